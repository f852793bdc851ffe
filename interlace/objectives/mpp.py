"""Masked patches: guess the pixels of hidden parts of a picture from the rest and from its words."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from interlace.embed.base import Embedder
from interlace.errors import UserError
from interlace.model import VLModel
from interlace.objectives.base import Batch, Scored, Views
from interlace.objectives.mvm import MaskedRegions

FLAT = 1e-6  # variance of a patch of one colour, whose target is 0


def normalised_patches(pixels: Tensor, side: int) -> Tensor:
    """(B, 3, S, S) -> (B, I, 3 * side * side): each patch row by row, minus its mean and divided by its deviation over
    pixels and channels. He et al. 2022 (MAE, arXiv:2111.06377), section 3 and table 1d."""
    patches = F.unfold(pixels.float(), side, stride=side).transpose(1, 2)  # (B, I, 3*side*side)
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (variance + FLAT).sqrt()


def side_of_cell(image: Embedder, name: str) -> int:
    """Pixels along a side of a patch or cell. Raises UserError for cells that do not tile the picture as a square."""
    size, side = getattr(image, "size", 0), getattr(image, "patch", 0)
    if size and not side:
        side = size // max(1, round(getattr(image, "cells", 0) ** 0.5))
    whole = getattr(image, "whole", False)
    if not side or size % side or whole or getattr(image, "cells", (size // side) ** 2) != (size // side) ** 2:
        raise UserError(f"{name} guesses the pixels of a patch, and the cells of the image part {image.name!r} do not "
                        "tile a picture: set model.image=patches (model.patch divides model.size), or take mrfr, which "
                        "guesses features.")  # fmt: skip
    return side


class MPP(MaskedRegions):
    """Guess the pixels of hidden patches: squared error to each patch's pixels after its own mean and deviation were
    taken out (MAE), mean over pixels and hidden patches. ViLT's ablation guesses a patch's mean colour, which can be
    read off its neighbours; here that is taken out first.

    Columns: image (and caption). Hides, sees: as all guesses at regions. Head: patches. Logs: mpp, and mpp_r2: the
    share of the hidden pixels' variance that is explained, 0 for guessing each patch's mean.

    For patches and blocks: cells of a tower (model.image) have seen their neighbours' pixels before those are hidden.
    """

    name = "mpp"
    head = "patches"
    reads_pixels = True

    @staticmethod
    def reads(config: Any) -> bool:
        """Whether a system has blocks that hide; patches do once their `hide` is true."""
        return getattr(getattr(config, "image", None), "name", "") == "blocks"

    def head_for(self, text: Embedder, image: Embedder) -> dict:
        return {"kind": "transformed", "labels": 3 * side_of_cell(image, self.name) ** 2, "stream": "image"}

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        if "pixel_values" not in batch:
            raise UserError("mpp needs the pictures themselves, and this batch has none: leave data.regions out.")
        asked = self.scored(views.part)
        truth = normalised_patches(model.normalise(batch["pixel_values"]),  # type: ignore[arg-type]
                                   side_of_cell(model.config.image, self.name))[asked]  # fmt: skip
        errors = (model.heads[self.head](None, views.cells_where(asked)).float() - truth).square()  # (n, 3*side*side)
        loss = errors.mean(-1).sum() / views.total(self)
        explained = 1 - errors.detach().sum() / truth.square().sum().clamp(min=1e-6)
        return Scored(loss, {"mpp": loss.detach(), "mpp_r2": explained})
