"""The picture, hidden and visible parts alike, from the states of its cells. MLIM (Arici et al. 2021,
arXiv:2109.12178)."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from interlace.embed.base import Embedder
from interlace.errors import UserError
from interlace.heads.pixels import Pixels, halving
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Scored, Views

REDUCTIONS = ("sum", "mean")


def pixel_losses(predicted: Tensor, target: Tensor, channels: str = "sum") -> Tensor:
    """(B, 3, S, S) twice, both between 0 and 1 -> (B,): the mean over all pixels of the squared error, summed over
    channels as in the paper (`channels` "sum"), or a third of it ("mean", the usual mean squared error).

    The whole picture is scored: what a cell's vector keeps of its visible pixels is worth learning too. Raises
    UserError for shapes that differ and another `channels`.
    """
    if channels not in REDUCTIONS:
        raise UserError(f"squared errors are summed over channels or their mean is taken: sum or mean; got "
                        f"{channels!r}.")  # fmt: skip
    if predicted.shape != target.shape:
        raise UserError(f"a drawn picture of {tuple(predicted.shape[1:])} is compared with one of "
                        f"{tuple(target.shape[1:])}: the pixels head must draw what the model reads, "
                        "grid * 2 ** len(up) pixels.")  # fmt: skip
    losses = (predicted - target).float().square().mean((1, 2, 3))
    return losses * predicted.shape[1] if channels == "sum" else losses


def picture(model: VLModel, pixels: Tensor) -> Tensor:
    """(B, 3, S, S) uint8, or normalised as the model has it -> between 0 and 1."""
    return cast(Tensor, model.normalise(pixels)) * model.pixel_std + model.pixel_mean


class Recon(Objective):
    """Draw the picture from the states of its cells.

    Columns: image (and caption). Hides: nothing itself; an objective of the same pass does (`mam`, mrfr, ...). Sees:
    everyone sees everyone. Head: pixels. Logs: recon, and recon_r2: the share of the pixels' variance that is
    explained, 0 for the batch's mean colour everywhere.

    Wants whole pictures (`augment.smallest_crop: 1`): no text says how a picture was cropped, and the mean of crops is
    another than that of the pictures it will be asked for.

    `recon_reduction` "sum" over channels, as in the paper; "mean" makes the loss the mean squared error, a third of it.
    `mismatched` False: a picture whose sentence ITM swapped is not scored.
    """

    name = "recon"
    head = "pixels"
    fused = True
    reads_pixels = True

    def __init__(self, recon_reduction: str = "sum", mismatched: bool = True):
        if recon_reduction not in REDUCTIONS:
            raise UserError(f"recon.recon_reduction is sum or mean; got {recon_reduction!r}.")
        self.channels, self.mismatched = recon_reduction, mismatched

    def head_for(self, text: Embedder, image: Embedder) -> dict:
        """Raises UserError for cells that are not a square whose sides double to the picture's."""
        size, cells = getattr(image, "size", 0), getattr(image, "cells", 0)
        cells = cells or (size // getattr(image, "patch", size + 1)) ** 2
        side = round(cells**0.5)
        doublings = (size // side).bit_length() - 1 if side else 0
        if not side or side**2 != cells or side * 2**doublings != size:
            raise UserError(f"recon draws a picture by doubling the sides of its cells, and {cells} cells do not "
                            f"become {size}x{size} pixels: choose model.size so that each cell is 8, 16 or 32 "
                            "pixels wide.")  # fmt: skip
        return halving(image.width.size, side, doublings)

    def check(self, model: VLModel) -> None:
        super().check(model)
        spec, head = model.config.image, cast(Pixels, model.heads[self.head])
        if not hasattr(model, "pixel_mean") or getattr(spec, "size", head.size) != head.size:
            size = getattr(spec, "size", None)
            raise UserError(f"recon draws pictures of {head.size}x{head.size} pixels, and the model reads "
                            f"{f'{size}x{size} pixels' if size else 'no pixels'}.")  # fmt: skip

    def asks(self, part: Batch) -> tuple[bool | Tensor, bool | Tensor]:
        return False, True

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        if "pixel_values" not in batch:
            raise UserError("recon needs the pictures themselves, and this batch has none: leave data.regions out.")
        target = picture(model, batch["pixel_values"]).float()
        losses = pixel_losses(model.heads["pixels"](views.cells()).float(), target, self.channels)  # (B,)
        scored = losses if self.mismatched else losses * views.matched
        loss = scored.mean()
        spread = (target - target.mean((0, 2, 3), keepdim=True)).square().mean().clamp(min=1e-6)
        error = losses.detach().mean() / (target.shape[1] if self.channels == "sum" else 1)
        return Scored(loss, {"recon": loss.detach(), "recon_r2": 1 - error / spread})
