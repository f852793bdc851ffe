"""CSV and TSV files, such as open_clip's `filepath`/`title` lists separated by tabs."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from interlace.data.pictures import SUFFIXES
from interlace.data.rows import Problems
from interlace.data.sources.build import BATCH, Batch, Raw
from interlace.errors import UserError

csv.field_size_limit(16 * 1024 * 1024)  # a caption of 128 KiB is unusual but no reason to stop
UNCLOSED = 'look for a " that nobody closed, or write it twice ("") inside quotes'


def read_csv(file: Path, name: str) -> Raw:
    """The separator (tab, comma, semicolon or bar) is the one that occurs most often in the header line."""
    encoding = _encoding(file)
    with open(file, encoding=encoding, errors="replace", newline="") as lines:
        header = lines.readline()
        if not header.strip():
            raise UserError(f"{file} is empty: expected a header line with the columns' names.")
        separator = max("\t,;|", key=header.count) if any(s in header for s in "\t,;|") else ","
        line = _Lines([header])
        columns = [column.strip() for column in next(csv.reader(line, delimiter=separator))]
    if line.ended:
        raise UserError(f"{file}: the header opens a quote and does not close it in its line; {UNCLOSED}.")
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


class _Lines:
    """A file's lines as `csv` asks for them. What was asked for since `start` shows which lines became one row, and
    that the lines `ended` before the row did shows a quote that nobody closed."""

    def __init__(self, lines: Iterable[str]):
        self.lines = iter(lines)
        self.record: list[str] = []
        self.number = 0
        self.ended = False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self.lines, None)
        if line is None:
            self.ended = True
            raise StopIteration
        self.record.append(line)
        self.number += 1
        return line

    def start(self) -> None:
        self.record = []


def _batches(file: Path, encoding: str, separator: str, columns: list[str], problems: Problems) -> Iterator[Batch]:
    places: list[int] = []
    rows: list[list[str]] = []
    # broken bytes become U+FFFD so that one bad line does not end the file; such a row is left out below
    with open(file, encoding=encoding, errors="replace", newline="") as text:
        lines = _Lines(text)
        reader = csv.reader(lines, delimiter=separator)
        next(reader)
        like_a_row = _looks(lines.record[0], separator, len(columns))
        number = 0
        while True:
            lines.start()
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                first, n = lines.number - len(lines.record) + 1, len(lines.record)
                reason = f"not readable as CSV: {error}"
                problems.add(f"line {first}", reason + (f" in {n:,} lines; {UNCLOSED}" if n > 1 else ""), n)
                number += n
                continue
            number += 1
            if not row:
                continue
            if len(lines.record) > 1 and not _sound(row, lines, separator, columns, like_a_row, problems):
                number += len(lines.record) - 1  # the rows that the cell swallowed keep their numbers
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


def _sound(row: list[str], lines: _Lines, separator: str, columns: list[str], like_a_row: Callable[[str], bool],
           problems: Problems) -> bool:  # fmt: skip
    """Whether a row over several lines may be what its writer meant: a line break inside a quoted cell is; a quote that
    is never closed, or that ends in the middle of another row, swallowed the rows between. Adds what it finds."""
    last, n = lines.number, len(lines.record)
    if lines.ended:
        inside = len(_broken(row[-1])) - row[-1].endswith(("\n", "\r"))  # the open cell is the last
        problems.add(f"line {last - inside + 1}", f"a quote is opened and not closed: up to line {last}, the file's "
                     f"end, {inside:,} lines became one cell; {UNCLOSED}", n)  # fmt: skip
        return False
    swallowed = [line for cell in row for line in _broken(cell)[1:] if like_a_row(line)]
    if any(cell.lower().endswith(SUFFIXES) for cell in row):  # "3,5 m wide" has a comma, and no picture
        swallowed = [line for line in swallowed if any(suffix in line.lower() for suffix in SUFFIXES)]
    if len(row) != len(columns):
        stray = any(map(like_a_row, lines.record[1:]))
    else:
        # a quote that ends the cell, and not at a cell's end: where it begins another cell, it is that one's
        opens = any(separator + '"' in line for line in lines.record[1:])
        stray = bool(swallowed or opens) and not _strict(lines.record, separator)
    where = f"line {last - n + 1}"
    if stray:
        problems.add(where, f"a quote is opened and closed in another row: lines {last - n + 1} to {last} "
                     f"became one row; {UNCLOSED}", n)  # fmt: skip
        return False
    if swallowed and len(row) == len(columns):
        problems.doubt(where, f"a cell of lines {last - n + 1} to {last} holds lines that look like rows, such as "
                       f"{swallowed[0][:60]!r}; if they are, {UNCLOSED}")  # fmt: skip
    return True


def _broken(cell: str) -> list[str]:
    return re.split("\r\n|\r|\n", cell)


def _looks(header: str, separator: str, width: int) -> Callable[[str], bool]:
    """Tells whether a line has as many separators as a row. A comma before a blank is one of prose, unless the header
    writes its own so; one at the line's end too, unless a row has more of them."""
    before = "" if re.search(re.escape(separator) + " ", header) else r"(?! )" if width > 2 else r"(?=\S)"
    pattern = re.compile(re.escape(separator) + before)
    return lambda line: width > 1 and len(pattern.findall(line)) >= width - 1


def _strict(record: list[str], separator: str) -> bool:
    """Whether each closing quote ends its cell, as in any file that a program wrote."""
    try:
        list(csv.reader(record, delimiter=separator, strict=True))
    except csv.Error:
        return False
    return True
