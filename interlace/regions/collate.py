"""Regions of several pictures -> padded tensors, with as many box numbers as the model's paper has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interlace.embed.grid import box_numbers
from interlace.embed.regions import Regions
from interlace.errors import UserError
from interlace.regions.arrays import BadRegions, RegionArrays, check_boxes, with_whole

LABELS = ("objects", "attributes")  # padded with -1: not scored


def collate_regions(rows: Sequence[RegionArrays], boxes: int = 4, whole: bool = False) -> dict[str, Tensor]:
    """Regions of B pictures -> a batch, I the most regions any of them has.

    >>> collate_regions([two_regions, three_regions], boxes=7)
    {"region_features": float32 (2, 3, F), "region_boxes": float32 (2, 3, 7), "region_mask": bool (2, 3),
     "region_cells": bool (2, 3)}

    and where the pictures have them `region_confidence` (B, I), `region_beliefs` (B, I, C), `region_objects`,
    `region_attributes` int64 (B, I), `region_objects_confidence`, `region_attributes_confidence` (B, I). Padding is 0,
    in labels -1, False in the mask. `region_cells` are those that may be hidden: the mask without the whole picture.

    Args:
        boxes: numbers per box: 4 corners (LXMERT, VL-BERT), 5 with the area (ViLBERT), 7 with width, height and area
            (UNITER); 0 leaves them out (VisualBERT).
        whole: put the whole picture in front (ViLBERT, VL-BERT).

    Raises UserError for any other number of box numbers, for a box outside its picture or with its corners in the wrong
    order, and for pictures whose features differ in width or of which only some have beliefs or labels: they are of
    different extractors.
    """
    for n, row in enumerate(rows):
        try:
            check_boxes(row.boxes)  # what was read from a file was looked at there; what a program made, was not
        except BadRegions as bad:
            raise UserError(f"picture {n} of {len(rows)}: {bad.reason}.") from None
    rows = [with_whole(row) for row in rows] if whole else rows
    names = set(rows[0].given())
    widths = {(row.features.shape[1], None if row.beliefs is None else row.beliefs.shape[1]) for row in rows}
    if len(widths) > 1 or any(set(row.given()) != names for row in rows):
        raise UserError("regions of different extractors in one batch: features, beliefs or labels differ "
                        f"(features and classes: {sorted(widths, key=str)}).")  # fmt: skip
    counts = np.array([len(row) for row in rows])
    mask = np.arange(counts.max()) < counts[:, None]  # (B, I)
    batch = {"region_mask": torch.from_numpy(mask), "region_cells": torch.from_numpy(mask.copy())}
    batch["region_cells"][:, :whole] = False
    for name in names:
        flat = np.concatenate([getattr(row, name) for row in rows])  # (sum of counts, ...)
        padded = np.full((*mask.shape, *flat.shape[1:]), -1 if name in LABELS else 0,
                         np.int64 if name in LABELS else np.float32)  # fmt: skip
        padded[mask] = flat
        batch[f"region_{name}"] = torch.from_numpy(padded)
    if boxes:
        batch["region_boxes"] = box_numbers(batch["region_boxes"], boxes)
    else:
        del batch["region_boxes"]
    return batch


def to_regions(batch: dict[str, Any]) -> tuple[Regions, Tensor]:
    """The batch's regions as a model takes them: `model(ids, regions, image_mask=mask)`."""
    return Regions(batch["region_features"], batch.get("region_boxes")), batch["region_mask"]
