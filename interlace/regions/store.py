"""Regions on disk: chunks that are written once, each a safetensors file, and what extractor they are of.

A chunk is written aside, flushed to the disk and renamed, so it is there in full or not at all, and what was reported
as kept survives a kill. A chunk knows its pictures' keys; a picture extracted again stands in a later chunk, which
counts. Reading maps the chunks and copies one picture's regions.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from interlace import __version__
from interlace.data.rows import Pair, Picture
from interlace.errors import UserError
from interlace.regions.arrays import BadRegions, RegionArrays, check_regions
from interlace.regions.base import RegionSource, Shown
from interlace.regions.keys import Keys

STORE, CHUNK = "store.json", "chunk-{:06d}.safetensors"
VERSION = 1
REGION = "region."  # before the names of arrays that have a row for each region
OPEN_CHUNKS = 256  # mapped at once; a process has 1,024 open files on most systems
# features and beliefs at half precision: what they lose is far below what a detector's noise is
DTYPES = {"features": np.float16, "beliefs": np.float16, "objects": np.int32, "attributes": np.int32}


@dataclass(frozen=True)
class Stamp:
    """Tells whether a picture's file is the one that was looked at: its length, and when it was written."""

    bytes: int
    written: int  # ns; 0 for bytes that are no file

    @classmethod
    def of(cls, picture: Picture) -> Stamp:
        """Raises OSError when the file is not there."""
        if picture.data is not None:
            return cls(len(picture.data), 0)
        status = os.stat(picture.path or "")
        return cls(picture.length or status.st_size, status.st_mtime_ns)


class RegionStore(RegionSource):
    """A store that `extract` wrote, read only. Open one with `RegionStore.open`."""

    def __init__(self, folder: Path, plain: dict[str, Any], regions: int | None = None):
        self.folder, self.regions = folder, regions
        self.name = str(folder)
        self.facts = plain["extractor"]
        self.features_size: int = plain["features"]
        self.beliefs_size: int = plain["beliefs"]
        self._forget()

    @classmethod
    def open(cls, folder: str | Path, regions: int | None = None) -> RegionStore:
        """`regions`: at most so many of a picture, its first. Raises UserError for a folder that holds no store, or
        one of a newer version."""
        folder = Path(folder).expanduser()
        plain = read_store(folder)
        if plain is None:
            raise UserError(f"{folder} holds no regions: no {STORE}. Make them with: interlace extract DATA {folder}")
        return cls(folder, plain, regions)

    def _forget(self) -> None:
        self._keys: Keys | None = None
        self._chunk = np.empty(0, np.int32)  # (keys,) number of the chunk each key's picture is in
        self._picture = np.empty(0, np.int32)  # (keys,) and its place there
        self._stamps: dict[int, np.ndarray] = {}  # chunk -> (pictures, 2) int64
        self._files: OrderedDict[int, tuple[Any, np.ndarray]] = OrderedDict()  # chunk -> (mapped file, starts)

    def _index(self) -> Keys:
        """Read on first use, in each process anew."""
        if self._keys is None:
            texts, starts, chunks, pictures, end = [], [np.zeros(1, np.int64)], [], [], 0
            for number in chunk_numbers(self.folder):
                with self._map(number) as file:
                    text, own, owner = (file.get_tensor(name) for name in ("key_text", "key_starts", "key_owner"))
                    self._stamps[number] = file.get_tensor("stamps")
                texts.append(text)
                starts.append(own[1:] + end)
                end += int(own[-1])
                chunks.append(np.full(len(owner), number, np.int32))
                pictures.append(owner)
            none = [np.empty(0, np.int32)]
            self._chunk, self._picture = np.concatenate(chunks or none), np.concatenate(pictures or none)
            self._keys = Keys(np.concatenate(texts or [np.empty(0, np.uint8)]), np.concatenate(starts))
        return self._keys

    def _map(self, number: int) -> Any:
        file = self.folder / CHUNK.format(number)
        try:
            return safe_open(file, "numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({error}). Delete it and run interlace extract again: only its "
                            "pictures are looked at again.") from None  # fmt: skip

    def _read(self, number: int, picture: int) -> RegionArrays:
        if number not in self._files:
            file = self._map(number)
            self._files[number] = file, file.get_tensor("starts")
            if len(self._files) > OPEN_CHUNKS:
                self._files.popitem(last=False)
        file, starts = self._files[number]
        self._files.move_to_end(number)
        first, last = int(starts[picture]), int(starts[picture + 1])
        last = last if self.regions is None else min(last, first + self.regions)
        names = [name for name in file.keys() if name.startswith(REGION)]  # noqa: SIM118 (not a dict)
        return RegionArrays(**{name.removeprefix(REGION): file.get_slice(name)[first:last] for name in names})

    def keys_of(self, id: str, picture: Picture) -> list[str]:
        # the file first: two tables may use one id for different pictures
        return [place(picture), id]

    def of(self, row: Pair | Shown) -> RegionArrays:
        """As of all. Raises BadRegions, too, when the id's picture was a file of another length when it was extracted:
        ids of another table, or a picture that was exchanged."""
        at = self._index().at(place(row.picture))
        if at is None and (at := self._index().at(row.id)) is not None:
            then = int(self._stamps[int(self._chunk[at])][self._picture[at], 0])
            with suppress(OSError):  # a picture that is not there any more cannot be another
                if (now := Stamp.of(row.picture).bytes) != then:
                    raise BadRegions(f"its features are of another picture ({then} bytes then, {now} now)")
        if at is None:
            raise BadRegions(f"no features in {self.name}")
        return self._read(int(self._chunk[at]), int(self._picture[at]))

    def find(self, key: str) -> RegionArrays | None:
        at = self._index().at(key)
        return None if at is None else self._read(int(self._chunk[at]), int(self._picture[at]))

    def stamp(self, key: str) -> Stamp | None:
        """Of the file that was extracted under this key."""
        at = self._index().at(key)
        return None if at is None else Stamp(*self._stamps[int(self._chunk[at])][self._picture[at]].tolist())

    def __contains__(self, key: str) -> bool:
        return self._index().at(key) is not None

    def __len__(self) -> int:
        self._index()
        return len(np.unique(np.stack([self._chunk, self._picture]), axis=1).T)

    def keys(self) -> Iterator[str]:
        return iter(dict.fromkeys(self._index()))

    def counts(self) -> np.ndarray:
        """(pictures,) regions of each, in the order they were extracted."""
        per_chunk = []
        for number in chunk_numbers(self.folder):
            with self._map(number) as file:
                per_chunk.append(np.diff(file.get_tensor("starts")))
        return np.concatenate(per_chunk or [np.empty(0, np.int64)])

    @property
    def bytes(self) -> int:
        return sum((self.folder / CHUNK.format(n)).stat().st_size for n in chunk_numbers(self.folder))

    def __getstate__(self) -> dict[str, Any]:
        other = RegionStore.__new__(RegionStore)
        other.__dict__.update(self.__dict__)
        other._forget()
        return other.__dict__


def place(picture: Picture) -> str:
    """The key of a picture by where it is. No row's id looks like one."""
    return f"file:{picture}"


def chunk_numbers(folder: Path) -> list[int]:
    return sorted(int(file.stem.removeprefix("chunk-")) for file in folder.glob("chunk-*.safetensors"))


def read_store(folder: Path) -> dict[str, Any] | None:
    """What the store says of itself; None where there is none. Raises UserError for one that cannot be read."""
    file = folder / STORE
    if not file.is_file():
        return None
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        version = plain["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): delete the folder and extract again.") from None
    if version != VERSION:
        raise UserError(f"{folder} was written by interlace {plain.get('interlace')} in form {version}; this one reads "
                        f"form {VERSION}. Extract again into another folder.")  # fmt: skip
    return plain


class Writer:
    """Appends to the store in `folder`, which it makes. One process at a time: the caller holds the lock."""

    def __init__(self, folder: Path, facts: dict[str, Any], features: int, beliefs: int):
        self.folder, self.features, self.beliefs = folder, features, beliefs
        for left in folder.glob("*.part"):  # of a process that was killed
            left.unlink()
        if read_store(folder) is None:
            plain = {"version": VERSION, "interlace": __version__, "extractor": facts, "features": features,
                     "beliefs": beliefs}  # fmt: skip
            durable(folder / STORE, (json.dumps(plain, indent=2) + "\n").encode())
        self.next = max(chunk_numbers(folder), default=-1) + 1
        self.waiting: list[tuple[list[str], Stamp, RegionArrays]] = []
        self.size = 0  # bytes that wait

    def add(self, keys: list[str], stamp: Stamp, regions: RegionArrays) -> None:
        """Checks, and keeps for the next commit. Raises BadRegions."""
        if len(keys) == 0:
            raise ValueError("a picture without a key cannot be found again")
        regions = check_regions(regions, self.features, self.beliefs or None)
        with np.errstate(over="ignore"):  # what overflows is refused below
            stored = RegionArrays(**{k: v.astype(DTYPES.get(k, np.float32)) for k, v in regions.given().items()})
        if not np.isfinite(stored.features).all():
            raise BadRegions(f"features up to {np.abs(regions.features).max():.3g}, which half precision cannot hold")
        self.waiting.append((keys, stamp, stored))
        self.size += sum(value.nbytes for value in stored.given().values())

    def commit(self) -> int:
        """Writes what waits as one chunk; it is on the disk when this returns. -> pictures written."""
        if not self.waiting:
            return 0
        names = [key for keys, _, _ in self.waiting for key in keys]
        text, key_starts = Keys.pack(names)
        owner = np.repeat(np.arange(len(self.waiting), dtype=np.int32), [len(keys) for keys, _, _ in self.waiting])
        counts = [len(regions) for _, _, regions in self.waiting]
        tensors = {"key_text": text.copy(), "key_starts": key_starts, "key_owner": owner,
                   "starts": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
                   "stamps": np.array([(s.bytes, s.written) for _, s, _ in self.waiting], np.int64)}  # fmt: skip
        for name in self.waiting[0][2].given():
            tensors[f"{REGION}{name}"] = np.concatenate([getattr(regions, name) for _, _, regions in self.waiting])
        durable(self.folder / CHUNK.format(self.next), save(tensors))
        done = len(self.waiting)
        self.waiting, self.size, self.next = [], 0, self.next + 1
        return done


def durable(file: Path, data: bytes) -> None:
    """Written aside, flushed, renamed, and the folder flushed: after it returns, a power cut does not undo it."""
    aside = file.with_name(file.name + ".part")
    with open(aside, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(aside, file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
