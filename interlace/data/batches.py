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
from interlace.data.rows import Pair, Question, Source
from interlace.data.states import States, view_of
from interlace.errors import UserError
from interlace.objectives.base import Objective, Pass
from interlace.regions.base import RegionSource
from interlace.regions.collate import collate_regions


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

    def question_about_another_group(self, group: str, rng: np.random.Generator, tries: int = 50) -> str:
        """A question about a picture of another group; the empty string when hardly any other has one."""
        for _ in range(tries):
            row = int(self.rows[rng.integers(len(self.rows))])
            if self.source.group(row) != group and (found := self.questions_about(row, rng, 1)):
                return found[0].question
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
    """Item (epoch, position) or (epoch, position, pass drawn) -> a sample. A picture that cannot be read is replaced by
    the next row of the split that can, and travels along as `skipped`, so that the main process counts and lists it."""

    def __init__(self, source: Source, split: str, processor: Processor, passes: list[Pass] | list[Objective],
                 seed: int, augment: bool = True, states: States | None = None,
                 regions: RegionSource | None = None):  # fmt: skip
        self.source, self.processor = source, processor
        self.passes = [one if isinstance(one, Pass) else Pass([(one, 1.0)]) for one in passes]
        self.rows = np.asarray(source.indices(split))
        if not len(self.rows):
            raise UserError(f"{source.name} has no rows in its {split!r} split: give it a split column, or more rows.")
        self.seed, self.augment, self.states, self.regions = seed, augment, states, regions
        self.draw = Drawer(source, self.rows)
        self.pixels = any(objective.reads_pixels for one in self.passes for objective, _ in one.objectives)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, ...] | int) -> dict[str, Any]:
        epoch, position, *drawn = item if isinstance(item, tuple) else (0, item)
        skipped: list[tuple[str, str]] = []
        for step in range(min(len(self.rows), 100)):
            place = (position + step) % len(self.rows)
            index = int(self.rows[place])
            row = self.source.pair(index)
            rng = np.random.default_rng([self.seed, epoch, index])
            sample: dict[str, Any] = {"texts": {}, "id": row.id, "group": group_number(row.group), "skipped": skipped,
                                      "item": torch.tensor([epoch, position, *drawn])}  # fmt: skip
            try:
                self._show(sample, row, place, index, rng)
            except BadPicture as bad:
                skipped.append((row.id, bad.reason))
                continue
            sample["lot"], sample["parts"] = (self.seed, epoch, index), []
            for number, one in enumerate(self.passes):
                wanted = not drawn or drawn[0] == number
                sample["parts"].append(self._part(sample, one, row, index, rng) if wanted else None)
            return sample
        raise UserError(f"100 rows of {self.source.name} in a row have no readable picture; the last: {skipped[-1]}. "
                        "Run `interlace data check` on the source.")  # fmt: skip

    def _part(self, sample: dict[str, Any], one: Pass, row: Pair, index: int,
              rng: np.random.Generator) -> dict[str, Any]:  # fmt: skip
        """What the pass alone sees of the row: its sentence, and what its objectives add."""
        sample["part"] = {"text": row.caption}
        for objective in one.in_stages():
            objective.prepare(sample, row, index, self.draw, rng)
        part = sample.pop("part")
        if one.fused:
            sample["texts"]["caption"] = row.caption
        return part

    def _show(self, sample: dict[str, Any], row: Pair, place: int, index: int, rng: np.random.Generator) -> None:
        """Adds the picture, its stored regions, or what the frozen tower said of one of its views, and that view where
        its pixels are wanted too. Raises BadPicture."""
        if self.regions is not None:
            sample["regions"] = self.regions.of(row)
            return
        if self.states is not None and self.states.images is not None:
            if place in self.states.unreadable:
                raise BadPicture(self.states.unreadable[place])
            view = int(rng.integers(self.states.views))
            sample["image_states"] = self.states.image(place, view)
            if self.pixels:
                picture = open_picture(row.picture, size_hint=2 * self.processor.size)
                sample["pixel_values"] = view_of(picture, self.processor, view, index)
            return
        # cropped pictures keep their detail when decoded at twice the size they end in
        picture = open_picture(row.picture, size_hint=2 * self.processor.size)
        sample["pixel_values"] = self.processor.picture(picture, rng if self.augment else None)


def group_number(group: str) -> int:
    """A group's name as a 63-bit number that is the same in every process."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big") >> 1


class Collate:
    """Samples -> a batch.

    >>> Collate(processor)([{"pixel_values": (3, 8, 8), "texts": {"caption": "a cat"}, "group": 7, ...}, ...])
    {"pixel_values": uint8 (B, 3, 8, 8), "caption_ids": (B, T), "caption_mask": (B, T), "caption_real": (B,) bool,
     "group": (B,), "item": (B, 2 or 3) what was asked of `Samples`, "ids": [row ids], "skipped": [(id, reason)],
     "parts": [one dict a pass, None = not drawn], and what the objectives added, stacked}

    `passes`: those of the samples. `cells` (I,) bool: which cells of a picture may be hidden, where all have as many.
    `boxes`: of stored regions, how many numbers a box has and whether the whole picture comes first.
    """

    def __init__(self, processor: Processor, states: States | None = None, passes: list[Pass] | None = None,
                 cells: torch.Tensor | None = None, boxes: tuple[int, bool] = (4, False)):  # fmt: skip
        self.processor, self.states, self.passes = processor, states, passes or []
        self.cells = torch.zeros(0, dtype=torch.bool) if cells is None else cells
        self.boxes = boxes
        self.by_words = {name for one in self.passes for objective, _ in one.objectives for name in objective.by_words}

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "ids": [s["id"] for s in samples],
            "skipped": [bad for s in samples for bad in s["skipped"]],
            "group": torch.tensor([s["group"] for s in samples]),
        }
        for name in samples[0]["texts"]:
            texts = [s["texts"][name] for s in samples]
            if self.states is not None and name not in self.by_words and self.states.knows(texts):
                batch[f"{name}_states"], batch[f"{name}_mask"] = self.states.texts(texts)
            else:
                batch[f"{name}_ids"], batch[f"{name}_mask"] = self.processor.texts(texts)
            batch[f"{name}_real"] = torch.tensor([bool(t.strip()) for t in texts])
        for key, value in samples[0].items():
            if isinstance(value, torch.Tensor):
                batch[key] = torch.stack([s[key] for s in samples])
        if "regions" in samples[0]:
            batch |= collate_regions([s["regions"] for s in samples], *self.boxes)
        batch["parts"] = [self._part(number, one, samples, batch) for number, one in enumerate(self.passes)]
        return batch

    def _part(self, number: int, one: Pass, samples: list[dict], batch: dict[str, Any]) -> dict[str, Any] | None:
        """The pass's own tensors: its words with some hidden, the parts of the picture to hide, targets."""
        given = [s["parts"][number] for s in samples]
        if given[0] is None:
            return None
        tensors = [key for key, value in given[0].items() if isinstance(value, torch.Tensor)]
        part = {key: torch.stack([p[key] for p in given]) for key in tensors}
        if not one.fused:
            return part
        texts = [p["text"] for p in given]
        part["text_real"] = torch.tensor([bool(t.strip()) for t in texts])
        other = any(p["text"] != s["texts"]["caption"] for p, s in zip(given, samples))
        if other or one.corrupts or one.limits_sight:  # else the caption's half serves, which other passes read too
            part |= self.processor.tokens(texts)
        if one.corrupts:
            part["cells"] = batch.get("region_cells", self.cells.expand(len(samples), -1))
            rngs = [np.random.default_rng([*s["lot"], number]) for s in samples]
            for objective, _ in one.objectives:
                objective.corrupt(part, rngs, self.processor)
            del part["cells"], part["text_words"]
        return part


class EpochSampler(Sampler):
    """Yields (epoch, position) in an order drawn by (seed, epoch), as many as fill optimiser steps of `rows` over all
    ranks: what is left over waits for an epoch whose order has it earlier. `shares`: one pass is drawn for each step
    and yielded as the third number; `draw` False: they take turns, as often as their shares say."""

    def __init__(self, size: int, seed: int, shares: list[float] | None = None, rows: int = 1, draw: bool = True):
        self.size, self.seed, self.epoch = size, seed, 0
        self.shares, self.rows, self.draw = shares or [], rows, draw

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.rows * self.rows

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)[: len(self)]
        if not self.shares:
            return iter((self.epoch, int(n)) for n in order)
        drawn = self.passes(self.size // self.rows)
        return iter((self.epoch, int(n), drawn[at // self.rows]) for at, n in enumerate(order))

    def passes(self, steps: int) -> list[int]:
        """The pass of each step of the epoch."""
        shares = np.array(self.shares) / sum(self.shares)
        if self.draw:
            return np.random.default_rng([self.seed, self.epoch, 1]).choice(len(shares), steps, p=shares).tolist()
        # in turns: always the pass that is furthest behind its share, counted from the first step of the run
        done, turns = np.zeros(len(shares)), []
        for step in range((self.epoch + 1) * steps):
            turn = int(np.argmax(shares * (step + 1) - done))
            done[turn] += 1
            turns.append(turn)
        return turns[-steps:]
