"""The micro-batches of one optimiser step. Words and targets of all are held; of the pictures as many as may be, and
the rest are read again when their turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

Batch = dict[str, Any]
Item = tuple[int, ...]  # (epoch, position) or (epoch, position, pass): what `Samples` takes
Read = Callable[[list[list[Item]]], Iterator[Batch]]


def pictures_of(batch: Batch) -> Batch:
    """What a batch knows of its pictures: pixels, kept states or regions."""
    return {k: v for k, v in batch.items() if k in ("pixel_values", "image_states") or k.startswith("region_")}


def items_of(item: torch.Tensor) -> list[Item]:
    """(B, 2 or 3) -> what `Samples` takes."""
    return [tuple(row) for row in item.tolist()]


class Step:
    """Iterating gives the micro-batches whole, once: what was used is let go."""

    def __init__(self, read: Read, hold: float):
        """`read`: lists of items -> their pictures. `hold`: bytes of pictures, in main memory."""
        self.read, self.hold, self.held = read, hold, 0
        self.rest: list[Batch] = []  # micro-batches without their pictures
        self.pictures: list[Batch | None] = []  # None: to be read again

    def add(self, batch: Batch) -> None:
        pictures = pictures_of(batch)
        self.rest.append({k: v for k, v in batch.items() if k not in pictures})
        size = sum(t.nbytes for t in pictures.values())
        if self.held + size <= self.hold:
            self.held += size
            self.pictures.append({k: t.to("cpu") for k, t in pictures.items()})
        else:
            self.pictures.append(None)

    def __len__(self) -> int:
        return len(self.rest)

    def __iter__(self) -> Iterator[Batch]:
        again = self.read([items_of(b["item"]) for b, p in zip(self.rest, self.pictures) if p is None])
        for n, rest in enumerate(self.rest):
            pictures, self.pictures[n] = self.pictures[n], None
            yield {**rest, **(next(again) if pictures is None else pictures)}
