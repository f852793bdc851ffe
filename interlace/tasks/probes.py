"""Does one modality help to guess the other? The two probes of MLIM (Arici et al. 2021, arXiv:2109.12178): hidden words
beside the true picture, another one or none, and a hidden picture beside the true text, another one or none.

What is hidden of a row depends on the seed and the row alone, so the conditions of a probe differ in nothing but what
stands beside, and their difference can be tested in pairs (`paired_difference`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from interlace.data.pictures import BadPicture, open_picture
from interlace.errors import UserError, suggest
from interlace.held import sample_rows, shuffled
from interlace.objectives.mlm import word_logits
from interlace.objectives.modality_masking import check_hiding, hide_slots
from interlace.objectives.reconstruct import picture, pixel_losses
from interlace.run import Run, chunks
from interlace.tasks.uncertainty import Difference, Interval, bootstrap_interval, paired_difference

if TYPE_CHECKING:
    from interlace.data.rows import Pair, Source

IMAGES, TEXTS = ("paired", "random", "blank"), ("paired", "random", "empty")


@dataclass(frozen=True)
class Probed:
    """One condition. `values` (N,): each row's loss, in the order of `rows`, its positions in the source."""

    interval: Interval  # of the mean; rows of a group are drawn together
    values: np.ndarray
    rows: np.ndarray
    groups: list[str]

    @property
    def mean(self) -> float:
        return self.interval.mean


def mlm_loss(run: Run, source: Source, split: str = "test", image: str = "paired", rate: float = 0.8,
             limit: int = 2000, seed: int = 0) -> Probed:  # fmt: skip
    """Cross-entropy of hidden words, of each row the mean. `image`: beside them stands their own picture ("paired"),
    that of another group ("random"), or white ("blank"). `rate`: share of the words hidden, at least one; the paper's
    heavy text by default. Rows without a caption are left out. Raises UserError when the run has no word head."""
    return _hidden_words(run, source, split, image, rate, limit, seed)[0]


def mlm_accuracy(run: Run, source: Source, split: str = "test", image: str = "paired", rate: float = 0.8,
                 limit: int = 2000, seed: int = 0) -> Probed:  # fmt: skip
    """As `mlm_loss`, but the share of each row's hidden words that are guessed right; the same words are hidden."""
    return _hidden_words(run, source, split, image, rate, limit, seed)[1]


def recon_loss(run: Run, source: Source, split: str = "test", text: str = "paired", rate: float = 0.8,
               limit: int = 2000, seed: int = 0, channels: str = "sum") -> Probed:  # fmt: skip
    """Squared error of the picture that is drawn again, of each row the mean over its pixels (`channels`: their sum or
    mean). `text`: beside it stands its own caption ("paired"), that of another group ("random"), or none ("empty").
    `rate`: share of the cells hidden, at least one; the paper's heavy image by default. Rows without a caption are left
    out. Raises UserError when the run has no pixels head, or its image part can hide no cells."""
    _known(text, TEXTS, "text")
    _needs(run, "pixels", "recon")
    check_hiding("recon_loss", run.model)
    rows = _rows(run, source, split, limit)
    said = [pair.caption for pair in rows.pairs]
    if text == "random":
        said = [said[n] for n in shuffled(rows.groups, seed)]
    elif text == "empty":
        said = [""] * len(said)
    values = []
    for places in chunks(range(len(rows.pairs)), 32):
        pixels = run.processor.pictures([_open(rows.pictures[n], run) for n in places])
        hidden = torch.stack([_hide(_cells(run), rate, rows, n, seed) for n in places])
        ids, mask = run.processor.texts([said[n] for n in places])
        values.append(picture_values(run, ids, mask, hidden, pixels, channels))
    return rows.probed(values)


def _hidden_words(run: Run, source: Source, split: str, image: str, rate: float, limit: int,
                  seed: int) -> tuple[Probed, Probed]:  # fmt: skip
    """What the hidden words cost, and the share of them that is guessed right, from the same guesses."""
    _known(image, IMAGES, "image")
    _needs(run, "mlm", "mam or mlm")
    rows = _rows(run, source, split, limit)
    beside = rows.pictures if image != "random" else [rows.pictures[n] for n in shuffled(rows.groups, seed)]
    white = Image.new("RGB", (run.processor.size,) * 2, "white")
    cost, right = [], []
    for places in chunks(range(len(rows.pairs)), 32):
        shown = [white if image == "blank" else _open(beside[n], run) for n in places]
        tokens = run.processor.tokens([rows.pairs[n].caption for n in places])
        ids, hidden = tokens["text_ids"], torch.zeros_like(tokens["text_ids"], dtype=torch.bool)
        for at, n in enumerate(places):
            hidden[at] = _hide(tokens["text_words"][at] >= 0, rate, rows, n, seed)
        of_batch = word_values(run, ids, tokens["text_mask"], hidden, run.processor.pictures(shown))
        cost.append(of_batch[0])
        right.append(of_batch[1])
    return rows.probed(cost), rows.probed(right)


def probe(run: Run, source: Source, split: str = "test", rate: float = 0.8, limit: int = 2000,
          seed: int = 0, cells: float = 0.0) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Both probes, with `rate` of the words or `cells` (0: `rate`, too) of the picture hidden, as far as the run's
    heads allow: {"mlm_loss": {"paired": {"value", "low", "high", "rows"}, "random":
    {..., "difference", "difference_low", "difference_high", "p"}, "blank": ...}, "mlm_accuracy": ..., "recon_loss":
    ...}. A difference is that condition minus paired, on the same rows: above 0 of a loss, below 0 of the accuracy, and
    the true partner helps."""
    found: dict[str, dict[str, Probed]] = {}
    if "mlm" in run.model.heads:
        words = {image: _hidden_words(run, source, split, image, rate, limit, seed) for image in IMAGES}
        found["mlm_loss"] = {image: cost for image, (cost, _) in words.items()}
        found["mlm_accuracy"] = {image: right for image, (_, right) in words.items()}
    if "pixels" in run.model.heads:
        found["recon_loss"] = {text: recon_loss(run, source, split, text, cells or rate, limit, seed)
                               for text in TEXTS}  # fmt: skip
    return {name: {condition: _plain(one, of["paired"] if condition != "paired" else None)
                   for condition, one in of.items()} for name, of in found.items()}  # fmt: skip


def difference(other: Probed, paired: Probed) -> Difference:
    """How much more the loss is beside the other partner, on the same rows, with its interval and p value. Raises
    ValueError when the two were not measured on the same rows."""
    if not np.array_equal(other.rows, paired.rows):
        raise ValueError("the two conditions were measured on different rows: take one split, limit and seed")
    return paired_difference(other.values, paired.values, groups=paired.groups)


def _plain(one: Probed, paired: Probed | None) -> dict[str, float]:
    out = {"value": one.interval.mean, "low": one.interval.low, "high": one.interval.high, "rows": one.interval.values}
    if paired is not None:
        more = difference(one, paired)
        out |= {"difference": more.mean, "difference_low": more.low, "difference_high": more.high, "p": more.p}
    return out


# ------------------------------------------------------------------------------------------------------------- a batch


@torch.inference_mode()
def word_values(run: Run, ids: Tensor, mask: Tensor, hidden: Tensor, pixels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Whole words (B, T), their mask, which are hidden (B, T) bool, and pixels (B, 3, S, S) -> (B,), the mean
    cross-entropy of each row's hidden words, and (B,), the share of them that come first; nan where none is hidden."""
    logits, target = _guesses(run, ids, mask, hidden, pixels)
    return (_by_row(F.cross_entropy(logits, target, reduction="none"), hidden),
            _by_row((logits.argmax(-1) == target).float(), hidden))  # fmt: skip


def _guesses(run: Run, ids: Tensor, mask: Tensor, hidden: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, V) of the n hidden places, row by row, and what stood there (n,)."""
    model, device = run.model, run.model.device
    ids, mask, hidden = ids.to(device), mask.to(device), hidden.to(device)
    text = model.half_text(ids.masked_fill(hidden, run.processor.mask_id), mask)
    states = model.words_where(text, model.half_image(pixels.to(device)), hidden)
    return word_logits(model, states), ids[hidden]


def _by_row(values: Tensor, hidden: Tensor) -> np.ndarray:
    """(n,), (B, T) bool -> (B,), the mean of each row's; nan where nothing is hidden."""
    hidden = hidden.to(values.device)
    placed = torch.zeros(hidden.shape, device=values.device).masked_scatter_(hidden, values)
    return (placed.sum(1) / hidden.sum(1)).double().cpu().numpy()  # 0/0 = nan


@torch.inference_mode()
def picture_values(run: Run, ids: Tensor, mask: Tensor, hidden: Tensor, pixels: Tensor,
                   channels: str = "sum") -> np.ndarray:  # fmt: skip
    """Words (B, T), their mask, which cells are hidden (B, I) bool, and pixels (B, 3, S, S) -> (B,): each picture's
    error."""
    model, device = run.model, run.model.device
    pixels = pixels.to(device)
    out = model.fuse(model.half_text(ids.to(device), mask.to(device)),
                     model.half_image(pixels, hidden=hidden.to(device)))  # fmt: skip
    drawn = model.heads["pixels"](out.image).float()
    return pixel_losses(drawn, picture(model, pixels).float(), channels).double().cpu().numpy()


# -------------------------------------------------------------------------------------------------------------- rows


@dataclass
class _Rows:
    pairs: list[Pair]
    rows: np.ndarray
    pictures: list[Any]

    @property
    def groups(self) -> list[str]:
        return [pair.group for pair in self.pairs]

    def probed(self, values: list[np.ndarray]) -> Probed:
        joined = np.concatenate(values)
        return Probed(bootstrap_interval(joined, groups=self.groups), joined, self.rows, self.groups)


def _rows(run: Run, source: Source, split: str, limit: int) -> _Rows:
    """The split's rows with a caption and a picture that can be read, at most `limit`."""
    kept = list(_readable(run, source, sample_rows(np.asarray(source.indices(split)), limit)))
    if not kept:
        raise UserError(f"{source.name} has no row with a caption and a readable picture in its {split!r} split.")
    pairs = [pair for _, pair in kept]
    return _Rows(pairs, np.array([row for row, _ in kept]), [pair.picture for pair in pairs])


def _readable(run: Run, source: Source, rows: np.ndarray) -> Iterator[tuple[int, Pair]]:
    for row in rows:
        pair = source.pair(int(row))
        if not pair.caption.strip():
            continue
        try:
            open_picture(pair.picture, size_hint=run.processor.size)
        except BadPicture:
            continue
        yield int(row), pair


def _open(ref: Any, run: Run) -> Image.Image:
    return open_picture(ref, size_hint=run.processor.size)


def _hide(may: Tensor, rate: float, rows: _Rows, place: int, seed: int) -> Tensor:
    rng = np.random.default_rng([seed, int(rows.rows[place])])
    return torch.from_numpy(hide_slots(may.numpy(), rate, rng))


def _cells(run: Run) -> Tensor:
    """(I,) bool: which cells of a picture may be hidden."""
    spec: Any = run.model.config.image
    cells = spec.cells if hasattr(spec, "cells") else (spec.size // spec.patch) ** 2
    return torch.tensor([False] * getattr(spec, "whole", False) + [True] * cells)


def _known(given: str, choices: tuple[str, ...], name: str) -> None:
    if given not in choices:
        raise UserError(f"{name} is {', '.join(choices)}; got {given!r}.{suggest(given, choices)}")


def _needs(run: Run, head: str, objective: str) -> None:
    if head not in run.model.heads:
        raise UserError(f"the run in {run.folder} has no {head} head: train it with the {objective} objective.")
