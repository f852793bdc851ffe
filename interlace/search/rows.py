"""What an index stores of one pair: its arrow schema, its fingerprints, its thumbnail."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from interlace.data.rows import Attribute, Pair, Picture
from interlace.search.filters import Column, Kind, clean

if TYPE_CHECKING:
    import pyarrow as pa

# Without this mark, two processes that upsert the same new id at once both insert it, silently.
PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}
# Columns every index has and filters may use; an attribute of the same name goes first.
FIXED = (
    Column("name", "name", "text"),
    Column("caption", "caption", "text"),
    Column("id", "id", "text"),
    Column("split", "split_of", "text"),
    Column("group", "group_of", "text"),
)
KEEP_BYTES = 200_000  # a picture that exists only as bytes is kept as it is up to here, and as a JPEG of 640 px above
KEEP_SIDE = 640


@dataclass
class Item:
    """One row of the index."""

    id: str
    name: str
    caption: str
    attributes: dict[str, Attribute]
    picture: Picture
    split: str = ""
    group: str = ""
    thumbnail: bytes | None = field(default=None, repr=False)  # JPEG; only filled by `Index.get`


@dataclass
class Skip:
    """A pair that could not be indexed, and why in a few words."""

    id: str
    path: str
    reason: str


@dataclass
class Row:
    """A pair on its way into the table."""

    pair: Pair
    prints: tuple[int, int]
    vector: np.ndarray  # (D,)
    thumbnail: bytes | None
    data: bytes | None


def schema(dim: int, columns: Iterable[Column]) -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False, metadata=PRIMARY_KEY),
            pa.field("vector", pa.list_(pa.float32(), dim)),
            pa.field("thumbnail", pa.binary()),
            pa.field("picture_data", pa.binary()),
            pa.field("picture_print", pa.int64()),
            *label_fields(columns),
        ]
    )


def label_fields(columns: Iterable[Column]) -> list[pa.Field]:
    """Everything that can change without looking at the picture again."""
    import pyarrow as pa

    text = ["name", "caption", "words", "split_of", "group_of", "picture_path"]
    numbers = ["picture_offset", "picture_length", "row_print"]
    return [
        *(pa.field(name, pa.string()) for name in text),
        *(pa.field(name, pa.int64()) for name in numbers),
        *(attribute_field(column) for column in columns),
    ]


def attribute_field(column: Column) -> pa.Field:
    import pyarrow as pa

    return pa.field(column.field, {"text": pa.string(), "number": pa.float64(), "boolean": pa.bool_()}[column.type])


def new_column(name: str, kind: Kind, taken: Iterable[str]) -> Column:
    """A column whose field is made of letters, digits and underscores, and is not `taken`."""
    plain = "a_" + re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:40]
    used, chosen, n = set(taken), plain, 1
    while chosen in used:
        n += 1
        chosen = f"{plain}_{n}"
    return Column(name, chosen, kind)


def table_of(rows: Sequence[Row], dim: int, columns: Sequence[Column]) -> pa.Table:
    import pyarrow as pa

    vectors = np.stack([row.vector for row in rows]).astype(np.float32)  # (N, D)
    values: dict[str, Any] = {
        "id": [clean(row.pair.id) for row in rows],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim),
        "thumbnail": [row.thumbnail for row in rows],
        "picture_data": [row.data for row in rows],
        "picture_print": [row.prints[0] for row in rows],
        **_labels([(row.pair, row.prints) for row in rows], columns),
    }
    whole = schema(dim, columns)
    return pa.table({f.name: values[f.name] for f in whole}, schema=whole)


def label_table(pairs: Sequence[tuple[Pair, tuple[int, int]]], columns: Sequence[Column]) -> pa.Table:
    """Rows whose picture is as it was: everything but vector, thumbnail and bytes."""
    import pyarrow as pa

    id_field = pa.field("id", pa.string(), nullable=False, metadata=PRIMARY_KEY)
    values = {"id": [clean(pair.id) for pair, _ in pairs], **_labels(pairs, columns)}
    return pa.table(values, schema=pa.schema([id_field, *label_fields(columns)]))


def _labels(pairs: Sequence[tuple[Pair, tuple[int, int]]], columns: Sequence[Column]) -> dict[str, list]:
    only = [pair for pair, _ in pairs]
    return {
        "name": [clean(p.name or "") for p in only],
        "caption": [clean(p.caption or "") for p in only],
        "words": [clean(searchable(p)) for p in only],
        "split_of": [p.split for p in only],
        "group_of": [clean(p.group or "") for p in only],
        "picture_path": [p.picture.path for p in only],
        "picture_offset": [p.picture.offset for p in only],
        "picture_length": [p.picture.length for p in only],
        "row_print": [row_print for _, (_, row_print) in pairs],
        **{c.field: [stored(p.attributes.get(c.name), c.type) for p in only] for c in columns},
    }


def searchable(pair: Pair) -> str:
    """What full-text search reads: the name, then the caption unless it says the same again."""
    name, caption = (pair.name or "").strip(), (pair.caption or "").strip()
    return caption if name.lower() in caption.lower() else f"{name}\n{caption}"


def stored(value: Attribute, kind: Kind) -> Attribute:
    """A cell in its column's type, or missing. No NaN, infinity or -0.0: engines disagree on how those compare."""
    if value is None:
        return None
    if kind == "text":
        return clean(str(value))
    if kind == "boolean":
        return value if isinstance(value, bool) else None
    if isinstance(value, str) or not math.isfinite(value):
        return None
    return float(value) + 0.0


def kind_of(value: Attribute) -> Kind:
    return "boolean" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"


# Fingerprints --------------------------------------------------------------------------------------------------------


def hash64(*parts: object) -> int:
    """A signed 64-bit number; equal parts give equal numbers in every process."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode("utf-8", "replace")
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little", signed=True)


def fingerprints(pair: Pair) -> tuple[int, int]:
    """(picture, labels). The first tells whether to embed again: path, size and time of the file, or the bytes' hash.

    Raises OSError when the file is not there.
    """
    ref = pair.picture
    if ref.data is not None:
        picture = hash64(ref.data)
    else:
        status = os.stat(ref.path or "")
        picture = hash64(ref.path, status.st_size, status.st_mtime_ns, ref.offset, ref.length)
    labels = (pair.name, pair.caption, pair.group, pair.split, sorted(pair.attributes.items()))
    return picture, hash64(labels, ref.path, ref.offset, ref.length)


# Small pictures ------------------------------------------------------------------------------------------------------


def jpeg(image: Image.Image, side: int, quality: int = 80) -> bytes:
    small = image.copy()
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=quality)
    return out.getvalue()


def bytes_to_keep(ref: Picture, image: Image.Image) -> bytes | None:
    """What to store of the picture itself: nothing when it is a file, else its bytes or a smaller JPEG of them."""
    if ref.path is not None or ref.data is None:
        return None
    return ref.data if len(ref.data) <= KEEP_BYTES else jpeg(image, KEEP_SIDE, quality=90)
