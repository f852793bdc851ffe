"""CSV and TSV files, such as open_clip's `filepath`/`title` lists separated by tabs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from interlace.data.rows import Problems
from interlace.data.sources.build import BATCH, Batch, Raw
from interlace.errors import UserError

csv.field_size_limit(16 * 1024 * 1024)  # a caption of 128 KiB is unusual but no reason to stop


def read_csv(file: Path, name: str) -> Raw:
    """The separator (tab, comma, semicolon or bar) is the one that occurs most often in the header line."""
    encoding = _encoding(file)
    with open(file, encoding=encoding, errors="replace", newline="") as lines:
        header = lines.readline()
        if not header.strip():
            raise UserError(f"{file} is empty: expected a header line with the columns' names.")
        separator = max("\t,;|", key=header.count) if any(s in header for s in "\t,;|") else ","
        columns = [column.strip() for column in next(csv.reader(io.StringIO(header), delimiter=separator))]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise UserError(f"{file}: the header names {', '.join(map(repr, twice))} more than once. Rename one of them.")
    problems = Problems()
    return Raw(
        name=name,
        where=str(file),
        columns=columns,
        batches=lambda: _batches(file, encoding, separator, columns, problems),
        root=file.parent,
        problems=problems,
    )


def _encoding(file: Path) -> str:
    with open(file, "rb") as binary:
        start = binary.read(65536)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if b"\x00" in start:
        raise UserError(f"{file} is not a text file: expected CSV or TSV, found binary data.")
    return "utf-8-sig"


def _batches(file: Path, encoding: str, separator: str, columns: list[str], problems: Problems) -> Iterator[Batch]:
    places: list[int] = []
    rows: list[list[str]] = []
    # broken bytes become U+FFFD so that one bad line does not end the file; such a row is left out below
    with open(file, encoding=encoding, errors="replace", newline="") as lines:
        reader = csv.reader(lines, delimiter=separator)
        next(reader)
        number = 0
        while True:
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                problems.add(f"line {reader.line_num}", f"not readable as CSV: {error}")
                continue
            number += 1
            if not row:
                continue
            if len(row) != len(columns):
                problems.add(number, f"wrong number of cells: {len(row)} instead of {len(columns)}")
                continue
            if any("\ufffd" in cell for cell in row):
                problems.add(number, "not UTF-8: save the table as UTF-8")
                continue
            places.append(number)
            rows.append(row)
            if len(rows) == BATCH:
                yield places, {column: list(cells) for column, cells in zip(columns, zip(*rows))}
                places, rows = [], []
    if rows:
        yield places, {column: list(cells) for column, cells in zip(columns, zip(*rows))}
