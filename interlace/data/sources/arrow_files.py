"""Parquet files, and Hugging Face data sets saved to disk: paths or pictures embedded as bytes.

Embedded pictures become slices of a file, so rows stay addressable one by one: in a saved data set's arrow files they
already are; compressed Parquet is unpacked once into the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from tqdm import tqdm

from interlace.data.cache import cache_folder
from interlace.data.rows import Picture, Problems
from interlace.data.sources.build import Batch, Raw
from interlace.data.sources.chain import chain, split_in_name
from interlace.errors import UserError

ROWS = 1024  # rows of a Parquet file decoded at once


def read_parquet(file: Path, name: str) -> Raw:
    """A Parquet table. Raises UserError when the file is not readable as one."""
    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} is not readable as Parquet: {str(error).splitlines()[0]}") from None
    schema, total = table.schema_arrow, table.metadata.num_rows
    labels = _class_names(schema)
    embedded = [field.name for field in schema if _holds_bytes(field.type)]

    def batches() -> Iterator[Batch]:
        slices = {column: _unpacked(file, column, schema.field(column).type, total) for column in embedded}
        with pq.ParquetFile(file) as opened:
            plain = [column for column in schema.names if column not in embedded]
            start = 0
            for batch in opened.iter_batches(ROWS, columns=plain):
                places = list(range(start + 1, start + batch.num_rows + 1))
                cells = _cells(batch, labels)
                for column, (bin_file, spans, paths) in slices.items():
                    cells[column] = [
                        _slice(bin_file, int(spans[i, 0]), int(spans[i, 1]), paths[i] if paths else None)
                        for i in range(start, start + batch.num_rows)
                    ]
                cells["__label__"] = [f"{file.stem}-{place}" for place in places] if embedded else [None] * len(places)
                start += batch.num_rows
                yield places, cells

    return Raw(
        name=name,
        where=str(file),
        columns=list(schema.names),
        batches=batches,
        root=file.parent,
        total=total,
        stamp=_stamp(file),
    )


def _stamp(file: Path) -> str:
    facts = file.stat()
    return f"{file.name} {facts.st_size} {facts.st_mtime_ns}"


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        return "bytes" in names
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Column -> names of its classes, as Hugging Face notes them in the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {column: f["names"] for column, f in features.items() if isinstance(f, dict) and f.get("names")}
    except (KeyError, ValueError, TypeError):
        return {}


def _cells(batch: pa.RecordBatch, labels: dict[str, list[str]]) -> dict[str, list[Any]]:
    cells = batch.to_pydict()
    for column, names in labels.items():
        if column in cells:
            cells[column] = [
                names[value] if isinstance(value, int) and 0 <= value < len(names) else value for value in cells[column]
            ]
    return cells


def _slice(file: Path | str, offset: int, length: int, path: str | None) -> Picture | str | None:
    if length < 0:
        return path  # no bytes in this row: perhaps a path
    return Picture(path=str(file), offset=offset, length=length)


def _unpacked(
    file: Path, column: str, kind: pa.DataType, total: int
) -> tuple[Path, np.ndarray, list[str | None] | None]:
    """(file of all pictures one after another, (N, 2) int64 offset and length, paths): made once, kept in the cache."""
    folder = cache_folder() / "unpacked"
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{file.absolute()} {_stamp(file)} {column}".encode()).hexdigest()[:32]
    bin_file, span_file, path_file = (folder / f"{key}{suffix}" for suffix in (".bin", ".npy", ".json"))
    if not (bin_file.exists() and span_file.exists() and path_file.exists()):
        _unpack(file, column, kind, total, bin_file, span_file, path_file)
    paths = json.loads(path_file.read_text(encoding="utf-8"))
    return bin_file, np.load(span_file, allow_pickle=False, mmap_mode="r"), paths


def _unpack(
    file: Path, column: str, kind: pa.DataType, total: int, bin_file: Path, span_file: Path, path_file: Path
) -> None:
    spans = np.full((total, 2), -1, np.int64)
    paths: list[str | None] = []
    handle, aside = tempfile.mkstemp(dir=bin_file.parent)
    try:
        with os.fdopen(handle, "wb") as out, pq.ParquetFile(file) as opened:
            row = 0
            progress = tqdm(
                total=total, desc=f"unpacking {file.name}", unit=" pictures", disable=None, delay=1, leave=False
            )
            with progress:
                for batch in opened.iter_batches(64, columns=[column]):
                    for value in batch.column(0).to_pylist():
                        data = value.get("bytes") if isinstance(value, dict) else value
                        paths.append(value.get("path") if isinstance(value, dict) and data is None else None)
                        if data is not None:
                            spans[row] = out.tell(), len(data)
                            out.write(data)
                        row += 1
                    progress.update(batch.num_rows)
        with open(span_file, "wb") as file_of_spans:
            np.save(file_of_spans, spans)
        path_file.write_text(json.dumps(paths if any(paths) else None), encoding="utf-8")
        os.replace(aside, bin_file)  # last: with it the set of three is complete
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def read_saved(folder: Path, name: str, wanted: dict[str, str] | None) -> Raw:
    """A folder written by Hugging Face `save_to_disk`: a data set, or a dictionary of them whose keys are the
    splits."""
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        parts = [_saved_split(folder / split, f"{name}-{split}", split_in_name(split)) for split in splits]
        return chain(parts, name, folder, wanted)
    return _saved_split(folder, name, None)


def _saved_split(folder: Path, name: str, split: str | None) -> Raw:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / item["filename"] for item in state["_data_files"]]
        with pa.memory_map(str(files[0])) as mapped:
            schema = pa.ipc.open_stream(mapped).schema
    except (OSError, ValueError, KeyError, IndexError, pa.ArrowInvalid) as error:
        raise UserError(f"{folder} looks like a data set saved to disk but is not readable: {error}") from None
    problems = Problems()
    return Raw(
        name=name,
        where=str(folder),
        columns=list(schema.names),
        batches=lambda: _saved_batches(files, schema),
        root=folder,
        split=split,
        stamp=" ".join(map(_stamp, files)),
        problems=problems,
    )


def _saved_batches(files: list[Path], schema: pa.Schema) -> Iterator[Batch]:
    labels = _class_names(schema)
    embedded = [field.name for field in schema if _holds_bytes(field.type)]
    row = 0
    for file in files:
        mapped = pa.memory_map(str(file), "r")
        base = _base_address(mapped)
        for batch in pa.ipc.open_stream(mapped):
            places = list(range(row + 1, row + batch.num_rows + 1))
            cells = _cells(batch.select([c for c in schema.names if c not in embedded]), labels)
            for column in embedded:
                cells[column] = _mapped_slices(batch.column(column), file, base, mapped.size())
            cells["__label__"] = [f"row-{place}" for place in places] if embedded else [None] * len(places)
            row += batch.num_rows
            yield places, cells


def _base_address(mapped: pa.MemoryMappedFile) -> int:
    """Where the file's first byte lies in memory: buffers read from a memory map point into it."""
    mapped.seek(0)
    address = mapped.read_buffer(1).address
    mapped.seek(0)
    return address


def _mapped_slices(values: pa.Array, file: Path, base: int, size: int) -> list[Any]:
    paths: list[str | None] = [None] * len(values)
    if pa.types.is_struct(values.type):
        names = [values.type.field(i).name for i in range(values.type.num_fields)]
        if "path" in names:
            paths = pa.compute.struct_field(values, "path").to_pylist()
        values = pa.compute.struct_field(values, "bytes")
    buffers = values.buffers()
    wide = pa.types.is_large_binary(values.type) or pa.types.is_large_string(values.type)
    offsets = np.frombuffer(buffers[1], np.int64 if wide else np.int32)[values.offset : values.offset + len(values) + 1]
    start = (buffers[2].address - base) if buffers[2] is not None else 0
    if not 0 <= start <= size:
        raise UserError(f"{file}: this data set is compressed on disk, which is not read. Save it to Parquet instead.")
    missing = values.is_null().to_pylist()
    spans = zip((start + offsets[:-1]).tolist(), np.diff(offsets).tolist())
    return [
        path if gone else Picture(path=str(file), offset=begin, length=length)
        for path, gone, (begin, length) in zip(paths, missing, spans)
    ]
