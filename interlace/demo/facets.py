"""What the page shows before anyone searched: filters from the columns, a few pictures, queries and questions."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np

from interlace.demo.schemas import Column, Item, Score, ValueCount
from interlace.evaluate import rows_of
from interlace.run import Run
from interlace.search import Index
from interlace.search.filters import parse

LOOK = 20_000  # rows looked at for frequent values and ranges: enough to choose from, quick on 10 million
MOST = 40  # values listed per column
EXAMPLE = 32  # characters of a query worth proposing: four fit on a line


def facets(index: Index) -> tuple[list[Column], bool]:
    """The attributes as filters need them, and whether the counts are exact or those of a random sample of rows."""
    columns = [c for c in index.filter_columns if c.name in index.columns]
    rows = index.sample(LOOK, ["id", *(c.field for c in columns)])
    found = []
    for column in columns:
        values = [value for value in rows[column.field].to_pylist() if value is not None]
        if column.type == "number":
            low, high = (min(values), max(values)) if values else (None, None)
            found.append(Column(name=column.name, type=column.type, minimum=low, maximum=high))
        else:
            counts: Counter[Any] = Counter(values)
            frequent = [ValueCount(value=value, count=count) for value, count in counts.most_common(MOST)]
            found.append(Column(name=column.name, type=column.type, distinct=len(counts), values=frequent))
    return found, len(index) <= LOOK


def look_around(index: Index, limit: int, where: str | None = None) -> list[Item]:
    """Some of the items, the same each time; with a filter, some that pass it. Raises UserError for a wrong filter."""
    if where is not None:
        # any direction will do: the point is that the filter decides, not the vector
        direction = np.random.default_rng(0).standard_normal(index.manifest.dim).astype(np.float32)
        found = index.nearest(direction, limit, parse(where, index.filter_columns))
        return [Item(id=i.id, name=i.name, caption=i.caption, attributes=i.attributes) for i, _ in found]
    columns = {c.name: c.field for c in index.filter_columns if c.name in index.columns}
    rows = index.sample(limit, ["id", "name", "caption", *columns.values()]).to_pylist()
    return [
        Item(
            id=row["id"],
            name=row["name"],
            caption=row["caption"],
            attributes={name: row[field] for name, field in columns.items()},
        )
        for row in rows
    ]


def propose_queries(index: Index, n: int = 4) -> list[str]:
    """Short captions, or names, of a few items: what a person could ask for here."""
    rows = index.sample(400, ["name", "caption"], seed=1)
    chosen: dict[str, str] = {}
    for name, caption in zip(rows["name"].to_pylist(), rows["caption"].to_pylist()):
        text = next((" ".join(t.split()) for t in (caption, name) if t and len(" ".join(t.split())) <= EXAMPLE), "")
        if text and len(chosen) < n:
            chosen.setdefault(text.split()[0].lower(), text)  # one for each first word, so that they differ
    return list(chosen.values())


def propose_questions(run: Run) -> list[str]:
    """The questions the run was trained on, most frequent first, when its folder names them."""
    try:
        known = json.loads((run.folder / "data.json").read_text(encoding="utf-8")).get("example_questions", [])
        return [str(question) for question in known][:6] or ["what is it?"]
    except (OSError, ValueError, AttributeError):
        return ["what is it?"]


def scores(run: Run) -> list[Score]:
    """The run's own evaluation, in reading order; none when it was not evaluated."""
    try:
        rows = rows_of(json.loads((run.folder / "metrics.json").read_text(encoding="utf-8")))
        wanted = ("value", "low", "high", "chance")
        return [Score.model_validate({"name": name, **{k: row.get(k) for k in wanted}}) for name, row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
