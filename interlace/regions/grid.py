"""Grid cells of any image tower as regions: a feature per cell, and the part of the original picture the cell covers.

Grid features in place of a detector's: Jiang et al. 2020 (arXiv:2001.03615).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from interlace.data.processor import Processor
from interlace.errors import UserError
from interlace.regions.arrays import RegionArrays
from interlace.regions.base import fingerprint
from interlace.towers import grid_size, grid_tokens, load_tower, pixel_spec, resize_positions


class Placed(NamedTuple):
    """Where `Processor.square` puts a picture on its canvas, in pixels of the canvas; a crop starts outside it."""

    left: int
    top: int
    width: int
    height: int


def placed(width: int, height: int, size: int, fit: str) -> Placed:
    """Of a picture of `width` x `height` on a canvas of `size` x `size`."""
    if fit == "squash" or width == height:
        return Placed(0, 0, size, size)
    side = max(width, height) if fit == "pad" else min(width, height)
    w, h = max(1, round(width * size / side)), max(1, round(height * size / side))
    return Placed((size - w) // 2, (size - h) // 2, w, h)


def cells(width: int, height: int, size: int, fit: str, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """For a picture of `width` x `height`: which cells, row by row, show it (h*w,), and the boxes (n, 4) of those.

    Boxes are in parts of the original picture: what was padded is no part of it, and a crop's cells lie within it. A
    cell that is padding by more than half is left out; a picture narrower than half a cell keeps the cell it is in.
    """
    at = placed(width, height, size, fit)
    columns, keep_columns = _along(at.left, at.width, size, grid[1])
    rows, keep_rows = _along(at.top, at.height, size, grid[0])
    keep = keep_rows[:, None] & keep_columns[None]  # (h, w)
    boxes = np.empty((*grid, 4))
    boxes[..., 0::2], boxes[..., 1::2] = columns[None], rows[:, None]
    return keep.ravel(), boxes[keep].astype(np.float32)


def _along(start: int, length: int, size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """One axis: each cell's ends (count, 2) in parts of the picture, and whether it shows enough of it (count,)."""
    edges = np.arange(count + 1) * size / count
    ends = np.stack([edges[:-1], edges[1:]], 1).clip(start, start + length)
    share = (ends[:, 1] - ends[:, 0]) / (size / count)
    return (ends - start) / length, share >= min(0.5, share.max())


class GridExtractor:
    """`tower`: a name or folder as `load_tower` takes it. `size`: side in pixels, default the tower's own. `fit`: pad,
    squash or crop, as in the processor.

    Raises UserError as `load_tower` does, and for a size or fit that cannot be.
    """

    beliefs_size = 0

    def __init__(self, tower: str | Path, size: int | None = None, fit: str = "pad", device: str | None = None):
        if size is not None and size < 1:
            raise UserError(f"pictures have a side of at least 1 pixel; got {size}.")
        spec = pixel_spec(tower)
        model, self.features_size, extras = load_tower(tower, "image")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.size = self.hint = size or spec.size
        self.prefix = extras.prefix
        self.grid = grid_size(model, self.size)
        self.keywords = resize_positions(model, self.size)
        self.model = cast(nn.Module, model).to(self.device)
        self.processor = Processor(None, self.size, list(spec.mean), list(spec.std), fit)
        self.facts: dict[str, Any] = {"kind": "grid", "name": str(tower), "tower": extras.model_type,
                                      "weights": digest(model), "size": self.size, "fit": fit, "grid": list(self.grid),
                                      "mean": list(spec.mean), "std": list(spec.std)}  # fmt: skip

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.facts)

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image]) -> list[RegionArrays]:
        pixels = self.processor.pictures(pictures).to(self.device)
        mean = torch.tensor(self.processor.mean, device=self.device).view(3, 1, 1)
        std = torch.tensor(self.processor.std, device=self.device).view(3, 1, 1)
        states = self.model(pixel_values=(pixels / 255 - mean) / std, **self.keywords).last_hidden_state
        features = grid_tokens(cast(Tensor, states), self.prefix).float().cpu().numpy()  # (B, h*w, F)
        out = []
        for picture, feature in zip(pictures, features):
            keep, boxes = cells(picture.width, picture.height, self.size, self.processor.fit, self.grid)
            out.append(RegionArrays(feature[keep], boxes))
        return out


def digest(model: nn.Module) -> str:
    """Of all weights and buffers, by name."""
    out = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        out.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        out.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return out.hexdigest()[:32]
