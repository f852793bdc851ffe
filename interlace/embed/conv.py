"""Pixels through a shallow convolution network whose layers never overlap, so that a cell knows its own block of pixels
and nothing else. MLIM (Arici et al. 2021, arXiv:2109.12178)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.embed.base import Embedder
from interlace.embed.patches import check_pixels
from interlace.embed.words import WordEmbedding
from interlace.errors import UserError


@dataclass
class Blocks(Embedder):
    """`kernels`, `strides`: of each layer, ReLU between them. `channels`: what each layer but the last gives; the last
    gives the stream's width. `mask`: the word whose vector stands for a hidden cell, [MASK] in BERT's vocabularies.

    The paper says seven layers of 2x2 with stride 2 and about 200 thousand weights. It does not say (as far as could be
    verified) how many of the seven have a stride, the channels, or whether pixels are normalised: these defaults are
    ours. Five strided layers give 12x12 cells of 32x32 pixels; mean 0 and deviation 1 leave pixels between 0 and 1.
    """

    size: int = 384  # pixels
    channels: list[int] = field(default_factory=lambda: [16, 32, 64, 128, 128, 80])
    strides: list[int] = field(default_factory=lambda: [2, 2, 2, 2, 2, 1, 1])
    kernels: list[int] = field(default_factory=lambda: [2, 2, 2, 2, 2, 1, 1])
    mask: int = 103
    mean: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    std: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    name = "blocks"
    stream = "image"

    @property
    def patch(self) -> int:
        """Side of a cell's block in pixels."""
        return math.prod(self.strides)

    @property
    def side(self) -> int:
        """Cells in a row."""
        return self.size // self.patch

    @property
    def cells(self) -> int:
        return self.side**2

    def build(self) -> nn.Module:
        return BlockEmbedding(self)


class HeConv(nn.Module):
    """A convolution that starts as He et al. 2015 (arXiv:1502.01852) have it, so that a picture comes through many of
    them at its own scale; after seven that start as BERT's linears do, nothing of it would be left."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int = 1, padding: int = 0):
        super().__init__()
        deviation = math.sqrt(2 / (inside * kernel**2))
        self.weight = nn.Parameter(torch.empty(outside, inside, kernel, kernel).normal_(std=deviation))
        self.bias = nn.Parameter(torch.zeros(outside))
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:  # (B, inside, h, w) -> (B, outside, h', w')
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class BlockEmbedding(nn.Module):
    """The words' norm, type 0 and dropout serve the cells too: but for its position a hidden cell looks like a hidden
    word. There is no modality vector."""

    reads_words = True
    hides = True

    def __init__(self, spec: Blocks):
        super().__init__()
        self.spec = spec
        if not len(spec.kernels) == len(spec.strides) == len(spec.channels) + 1:
            raise UserError(f"as many kernels as strides, and one channel fewer (the last is the stream's width); got "
                            f"{len(spec.kernels)}, {len(spec.strides)} and {len(spec.channels)}.")  # fmt: skip
        if spec.kernels != spec.strides:
            raise UserError(f"each kernel must be as large as its stride, or a hidden cell's pixels show in its "
                            f"neighbours; got kernels {spec.kernels} and strides {spec.strides}.")  # fmt: skip
        if spec.size % spec.patch or spec.size < spec.patch:
            raise UserError(f"a picture of {spec.size} pixels does not divide into blocks of {spec.patch}, the product "
                            "of the strides.")  # fmt: skip
        *before, last = zip([3, *spec.channels], [*spec.channels, spec.width.size], spec.kernels)
        self.convs = nn.ModuleList(HeConv(a, b, kernel, kernel) for a, b, kernel in before)
        # small, as BERT's linears start: a cell begins at a word's scale, where its position still counts
        self.convs.append(nn.Conv2d(last[0], last[1], last[2], last[2]))
        self.positions = nn.Embedding(spec.cells, spec.width.size)

    def contents(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S), normalised -> (B, I, D): each cell from its own block alone, row by row."""
        check_pixels(pixels, self.spec.patch)
        size = self.spec.size
        if pixels.shape[-2:] != (size, size):
            raise UserError(f"the model reads pictures of {size}x{size} pixels, got {pixels.shape[-1]}x"
                            f"{pixels.shape[-2]}: resize them.")  # fmt: skip
        x = pixels
        for n, conv in enumerate(self.convs):
            x = conv(torch.relu(x) if n else x)
        return x.flatten(2).transpose(1, 2)

    def forward(self, pixels: Tensor, words: WordEmbedding, hidden: Tensor | None = None) -> Tensor:
        """(B, 3, S, S), normalised; hidden (B, I) bool, True = to be guessed -> (B, I, D). A hidden cell has the vector
        of the word [MASK] in place of its own, before the position is added."""
        x = self.contents(pixels)  # (B, I, D)
        if hidden is not None:
            x = torch.where(hidden.unsqueeze(-1), words.words.weight[self.spec.mask], x)
        x = x + self.positions.weight
        if words.types is not None:
            x = x + words.types.weight[0]
        return words.dropout(words.norm(x))
