"""A table made from another: other captions, further columns, the same pictures, groups, splits and questions."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interlace.data.rows import Picture, Source
from interlace.data.samples.write import EPOCH
from interlace.data.sources.build import _short

ROLES = ("id", "image", "caption", "name", "group", "split")
BEGINNINGS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp",
              b"II*\x00": ".tif", b"MM\x00*": ".tif"}  # fmt: skip


class Table:
    """Writes pairs.csv, questions.jsonl, LICENCE.txt and, for pictures that are no file of their own, pictures/ into an
    existing folder; pictures that are files are referred to by their absolute path.

    >>> with Table(folder, source, ["verdict"]) as table:
    ...     table.row(0, "a red chair", ["keep"])
    ... table.company("what was changed")

    A column of the source that has the name of one of ours is written as NAME_before.
    """

    def __init__(self, folder: Path, source: Source, added: Sequence[str]):
        self.folder, self.source = folder, source
        self.added = list(added)
        self.names = _free_names(list(source.columns), [*ROLES, *added])
        self.ids: dict[int, str] = {}  # position in the source -> id of the row that took its questions over
        self.lost: list[tuple[str, str]] = []  # (id, why) of rows whose picture could not be copied
        self.rows = self.copied = 0
        self.file = open(folder / "pairs.csv", "w", encoding="utf-8", errors="replace", newline="")  # noqa: SIM115
        self.csv = csv.writer(self.file)
        self.csv.writerow([*ROLES, *added, *self.names.values()])

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def row(self, i: int, caption: str, added: Sequence[Any] = (), id: str = "") -> bool:
        """The source's row with this caption, and a cell for each added column, or none. `id`: of a second row about
        the same picture, which has no questions. False where the picture could not be copied."""
        added = added or [None] * len(self.added)
        assert len(added) == len(self.added)
        pair = self.source.pair(i)
        try:
            image = self._image(pair.picture)
        except OSError as error:
            self.lost.append((pair.id, f"cannot be read ({error.strerror or error})"))
            return False
        # a name that was only the beginning of the caption is to follow the caption
        name = "" if pair.name == _short(pair.caption) else pair.name
        kept = [self.source._cell("@" + column, i) for column in self.names]  # as stored: a column keeps its type
        cells = [id or pair.id, image, caption, name, pair.group, pair.split, *map(cell, added), *map(cell, kept)]
        # U+FFFD is how a reader of tables tells bytes that are no UTF-8; here it was in a text
        self.csv.writerow([c.replace("\ufffd", "?") for c in cells])
        self.rows += 1
        if not id:
            self.ids[i] = pair.id
        return True

    def company(self, note: str) -> int:
        """Questions about the rows that are there, and the licence with a note of what changed. Returns how many
        questions there are."""
        count = 0
        if self.source.n_questions:
            owners = self.source.question_rows()
            with open(self.folder / "questions.jsonl", "w", encoding="utf-8", errors="replace") as file:
                for n, owner in enumerate(owners.tolist()):
                    if owner not in self.ids:
                        continue
                    question = self.source.question(n)
                    line = {"id": question.id, "pair_id": self.ids[owner], "question": question.question,
                            "answers": [list(one) for one in question.answers], "kind": question.kind}  # fmt: skip
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    count += 1
        licence = self.source.licence or "The source states no licence."
        (self.folder / "LICENCE.txt").write_text(f"{note}\n\n{licence}\n", encoding="utf-8", errors="replace")
        return count

    def _image(self, picture: Picture) -> str:
        path = picture.path
        if path is not None and picture.offset is None and path == path.strip() and _writable(path):
            return os.path.abspath(path)
        data = picture.read()
        suffix = next((suffix for start, suffix in BEGINNINGS.items() if data.startswith(start)), ".img")
        (self.folder / "pictures").mkdir(exist_ok=True)
        file = self.folder / "pictures" / f"{self.copied:08d}{suffix}"
        file.write_bytes(data)
        os.utime(file, (EPOCH, EPOCH))  # made twice, a folder has the same fingerprint
        self.copied += 1
        return f"pictures/{file.name}"


def cell(value: Any) -> str:
    """yes and no, numbers with six digits after the point, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def _writable(path: str) -> bool:
    """A name with broken bytes cannot stand in a table of UTF-8."""
    try:
        return "\ufffd" not in path and bool(path.encode())
    except UnicodeEncodeError:
        return False


def _free_names(columns: list[str], taken: list[str]) -> dict[str, str]:
    """Column of the source -> its name in the new table."""
    out: dict[str, str] = {}
    for column in columns:
        name, number = column, 1
        while name in taken or (name != column and name in columns) or name in out.values():
            name = f"{column}_before{number if number > 1 else ''}"
            number += 1
        out[column] = name
    return out
