"""Features made elsewhere, one .npz file per picture: ours, UNITER's, and what bottom-up detectors write."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from interlace.errors import UserError
from interlace.regions.arrays import BadRegions, RegionArrays, check_regions
from interlace.regions.base import EXTRACTOR, RegionSource

# the array's names, first ours, then those of the releases
NAMES = {
    "features": ("features", "feature", "x", "roi_feats"),
    "boxes": ("boxes", "norm_bb", "bbox", "bboxes"),
    "confidence": ("confidence", "conf"),
    "beliefs": ("beliefs", "soft_labels", "cls_prob"),
    "objects": ("objects", "objects_id"),
    "objects_confidence": ("objects_confidence", "objects_conf"),
    "attributes": ("attributes", "attrs_id"),
    "attributes_confidence": ("attributes_confidence", "attrs_conf"),
    "width": ("width", "image_w", "img_w"),
    "height": ("height", "image_h", "img_h"),
}


def from_arrays(given: Mapping[str, Any]) -> RegionArrays:
    """Arrays under any of `NAMES` -> regions. Boxes in pixels are divided by the width and height beside them; of more
    than four box numbers the first four are the corners. Raises BadRegions when features or boxes are missing."""
    found: dict[str, np.ndarray] = {}
    for name, others in NAMES.items():
        if (key := next((other for other in others if other in given), None)) is not None:
            found[name] = np.asarray(given[key])
    if "features" not in found or "boxes" not in found:
        raise BadRegions(f"expected the arrays features and boxes, got {', '.join(sorted(map(str, given))) or 'none'}")
    width, height = found.pop("width", None), found.pop("height", None)
    boxes = found["boxes"]
    boxes = boxes[:, :4].astype(np.float32) if boxes.ndim == 2 else boxes
    if width is not None and height is not None and boxes.size and boxes.max() > 1.5:
        boxes = boxes / np.array([width, height] * 2, np.float32).reshape(4)
    found["boxes"] = boxes
    return RegionArrays(**found)


def read_npz(file: Path | IO[bytes]) -> RegionArrays:
    """Raises BadRegions for a file that is no .npz, is damaged, or holds pickled objects (they are not read)."""
    try:
        arrays = np.load(file, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise BadRegions("not an .npz file")
        with arrays:
            known = {other for others in NAMES.values() for other in others}
            return from_arrays({name: arrays[name] for name in arrays.files if name in known})
    except (OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise BadRegions(f"cannot be read as .npz ({error})") from None
    except ValueError as error:
        why = "holds pickled objects, which are not read" if "pickle" in str(error).lower() else str(error)
        raise BadRegions(f"cannot be read as .npz ({why})") from None


class NpzFolder(RegionSource):
    """`folder`/KEY.npz, in subfolders too. `regions`: at most so many of a picture, its first."""

    def __init__(self, folder: str | Path, regions: int | None = None):
        self.folder, self.regions = Path(folder).expanduser(), regions
        self.name = str(self.folder)
        first = next(self.folder.rglob("*.npz"), None)
        if first is None:
            raise UserError(f"no .npz files in {self.folder}; expected one per picture, named after it.")
        try:
            example = read_npz(first)
            self.features_size = check_regions(example).features.shape[1]
        except BadRegions as bad:
            raise UserError(f"{first}: {bad.reason}") from None
        self.beliefs_size = 0 if example.beliefs is None else example.beliefs.shape[-1]
        self.facts = foreign(self.folder, self.features_size, self.beliefs_size)

    def _file(self, key: str) -> Path | None:
        file = self.folder / f"{key.removesuffix('.npz')}.npz"
        # a row's id comes from a table: it must not lead out of the folder
        return file if ".." not in file.parts and file.is_relative_to(self.folder) and file.is_file() else None

    def find(self, key: str) -> RegionArrays | None:
        if (file := self._file(key)) is None:
            return None
        return check_regions(read_npz(file), self.features_size, self.beliefs_size).take(slice(self.regions))

    def __contains__(self, key: str) -> bool:
        return self._file(key) is not None

    def __len__(self) -> int:
        return sum(1 for _ in self.keys())

    def keys(self) -> Iterator[str]:
        for file in self.folder.rglob("*.npz"):
            yield file.relative_to(self.folder).with_suffix("").as_posix()


def foreign(folder: Path, features: int, beliefs: int) -> dict[str, Any]:
    """Facts about features somebody else made. The files do not say by what, so beyond their widths nothing is known
    unless `extractor.json` lies beside them: an object with whatever tells one extractor from another."""
    facts: dict[str, Any] = {"kind": "given", "features": features, "beliefs": beliefs}
    file = folder / EXTRACTOR
    if file.is_file():
        try:
            facts["said"] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is not JSON: {error}") from None
    return facts
