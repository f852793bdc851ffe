"""Every published system at its tiny size: a toy batch as it wants one, its states, and its own losses on that batch.

The names are those of the table of presets, so a new preset joins every property with its line there; one whose losses
have other names adds them to `Losses`. VisionEncoderDecoder has no line, since its model is transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.captioner import CaptionModel
from interlace.embed.base import Embedder
from interlace.embed.regions import RegionEmbedder, Regions, seven
from interlace.model import Half, VLModel
from interlace.objectives import mlm, mvm, wra
from interlace.objectives.itc import contrast
from interlace.objectives.lm import next_word, written
from interlace.objectives.momentum import Momentum, soft_contrast
from interlace.objectives.reconstruct import pixel_losses
from interlace.objectives.region_labels import feature_loss, label_loss
from interlace.presets import PRESETS, objectives, vilt
from interlace.presets.vision_encoder_decoder import tiny

CLS, SEP, MASK = 2, 3, 4  # of every tiny size
Out = dict[str, tuple[Tensor, Tensor | None]]  # name -> states (B, L, D) and which are real (B, L), or (B, P) and None


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool
    image: Tensor | Regions
    cells: Tensor | None = None  # (B, I) of regions, (B, H, W) of pixels; None = all are real
    extra: int = 0  # cells of noise after an image whose embedder takes no mask


def longer(x: Tensor, at: int, new: Tensor) -> Tensor:
    """(B, L, ...) with `new` (B, N, ...) before position `at`."""
    return torch.cat([x[:, :at], new, x[:, at:]], 1)


class System:
    """A preset of the table."""

    def __init__(self, name: str):
        self.name, self.line = name, PRESETS[name]
        self.config = self.line.module.tiny
        self.objectives = objectives(self.line.module.PRETRAIN).split(", ")

    def build(self) -> VLModel:
        torch.manual_seed(0)
        return VLModel(self.config()).eval()

    @cache  # noqa: B019  a handful of systems, and no test changes the model it is given
    def model(self) -> VLModel:
        """With weights ten times the initial ones, and drawn ones where it starts with zeros (biases, class tokens,
        VL-BERT's norms): small numbers and zeros hide mistakes."""
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 or not parameter.any():
                    parameter.normal_(std=0.2)
        return model

    @property
    def regions(self) -> bool:
        return isinstance(self.config().image, RegionEmbedder)

    def batch(self, rows: int = 3, words: int = 6, cells: int = 5, seed: int = 0) -> Batch:
        """Texts of `words`, and every third row two fewer; regions and pixels of unequal number likewise."""
        g, spec = torch.Generator().manual_seed(seed), self.config()
        ids = torch.randint(5, 90, (rows, words), generator=g)
        mask = torch.ones(rows, words, dtype=torch.bool)
        mask[1::3, -2:] = False
        ids[:, 0] = CLS
        ids[torch.arange(rows), mask.sum(1) - 1] = getattr(spec.text, "eos", SEP)
        ids = ids.masked_fill(~mask, 0)
        if self.regions:
            seen = torch.ones(rows, cells, dtype=torch.bool)
            seen[2::3, -2:] = False
            return Batch(ids, mask, some_regions(spec.image, rows, cells, g), seen)
        if getattr(self.model().image, "masks_pixels", False):  # pictures of unequal sizes
            size, patch = spec.image.size, spec.image.patch
            seen = torch.ones(rows, size, size + 2 * patch, dtype=torch.bool)
            seen[2::3, -patch:], seen[2::3, :, -2 * patch :] = False, False
            return Batch(ids, mask, pictures(spec.image, rows, size, size + 2 * patch, g), seen)
        return Batch(ids, mask, pictures(spec.image, rows, spec.image.size, spec.image.size, g))

    def rows(self, batch: Batch, index: Tensor) -> Batch:
        image = batch.image
        image = Regions(*(x if x is None else x[index] for x in image)) if isinstance(image, Regions) else image[index]
        cells = None if batch.cells is None else batch.cells[index]
        return replace(batch, ids=batch.ids[index], mask=batch.mask[index], image=image, cells=cells)

    def padded(self, batch: Batch, words: int = 0, cells: int = 0, at: int | None = None, seed: int = 1) -> Batch:
        """More padding, full of noise. `at`: after how many regions it comes; None = after all."""
        g, rows = torch.Generator().manual_seed(seed), len(batch.ids)
        noise = torch.randint(5, 90, (rows, words), generator=g)
        ids, mask = torch.cat([batch.ids, noise], 1), F.pad(batch.mask, (0, words))
        if isinstance(batch.image, Regions):
            new = some_regions(self.config().image, rows, cells, g)
            at = batch.image.features.shape[1] if at is None else at
            image = Regions(*(x if x is None else longer(x, at, y) for x, y in zip(batch.image, new)))
            return replace(batch, ids=ids, mask=mask, image=image,
                           cells=longer(batch.cells, at, torch.zeros(rows, cells, dtype=torch.bool)))  # fmt: skip
        if batch.cells is None:
            return replace(batch, ids=ids, mask=mask, extra=cells)
        side = cells * self.config().image.patch
        height, width = batch.image.shape[-2:]
        image = torch.randn(rows, 3, height + side, width + side, generator=g)
        image[:, :, :height, :width] = batch.image
        return replace(batch, ids=ids, mask=mask, image=image, cells=F.pad(batch.cells, (0, side, 0, side)))

    def image(self, model: VLModel, batch: Batch) -> Half:
        half = model.half_image(batch.image, batch.cells)
        if batch.extra:
            noise = torch.randn(len(half.states), batch.extra, half.states.shape[-1])
            half = Half(torch.cat([half.states, noise], 1), half.padded(half.states.shape[1] + batch.extra).mask)
        return half

    def run(self, model: VLModel, batch: Batch) -> Out:
        """The states of both streams, the pooled vectors, each vector alone and the words to come, where there are."""
        text, image = model.half_text(batch.ids, batch.mask), self.image(model, batch)
        states = model.fuse(text, image)
        out: Out = {"text": (states.text, text.mask), "image": (states.image, image.mask),
                    "pooled_text": (states.pooled_text, None), "pooled_image": (states.pooled_image, None)}  # fmt: skip
        if "contrast" in model.heads:
            out["vector_text"] = model.alone(text, "text"), None
            out["vector_image"] = model.alone(image, "image"), None
        if model.decoder is not None:
            out["written"] = model.decoder(batch.ids, *image[:2]).logits, batch.mask
        return out

    def learning(self, model: VLModel, batch: Batch) -> Callable[[], dict[str, Tensor]]:
        """What a step of its own pre-training computes on this batch: its losses by name."""
        losses = Losses(model, batch)
        return lambda: losses(self.objectives)


def pictures(spec: Embedder, rows: int, height: int, width: int, g: torch.Generator) -> Tensor:
    """Two by two patches of plain colour, normalised as the system wants it (MLIM: 0 to 1, which it draws again)."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (spec.mean, spec.std))
    return (F.interpolate(torch.rand(rows, 3, 2, 2, generator=g), (height, width)) - mean) / std


def some_regions(spec: RegionEmbedder, rows: int, cells: int, g: torch.Generator) -> Regions:
    """Drawn features, and boxes of as many numbers as the system reads; the first region is the whole picture."""
    features = torch.randn(rows, cells, spec.features, generator=g)
    first = torch.rand(rows, cells, 2, generator=g) / 2
    corners = torch.cat([first, first + 0.1 + torch.rand(rows, cells, 2, generator=g) / 3], -1)
    corners[:, :1] = torch.tensor([0.0, 0, 1, 1])
    boxes = {0: None, 4: corners, 5: seven(corners)[..., [0, 1, 2, 3, 6]], 7: seven(corners)}[spec.boxes]
    # VisualBERT: positions of the words that name a region, two at most, -1 = none
    named = torch.randint(-1, 4, (rows, cells, 2), generator=g) if spec.boxes == 0 else None
    return Regions(features, boxes, words=named)


class Losses:
    """Even rows hide words, odd rows regions, so that the other stream tells; half of the rows have another's picture.
    One forward serves all that can share it; what is hidden is drawn once, for the batch is to be learnt by heart."""

    def __init__(self, model: VLModel, batch: Batch):
        self.model, g = model, torch.Generator().manual_seed(5)
        rows = len(batch.ids)
        row = torch.arange(rows)
        self.matched = (row % 4 < 2).long()
        self.shown = torch.where(self.matched.bool(), row, (row + 2) % rows)  # whose picture
        self.own, self.batch = batch, replace(batch, **vars_of_image(batch, self.shown))
        may = batch.mask & (row % 2 == 0)[:, None]
        may[:, 0], may[row, batch.mask.sum(1) - 1] = False, False
        self.ids, self.labels = mlm.hide_words(batch.ids, may, MASK, (5, 90), g, 0.3)
        every = batch.mask & (batch.ids >= 5)
        self.text_ids, self.text_labels = mlm.hide_words(batch.ids, every, MASK, (5, 90), g, 0.3)
        self.hidden = None
        if isinstance(batch.image, Regions):
            may = self.batch.cells & (row % 2 == 1)[:, None]
            may[:, 0] = False
            self.hidden = mvm.hide_regions(may, g, 0.3)
        elif getattr(model.image, "hides_cells", False):
            cells = model.image.spec.cells
            self.hidden = (torch.rand(rows, cells, generator=g) < 0.8) & (row % 2 == 1)[:, None]
        cells = 1 if self.hidden is None else self.hidden.shape[1]
        draw = lambda most, *shape: torch.randint(most, shape, generator=g)  # noqa: E731
        self.classes, self.objects, self.attributes = draw(11, rows, cells), draw(7, rows, cells), draw(5, rows, cells)
        self.answer, self.sure = draw(11, rows), torch.rand(rows, cells, generator=g)
        self.slow = Momentum(model, queue=8, decay=0.5) if hasattr(model.heads, "contrast") and model.decoder else None

    def __call__(self, names: list[str]) -> dict[str, Tensor]:
        self.text = self.model.half_text(self.ids, self.batch.mask)
        image = self.batch.image
        if isinstance(image, Regions):
            self.image = self.model.half_image(image._replace(hidden=self.hidden), self.batch.cells)
        elif self.hidden is not None:
            self.image = self.model.half_image(image, self.batch.cells, hidden=self.hidden)
        else:
            self.image = self.model.half_image(image, self.batch.cells)
        self.out = self.model.fuse(self.text, self.image)
        return {name: getattr(self, name)() for name in names}

    def head(self, name: str, *states: Tensor | None) -> Tensor:
        return self.model.heads[name](*states)

    def states_of_regions(self) -> Tensor:
        return self.out.image[:, -self.hidden.shape[1] :]  # VL-BERT has [END] before them

    # ------------------------------------------------------------------------------------------------------ words

    def mlm(self, text: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        tied = self.model.config.heads["mlm"]["kind"] == "tied"
        table = (self.model.text.words.weight,) if tied else ()
        logits = self.head("mlm", self.out.text if text is None else text, *table)
        return mlm.masked_words(logits, self.labels if labels is None else labels)

    mam = mlm

    def text_mlm(self) -> Tensor:
        alone = self.model.fuse(self.model.half_text(self.text_ids, self.batch.mask), None)
        return self.mlm(alone.text, self.text_labels)

    def lm(self) -> Tensor:
        ids = self.own.ids.clone()
        ids[:, 0] = self.model.config.writes.start
        image = self.model.half_image(self.own.image)
        return next_word(self.model.decoder(ids, *image[:2]).logits, written(ids))

    # ---------------------------------------------------------------------------------------------------- regions

    def mrfr(self) -> Tensor:
        guessed = self.head("mrfr", self.states_of_regions()[self.hidden], self.model.image.features.weight.t())
        return mvm.feature_losses(guessed, self.batch.image.features[self.hidden]).mean()

    def mrc_kl(self) -> Tensor:
        beliefs = F.one_hot(self.classes, 11)[self.hidden].float()
        guessed = self.head("mrc", None, self.states_of_regions()[self.hidden])
        return mvm.belief_losses(guessed, beliefs).sum(-1).mean()

    def mvrc(self) -> Tensor:
        beliefs = F.one_hot(self.classes, 11) * self.hidden.unsqueeze(-1)
        return mvm.spread_cross_entropy(self.head("mvrc", self.states_of_regions()), beliefs.float())

    def region_labels(self) -> Tensor:
        guessed, real = self.head("regions", self.states_of_regions()), self.batch.cells
        return (label_loss(guessed["objects"], self.objects, self.sure * real)
                + label_loss(guessed["attributes"], self.attributes, self.sure * real)
                + feature_loss(guessed["features"], self.batch.image.features, self.hidden))  # fmt: skip

    def recon(self) -> Tensor:
        return pixel_losses(self.head("pixels", self.out.image), self.batch.image).mean()

    # ------------------------------------------------------------------------------------------------------ pairs

    def itm(self) -> Tensor:
        return F.cross_entropy(self.head("match", self.out.pooled_text, self.out.pooled_image), self.matched)

    def answers(self) -> Tensor:
        return F.cross_entropy(self.head("answers", self.out.pooled_text), self.answer)

    def wra(self, text: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        masks = (self.text.mask, self.image.mask) if text is None else (text, image)
        return 0.1 * wra.alignment_loss(wra.transport_distance(self.out.text, self.out.image, *masks), self.matched)

    def wpa(self) -> Tensor:
        return self.wra(*vilt.align(self.text.mask, self.image.mask))

    def itc(self) -> Tensor:
        own, model = self.own, self.model
        text, image = model.encode_text(own.ids, own.mask), model.encode_image(own.image)
        if self.slow is None:
            rows = torch.arange(len(text))
            return contrast(text, image, rows, torch.ones(len(text), dtype=torch.bool), model.contrast.scale)[0]
        self.slow.follow(model)
        with torch.no_grad():
            slow_text, slow_image = (self.slow.model.encode_text(own.ids, own.mask),
                                     self.slow.model.encode_image(own.image))  # fmt: skip
        # the queue stays as drawn: of so small a batch it would hold each row's own partner as a negative
        return soft_contrast(text, image, slow_text, slow_image, self.slow.text, self.slow.image,
                             model.contrast.scale)[0]  # fmt: skip

    itc_momentum = itc


def vars_of_image(batch: Batch, shown: Tensor) -> dict[str, object]:
    image, cells = batch.image, batch.cells
    image = Regions(*(x if x is None else x[shown] for x in image)) if isinstance(image, Regions) else image[shown]
    return {"image": image, "cells": None if cells is None else cells[shown]}


class Captions(System):
    """VisionEncoderDecoder in the same words. Its text is what it writes, labels in which -100 is padding; its picture
    has as many cells as its size says and is never padded, so asking for more cells changes nothing here."""

    def __init__(self) -> None:
        self.name, self.objectives = "vision_encoder_decoder", ["lm"]

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return CaptionModel(tiny()).eval()

    regions = False

    def batch(self, rows: int = 3, words: int = 6, cells: int = 5, seed: int = 0) -> Batch:
        g = torch.Generator().manual_seed(seed)
        ids, mask = torch.randint(5, 90, (rows, words), generator=g), torch.ones(rows, words, dtype=torch.bool)
        mask[1::3, -2:] = False
        ids[torch.arange(rows), mask.sum(1) - 1] = tiny().eos_token_id
        return Batch(ids, mask, torch.randn(rows, 3, 32, 32, generator=g))

    def padded(self, batch: Batch, words: int = 0, cells: int = 0, at: int | None = None, seed: int = 1) -> Batch:
        return replace(super().padded(batch, words), extra=0)

    def labels(self, batch: Batch) -> Tensor:
        return batch.ids.masked_fill(~batch.mask, -100)

    def run(self, model: nn.Module, batch: Batch) -> Out:
        out = model(pixel_values=batch.image, labels=self.labels(batch))
        return {"written": (out.logits, batch.mask), "image": (out.encoder_last_hidden_state, None)}

    def learning(self, model: nn.Module, batch: Batch) -> Callable[[], dict[str, Tensor]]:
        return lambda: {"lm": model(pixel_values=batch.image, labels=self.labels(batch)).loss}


CAPTIONS = Captions()
PAIRED = {name: System(name) for name in PRESETS if name != CAPTIONS.name}
EVERY_SYSTEM = pytest.mark.parametrize("system", [*PAIRED.values(), CAPTIONS], ids=[*PAIRED, CAPTIONS.name])
EVERY_PAIRED = pytest.mark.parametrize("system", PAIRED.values(), ids=PAIRED)  # two streams and a schedule


def real(out: Out) -> dict[str, Tensor]:
    """The states of real positions, one under the other: what padding must not change."""
    return {name: states[mask.bool()] if mask is not None else states.flatten(0, -2)
            for name, (states, mask) in out.items() if states is not None}  # fmt: skip


def one_row(out: Out, row: int) -> dict[str, Tensor]:
    return {name: states[row] if mask is None else states[row][mask[row].bool()] for name, (states, mask) in out.items()
            if states is not None}  # fmt: skip


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float = 2e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
