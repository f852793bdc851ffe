"""A row's picture and words -> tensors. Saved beside the weights: a model never meets other pixels than its own."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from interlace.errors import UserError, first_line

PROCESSOR_FILE = "preprocessor_config.json"


@dataclass
class Augment:
    """How a training picture is varied. Every draw comes from the generator handed in, never from a global one."""

    smallest_crop: float = 0.5  # share of the area, as in BLIP's fine-tuning; 1 = never crop
    flip: bool = True  # left-right; turn off where left and right are asked about
    colour: float = 0.2  # brightness, contrast and saturation each times 1 +- this

    def __call__(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        if self.smallest_crop < 1:
            picture = self._crop(picture, rng)
        if self.flip and rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.colour:
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                picture = enhance(picture).enhance(1 + rng.uniform(-self.colour, self.colour))
        return picture

    def _crop(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        width, height = picture.size
        share = rng.uniform(self.smallest_crop, 1)
        ratio = math.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3)))
        w = min(width, max(1, round(math.sqrt(share * width * height * ratio))))
        h = min(height, max(1, round(math.sqrt(share * width * height / ratio))))
        left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        return picture.crop((left, top, left + w, top + h))


@dataclass
class Processor:
    """`size`: side in pixels. `fit`: "pad" keeps the shape on white, "squash" stretches to the square (BLIP's
    evaluation), "crop" takes the centre. `max_length`: tokens, longer texts are cut. `regions`: empty for a model that
    reads pixels."""

    tokenizer: Any
    size: int = 224
    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    fit: str = "pad"
    max_length: int = 40
    augment: Augment = field(default_factory=Augment)
    # of a model that reads stored regions: the facts of their extractor, numbers per box, the whole picture first?
    regions: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.fit not in ("pad", "squash", "crop"):
            raise UserError(f"fit is pad, squash or crop; got {self.fit!r}.")
        if self.tokenizer is not None and self.tokenizer.pad_token_id is None:
            raise UserError("the tokenizer has no padding token: set tokenizer.pad_token first.")

    def square(self, picture: Image.Image) -> Image.Image:
        """Any RGB picture -> (size, size)."""
        if self.fit == "squash" or picture.width == picture.height:
            return picture.resize((self.size, self.size), Image.Resampling.BICUBIC, reducing_gap=2.0)
        side = (max if self.fit == "pad" else min)(picture.size)
        w, h = (max(1, round(x * self.size / side)) for x in picture.size)
        small = picture.resize((w, h), Image.Resampling.BICUBIC, reducing_gap=2.0)
        canvas = Image.new("RGB", (self.size, self.size), "white")
        canvas.paste(small, ((self.size - w) // 2, (self.size - h) // 2))
        return canvas

    def picture(self, picture: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        """RGB picture -> uint8 (3, S, S); the model normalises on its own device. `rng`: augment."""
        if rng is not None:
            picture = self.augment(picture, rng)
        return torch.from_numpy(np.asarray(self.square(picture)).transpose(2, 0, 1).copy())

    def pictures(self, pictures: list[Image.Image]) -> Tensor:
        """-> uint8 (B, 3, S, S)."""
        return torch.stack([self.picture(p) for p in pictures])

    def texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """-> ids (B, T), mask (B, T), padded on the right to the longest of the batch."""
        out = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt",
                             padding_side="right")  # fmt: skip
        return out["input_ids"], out["attention_mask"]

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        """-> text_ids, text_mask and text_words, each (B, T): the number of the word a token is a piece of, -1 =
        special or padding."""
        out = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt",
                             padding_side="right", return_special_tokens_mask=True)  # fmt: skip
        ids, mask = out["input_ids"], out["attention_mask"]
        plain = mask.bool() & ~out["special_tokens_mask"].bool()
        words = torch.full_like(ids, -1)
        if self.tokenizer.is_fast:
            for row in range(len(texts)):
                numbers = [-1 if n is None else n for n in out.word_ids(row)]
                words[row] = torch.tensor(numbers)
        else:  # it does not tell which pieces belong together: each is a word of its own
            words = torch.arange(ids.shape[1]).expand_as(ids).clone()
        return {"text_ids": ids, "text_mask": mask, "text_words": words.masked_fill(~plain, -1)}

    @property
    def mask_id(self) -> int:
        """Raises UserError when the tokenizer has no token for what is to be guessed."""
        if self.tokenizer.mask_token_id is None:
            raise UserError(f"{type(self.tokenizer).__name__} has no [MASK] token, so no word can be hidden: choose a "
                            "text part of BERT's kind, or learn to write instead (prefix_lm, lm).")  # fmt: skip
        return self.tokenizer.mask_token_id

    @cached_property
    def plain_ids(self) -> np.ndarray:
        """Ids of all words that are not special: what a hidden word may be replaced by."""
        return np.setdiff1d(np.arange(len(self.tokenizer)), self.tokenizer.all_special_ids)

    def length(self, text: str) -> int:
        """Tokens of the text uncut, special tokens included."""
        return len(self.tokenizer(text, truncation=False)["input_ids"])

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        plain = {k: v for k, v in asdict_shallow(self).items() if k != "tokenizer"}
        (folder / PROCESSOR_FILE).write_text(json.dumps(plain, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Processor:
        """Raises UserError when the folder has no processor or no tokenizer, and when either is damaged."""
        from interlace.towers import has_vocabulary, read_tokenizer

        folder = Path(folder)
        if not (folder / PROCESSOR_FILE).is_file():
            raise UserError(f"{folder} has no {PROCESSOR_FILE}: it is not a finished run folder.")
        plain = read_part(folder, PROCESSOR_FILE, "augment", "size", "mean", "std", "max_length")
        if (folder / "tokenizer_config.json").is_file():
            read_part(folder, "tokenizer_config.json")  # else the blame would fall on tokenizer.json
        try:
            tokenizer = read_tokenizer(folder)
        except ValueError as error:
            if not has_vocabulary(folder):
                raise UserError(f"{folder} has no tokenizer.json: copy the run again.") from None
            raise damaged(folder, "tokenizer.json", error) from None
        try:
            plain["augment"] = Augment(**plain["augment"])
            return cls(tokenizer=tokenizer, **plain)
        except TypeError as error:
            raise damaged(folder, PROCESSOR_FILE, error) from None


def read_part(folder: Path, name: str, *keys: str) -> dict[str, Any]:
    """A JSON file of a run folder. Raises UserError when it cannot be read or lacks a key."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected a mapping, got {type(content).__name__}")
        if missing := [key for key in keys if key not in content]:
            raise ValueError(f"it has no {missing[0]}")
    except (OSError, ValueError) as error:
        raise damaged(folder, name, error) from None
    return content


def damaged(folder: Path, name: str, error: BaseException) -> UserError:
    """What to say of a run one of whose files cannot be read."""
    why = f"it has no {error.args[0]}" if isinstance(error, KeyError) else getattr(error, "strerror", None)
    return UserError(f"{folder} is damaged: {name} cannot be read ({why or first_line(error)}): copy the run again, or "
                     "train it again.")  # fmt: skip


def asdict_shallow(processor: Processor) -> dict[str, Any]:
    """Like `asdict`, but leaves the tokenizer alone instead of copying it."""
    plain = {k: getattr(processor, k) for k in processor.__dataclass_fields__}
    plain["augment"] = asdict(processor.augment)
    return plain
