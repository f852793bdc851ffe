"""The picture again, from the states of its cells: the decoder of MLIM (Arici et al. 2021, arXiv:2109.12178)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from interlace.embed.conv import HeConv
from interlace.errors import UserError


class Pixels(nn.Module):
    """Transposed convolutions of 2x2, each doubling the side, then convolutions of 3x3, ReLU between, a sigmoid last.

    `grid`: cells in a row; they stand last in the image stream, row by row (a class token before them is left out).
    `up`: channels after each doubling. `smooth`: channels between the 3x3 convolutions, the last of which gives red,
    green and blue. The paper has ten layers and 2.8 million weights, which halving the channels from 1024 gives; the
    channels themselves could not be verified.
    """

    def __init__(self, text: int, image: int, grid: int, up: list[int], smooth: list[int]):
        super().__init__()
        self.grid, self.size = grid, grid * 2 ** len(up)  # cells in a row; pixels of a side
        doublings = [nn.ConvTranspose2d(a, b, 2, 2) for a, b in zip([image, *up], up)]
        for layer in doublings:  # a pixel reads one cell of the layer before, one weight a channel
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_channels))  # He et al. 2015, as HeConv
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        self.layers: nn.ModuleList = nn.ModuleList(doublings)
        channels = [up[-1] if up else image, *smooth]
        self.layers.extend(HeConv(a, b, 3, padding=1) for a, b in zip(channels, smooth))
        self.layers.append(nn.Conv2d(channels[-1], 3, 3, padding=1))  # starts small: grey everywhere

    def forward(self, states: Tensor) -> Tensor:
        """(B, I, D) -> (B, 3, S, S) between 0 and 1. Raises UserError for fewer cells than the grid has."""
        if states.shape[1] < self.grid**2:
            raise UserError(f"the pixels head draws {self.grid}x{self.grid} cells, and the picture has "
                            f"{states.shape[1]} states: set heads.pixels.grid to the embedder's.")  # fmt: skip
        cells = states[:, -(self.grid**2) :]
        x = cells.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (B, D, g, g)
        for n, layer in enumerate(self.layers):
            x = layer(torch.relu(x) if n else x)
        return torch.sigmoid(x)


def halving(width: int, grid: int, doublings: int, layers: int = 10) -> dict[str, Any]:
    """Options of this head for states `width` wide: channels halve as often as the side doubles, and 3x3 convolutions
    make up the number of layers."""
    up = [max(1, width >> n) for n in range(1, 1 + doublings)]
    wide = max(8, (up[-1] if up else width) // 2)
    return {"kind": "pixels", "grid": grid, "up": up, "smooth": [wide] * max(0, layers - doublings - 1)}
