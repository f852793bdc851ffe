"""Several sources as one: ids carry the source's name, attributes are the union of all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import copy

import numpy as np
import pyarrow as pa
import pyarrow.compute

from interlace.data.rows import Problems, Source
from interlace.data.sources.build import hash64


def join(sources: Sequence[Source]) -> Source:
    """Rows in the order given, ids as "furniture/...".

    An attribute that one source lacks is None there; one whose types disagree becomes text. Given groups stay apart
    between sources; rows with equal texts share a group across them.
    """
    names = _distinct([source.name for source in sources])
    columns: dict[str, str] = {}
    for source in sources:
        for column, kind in source.columns.items():
            columns[column] = kind if columns.get(column, kind) == kind else "text"
    columns = {"source": "text", **columns}
    tables, questions, groups = [], [], []
    n_rows = 0
    problems = Problems()
    for name, source in zip(names, sources):
        rows = source._rows
        prefixed = {key: rows.column(key) for key in ("path", "offset", "length", "caption", "name")}
        prefixed["id"] = _prefix(name, rows.column("id"))
        codes = source.group_codes
        if "group" in rows.column_names:
            prefixed["group"] = _prefix(name, rows.column("group"))
            given = prefixed["group"].to_pylist()
            codes = np.array([hash64("given:" + x) if x else code for x, code in zip(given, codes.tolist())], np.uint64)
        for column in columns:
            if column in source.columns:
                prefixed["@" + column] = rows.column("@" + column)
        if "source" not in source.columns:
            prefixed["@source"] = pa.chunked_array([pa.array([name] * len(rows), pa.large_string())])
        tables.append(pa.table(prefixed))
        asked = source._questions
        shifted = asked.set_column(asked.column_names.index("row"), "row", pa.compute.add(asked.column("row"), n_rows))
        questions.append(shifted.set_column(0, "id", _prefix(name, asked.column("id"))))
        groups.append(codes)
        n_rows += len(rows)
        problems.absorb(copy(source._problems), name)
    return Source(
        name="+".join(names),
        rows=pa.concat_tables(tables, promote_options="default"),
        groups=np.concatenate(groups),
        splits=np.concatenate([source.split_codes for source in sources]),
        columns=columns,
        fingerprint=hashlib.sha256(
            " ".join(f"{n}:{s.fingerprint}" for n, s in zip(names, sources)).encode()
        ).hexdigest(),
        licence="\n\n".join(f"{n}\n{'-' * len(n)}\n{s.licence}" for n, s in zip(names, sources) if s.licence),
        questions=pa.concat_tables(questions),
        problems=problems,
        roles={name: roles for name, source in zip(names, sources) for roles in source.roles.values()},
        hints=[hint for source in sources for hint in source.hints],
    )


def _prefix(name: str, ids: pa.ChunkedArray) -> pa.ChunkedArray:
    start, slash = pa.scalar(name, pa.large_string()), pa.scalar("/", pa.large_string())
    parts = [pa.compute.binary_join_element_wise(start, chunk, slash) for chunk in ids.chunks]
    return pa.chunked_array(parts, pa.large_string())


def _distinct(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}{names[:i].count(name) + 1}" for i, name in enumerate(names)]
