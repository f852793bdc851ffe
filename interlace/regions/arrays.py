"""One picture's regions as arrays, and what is demanded of them before a model may see them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from interlace.data.pictures import BadPicture

CLOSE = 1e-3  # a box may leave the picture by so much, and is moved in: half precision rounds by half of it


class BadRegions(BadPicture):
    """This picture's regions cannot be used. A loader that skips pictures it cannot read skips these, too."""


@dataclass
class RegionArrays:
    """What a detector, or a tower's grid, says of one picture. I regions, the surest first where there is an order."""

    features: np.ndarray  # (I, F)
    boxes: np.ndarray  # (I, 4) x1, y1, x2, y2 in parts of the upright original picture, 0 to 1
    confidence: np.ndarray | None = None  # (I,) how sure the detector was of the region
    beliefs: np.ndarray | None = None  # (I, C) a distribution over classes, class 0 = nothing there
    objects: np.ndarray | None = None  # (I,) class of the object, counted from 0 without "nothing"
    objects_confidence: np.ndarray | None = None  # (I,)
    attributes: np.ndarray | None = None  # (I,) likewise
    attributes_confidence: np.ndarray | None = None  # (I,)

    def __len__(self) -> int:
        return len(self.features)

    def take(self, which: slice | np.ndarray) -> RegionArrays:
        """Some of the regions."""
        return RegionArrays(**{name: value[which] for name, value in self.given().items()})

    def given(self) -> dict[str, np.ndarray]:
        """The arrays that are there, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def check_regions(regions: RegionArrays, features: int | None = None, beliefs: int | None = None) -> RegionArrays:
    """The same regions, boxes rounded into the picture. `features`, `beliefs`: numbers a region must have of each.

    Raises BadRegions: no regions, arrays of unequal length, features or beliefs of another width, numbers that are not
    finite, a box outside the picture or with its corners in the wrong order; it names the first such region.
    """
    x, boxes = regions.features, regions.boxes
    if x.ndim != 2 or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise BadRegions(f"expected features (I, F) and boxes (I, 4), got {x.shape} and {boxes.shape}")
    if not x.size:
        raise BadRegions("zero regions")
    for name, value in regions.given().items():
        if value.shape[:1] != x.shape[:1] or value.dtype.kind not in "fiu":
            raise BadRegions(f"{len(x)} regions, but {name} of shape {value.shape} and type {value.dtype}")
        if not np.isfinite(value).all():
            raise BadRegions(f"{name} with NaN or infinity")
    if features is not None and x.shape[1] != features:
        raise BadRegions(f"{x.shape[1]} features per region, expected {features}: another extractor's?")
    if beliefs is not None and regions.beliefs is not None and regions.beliefs.shape[1:] != (beliefs,):
        raise BadRegions(f"beliefs of shape {regions.beliefs.shape}, expected {beliefs} classes per region")
    check_boxes(boxes)
    return replace(regions, boxes=boxes.clip(0, 1))


def check_boxes(boxes: np.ndarray) -> None:
    """(I, 4). Raises BadRegions for none, one outside the picture, or with its corners in the wrong order."""
    if not boxes.size:
        raise BadRegions("zero regions")
    _none_of((boxes[:, 2:] < boxes[:, :2]).any(axis=1), boxes, "with its corners in the wrong order (expected x1, y1, "
             "x2, y2; of x, y, width, height add the sides to the first corner)")  # fmt: skip
    pixels = " (pixels? then the file must say the picture's width and height)" if boxes.max() > 2 else ""
    outside = ((boxes < -CLOSE) | (boxes > 1 + CLOSE)).any(axis=1)
    _none_of(outside, boxes, f"outside the picture, which is 0 to 1{pixels}")


def _none_of(wrong: Any, boxes: np.ndarray, what: str) -> None:
    if wrong.any():
        at = int(wrong.argmax())
        numbers = ", ".join(f"{float(number):.4g}" for number in boxes[at])
        more = f", and {int(wrong.sum()) - 1} more" if wrong.sum() > 1 else ""
        raise BadRegions(f"box {at} of {len(boxes)} ({numbers}){more} {what}")


def with_whole(regions: RegionArrays) -> RegionArrays:
    """The whole picture in front, for ViLBERT (Lu et al. 2019, arXiv:1908.02265, section 3.1) and VL-BERT: its feature
    is the mean of the others', its box the picture. Nobody classified it: beliefs 0, labels -1, confidence 0."""
    out = {}
    for name, value in regions.given().items():
        first: np.ndarray | float = {"features": regions.features.astype(np.float32).mean(0), "objects": -1,
                                     "boxes": np.array([0, 0, 1, 1]), "attributes": -1}.get(name, 0)  # fmt: skip
        out[name] = np.concatenate([np.broadcast_to(first, value[:1].shape).astype(value.dtype), value])
    return RegionArrays(**out)
