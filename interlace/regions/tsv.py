"""Features of the LXMERT release (Tan & Bansal 2019): a TSV of tens of gigabytes, a picture a line, arrays in base64.

A line is read by its place in the file. The places are found once, in a pass over the file, and kept in the cache.
Bottom-up-attention's own TSV of six columns (Anderson et al. 2018, arXiv:1707.07998) is read, too.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from interlace.bars import bar
from interlace.data.cache import cache_folder
from interlace.errors import UserError
from interlace.regions.arrays import BadRegions, RegionArrays, check_regions
from interlace.regions.base import RegionSource
from interlace.regions.keys import Keys
from interlace.regions.npz import foreign, from_arrays

LXMERT = ("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes",
          "features")  # fmt: skip
BOTTOM_UP = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
TYPES = {"objects_id": np.int64, "objects_conf": np.float32, "attrs_id": np.int64, "attrs_conf": np.float32,
         "boxes": np.float32, "features": np.float32}  # fmt: skip


class RegionTSV(RegionSource):
    """`file`: without a header line, ten columns (LXMERT) or six. `regions`: at most so many of a picture, its first.

    Raises UserError for a file that is empty or has other columns.
    """

    def __init__(self, file: str | Path, regions: int | None = None):
        self.file, self.regions = Path(file).expanduser().resolve(), regions
        self.name = str(self.file)
        with open(self.file, "rb") as lines:
            first = lines.readline()
        self.columns = {len(c): c for c in (LXMERT, BOTTOM_UP)}.get(first.count(b"\t") + 1, ())
        if not self.columns:
            raise UserError(f"{self.file}: expected 10 columns ({', '.join(LXMERT)}) or 6 ({', '.join(BOTTOM_UP)}) "
                            f"separated by tabs, got {first.count(9) + 1}.")  # fmt: skip
        try:
            self.features_size = check_regions(self._parse(first)).features.shape[1]
        except BadRegions as bad:
            raise UserError(f"{self.file}, its first line: {bad.reason}") from None
        self.facts = foreign(self.file.parent, self.features_size, 0)
        self._keys: Keys | None = None
        self._ends = np.empty(0, np.int64)  # (pictures,) byte after each line
        self._fd: int | None = None

    def _parse(self, line: bytes) -> RegionArrays:
        cells = line.rstrip(b"\r\n").split(b"\t")
        if len(cells) != len(self.columns):
            raise BadRegions(f"a line of {len(cells)} columns, expected {len(self.columns)}: truncated?")
        row: dict[str, Any] = dict(zip(self.columns, cells))
        try:
            count = int(row["num_boxes"])
            given: dict[str, Any] = {name: int(row[name]) for name in row if name.endswith(("_h", "_w"))}
            for name in row.keys() & TYPES.keys():
                data = np.frombuffer(base64.b64decode(row[name], validate=True), TYPES[name])
                given[name] = data.reshape(count, -1) if name in ("boxes", "features") else data
        except (ValueError, binascii.Error) as error:
            raise BadRegions(f"a line that cannot be read ({error})") from None
        return from_arrays(given)

    def _index(self) -> Keys:
        """Opened on first use, in each process anew."""
        if self._keys is None:
            status = os.stat(self.file)
            mark = hashlib.sha256(f"{self.file} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:32]
            kept = cache_folder() / "regions" / f"{mark}.npz"
            kept.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{kept}.lock"):
                if not kept.is_file():
                    self._pass(kept, status.st_size)
            with np.load(kept, allow_pickle=False) as arrays:
                self._keys, self._ends = Keys(arrays["text"], arrays["starts"]), arrays["ends"]
            self._fd = os.open(self.file, os.O_RDONLY)
        return self._keys

    def _pass(self, kept: Path, size: int) -> None:
        names, ends, end = [], [], 0
        with open(self.file, "rb") as lines, bar(total=size, unit="B", unit_scale=True, desc="places of lines") as done:
            for line in lines:
                end += len(line)
                names.append(line.split(b"\t", 1)[0].decode("utf-8", "replace"))
                ends.append(end)
                done.update(len(line))
        text, starts = Keys.pack(names)
        aside = kept.with_suffix(".part.npz")
        np.savez(aside, text=text, starts=starts, ends=np.array(ends, np.int64))
        os.replace(aside, kept)

    def find(self, key: str) -> RegionArrays | None:
        if (at := self._index().at(key)) is None:
            return None
        assert self._fd is not None
        start = int(self._ends[at - 1]) if at else 0
        line = os.pread(self._fd, int(self._ends[at]) - start, start)  # no shared file position: workers may be forks
        return check_regions(self._parse(line), self.features_size).take(slice(self.regions))

    def __contains__(self, key: str) -> bool:
        return self._index().at(key) is not None

    def __len__(self) -> int:
        return len(self._index())

    def keys(self) -> Iterator[str]:
        return iter(self._index())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_keys": None, "_fd": None, "_ends": np.empty(0, np.int64)}

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            os.close(self._fd)  # type: ignore[arg-type]
