"""Cells of a tower's grid where the paper has regions of a detector: a feature and a box each, from the picture itself.

A model with this part reads pixels, so that it can be trained, searched and asked with nothing but photographs; what
the paper does with its regions (norms, box numbers, positions) is done by the paper's own embedder behind the tower.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interlace import towers
from interlace.embed.base import Embedder, embedder_from_dict
from interlace.embed.regions import RegionEmbedder, Regions, seven, whole_of_shown
from interlace.embed.stem import check_square, empty_tower
from interlace.embed.words import WordEmbedding
from interlace.errors import UserError


@dataclass
class GridRegions(Embedder):
    """`tower`: the configuration of a transformers vision model whose grid is `rows` by `columns` cells at `size`
    pixels, after `prefix` tokens that are none. `grid`: it has more, averaged to so many a side; 0: as they are.
    `regions`: the paper's embedder, as `to_dict()` writes it. `whole`: the first region is the whole picture (ViLBERT,
    VL-BERT), its feature the mean over the cells."""

    tower: dict[str, Any] = field(default_factory=dict)
    regions: dict[str, Any] = field(default_factory=dict)
    size: int = 224  # pixels
    rows: int = 7
    columns: int = 7
    prefix: int = 0
    channels: int = 1280
    whole: bool = False
    grid: int = 0
    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    name = "grid_regions"
    stream = "image"

    @property
    def cells(self) -> int:
        """Of the tower: the whole picture is not one."""
        return self.rows * self.columns

    @property
    def features(self) -> int:
        """Numbers per region, as the embedders of regions call it."""
        return self.channels

    def build(self) -> nn.Module:
        return GridTower(self)


def grid_boxes(rows: int, columns: int) -> Tensor:
    """(rows * columns, 4): corners of the cells in parts of the picture, row by row."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    x, y = x.flatten() / columns, y.flatten() / rows
    return torch.stack([x, y, x + 1 / columns, y + 1 / rows], -1)


def box_numbers(corners: Tensor, numbers: int) -> Tensor:
    """Corners (..., 4) as a paper has them: 0 none, 4 corners, 5 with the share of the area (ViLBERT), 7 with width,
    height and area (UNITER)."""
    sides = corners[..., 2:] - corners[..., :2]
    if numbers == 7:
        return seven(corners)
    if numbers == 5:
        return torch.cat([corners, sides.prod(-1, keepdim=True)], -1)
    if numbers not in (0, 4):
        raise UserError(f"boxes have 0, 4, 5 or 7 numbers, the model asks for {numbers}.")
    return corners[..., :numbers]


class GridTower(nn.Module):
    """Tower, then the paper's region embedder."""

    hides = True
    boxes: Tensor

    def __init__(self, spec: GridRegions):
        super().__init__()
        self.tower = empty_tower(spec.tower)
        self.keywords = towers.resize_positions(self.tower, spec.size)
        inner = embedder_from_dict(spec.regions)
        if not isinstance(inner, RegionEmbedder):
            raise UserError(f"{inner.name!r} reads no regions: give the embedder of a system that does.")
        self.regions = inner.build()
        self.prefix, self.whole, self.grid, self.size = spec.prefix, spec.whole, spec.grid, spec.size
        corners = grid_boxes(spec.rows, spec.columns)
        if spec.whole:
            corners = torch.cat([torch.tensor([[0.0, 0.0, 1.0, 1.0]]), corners])
        self.register_buffer("boxes", box_numbers(corners, inner.boxes))
        self.reads_words = getattr(self.regions, "reads_words", False)
        self.lead = getattr(self.regions, "lead", 0)

    def states(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S), normalised -> (B, I, C), row by row."""
        check_square(pixels, self.size)
        cells = towers.grid_tokens(self.tower(pixel_values=pixels, **self.keywords).last_hidden_state, self.prefix)
        return towers.averaged(cells, self.grid) if self.grid else cells

    def features(self, states: Tensor) -> Tensor:
        """(B, I, C) -> (B, I or 1+I, C): with the whole picture first, where the paper has it."""
        return torch.cat([states.mean(1, keepdim=True), states], 1) if self.whole else states

    def forward(self, pixels: Tensor | None, words: WordEmbedding | None = None, states: Tensor | None = None,
                hidden: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """(B, 3, S, S), normalised -> what the paper's embedder gives. `states` (B, I, C): what the tower said, kept
        from before. `hidden` (B, I or 1+I) bool: regions to be guessed."""
        features = self.features(self.states(pixels) if states is None else states)  # type: ignore[arg-type]
        boxes = self.boxes.to(features.dtype).expand(len(features), -1, -1) if self.boxes.shape[-1] else None
        regions = Regions(features, boxes, hidden)
        if getattr(self.regions, "whole_of_shown", False):
            regions = whole_of_shown(regions)
        return self.regions(regions, words) if self.reads_words else self.regions(regions)
