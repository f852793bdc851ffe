"""What regions are asked for: by a row, from whatever keeps them. One class per kind of keeper reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from interlace.data.rows import Pair, Picture
from interlace.errors import UserError
from interlace.regions.arrays import BadRegions, RegionArrays

if TYPE_CHECKING:
    from interlace.data.rows import Source

# of an extractor's facts those that are for people, or to make it again: they do not change what comes out
APART = ("name", "classes", "asked_size")
EXTRACTOR = "extractor.json"  # beside features made elsewhere: what made them, in your words


def fingerprint(facts: dict[str, Any]) -> str:
    """Of an extractor: equal where weights, size, fit and settings are. Names and places do not count."""
    plain = {name: value for name, value in facts.items() if name not in APART}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:32]


class Shown(NamedTuple):
    """A row's picture without the row: what a question is about."""

    id: str  # the row's
    picture: Picture


class RegionSource:
    """Regions by key. Picklable: a loader's worker opens files of its own, when it first reads.

    `facts`: what made them. `features_size`: numbers per region. `beliefs_size`: classes per region, 0 = no beliefs.
    """

    name: str
    facts: dict[str, Any]
    features_size: int
    beliefs_size: int = 0

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.facts)

    def get(self, key: str) -> RegionArrays:
        """Checked regions of one picture. Raises BadRegions when there are none of that key, or unusable ones."""
        found = self.find(key)
        if found is None:
            raise BadRegions(f"no features of {key} in {self.name}")
        return found

    def of(self, row: Pair | Shown) -> RegionArrays:
        """Likewise of the row's picture: by where the picture is, by the row's id, by the picture's file name."""
        for key in self.keys_of(row.id, row.picture):
            if (found := self.find(key)) is not None:
                return found
        raise BadRegions(f"no features in {self.name}")

    def find(self, key: str) -> RegionArrays | None:
        """None when the key is not there."""
        raise NotImplementedError

    def __contains__(self, key: str) -> bool:
        raise NotImplementedError

    def __len__(self) -> int:
        """Pictures."""
        raise NotImplementedError

    def keys(self) -> Iterator[str]:
        raise NotImplementedError

    def keys_of(self, id: str, picture: Picture) -> list[str]:
        """Keys a row's picture may have here, the surest first."""
        name = PurePath(picture.path or "")
        return list(dict.fromkeys(key for key in (id, name.stem, name.name, name.stem.lower()) if key))

    def missing(self, source: Source, rows: np.ndarray | None = None) -> list[str]:
        """Ids of the rows (positions in the source; None: all) whose pictures have no regions here."""
        chosen = range(len(source)) if rows is None else rows
        lost = []
        for n in chosen:
            row = source.pair(int(n))
            if not any(key in self for key in self.keys_of(row.id, row.picture)):
                lost.append(row.id)
        return lost

    def require(self, fingerprint: str, features: int | None = None) -> None:
        """Raises UserError when these are not regions of the extractor with this fingerprint, or have not `features`
        numbers each."""
        if features is not None and features != self.features_size:
            raise UserError(f"The model reads {features} features per region, {self.name} has {self.features_size}: "
                            "extract again with the extractor the model was trained with.")  # fmt: skip
        if fingerprint != self.fingerprint:
            raise UserError(f"{self.name} holds regions of another extractor than the run was trained with (expected "
                            f"fingerprint {fingerprint}, got {self.fingerprint}: {describe(self.facts)}). Extract "
                            "again with the run's extractor, or train again on these.")  # fmt: skip


def describe(facts: dict[str, Any]) -> str:
    """One line for people."""
    long = ("classes", "asked_size", "mean", "std")
    return ", ".join(f"{name} {value}" for name, value in facts.items() if name not in long)
