"""Masked regions: guess their features, their class, or how a detector's belief is spread over the classes.

UNITER (Chen et al. 2020, arXiv:1909.11740), section 3.2, names them MRFR, MRC and MRC-KL. Its equations sum over
features and classes; its release averages over them, and so do the means of what these functions return.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from interlace.embed.grid import GridTower
from interlace.errors import UserError
from interlace.heads import Tied
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Scored, Views, systems_where

BACKGROUND = 0  # the detector's class for no object


def feature_losses(predicted: Tensor, features: Tensor) -> Tensor:
    """(n, F), (n, F) -> squared errors (n, F)."""
    return F.mse_loss(predicted, features, reduction="none")


def class_losses(logits: Tensor, beliefs: Tensor) -> Tensor:
    """(n, C), (n, C) -> (n,): cross-entropy with the class the detector believes most, the background left out."""
    return F.cross_entropy(logits, beliefs[:, BACKGROUND + 1 :].argmax(-1) + BACKGROUND + 1, reduction="none")


def belief_losses(logits: Tensor, beliefs: Tensor) -> Tensor:
    """(n, C), (n, C) -> the terms (n, C) of KL(detector || model)."""
    return F.kl_div(F.log_softmax(logits, -1), beliefs, reduction="none")


def spread_cross_entropy(logits: Tensor, beliefs: Tensor) -> Tensor:
    """(..., C), (..., C) -> cross-entropy with the whole distribution, summed over classes, mean over the regions that
    have one (their beliefs sum to 1, the others' to 0); 0 when none has. VL-BERT's (arXiv:1908.08530) release."""
    scored = (beliefs.sum(-1) - 1).abs() < 0.1
    losses = -(beliefs[scored] * F.log_softmax(logits[scored], -1)).sum(-1)
    return losses.sum() / max(len(losses), 1)


def hide_regions(may: Tensor, draw: torch.Generator, share: float = 0.15, at_least_one: bool = True) -> Tensor:
    """may (B, I) True = a region that may be hidden (no padding, not the whole picture) -> hidden (B, I).
    `at_least_one`: a row in which none was drawn hides the first it may, as in UNITER."""
    may = may.bool()
    hidden = (torch.rand(may.shape, generator=draw) < share) & may
    if at_least_one:
        hidden = hidden | (may & (may.cumsum(1) == 1) & ~hidden.any(1, keepdim=True))
    return hidden


class MaskedRegions(Objective):
    """What all guesses at hidden parts of a picture share: who is hidden, and who is scored.

    Columns: image (and caption). Hides: `mask` of the regions or grid cells, never the whole picture as a region.
    Sees: everyone sees everyone. `mismatched` True: scored beside a swapped sentence too. `kept`: share of the chosen
    that stay visible and are scored all the same (0.1 in LXMERT, ViLBERT and VL-BERT).
    """

    fused = True
    hides_cells = True

    def __init__(self, mask: float = 0.15, at_least_one: bool = True, mismatched: bool = True, kept: float = 0.0):
        if not 0 < mask < 1:
            raise UserError(f"{self.name}.mask is the share of regions to hide, above 0 and below 1; got {mask}.")
        if not 0 <= kept < 1:
            raise UserError(f"{self.name}.kept is the share of the chosen regions that stay visible, from 0 to below "
                            f"1; got {kept}.")  # fmt: skip
        self.mask, self.at_least_one, self.mismatched, self.kept = mask, at_least_one, mismatched, kept

    def check(self, model: VLModel) -> None:
        super().check(model)
        if not (getattr(model.image, "hides", False) or hasattr(model.config.image, "features")):
            raise UserError(f"{self.name} hides parts of the picture, and the image part {model.config.image.name!r} "
                            "has nothing to put in their place: use regions, a grid, or `hide: true`."
                            f"{systems_where(self.reads)}")  # fmt: skip

    @staticmethod
    def reads(config: Any) -> bool:
        """Whether a system has regions to hide and to guess."""
        return hasattr(getattr(config, "image", None), "features")

    def corrupt(self, part: Batch, rngs: list[np.random.Generator], processor) -> None:
        if "hidden" in part:  # two guesses at the same hidden regions share a pass: they are hidden once
            return
        may = part["cells"].numpy()
        hidden, visible = np.zeros_like(may), np.zeros_like(may)
        for row, rng in enumerate(rngs):
            places = np.flatnonzero(may[row])
            lots = rng.random(len(places)) < self.mask
            if self.at_least_one and len(places) and not lots.any():
                lots[int(rng.integers(len(places)))] = True
            hidden[row, places[lots]] = True
            if self.kept:
                visible[row, places[lots]] = rng.random(int(lots.sum())) < self.kept
        part["hidden"] = torch.from_numpy(hidden & ~visible)
        if self.kept:
            part["guessed"] = torch.from_numpy(hidden)

    def scored(self, part: Batch) -> Tensor:
        """(B, I) bool."""
        hidden: Tensor = part["guessed"] if "guessed" in part else part["hidden"]
        if not self.mismatched and "matched" in part:
            hidden = hidden & part["matched"].unsqueeze(1)
        return hidden

    def count(self, part: Batch, batch: Batch) -> Tensor:
        return self.scored(part).sum()

    def asks(self, part: Batch) -> tuple[bool | Tensor, bool | Tensor]:
        return False, self.scored(part)


def true_features(model: VLModel, batch: Batch) -> Tensor:
    """(B, I, F): the regions' features before any was hidden; of a grid, what its tower says of the picture."""
    if "region_features" in batch:
        return batch["region_features"]
    image = model.image
    with torch.no_grad():
        states = batch.get("image_states")
        if states is None:
            states = image.states(model.normalise(batch["pixel_values"]))  # type: ignore[operator]
        assert states is not None
        return image.features(states) if isinstance(image, GridTower) else states


def feature_table(model: VLModel) -> Tensor:
    """(F, D): the projection of features, read backwards, to which UNITER ties the last linear."""
    regions = model.image.regions if isinstance(model.image, GridTower) else model.image
    return regions.features.weight.T  # type: ignore[union-attr,operator,return-value]


class MRFR(MaskedRegions):
    """Guess the features of hidden regions: squared error, mean over features and hidden regions.

    Head: mrfr (tied to the projection of features backwards, or its own). Logs: mrfr, and mrfr_r2: the share of the
    features' variance over the batch that is explained, 0 for the mean of all regions.
    """

    name = "mrfr"
    head = "mrfr"

    def head_for(self, text, image) -> dict:
        """Raises UserError for patches, which nothing has described."""
        if not (hasattr(image, "channels") or hasattr(image, "features")):
            raise UserError(f"{self.name} guesses the features of regions or cells, and those of the image part "
                            f"{image.name!r} are pixels: take mpp, or a tower as model.image.")  # fmt: skip
        labels = image.channels if hasattr(image, "channels") else image.features
        return {"kind": "transformed", "labels": labels, "stream": "image"}

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        asked = self.scored(views.part)
        truth = true_features(model, batch)[asked].float()  # (n, F)
        head = model.heads["mrfr"]
        chosen = views.cells_where(asked)
        predicted = (head(chosen, feature_table(model)) if isinstance(head, Tied) else head(None, chosen)).float()
        loss = feature_losses(predicted, truth).mean(-1).sum() / views.total(self)
        spread, error = (truth - truth.mean(0)).square().sum(), (predicted.detach() - truth).square().sum()
        explained = torch.where(spread > 1e-6, 1 - error / spread.clamp(min=1e-6), 0)  # one region alone has no spread
        return Scored(loss, {"mrfr": loss.detach(), "mrfr_r2": explained})


class Beliefs(MaskedRegions):
    """Guesses at what a detector believes: they need features that were stored with its beliefs."""

    def asked(self, model: VLModel, batch: Batch, views: Views) -> tuple[Tensor, Tensor]:
        """-> logits (n, C) of the hidden regions, and the detector's beliefs of them (n, C)."""
        if "region_beliefs" not in batch:
            raise UserError(f"{self.name} guesses what a detector believes of a region, and these features came "
                            "without beliefs: extract them with a detector (interlace extract --detector), or use "
                            "mrfr.")  # fmt: skip
        asked = self.scored(views.part)
        logits = model.heads[self.head](None, views.cells_where(asked)).float()
        return logits, batch["region_beliefs"][asked].float()

    def logs(self, logits: Tensor, beliefs: Tensor, loss: Tensor) -> dict[str, Tensor]:
        right = (logits.argmax(-1) == beliefs.argmax(-1)).float().sum() / max(len(logits), 1)
        return {self.name: loss.detach(), f"{self.name}_accuracy": right}


class MRC(Beliefs):
    """Guess the class of hidden regions, as the detector believes it most. Head: mrc. Logs: mrc, mrc_accuracy."""

    name = "mrc"
    head = "mrc"

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        logits, beliefs = self.asked(model, batch, views)
        loss = class_losses(logits, beliefs).sum() / views.total(self)
        return Scored(loss, self.logs(logits, beliefs, loss))


class MRCKL(Beliefs):
    """Guess how the detector's belief about hidden regions is spread: KL(detector || model), mean over classes and
    regions as in UNITER's release. ViLBERT's too, which sums over the classes. Head: mrc. Logs: mrc_kl,
    mrc_kl_accuracy. `sum_classes`: ViLBERT's reduction."""

    name = "mrc_kl"
    head = "mrc"

    def __init__(self, mask: float = 0.15, at_least_one: bool = True, mismatched: bool = True,
                 kept: float = 0.0, sum_classes: bool = False):  # fmt: skip
        super().__init__(mask, at_least_one, mismatched, kept)
        self.sum_classes = sum_classes

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        logits, beliefs = self.asked(model, batch, views)
        terms = belief_losses(logits, beliefs)
        loss = (terms.sum(-1) if self.sum_classes else terms.mean(-1)).sum() / views.total(self)
        return Scored(loss, self.logs(logits, beliefs, loss))


class MVRC(Beliefs):
    """VL-BERT's: cross-entropy with the whole distribution, summed over classes. Head: mvrc. Logs: mvrc,
    mvrc_accuracy."""

    name = "mvrc"
    head = "mvrc"

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        asked = self.scored(views.part)
        if "region_beliefs" not in batch:
            return self.asked(model, batch, views)  # type: ignore[return-value]  # says what is missing
        logits, beliefs = model.heads["mvrc"](views.cells_where(asked)).float(), batch["region_beliefs"][asked].float()
        loss = -(beliefs * F.log_softmax(logits, -1)).sum() / views.total(self)
        return Scored(loss, self.logs(logits, beliefs, loss))
