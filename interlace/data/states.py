"""What frozen towers say, computed once. A tower that does not learn gives the same states for the same pixels or words
every epoch; on a machine without a GPU that is most of a step. So its states of the training split are written down
before the first step, a few augmented views of each picture, and read back ever after: by this run, when it resumes,
and by every other run on the same data with the same towers.

Computed in one fixed order and batch size, so that a resumed run reads exactly the numbers the first one read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from interlace.bars import bar
from interlace.data.cache import cache_folder
from interlace.data.pictures import BadPicture, open_picture
from interlace.data.processor import Processor, asdict_shallow
from interlace.data.rows import Source

if TYPE_CHECKING:
    from interlace.embed.stem import ImageTower, TextTower
    from interlace.model import VLModel

BATCH = 32
DONE = "done.json"
VIEWS = 2  # one more whenever the same options draw other views: stores of the old ones are no longer found


class States:
    """Rows' states of a finished store, memory-mapped.

    images: (N, V, I, C) float16 by position in the split; a row whose picture cannot be read is in `unreadable`.
    words: (L, C) float16, the states of all distinct texts one after another.
    """

    def __init__(self, folder: Path):
        facts = json.loads((folder / DONE).read_text())
        self.views: int = facts["views"]
        self.unreadable: dict[int, str] = {int(k): v for k, v in facts["unreadable"].items()}
        self.images = np.load(folder / "images.npy", mmap_mode="r") if facts["images"] else None
        self.words = np.load(folder / "words.npy", mmap_mode="r") if facts["texts"] else None
        self.starts = np.load(folder / "starts.npy") if facts["texts"] else np.zeros(1, np.int64)  # (texts + 1,)
        texts = json.loads((folder / "texts.json").read_text()) if facts["texts"] else []
        self.place = {text: n for n, text in enumerate(texts)}

    def image(self, position: int, view: int) -> Tensor:
        """(I, C) float32."""
        assert self.images is not None
        return torch.from_numpy(self.images[position, view].astype(np.float32))

    def knows(self, texts: list[str]) -> bool:
        """False when one of them is neither a caption nor a question of the split: the tower has to run for it."""
        return self.words is not None and all(t in self.place for t in texts)

    def text(self, text: str) -> np.ndarray:
        """(T, C) float32, of a text it knows."""
        assert self.words is not None
        n = self.place[text]
        return self.words[self.starts[n] : self.starts[n + 1]].astype(np.float32)

    def texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """-> states (B, T, C) float32 padded with zeros, mask (B, T)."""
        assert self.words is not None
        spans = [(self.starts[n], self.starts[n + 1]) for n in (self.place[t] for t in texts)]
        longest = max(int(b - a) for a, b in spans)
        states = np.zeros((len(texts), longest, self.words.shape[1]), np.float32)
        mask = np.zeros((len(texts), longest), np.int64)
        for row, (a, b) in enumerate(spans):
            states[row, : b - a], mask[row, : b - a] = self.words[a:b], 1
        return torch.from_numpy(states), torch.from_numpy(mask)


def frozen_states(model: VLModel, processor: Processor, source: Source, split: str, views: int,
                  most_bytes: float) -> States | None:  # fmt: skip
    """The store for the towers that are frozen in `model`; None when nothing is frozen or it would be larger than
    `most_bytes`. Built on first use, under a lock, aside and renamed; several ranks and runs may ask at once."""
    image = "image" in model.frozen
    text = "text" in model.frozen
    rows = np.asarray(source.indices(split))
    if not (image or text):
        return None
    cells, channels = (model.config.image.cells, model.config.image.channels) if image else (0, 0)
    # float16; of words about 2 texts a row, 20 tokens long
    words = 2 * 20 * cast("TextTower", model.text).tower.config.hidden_size if text else 0
    need = len(rows) * (views * cells * channels + words) * 2
    if need > most_bytes:
        print(f"frozen towers run at every step: their states would take {need / 1e9:.1f} GB, more than "
              f"data.keep_states_gb={most_bytes / 1e9:g}")  # fmt: skip
        return None
    folder = cache_folder() / "states" / _name(model, processor, source, split, views)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / DONE).is_file():
            work = folder.with_name(folder.name + ".part")
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            work.mkdir()
            facts: dict[str, Any] = {"views": views, "images": image, "texts": text, "unreadable": {}}
            was_training = model.training
            model.eval()
            if image:
                facts["unreadable"] = _write_images(model, processor, source, rows, views, work)
            if text:
                _write_texts(model, processor, source, split, work)
            model.train(was_training)
            (work / DONE).write_text(json.dumps(facts))
            os.replace(work, folder)
    return States(folder)


def _name(model: VLModel, processor: Processor, source: Source, split: str, views: int) -> str:
    digest = hashlib.sha256()
    shape = {k: v for k, v in asdict_shallow(processor).items() if k != "tokenizer"}
    told = [VIEWS, shape, source.fingerprint, split, views, model.frozen]
    if grid := getattr(model.config.image, "grid", 0):
        told.append(grid)
    digest.update(json.dumps(told, sort_keys=True).encode())
    for stream in model.frozen:
        for name, tensor in getattr(model, stream).tower.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def view_of(picture: Image.Image, processor: Processor, view: int, row: int) -> Tensor:
    """(3, S, S) uint8: the picture of the source's row `row` as the store has encoded its `view`."""
    return processor.picture(picture, np.random.default_rng([view, row]))  # runs of all seeds share the store


@torch.no_grad()
def _write_images(model: VLModel, processor: Processor, source: Source, rows: np.ndarray, views: int,
                  work: Path) -> dict[int, str]:  # fmt: skip
    spec, unreadable = model.config.image, {}
    shape = (len(rows), views, spec.cells, spec.channels)
    out = np.lib.format.open_memmap(work / "images.npy", "w+", np.float16, shape)
    tower = cast("ImageTower", model.image)
    waiting: list[tuple[int, int, Tensor]] = []

    def flush() -> None:
        pixels = torch.stack([p for _, _, p in waiting]).to(model.device)
        states = tower.states(cast(Tensor, model.normalise(pixels))).half().cpu().numpy()
        for (position, view, _), state in zip(waiting, states):
            out[position, view] = state
        waiting.clear()

    for position, row in enumerate(bar(rows, desc="frozen image tower", unit="picture", mininterval=1)):
        try:
            picture = open_picture(source.picture(int(row)), size_hint=2 * processor.size)
        except BadPicture as bad:
            unreadable[position] = bad.reason
            continue
        for view in range(views):
            waiting.append((position, view, view_of(picture, processor, view, int(row))))
            if len(waiting) == BATCH:
                flush()
    if waiting:
        flush()
    out.flush()
    return unreadable


@torch.no_grad()
def _write_texts(model: VLModel, processor: Processor, source: Source, split: str, work: Path) -> None:
    rows = set(source.indices(split).tolist())
    captions = source.captions().to_pylist()
    texts = {captions[row] for row in rows} | {source.question(int(q)).question for q in source.question_indices(split)}
    # the empty text stands for "no caption", "no question"; by length, so that batches pad little
    ordered = sorted(texts | {""}, key=lambda t: (len(t), t))
    tower, starts = cast("TextTower", model.text).tower, [0]
    with open(work / "words.raw", "wb") as raw:
        for at in bar(range(0, len(ordered), BATCH), desc="frozen text tower", unit="batch", mininterval=1):
            ids, mask = processor.texts(ordered[at : at + BATCH])
            states = tower(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).last_hidden_state
            for state, real in zip(states.half().cpu().numpy(), mask.numpy().astype(bool)):
                raw.write(state[real].tobytes())
                starts.append(starts[-1] + int(real.sum()))
    words = np.fromfile(work / "words.raw", np.float16).reshape(starts[-1], -1)
    np.save(work / "words.npy", words)
    (work / "words.raw").unlink()
    np.save(work / "starts.npy", np.array(starts, np.int64))
    (work / "texts.json").write_text(json.dumps(ordered))
