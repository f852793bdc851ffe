"""Lines that survive a kill: appended a batch at a time, on the disk before the next one is begun."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Parts:
    """A file of JSON lines, one a row, `batch` rows at a time. What was written whole is there after a kill; a batch
    that was torn is cut off, and done again whole: so every batch has the same rows however often the work was begun,
    and with them the same numbers to the last bit."""

    def __init__(self, file: Path, rows: int, batch: int):
        self.file, self.rows, self.batch = file, rows, batch
        self.done = self._mend()

    def _mend(self) -> int:
        """How many rows are there, after cutting off what is not a whole batch."""
        if not self.file.exists():
            return 0
        ends = []
        with open(self.file, "rb") as lines:
            at = 0
            for line in lines:
                if not line.endswith(b"\n") or not _whole(line):
                    break
                at += len(line)
                ends.append(at)
        done = len(ends) if len(ends) >= self.rows else len(ends) // self.batch * self.batch
        done = min(done, self.rows)
        if (whole := ends[done - 1] if done else 0) < self.file.stat().st_size:
            os.truncate(self.file, whole)
        return done

    def append(self, lines: list[dict[str, Any]]) -> None:
        """A whole batch. Returns when it is on the disk."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with open(self.file, "ab") as file:
            file.write(text.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        self.done += len(lines)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.file.exists():
            return
        with open(self.file, encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def _whole(line: bytes) -> bool:
    """A disk that lost power may keep a line's length and not its bytes."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
