"""Several files of one data set, such as train.csv and val.csv or the shards of a Parquet table, as one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from interlace.data.rows import SPLITS, Problems
from interlace.data.sources.build import SPLIT_WORDS, Batch, Raw
from interlace.data.sources.columns import resolve


def split_in_name(stem: str) -> str | None:
    """The split that a file's name begins or ends with: train.csv, train-00000-of-00002, coco_val."""
    words = stem.lower().replace("_", "-").replace(".", "-").split("-")
    for word in (words[0], words[-1]):
        if word in SPLIT_WORDS:
            return SPLITS[SPLIT_WORDS[word]]
    return None


def keep_only_telling_splits(raws: Sequence[Raw]) -> None:
    """Forgets splits taken from file names unless they name two: train.csv alone is data to divide, not to train on
    only."""
    if len({raw.split for raw in raws} - {None}) < 2:
        for raw in raws:
            raw.split = None


def chain(raws: Sequence[Raw], name: str, root: Path, wanted: dict[str, str] | None) -> Raw:
    """One table after another: the union of their columns; a file's own split fills rows whose split is empty."""
    keep_only_telling_splits(raws)
    if len(raws) == 1 and raws[0].root == root:
        return raws[0]
    columns = list(dict.fromkeys(column for raw in raws for column in raw.columns))
    splits = {raw.split for raw in raws}
    split_column = resolve(columns, wanted, raws[0].where, ()).get("split", "split")
    if splits != {None} and split_column not in columns:
        columns.append(split_column)
    problems = Problems()

    def batches() -> Iterator[Batch]:
        for raw in raws:
            image = resolve(raw.columns, wanted, raw.where)["image"]
            below = os.path.relpath(raw.root, root)
            for places, cells in raw.batches():
                n = len(places)
                out: dict[str, list[Any]] = {column: cells.get(column) or [None] * n for column in columns}
                if "__label__" in cells:
                    out["__label__"] = cells["__label__"]
                if below != ".":
                    out[image] = [os.path.join(below, c) if isinstance(c, str) and c else c for c in out[image]]
                if raw.split is not None:
                    out[split_column] = [cell or raw.split for cell in out[split_column]]
                yield [f"{Path(raw.where).name} {place}" for place in places], out
            problems.absorb(raw.problems, Path(raw.where).name)

    totals = [raw.total for raw in raws]
    return Raw(
        name=name,
        where=str(root),
        columns=columns,
        batches=batches,
        root=root,
        total=None if None in totals else sum(total for total in totals if total is not None),
        stamp=" ".join(raw.stamp for raw in raws),
        problems=problems,
    )
