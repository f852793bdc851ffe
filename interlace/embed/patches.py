"""Patches as in ViT: one convolution, a class token, learned positions. Dosovitskiy et al. 2021, section 3.1."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.embed.base import Embedder
from interlace.errors import UserError


@dataclass
class Patches(Embedder):
    """`hide`: it has a vector to put in the place of a patch that is to be guessed (ViT's [MASK], section 5 of its
    supplement)."""

    size: int = 224  # pixels, the side the positions were made for
    patch: int = 16
    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    hide: bool = False
    name = "patches"
    stream = "image"

    def build(self) -> nn.Module:
        return PatchEmbedding(self)


def check_pixels(pixels: Tensor, patch: int) -> None:
    """Raises UserError unless these are pictures (B, 3, h, w) whose sides are multiples of a patch."""
    if not isinstance(pixels, Tensor):
        raise UserError(f"the model reads pictures, a tensor (B, 3, height, width), got {type(pixels).__name__}: "
                        "regions of a detector belong to another preset.")  # fmt: skip
    if pixels.dim() != 4 or pixels.shape[1] != 3:
        raise UserError(f"expected pictures (B, 3, height, width), got {tuple(pixels.shape)}: put one picture in a "
                        "batch of one, its colours before its rows, grey ones as three equal colours.")  # fmt: skip
    height, width = pixels.shape[-2:]
    if min(height, width) < patch:
        raise UserError(f"a picture of {width}x{height} pixels is smaller than one patch ({patch}): resize it to at "
                        "least that.")  # fmt: skip
    if height % patch or width % patch:  # the convolution would leave out what is over, without a word
        fits = [max(patch, round(side / patch) * patch) for side in (width, height)]
        raise UserError(f"a picture of {width}x{height} pixels does not divide into patches of {patch}: resize it, to "
                        f"{fits[0]}x{fits[1]} for example.")  # fmt: skip


class PatchEmbedding(nn.Module):
    lead = 1  # the class token stands before the cells

    def __init__(self, spec: Patches):
        super().__init__()
        width = spec.width.size
        if spec.size % spec.patch:
            raise UserError(f"a picture of {spec.size} pixels does not divide into patches of {spec.patch}.")
        self.side, self.patch = spec.size // spec.patch, spec.patch
        self.project = nn.Conv2d(3, width, spec.patch, stride=spec.patch)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + self.side**2, width))
        self.dropout = nn.Dropout(spec.width.dropout)
        self.hides = spec.hide
        if spec.hide:
            self.hidden = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, pixels: Tensor, hidden: Tensor | None = None) -> Tensor:
        """(B, 3, h, w), normalised -> (B, 1 + cells, D). Other sizes interpolate the positions, bicubic. `hidden`
        (B, cells) bool: patches that become the one vector for what is to be guessed."""
        check_pixels(pixels, self.patch)
        cells = self.project(pixels)  # (B, D, h/p, w/p)
        positions: Tensor = self.positions
        if cells.shape[-2:] != (self.side, self.side):
            grid = positions[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, cells.shape[-2:], mode="bicubic", align_corners=False)
            positions = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)
        tokens = cells.flatten(2).transpose(1, 2)
        if hidden is not None:
            tokens = torch.where(hidden.unsqueeze(-1), self.hidden, tokens)
        x = torch.cat([self.first.expand(len(cells), -1, -1), tokens], 1)
        return self.dropout(x + positions)  # (B, 1+I, D)
