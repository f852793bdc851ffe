"""Features of the UNITER release (Chen et al. 2020): an LMDB whose values are .npz files, or arrays in msgpack.

Values are decoded by hand, since the usual decoder of arrays in msgpack unpickles those of objects. ViLBERT's LMDB
(Lu et al. 2019) holds pickles throughout, and a pickle can run any program: it is refused.
"""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from interlace.errors import UserError
from interlace.regions.arrays import BadRegions, RegionArrays, check_regions
from interlace.regions.base import RegionSource
from interlace.regions.npz import foreign, from_arrays, read_npz

NAMES_KEY = b"__keys__"  # UNITER's list of all keys, itself no picture
PICKLE, ZIP, LZ4 = b"\x80", b"PK", b"\x04\x22\x4d\x18"


def array(value: Any) -> Any:
    """An array as msgpack-numpy writes it, {nd, type, kind, shape, data} -> the array; anything else as it is."""
    if not isinstance(value, dict) or not ("nd" in value or b"nd" in value):
        return value
    plain = {name.decode() if isinstance(name, bytes) else name: part for name, part in value.items()}
    kind = plain["type"].decode() if isinstance(plain.get("type"), bytes) else plain.get("type")
    if plain.get("kind") not in (None, b"", "") or not isinstance(kind, str) or kind[1:2] not in tuple("fiu"):
        raise BadRegions(f"an array of {kind!r}, which is not read: expected numbers")
    return np.frombuffer(plain["data"], np.dtype(kind)).reshape(plain["shape"] if plain["nd"] else ())


def decode(value: bytes) -> RegionArrays:
    """Raises BadRegions for what is damaged, UserError for a pickle and for a package that is not installed."""
    if value[:4] == LZ4:
        value = _package("lz4.frame").decompress(value)
    if value[:2] == ZIP:
        return read_npz(io.BytesIO(value))
    if value[:1] == PICKLE:
        raise UserError("These values are pickles, as in ViLBERT's release, and pickles are not read: they can run any "
                        "program. Unpickle them where you trust them, and write a folder of .npz files with the "
                        "arrays features, boxes, width and height.")  # fmt: skip
    try:
        given = _package("msgpack").unpackb(value, object_hook=array, raw=False, strict_map_key=False)
    except (ValueError, TypeError, KeyError) as error:
        raise BadRegions(f"neither .npz nor msgpack ({error})") from None
    if not isinstance(given, dict):
        raise BadRegions("a value that is no table of arrays")
    return from_arrays({name.decode() if isinstance(name, bytes) else name: part for name, part in given.items()})


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"These features need the package {name.split('.')[0]}: pip install interlace[lmdb]") from None


class RegionLMDB(RegionSource):
    """`path`: the folder with data.mdb, or the file. `regions`: at most so many of a picture, its first.

    Raises UserError for a database without pictures, or one of pickles.
    """

    def __init__(self, path: str | Path, regions: int | None = None):
        self.path, self.regions = Path(path).expanduser(), regions
        self.name = str(self.path)
        with self._env.begin() as look:
            key, example = next(((k, v) for k, v in look.cursor() if k != NAMES_KEY), (b"", b""))
        if not key:
            raise UserError(f"{self.path} holds no pictures.")
        try:
            regions_of_it = check_regions(decode(example))
        except (BadRegions, UserError) as error:
            raise UserError(f"{self.path}, key {key.decode('utf-8', 'replace')}: {error}") from None
        self.features_size = regions_of_it.features.shape[1]
        self.beliefs_size = 0 if regions_of_it.beliefs is None else regions_of_it.beliefs.shape[1]
        self.facts = foreign(self.path if self.path.is_dir() else self.path.parent, self.features_size,
                             self.beliefs_size)  # fmt: skip

    @property
    def _env(self) -> Any:
        return _environment(self.path.resolve(), os.getpid())

    def _value(self, key: str) -> bytes | None:
        with self._env.begin() as look:
            for name in (key, f"{key}.npz"):
                # LMDB takes keys of 1 to 511 bytes
                if 0 < len(name.encode()) <= 511 and (value := look.get(name.encode())) is not None:
                    return value
        return None

    def find(self, key: str) -> RegionArrays | None:
        if (value := self._value(key)) is None:
            return None
        return check_regions(decode(value), self.features_size, self.beliefs_size).take(slice(self.regions))

    def __contains__(self, key: str) -> bool:
        return self._value(key) is not None

    def __len__(self) -> int:
        with self._env.begin() as look:
            return look.stat()["entries"] - (look.get(NAMES_KEY) is not None)

    def keys(self) -> Iterator[str]:
        with self._env.begin() as look:
            for key in look.cursor().iternext(values=False):
                if key != NAMES_KEY:
                    yield key.decode("utf-8", "replace").removesuffix(".npz")


@cache
def _environment(path: Path, pid: int) -> Any:
    """One per process, for LMDB opens a file only once in each, and none survives a fork."""
    lmdb = _package("lmdb")
    try:
        return lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise UserError(f"{path} is no LMDB that can be read: {error}") from None
