"""A reader for a form of data that the library does not know: the table `pairs` of an SQLite file.

    python docs/examples/sqlite_source.py data check shop.sqlite
    python docs/examples/sqlite_source.py train demo data.source=shop.sqlite train.out=runs/shop
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from interlace.data.sources.build import BATCH, Batch, Raw
from interlace.data.sources.open import TABLES
from interlace.errors import UserError

TABLE = "pairs"


def read_sqlite(file: Path, name: str) -> Raw:
    """The columns keep their names; which of them is the picture or the caption is decided as for a CSV. Raises
    UserError when the file is no SQLite database or has no such table."""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as db:
            columns = [column for _, column, *_ in db.execute(f"PRAGMA table_info({TABLE})")]
            total = db.execute(f"SELECT count(*) FROM {TABLE}").fetchone()[0] if columns else 0
    except sqlite3.DatabaseError as error:
        raise UserError(f"{file} is not readable as SQLite: {error}.") from None
    if not columns:
        raise UserError(f"{file}: expected a table called {TABLE!r}, and there is none.")

    def batches() -> Iterator[Batch]:
        """(rows' places, column -> cells), BATCH rows at a time: ten million rows are never in memory at once."""
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as db:
            rows, start = db.execute(f"SELECT * FROM {TABLE}"), 1
            while some := rows.fetchmany(BATCH):
                yield range(start, start + len(some)), {c: list(cells) for c, cells in zip(columns, zip(*some))}
                start += len(some)

    return Raw(name=name, where=str(file), columns=columns, batches=batches, root=file.parent, total=total)


TABLES[".sqlite"] = read_sqlite  # from here on every command and open_source() take such a file

if __name__ == "__main__":
    from interlace.cli import main

    sys.exit(main())
