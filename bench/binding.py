"""How far frozen towers can tell which thing stands where: a ceiling for what learns over them, in closed form.

    interlace data scenes furniture,food scenes --cells 2 --per-split train=3000,val=200,test=400
    python -m bench.binding scenes --size 192

pictures  ridge regression from a quarter of the grid's cells to the sentence vector of the name that stands there,
          fitted on training scenes; a scene is right if its true caption's names fit their quarters better than the
          exchanged ones do
words     ridge regression from the state of a name's last token, in the whole caption, to the quarter where the caption
          says the thing stands: does a frozen text tower's token know its own place?
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bench.common import keep, machine, parser, show
from interlace import towers
from interlace.data.pictures import open_picture
from interlace.data.processor import Augment, Processor
from interlace.data.rows import Source
from interlace.data.sources import open_source

PLACES = ("top left", "top right", "bottom left", "bottom right")
STRENGTHS = (0.1, 1.0, 10.0)  # of the ridge, relative to the mean eigenvalue; chosen on the validation split


def places_of(caption: str) -> dict[str, str]:
    """ "a chair at the top left and rice at the bottom right" -> {"top left": "chair", "bottom right": "rice"}"""
    out = {}
    for part in caption.split(" and "):
        name, _, place = part.partition(" at the ")
        out[place] = name.removeprefix("a ").removeprefix("an ")
    return out


def ridge(x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    """Centred (N, C), (N, D) -> (C, D)."""
    gram = x.T @ x
    return np.linalg.solve(gram + strength * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ y)


@torch.inference_mode()
def quarters(source: Source, processor: Processor, tower: Any, prefix: int) -> np.ndarray:
    """(N, 4, C): the mean over each quarter's cells, in the order of PLACES."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.mean, processor.std))
    parts = []
    for at in tqdm(range(0, len(source), 64), desc="image tower", unit="batch", disable=None):
        rows = range(at, min(at + 64, len(source)))
        pixels = processor.pictures([open_picture(source.picture(r), size_hint=processor.size) for r in rows])
        cells = towers.grid_tokens(tower(pixel_values=(pixels.float() / 255 - mean) / std).last_hidden_state, prefix)
        side = round(cells.shape[1] ** 0.5)
        grid, half = cells.view(len(cells), side, side, -1), side // 2
        corners = [grid[:, :half, :half], grid[:, :half, -half:], grid[:, -half:, :half], grid[:, -half:, -half:]]
        parts.append(torch.stack([c.mean((1, 2)) for c in corners], 1))
    return torch.cat(parts).numpy()


@torch.inference_mode()
def sentence_vectors(texts: list[str], processor: Processor, tower: Any) -> np.ndarray:
    """(N, D), mean over the words, L2-normalised."""
    parts = []
    for at in range(0, len(texts), 256):
        ids, mask = processor.texts(texts[at : at + 256])
        states, real = tower(input_ids=ids, attention_mask=mask).last_hidden_state, mask.unsqueeze(-1)
        parts.append((states * real).sum(1) / real.sum(1))
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1).numpy()


def fits(seen: np.ndarray, named: list[dict[str, str]], swapped: list[dict[str, str]], vector: dict[str, np.ndarray],
         weight: np.ndarray, centre: tuple[np.ndarray, np.ndarray]) -> np.ndarray:  # fmt: skip
    """(N,) bool: whether each scene's own names fit their quarters better than the exchanged ones."""

    def fit(row: np.ndarray, names: dict[str, str]) -> float:
        total = 0.0
        for place, name in names.items():
            a, b = (row[PLACES.index(place)] - centre[0]) @ weight, vector[name] - centre[1]
            total += float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))
        return total

    return np.array([fit(row, true) > fit(row, wrong) for row, true, wrong in zip(seen, named, swapped)])


@torch.inference_mode()
def last_tokens(captions: list[str], processor: Processor, tower: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States of each name's last token (M, D), the number of its place (M,), the caption it is of (M,)."""
    states, places, owners = [], [], []
    for n, caption in enumerate(tqdm(captions, desc="text tower", unit="caption", disable=None)):
        given = processor.tokenizer(caption, return_offsets_mapping=True, truncation=True,
                                    max_length=processor.max_length, return_tensors="pt")  # fmt: skip
        offsets = given.pop("offset_mapping")[0].tolist()
        said = tower(**given).last_hidden_state[0]
        at = 0
        for part in caption.split(" and "):
            name, _, place = part.partition(" at the ")
            begin = caption.index(part, at)
            at = begin + len(part)
            inside = [k for k, (a, b) in enumerate(offsets) if begin <= a < b <= begin + len(name)]
            if inside and place in PLACES:
                states.append(said[inside[-1]].numpy())
                places.append(PLACES.index(place))
                owners.append(n)
    return np.stack(states), np.array(places), np.array(owners)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("scenes", help="folder that `interlace data scenes --cells 2` wrote")
    options.add_argument("--size", type=int, default=192, help="side of a scene in pixels")
    options.add_argument("--threads", type=int, default=2)
    given = options.parse_args(argv)
    torch.set_num_threads(given.threads)
    source = open_source(given.scenes)
    image, text = towers.load_tower("efficientnet-lite0", "image"), towers.load_tower("minilm", "text")
    spec = towers.pixel_spec("efficientnet-lite0")
    processor = Processor(towers.load_tokenizer("minilm"), given.size, list(spec.mean), list(spec.std), "pad", 40,
                          Augment())  # fmt: skip
    captions = source.captions().to_pylist()
    named = [places_of(c) for c in captions]
    swapped = [places_of(str(c)) for c in source.attribute("swapped")]
    names = sorted({name for places in named for name in places.values()})
    vector = dict(zip(names, sentence_vectors(names, processor, text.model.eval())))
    seen = quarters(source, processor, image.model.eval(), image.extras.prefix)
    train, val, test = (source.indices(split) for split in ("train", "val", "test"))
    x = np.stack([seen[n, PLACES.index(p)] for n in train for p in named[n]]).astype(np.float64)
    y = np.stack([vector[name] for n in train for name in named[n].values()]).astype(np.float64)
    centre = x.mean(0), y.mean(0)

    def right(rows: np.ndarray, weight: np.ndarray) -> float:
        of = [named[n] for n in rows], [swapped[n] for n in rows]
        return float(fits(seen[rows], *of, vector, weight, centre).mean())

    weights = {s: ridge(x - centre[0], y - centre[1], s) for s in STRENGTHS}
    strength = max(STRENGTHS, key=lambda s: right(val, weights[s]))
    states, places, owners = last_tokens(captions, processor, text.model.eval())
    known = np.isin(owners, train)
    middle = states[known].mean(0)
    weight = ridge((states[known] - middle).astype(np.float64), np.eye(4)[places[known]] - 0.25, 0.1)
    told = ((states - middle) @ weight).argmax(1) == places
    rows = [{"what": "pictures", "train": 100 * right(train, weights[strength]),
             "test": 100 * right(test, weights[strength]), "chance": 50.0},
            {"what": "words", "train": 100 * told[known].mean(), "test": 100 * told[np.isin(owners, test)].mean(),
             "chance": 25.0}]  # fmt: skip
    facts = machine("torch", "transformers")
    notes = [f"{source.name}: {len(train):,} training scenes, {len(test)} test scenes, {given.size} pixels; ridge "
             f"strength {strength:g}, chosen on {len(val)} validation scenes; per cent"]  # fmt: skip
    show("What frozen towers tell of places", ["what", "train", "test", "chance"], rows, notes)
    keep(given.out, {"machine": facts, "size": given.size, "strength": strength, "rows": rows})
    return {"rows": rows}


if __name__ == "__main__":
    main()
