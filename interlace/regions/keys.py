"""Millions of names as three arrays: some 40 bytes each, where a dict of them would take 300."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np


def hash64(name: str) -> int:
    """The same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


class Keys:
    """Names in UTF-8 one after another: `text` uint8, `starts` (N + 1,). Of equal names the last counts."""

    def __init__(self, text: np.ndarray, starts: np.ndarray):
        self.text, self.starts = text, starts
        hashes = np.fromiter((hash64(name) for name in self), np.int64, len(self))
        self.order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.order]

    @staticmethod
    def pack(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """-> text, starts."""
        coded = [name.encode() for name in names]
        starts = np.concatenate([[0], np.cumsum([len(name) for name in coded], dtype=np.int64)])
        return np.frombuffer(b"".join(coded), np.uint8), starts.astype(np.int64)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, n: int) -> str:
        return self.text[self.starts[n] : self.starts[n + 1]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return (self[n] for n in range(len(self)))

    def at(self, name: str) -> int | None:
        """Position of the last key of that name."""
        hashed = hash64(name)
        low, high = np.searchsorted(self.hashes, hashed), np.searchsorted(self.hashes, hashed, "right")
        for place in self.order[low:high][::-1]:
            if self[int(place)] == name:
                return int(place)
        return None
