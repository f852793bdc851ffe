"""The run folder: the one artefact. Weights, configuration, processor, tokenizer, answers, metrics, card; every command
takes it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from interlace import __version__
from interlace.config import VLConfig
from interlace.data.pictures import open_picture
from interlace.data.processor import PROCESSOR_FILE, Processor, damaged, read_part
from interlace.data.rows import Picture
from interlace.embed.regions import Regions
from interlace.errors import UserError, shown
from interlace.given import as_picture, check_questions, several
from interlace.model import Half, VLModel
from interlace.regions.arrays import RegionArrays
from interlace.regions.base import RegionSource, Shown
from interlace.regions.base import fingerprint as extractor_print
from interlace.regions.collate import collate_regions
from interlace.regions.extract import Extractor
from interlace.regions.open import EXTRACTORS, extractor_of
from interlace.towers import quiet

MARK = "run.json"  # written last: a folder without it is not finished
WEIGHTS = "model.safetensors"
ANSWERS = "answers.json"
Seen = Image.Image | RegionArrays  # of a picture: itself, or its stored regions


def write_json(file: Path, content: Any) -> None:
    """Written aside and renamed, so that a reader sees the old file or the new one, never half of it; a failed write
    leaves nothing. NaN and infinities, which JSON has not, become null. Raises UserError where a folder has that name.
    """
    if file.is_dir():
        raise UserError(f"{file} is a folder: expected the name of a file to write, such as {file / 'scores.json'}.")
    aside = file.with_name(file.name + ".part")
    try:
        text = json.dumps(_without_nan(content), indent=2, ensure_ascii=False, allow_nan=False)
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _without_nan(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    return [_without_nan(value) for value in content] if isinstance(content, list | tuple) else content


def fingerprint(folder: Path) -> str:
    """sha256 over weights, configuration and processor: what decides a picture's vector."""
    digest = hashlib.sha256()
    for name in (WEIGHTS, "config.json", PROCESSOR_FILE, "tokenizer.json"):
        file = folder / name
        if file.is_file():
            digest.update(name.encode())
            with open(file, "rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def save_run(folder: str | Path, model: VLModel, processor: Processor, answers: list[str] | None = None,
             temperature: float = 1.0, **facts: Any) -> Path:  # fmt: skip
    """Everything a loaded run needs; `facts` go into run.json. The mark is removed first and written last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).unlink(missing_ok=True)
    model.config.architectures = ["VLModel"]
    with quiet():
        model.save_pretrained(folder)
        processor.save(folder)
    if answers:
        write_json(folder / ANSWERS, {"answers": answers, "temperature": temperature})
    size = (folder / WEIGHTS).stat().st_size
    facts = {"fingerprint": fingerprint(folder), "weights_bytes": size, "interlace": __version__, **facts}
    write_json(folder / MARK, facts)
    _share(folder)
    return folder


def _share(folder: Path) -> None:
    """Files as readable as the umask lets new ones be: safetensors writes the weights for the owner alone."""
    umask = os.umask(0)  # the only way to read it is to set it
    os.umask(umask)
    for file in folder.iterdir():
        mode = file.stat().st_mode & 0o777
        if file.is_file() and (wanted := mode | 0o666 & ~umask) != mode:
            file.chmod(wanted)


def _model(folder: Path, facts: dict[str, Any]) -> VLModel:
    """Raises UserError when the configuration or the weights are damaged, and when they do not fit each other."""
    read_part(folder, "config.json", "model_type")  # without it transformers takes defaults, and blames the weights
    try:
        config = VLConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, "config.json", error) from None
    try:
        with quiet():  # its report says less than the check below
            loaded: Any = VLModel.from_pretrained(folder, config=config, local_files_only=True,
                                                  output_loading_info=True)  # fmt: skip
    except (OSError, SafetensorError) as error:
        raise damaged(folder, WEIGHTS, error) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # its parts are built of what it says
        raise damaged(folder, "config.json", error) from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # how transformers says that sizes differ
            raise damaged(folder, WEIGHTS, error) from None
        raise _unfit(folder, facts, "sizes differ") from None
    model, report = loaded  # a pair, because of the loading info
    if unfilled := sorted(report["missing_keys"]) + sorted(report["unexpected_keys"]):
        raise _unfit(folder, facts, f"{', '.join(unfilled[:3])}, ...")
    return model


def _unfit(folder: Path, facts: dict[str, Any], how: str) -> UserError:
    wrote = facts.get("interlace")
    by = f"interlace {wrote}" if wrote else "a version of interlace that did not note its number"
    fix = f"install interlace {wrote}" if wrote and wrote != __version__ else "copy the run again"
    return UserError(f"{folder}/{WEIGHTS} does not fit its config.json ({how}): the run was written by {by}, this is "
                     f"{__version__}. Train it again, or {fix}.")  # fmt: skip


class Run:
    """A loaded run folder. Texts and pictures in, vectors, probabilities and answers out."""

    def __init__(self, folder: Path, model: VLModel, processor: Processor, answers: list[str], temperature: float,
                 facts: dict[str, Any]):  # fmt: skip
        self.folder, self.model, self.processor = folder, model.eval(), processor
        self.answers, self.temperature, self.facts = answers, temperature, facts
        self.fingerprint: str = facts["fingerprint"]
        self.stored: RegionSource | None = None

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device | None = None) -> Run:
        """Raises UserError for a folder that is not there, not a run, half-written or damaged."""
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise UserError(f"no run folder at {folder}. `interlace train` writes one; give its path.")
        if not (folder / MARK).is_file():
            if (folder / "checkpoints").is_dir() or (folder / "config.yaml").is_file():
                raise UserError(f"the run in {folder} is not finished: it has no {MARK}. Start the same `interlace "
                                "train` command again, it resumes from the newest complete checkpoint.")  # fmt: skip
            raise UserError(f"{folder} is not a run folder: it has no {MARK}. `interlace train` writes one.")
        facts = read_part(folder, MARK, "fingerprint", "weights_bytes")
        try:
            size = (folder / WEIGHTS).stat().st_size
        except OSError as error:
            raise damaged(folder, WEIGHTS, error) from None
        if size != facts["weights_bytes"]:
            raise UserError(f"{folder}/{WEIGHTS} has {size:,} bytes and should have {facts['weights_bytes']:,}: the "
                            "copy is incomplete. Copy the run again.")  # fmt: skip
        answers: dict[str, Any] = {"answers": [], "temperature": 1.0}
        if (folder / ANSWERS).is_file():
            answers = read_part(folder, ANSWERS, *answers)
            if not isinstance(answers["answers"], list) or not isinstance(answers["temperature"], int | float):
                raise damaged(folder, ANSWERS, ValueError("expected a list of answers and a number"))
        model: Any = _model(folder, facts)
        processor = Processor.load(folder)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(folder, model.to(device), processor, answers["answers"], answers["temperature"], facts)

    # ---------------------------------------------------------------------------------------------------- vectors

    @property
    def dim(self) -> int:
        return self.model.config.heads["contrast"]["size"] if "contrast" in self.model.heads else 0

    @property
    def can_match(self) -> bool:
        return "match" in self.model.heads

    @property
    def match_weight(self) -> float:
        """Weight of the match logit beside the cosine when a search re-ranks, fitted on the validation split: 0 where
        matching did not help."""
        return float(self.facts.get("match_weight", 0.0))

    @property
    def match_fit(self) -> tuple[float, float, float]:
        """Scale and offset of the match head's logit and weight of the cosine, which together make verdicts honest on
        the validation split: see `evaluate.fit_match`. 1, 0 and 0 where there was no such split; without a contrast
        head, the head's own."""
        scale, offset, cosine = (*self.facts.get("match_fit", (1.0, 0.0)), 0.0)[:3]
        return (float(scale), float(offset), float(cosine)) if self.dim else (*self.match_head_fit, 0.0)

    @property
    def match_head_fit(self) -> tuple[float, float]:
        """Scale and offset of the match head's logit where it judges alone."""
        scale, offset = self.facts.get("match_head_fit") or self.facts.get("match_fit", (1.0, 0.0))[:2]
        return float(scale), float(offset)

    @property
    def picture_size(self) -> int:
        """Side in pixels of the pictures the model sees."""
        return self.processor.size

    @property
    def can_answer(self) -> bool:
        return "answers" in self.model.heads and bool(self.answers)

    def _words(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"expected a text, got {shown(text)}.")
        ids, mask = self.processor.texts(texts)
        return ids.to(self.model.device), mask.to(self.model.device)

    def _pixels(self, pictures: list[Image.Image]) -> Tensor:
        return self.processor.pictures(pictures).to(self.model.device)

    @property
    def can_look(self) -> bool:
        """It can be shown a picture that no store has regions of."""
        return not self.processor.regions or self.processor.regions["extractor"].get("kind") in EXTRACTORS

    def use_regions(self, stored: RegionSource) -> None:
        """From now on `see` takes the regions of a row's picture from there. Raises UserError for a run that reads
        pictures, and for regions of another extractor than its own."""
        if not self.processor.regions:
            raise UserError(f"the run in {self.folder} reads pictures and no regions: leave the regions out.")
        made = self.processor.regions["extractor"]
        # converted: its detector is not here, so any features of its size are taken
        print_of = stored.fingerprint if made.get("kind") == "release" else extractor_print(made)
        stored.require(print_of, cast(Any, self.model.config.image).features)
        self.stored = stored

    def see(self, id: str, picture: Picture) -> Seen:
        """What there is to see of the row with this id: its picture, or the regions that are stored of it. Raises
        BadPicture."""
        if self.stored is not None:
            return self.stored.of(Shown(id, picture))
        return open_picture(picture, size_hint=self.processor.size)

    def half_image(self, pictures: Sequence[Seen], for_vector: bool = False) -> Half:
        """The image stream just before fusion; of a model that reads regions, the extractor finds them first, where
        they are not given. `for_vector`: nobody will read it but the model's `alone`. Raises UserError for what is no
        picture."""
        pictures = [picture if isinstance(picture, RegionArrays) else as_picture(picture) for picture in pictures]
        if not self.processor.regions:
            return self.model.half_image(self._pixels(cast(Any, pictures)), for_vector=for_vector)
        new = [picture for picture in pictures if isinstance(picture, Image.Image)]
        found = iter(self.extractor(new) if new else [])
        rows = [next(found) if isinstance(picture, Image.Image) else picture for picture in pictures]
        batch = collate_regions(rows, self.processor.regions["boxes"], self.processor.regions["whole"])
        features, boxes = batch["region_features"].to(self.model.device), batch.get("region_boxes")
        regions = Regions(features, None if boxes is None else boxes.to(self.model.device))
        return self.model.half_image(regions, batch["region_mask"].to(self.model.device), for_vector=for_vector)

    @cached_property
    def extractor(self) -> Extractor:
        """What finds a picture's regions, as it did for training. Raises UserError when it is not there any more."""
        return extractor_of(self.processor.regions["extractor"], str(self.model.device))

    @torch.inference_mode()
    def encode_texts(self, texts: Iterable[str], batch: int = 128) -> np.ndarray:
        """-> (N, D) float32, L2-normalised. Raises UserError for anything but texts, and when the run has no contrast
        head."""
        lists = chunks(several(texts, "texts"), batch)
        parts = [self.model.encode_text(*self._words(one)).float().cpu().numpy() for one in lists]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    @torch.inference_mode()
    def encode_pictures(self, pictures: Iterable[Image.Image], batch: int = 32) -> np.ndarray:
        """-> (N, D) float32, L2-normalised; any iterable, only one batch of it is held at a time. Pictures of any mode;
        raises UserError for what is none, such as a path."""
        halves = (self.half_image(chunk, for_vector=True) for chunk in chunks(several(pictures, "pictures"), batch))
        parts = [self.model.alone(half, "image").float().cpu().numpy() for half in halves]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    # --------------------------------------------------------------------------------------------------- the fused

    @torch.inference_mode()
    def match(self, text: str, pictures: Iterable[Image.Image], batch: int = 32) -> np.ndarray:
        """(N,) probability that the text belongs to each picture; the text is encoded once. Raises UserError for a run
        without a match head, and for what is no text or no picture."""
        if not self.can_match:
            raise UserError(f"the run in {self.folder} has no match head: train it with the itm objective.")
        half, out = self.model.half_text(*self._words([text])), []
        vector = self.model.alone(half, "text") if self.dim else None  # (1, D)
        for chunk in chunks(several(pictures, "pictures"), batch):
            image = self.half_image(chunk)
            cosine = None if vector is None else (vector * self.model.alone(image, "image")).sum(-1)
            logits = self.match_logits(half.rows(torch.zeros(len(chunk), dtype=torch.long)), image, cosine)
            out.append(logits.sigmoid().cpu().numpy())
        return np.concatenate(out) if out else np.zeros(0, np.float32)

    def match_logits(self, text: Half, image: Half, cosine: Tensor | None = None) -> Tensor:
        """N texts and N pictures -> (N,) log odds that they belong together, where one in two does. `cosine` (N,) of
        their vectors, where it is known already; else it is found here, if it weighs anything."""
        scale, offset, weight = self.match_fit
        odds = scale * self.head_logits(text, image) + offset
        if not weight:
            return odds
        if cosine is None:
            cosine = (self.model.alone(text, "text") * self.model.alone(image, "image")).sum(-1)
        return odds + weight * cosine.to(odds)

    def head_logits(self, text: Half, image: Half) -> Tensor:
        """What the match head says of N pairs, as it was trained: (N,) logit of "match" above that of "no match"."""
        fused = self.model.fuse(text, image, asked=self.model.asked_by("match"))
        logits = self.model.heads["match"](fused.pooled_text, fused.pooled_image).float()
        return logits[:, 1] - logits[:, 0]

    def _needs_answers(self) -> None:
        if self.can_answer:
            return
        if "answers" in self.model.heads:
            raise UserError(f"the run in {self.folder} has an answer head, but no list of its answers: convert the "
                            "weights again with --answers FILE.json, the list they were trained with.")  # fmt: skip
        raise UserError(f"the run in {self.folder} does not answer questions: train it with the vqa objective.")

    @torch.inference_mode()
    def answer_logits(self, pictures: Sequence[Seen], questions: list[str]) -> Tensor:
        """One question each -> (N, A) logits over the answer list. A picture that stands there several times (the same
        object) is encoded once."""
        self._needs_answers()
        words = self.model.half_text(*self._words(several(questions, "questions")))
        out = self.model.fuse(words, self._each(pictures), asked=self.model.asked_by("answers"))
        return self.model.heads["answers"](out.pooled_text, out.pooled_image).float()

    def _each(self, pictures: Sequence[Seen]) -> Half:
        """The image stream of each, encoded once for each object."""
        distinct = {id(picture): picture for picture in pictures}
        place = {key: n for n, key in enumerate(distinct)}
        return self.half_image(list(distinct.values())).rows(torch.tensor([place[id(p)] for p in pictures]))

    def answer(self, picture: Image.Image, question: str, allowed: list[str] | None = None) -> list[tuple[str, float]]:
        """Answers with their probabilities, best first; they sum to 1 over the allowed ones and never leave the list.
        Raises UserError for an empty question or an allowed answer the run does not know."""
        check_questions([question])
        keep = self.allowed(allowed)
        logits = self.answer_logits([picture], [question])[0, keep]
        probabilities = (logits / self.temperature).softmax(-1).tolist()
        return sorted(zip([self.answers[n] for n in keep], probabilities), key=lambda pair: -pair[1])

    def allowed(self, allowed: list[str] | None) -> list[int]:
        """Positions in the answer list; names are compared without case."""
        from interlace.errors import suggest

        self._needs_answers()
        if allowed is None:
            return list(range(len(self.answers)))
        index = {a.lower(): n for n, a in enumerate(self.answers)}
        allowed = several(allowed, "answers")
        unknown = [a for a in allowed if a.strip().lower() not in index]
        if unknown or not allowed:
            hint = suggest(unknown[0].strip().lower(), index) if unknown else ""
            given = ", ".join(unknown) or "(nothing given)"
            raise UserError(f"not among the {len(index)} answers this run knows: {given}.{hint}")
        return sorted({index[a.strip().lower()] for a in allowed})


    # ------------------------------------------------------------------------------------------------------- writing

    @property
    def learnt(self) -> set[str] | None:
        """Names of the objectives the run was trained by; None for a run that was made without a config. Raises
        UserError for a config that is damaged."""
        import yaml

        file = self.folder / "config.yaml"
        if not file.is_file():
            return None
        try:
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
            return {name for one in [config.get("objectives") or {}, *(config.get("passes") or [])] for name in one}
        except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError) as error:
            raise damaged(self.folder, "config.yaml", error) from None

    @property
    def can_caption(self) -> bool:
        """It writes about a picture: with a decoder that reads one, or, trained by prefix_lm, with its own layers."""
        if self.model.decoder is not None:
            learnt = self.learnt or set()
            answers_alone = "vqa_writes" in learnt and not learnt & {"lm", "prefix_lm"}
            return self.model.config.writes.context in ("image", "both") and not answers_alone
        return "mlm" in self.model.heads and (self.learnt is None or "prefix_lm" in self.learnt)

    @property
    def can_write_answers(self) -> bool:
        """Its decoder reads questions."""
        if self.model.decoder is None or self.model.config.writes.context == "image":
            return False
        return self.learnt is None or "vqa_writes" in self.learnt

    def _start(self) -> tuple[int, int, int]:
        """The ids a text of its starts and ends with, and is padded by."""
        from interlace.objectives.lm import ends

        if self.model.decoder is not None:
            config = self.model.decoder.config
            return config.bos_token_id, config.eos_token_id, config.pad_token_id
        return *ends(self.processor.tokenizer), self.processor.tokenizer.pad_token_id

    @cached_property
    def never_written(self) -> list[int]:
        """Ids that are no words: the tokenizer's special tokens, the end excepted, and those that BERT keeps free. No
        text ever taught them to be unlikely: what is drawn now and then is one of them."""
        tokenizer = self.processor.tokenizer
        free = {id for word, id in tokenizer.get_vocab().items() if re.fullmatch(r"\[unused\d+\]", word)}
        return sorted((free | set(tokenizer.all_special_ids)) - {self._start()[1]})

    def caption(self, pictures: Iterable[Seen], prompt: str = "", beams: int = 3, max_length: int = 0,
                min_length: int = 0, sample: bool = False, top_p: float = 0.9, seed: int = 0,
                batch: int = 16) -> list[str]:  # fmt: skip
        """A caption each, which begins with the prompt. `max_length`: tokens, 0 for as many as in training. `sample`:
        words are drawn, with `seed`, from the likeliest that together have `top_p` of the probability; else `beams`.
        Raises UserError for a run that does not write about pictures, and for a prompt that leaves no room."""
        from interlace.generate import describe

        if not self.can_caption:
            raise UserError(f"the run in {self.folder} does not write about pictures: train it with the lm or "
                            "prefix_lm objective.")  # fmt: skip
        start, end, pad = self._start()
        words = self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt.strip() else []
        most = max_length or self.processor.max_length
        if len(words) + 2 > most:
            raise UserError(f"the prompt has {len(words)} tokens and the text at most {most}: shorten the prompt or "
                            "raise the length.")  # fmt: skip
        way: dict[str, Any] = {"beams": beams}
        if sample:
            way = {"beams": 1, "do_sample": True, "top_p": top_p, "top_k": 0}
        texts: list[str] = []
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            for chunk in chunks(several(pictures, "pictures"), batch):
                ids = describe(self.model, self.half_image(chunk), torch.tensor([start, *words]), (start, end, pad),
                               max_length=most, min_length=min_length, suppress_tokens=self.never_written,
                               **way)  # fmt: skip
                texts += self._texts(ids[:, 1:], end)
        return texts

    def write_answer(self, picture: Seen, question: str, beams: int = 3, max_length: int = 10) -> str:
        """The answer in the run's own words; no list bounds it. Raises UserError as `write_answers`."""
        return self.write_answers([picture], [question], beams, max_length)[0]

    def write_answers(self, pictures: Sequence[Seen], questions: list[str], beams: int = 3,
                      max_length: int = 10) -> list[str]:  # fmt: skip
        """An answer to each question about its picture, all written at once. A picture that stands there several times
        (the same object) is encoded once. Raises UserError for an empty question and for a run that does not write
        answers."""
        from interlace.generate import write
        from interlace.objectives.lm import read_for

        if not self.can_write_answers:
            choose = ", or let it choose from its list (answer)" if self.can_answer else ""
            raise UserError(f"the run in {self.folder} does not write answers: train it with the vqa_writes objective"
                            f"{choose}.")  # fmt: skip
        check_questions(several(questions, "questions"))
        with torch.inference_mode():
            read = read_for(self.model, self.model.half_text(*self._words(questions)), self._each(pictures))
            assert self.model.decoder is not None
            ids = write(self.model.decoder, read, beams=beams, max_length=max_length, min_length=0,
                        suppress_tokens=self.never_written)  # fmt: skip
        return self._texts(ids[:, 1:], self._start()[1])

    def _texts(self, ids: Tensor, end: int) -> list[str]:
        """Ids (B, L) -> their words up to the first end."""
        rows = [row[: row.index(end)] if end in row else row for row in ids.tolist()]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)]


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
