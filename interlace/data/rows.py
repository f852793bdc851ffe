"""The nouns of the data side: where a picture is, a pair, a question, and a source of many of them.

A source is map-style and backed by pyarrow tables (memory-mapped once they grow), so ten million rows cost ten million
rows of disk, not of Python objects. Only this file and `sources/` know how rows are stored.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from interlace.errors import UserError, suggest

SPLITS = ("train", "val", "test")
Attribute = str | float | bool | None
PART = "its "  # a reason that begins so is about a part of a row, its text or its .json: the row itself is kept


@dataclass(frozen=True)
class Picture:
    """Where a picture is, not its pixels: a file, a slice of a file (a member of an uncompressed tar), or encoded
    bytes."""

    path: str | None = None  # file on disk (absolute)
    data: bytes | None = None  # or the encoded bytes themselves
    offset: int | None = None  # with length: a slice of `path`
    length: int | None = None

    def read(self) -> bytes:
        """The encoded bytes. Raises OSError when the file is missing or shorter than the slice."""
        if self.data is not None:
            return self.data
        if self.path is None:
            raise FileNotFoundError("this picture has neither a path nor bytes")
        with open(self.path, "rb") as file:
            if self.offset is None:
                return file.read()
            file.seek(self.offset)
            data = file.read(self.length if self.length is not None else -1)
        if self.length is not None and len(data) < self.length:
            raise OSError(f"{self.path} ends before byte {self.offset + self.length}")
        return data

    def __str__(self) -> str:
        if self.path is None:
            return f"{len(self.data or b'')} bytes"
        return self.path if self.offset is None else f"{self.path} at byte {self.offset}"


@dataclass
class Pair:
    """One picture and its text. Rows of one group are never each other's negatives and never straddle a split."""

    id: str
    picture: Picture
    caption: str
    group: str
    split: str  # "train" | "val" | "test"
    attributes: dict[str, Attribute]  # numbers are float, yes/no is bool
    name: str  # short title to show a person


@dataclass
class Question:
    """One question about one pair's picture; `answers` are (answer, weight), weights being soft scores in 0..1."""

    id: str
    pair_id: str
    picture: Picture
    question: str
    answers: list[tuple[str, float]]
    group: str
    split: str
    kind: str  # which question template ("room", "food group"); "" when the data does not say


QUESTION_SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        ("row", pa.int64()),  # the pair the question is about
        ("question", pa.large_string()),
        ("answers", pa.large_list(pa.large_string())),
        ("weights", pa.large_list(pa.float32())),
        ("kind", pa.large_string()),
    ]
)


@dataclass
class Problems:
    """Rows that were skipped or repaired: all are counted, the first thousand are kept to be listed.

    What stands before a reason's first colon is its kind: rows are counted by it."""

    count: int = 0
    first: list[tuple[int | str, str]] = field(default_factory=list)
    keep: int = 1000
    again: bool = False  # the rows are read a second time: nothing about them is new
    kinds: Counter[str] = field(default_factory=Counter)
    note: str = ""  # something worth saying about rows that were kept
    doubts: int = 0  # rows that were kept and may not be what they seem
    doubts_first: list[str] = field(default_factory=list)
    bad_questions: int = 0  # questions that cannot be read, or are about no row
    bad_first: list[tuple[int | str, str]] = field(default_factory=list)
    question_kinds: Counter[str] = field(default_factory=Counter)
    strangers: str = ""  # said when not one question is about a row
    lost_questions: int = 0  # questions about rows that were left out: they follow from those, and are one line
    lost_first: list[str] = field(default_factory=list)  # ids of the first few of them

    def add(self, row: int | str, reason: str, rows: int = 1) -> None:
        """`rows`: how many are gone for this one reason."""
        if self.again:
            return
        self.count += rows
        self.kinds[reason.split(":")[0]] += rows
        if len(self.first) < self.keep:
            self.first.append((row, reason))

    def doubt(self, row: int | str, reason: str) -> None:
        if self.again:
            return
        self.doubts += 1
        if len(self.doubts_first) < 5:
            self.doubts_first.append(f"{row}: {reason}")

    def add_question(self, place: int | str, reason: str) -> None:
        self.bad_questions += 1
        self.question_kinds[reason.split(":")[0]] += 1
        if len(self.bad_first) < self.keep:
            self.bad_first.append((place, reason))

    def lose_question(self, question: str) -> None:
        self.lost_questions += 1
        if len(self.lost_first) < 5:
            self.lost_first.append(question)

    def absorb(self, other: Problems, where: str) -> None:
        """Takes over another's problems, as those of `where`, and empties it."""
        if not self.again:
            self.count += other.count
            self.kinds += other.kinds
            self.first = [*self.first, *((f"{where} {row}", why) for row, why in other.first)][: self.keep]
            self.doubts += other.doubts
            self.doubts_first = [*self.doubts_first, *(f"{where} {doubt}" for doubt in other.doubts_first)][:5]
        self.bad_questions += other.bad_questions
        self.question_kinds += other.question_kinds
        self.bad_first = [*self.bad_first, *((f"{where} {at}", why) for at, why in other.bad_first)][: self.keep]
        self.note = self.note or other.note
        self.strangers = self.strangers or (f"{where}: {other.strangers}" if other.strangers else "")
        self.lost_first = [*self.lost_first, *(f"{where}/{question}" for question in other.lost_first)][:5]
        self.lost_questions += other.lost_questions
        empty = Problems()
        for name in ("count", "kinds", "first", "doubts", "doubts_first", "bad_questions", "question_kinds",
                     "bad_first", "lost_questions", "lost_first"):  # fmt: skip
            setattr(other, name, getattr(empty, name))


def stored_attribute(value: Any, kind: str) -> Attribute:
    """A stored cell as the type its column has. Cells of CSV files stay text on disk and become typed here."""
    if value is None or value == "":
        return None
    if kind == "number":
        number = float(value)
        return number if math.isfinite(number) else None
    if kind == "boolean":
        return value if isinstance(value, bool) else str(value).strip().lower() in ("true", "yes")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


class Source:
    """Pairs, and perhaps questions, by position. Build one with `interlace.data.sources.open_source`.

    `rows` has the columns id, path, offset, length, caption, name, (group), and one `@name` per attribute.
    """

    def __init__(
        self,
        name: str,
        rows: pa.Table,
        groups: np.ndarray,
        splits: np.ndarray,
        columns: dict[str, str],
        fingerprint: str,
        licence: str = "",
        questions: pa.Table | None = None,
        problems: Problems | None = None,
        file: Path | None = None,
        roles: dict[str, dict[str, str]] | None = None,
        hints: list[str] | None = None,
    ):
        self.name = name
        self.fingerprint = fingerprint
        self.columns = columns
        self.licence = licence
        self.group_codes = groups  # (N,) uint64: equal codes are one group
        self.split_codes = splits  # (N,) int8: position in SPLITS
        self._rows = rows
        self._questions = questions if questions is not None else QUESTION_SCHEMA.empty_table()
        self._problems = problems or Problems()
        self.roles = roles or {}  # table -> role -> name of the column that plays it
        self.hints = hints or []  # what is worth a second look in those
        self._file = file  # the memory-mapped table behind `_rows`, when it was large enough to spill

    @property
    def problems(self) -> list[tuple[int | str, str]]:
        """(row, reason) of the rows skipped or repaired while opening, then of the questions: the first thousand of
        each; `n_problems` counts all."""
        return self._problems.first + self._problems.bad_first

    @property
    def n_problems(self) -> int:
        return self._problems.count + self._problems.bad_questions

    def left_out(self) -> str:
        """One sentence on what the data has and this source does not, such as "8 of 48 rows left out (not UTF-8: 8):
        `interlace data check` lists them"; empty when nothing is missing."""
        kinds, asked = self._problems.kinds, self._problems.question_kinds.copy()
        asked["about rows that were left out"] += self._problems.lost_questions
        torn = Counter({kind: n for kind, n in kinds.items() if kind.startswith(PART)})
        told = []
        for what, some, kept in (("rows left out", kinds - torn, len(self)), ("questions left out", asked,
                                 self.n_questions), ("rows incomplete", torn, len(self) - torn.total())):  # fmt: skip
            if n := some.total():
                reasons = ", ".join(f"{kind}: {count:,}" for kind, count in some.most_common(3) if count)
                more = ", ..." if len(+some) > 3 else ""
                told.append(f"{n:,} of {kept + n:,} {what} ({reasons}{more})")
        return f"{', '.join(told)}: `interlace data check` lists them" if told else ""

    @property
    def doubts(self) -> list[str]:
        """The first few of the rows that were kept and may not be what they seem."""
        return self._problems.doubts_first

    @property
    def n_lost_questions(self) -> int:
        """Questions left out because their rows were."""
        return self._problems.lost_questions

    def describe_columns(self) -> list[str]:
        """For people: a line for each table that says which column was taken for what, then the hints."""
        lines = []
        for table, roles in self.roles.items():
            taken = ", ".join(f"{role}={column}" for role, column in roles.items())
            lines.append(f"columns{f' of {table}' if len(self.roles) > 1 else ''}: {taken}")
        return lines + self.hints

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        counts = ", ".join(f"{split} {int((self.split_codes == i).sum()):,}" for i, split in enumerate(SPLITS))
        return f"Source({self.name!r}: {len(self):,} pairs ({counts}), {self.n_questions:,} questions)"

    def _cell(self, column: str, i: int) -> Any:
        return self._rows.column(column)[i].as_py()

    def picture(self, i: int) -> Picture:
        return Picture(self._cell("path", i), None, self._cell("offset", i), self._cell("length", i))

    def group(self, i: int) -> str:
        given = self._cell("group", i) if "group" in self._rows.column_names else None
        return given or f"~{int(self.group_codes[i]):016x}"

    def split_of(self, i: int) -> str:
        return SPLITS[self.split_codes[i]]

    def pair(self, i: int) -> Pair:
        """Raises IndexError outside `0 <= i < len(self)`."""
        i = int(i)
        if not 0 <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        return Pair(
            id=self._cell("id", i),
            picture=self.picture(i),
            caption=self._cell("caption", i),
            group=self.group(i),
            split=self.split_of(i),
            attributes={name: stored_attribute(self._cell("@" + name, i), kind) for name, kind in self.columns.items()},
            name=self._cell("name", i),
        )

    __getitem__ = pair

    def indices(self, split: str | None = None) -> np.ndarray:
        """(n,) int64 positions of the pairs of one split, in order; all of them for None."""
        if split is None:
            return np.arange(len(self))
        return np.flatnonzero(self.split_codes == split_code(split))

    def pairs(self, split: str | None = None) -> Iterator[Pair]:
        for i in self.indices(split):
            yield self.pair(i)

    @property
    def n_questions(self) -> int:
        return len(self._questions)

    def question(self, i: int) -> Question:
        i = int(i)
        if not 0 <= i < self.n_questions:
            raise IndexError(f"question {i} of {self.n_questions}")
        cells = {name: self._questions.column(name)[i].as_py() for name in QUESTION_SCHEMA.names}
        row = cells["row"]
        return Question(
            id=cells["id"],
            pair_id=self._cell("id", row),
            picture=self.picture(row),
            question=cells["question"],
            answers=list(zip(cells["answers"], cells["weights"])),
            group=self.group(row),
            split=self.split_of(row),
            kind=cells["kind"],
        )

    def question_indices(self, split: str | None = None) -> np.ndarray:
        """(n,) int64 positions of the questions whose pair is in the split."""
        if split is None:
            return np.arange(self.n_questions)
        rows = self._questions.column("row").to_numpy()
        return np.flatnonzero(self.split_codes[rows] == split_code(split))

    def question_rows(self) -> np.ndarray:
        """(n_questions,) int64: the position of the pair each question is about."""
        return self._questions.column("row").to_numpy()

    def questions(self, split: str | None = None) -> Iterator[Question]:
        for i in self.question_indices(split):
            yield self.question(i)

    def captions(self) -> pa.ChunkedArray:
        """All captions as one arrow column, for passes over text alone."""
        return self._rows.column("caption")

    def attribute(self, name: str) -> list[Attribute]:
        """All values of one attribute. Raises UserError for an unknown name."""
        if name not in self.columns:
            known = ", ".join(self.columns) or "none"
            raise UserError(f"No attribute {name!r} in {self.name}; there are: {known}.{suggest(name, self.columns)}")
        kind = self.columns[name]
        return [stored_attribute(value, kind) for value in self._rows.column("@" + name).to_pylist()]

    def __getstate__(self) -> dict[str, Any]:
        # a data loader's worker maps the spilled file again instead of receiving a copy of its rows
        state = dict(self.__dict__)
        if self._file is not None and self._file.exists():
            state["_rows"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._rows is None:
            self._rows = open_table(state["_file"])


def split_code(split: str) -> int:
    if split not in SPLITS:
        raise UserError(f"No split {split!r}; the splits are {', '.join(SPLITS)}.{suggest(split, SPLITS)}")
    return SPLITS.index(split)


def open_table(file: Path) -> pa.Table:
    """A memory-mapped arrow file as a table; its cells stay on disk until they are touched."""
    return pa.ipc.open_file(pa.memory_map(str(file), "r")).read_all()
