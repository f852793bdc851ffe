"""Rows -> samples -> batches. All randomness is here, seeded by (seed, epoch, row): whoever loads a row in an epoch, in
whatever order, process or resumed run, gets the same sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from interlace.data.pictures import BadPicture, open_picture
from interlace.data.processor import Processor
from interlace.data.rows import Picture, Question, Source
from interlace.data.states import States
from interlace.errors import UserError
from interlace.objectives.base import Objective


class Drawer:
    """What an objective may draw for a row: another caption, a question about its picture."""

    def __init__(self, source: Source, rows: np.ndarray):
        self.source, self.rows = source, rows  # rows: indices of the training split
        self.asked = QuestionsByRow(source)

    def caption_of_another_group(self, group: str, rng: np.random.Generator, tries: int = 50) -> str:
        """A caption of a row of another group; the empty string when the split has but one group."""
        for _ in range(tries):
            other = self.source.pair(int(self.rows[rng.integers(len(self.rows))]))
            if other.group != group and other.caption.strip():
                return other.caption
        return ""

    def questions_about(self, row: int, rng: np.random.Generator, most: int = 1) -> list[Question]:
        """Up to `most` different questions about the row's picture."""
        mine = self.asked.of(row)
        return [self.source.question(int(n)) for n in rng.permutation(mine)[:most]]


class QuestionsByRow:
    """Position of a pair -> positions of its questions, as two arrays: millions of questions do not become lists."""

    def __init__(self, source: Source):
        owners = source.question_rows()  # (Q,)
        self.order = np.argsort(owners, kind="stable")
        self.owners = owners[self.order]

    def of(self, row: int) -> np.ndarray:
        first, last = np.searchsorted(self.owners, [row, row + 1])
        return self.order[first:last]


class Samples(Dataset):
    """Item (epoch, position) -> a sample. A picture that cannot be read is replaced by the next row of the split that
    can, and travels along as `skipped`, so that the main process counts and lists it."""

    def __init__(self, source: Source, split: str, processor: Processor, objectives: list[Objective], seed: int,
                 augment: bool = True, states: States | None = None):  # fmt: skip
        self.source, self.processor, self.objectives = source, processor, objectives
        self.rows = np.asarray(source.indices(split))
        if not len(self.rows):
            raise UserError(f"{source.name} has no rows in its {split!r} split: give it a split column, or more rows.")
        self.seed, self.augment, self.states = seed, augment, states
        self.draw = Drawer(source, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, int] | int) -> dict[str, Any]:
        epoch, position = item if isinstance(item, tuple) else (0, item)
        skipped: list[tuple[str, str]] = []
        for step in range(min(len(self.rows), 100)):
            place = (position + step) % len(self.rows)
            index = int(self.rows[place])
            row = self.source.pair(index)
            rng = np.random.default_rng([self.seed, epoch, index])
            sample: dict[str, Any] = {"texts": {}, "id": row.id, "group": group_number(row.group), "skipped": skipped}
            try:
                self._show(sample, row.picture, place, rng)
            except BadPicture as bad:
                skipped.append((row.id, bad.reason))
                continue
            for objective in self.objectives:
                objective.prepare(sample, row, index, self.draw, rng)
            return sample
        raise UserError(f"100 rows of {self.source.name} in a row have no readable picture; the last: {skipped[-1]}. "
                        "Run `interlace data check` on the source.")  # fmt: skip


    def _show(self, sample: dict[str, Any], ref: Picture, place: int, rng: np.random.Generator) -> None:
        """Adds the picture, or what the frozen tower said of one of its views. Raises BadPicture."""
        if self.states is not None and self.states.images is not None:
            if place in self.states.unreadable:
                raise BadPicture(self.states.unreadable[place])
            sample["image_states"] = self.states.image(place, int(rng.integers(self.states.views)))
            return
        # cropped pictures keep their detail when decoded at twice the size they end in
        picture = open_picture(ref, size_hint=2 * self.processor.size)
        sample["pixel_values"] = self.processor.picture(picture, rng if self.augment else None)


def group_number(group: str) -> int:
    """A group's name as a 63-bit number that is the same in every process."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big") >> 1


class Collate:
    """Samples -> a batch.

    >>> Collate(processor)([{"pixel_values": (3, 8, 8), "texts": {"caption": "a cat"}, "group": 7, ...}, ...])
    {"pixel_values": uint8 (B, 3, 8, 8), "caption_ids": (B, T), "caption_mask": (B, T), "caption_real": (B,) bool,
     "group": (B,), "ids": [row ids], "skipped": [(id, reason)], and what the objectives added, stacked}
    """

    def __init__(self, processor: Processor, states: States | None = None):
        self.processor, self.states = processor, states

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "ids": [s["id"] for s in samples],
            "skipped": [bad for s in samples for bad in s["skipped"]],
            "group": torch.tensor([s["group"] for s in samples]),
        }
        for name in samples[0]["texts"]:
            texts = [s["texts"][name] for s in samples]
            if self.states is not None and self.states.knows(texts):
                batch[f"{name}_states"], batch[f"{name}_mask"] = self.states.texts(texts)
            else:
                batch[f"{name}_ids"], batch[f"{name}_mask"] = self.processor.texts(texts)
            batch[f"{name}_real"] = torch.tensor([bool(t.strip()) for t in texts])
        for key, value in samples[0].items():
            if isinstance(value, torch.Tensor):
                batch[key] = torch.stack([s[key] for s in samples])
        return batch


class EpochSampler(Sampler):
    """Yields (epoch, position) in an order drawn by (seed, epoch)."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        return iter((self.epoch, int(n)) for n in order)
