"""What a tar holds, kept on the disk: a shard is walked once, and opening it again reads one small file instead.

Walking touches every header and text of a tar, a seek each: minutes for a large set on a network's disk. The index has
keys, texts and where pictures lie, no picture. It belongs to a shard's path, size and time of change; a shard that
changed is walked again, and its old index goes. A cache that cannot be written or read costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from interlace.data.cache import cache_folder
from interlace.data.rows import Picture

VERSION = 1
Members = dict[str, Any]  # suffix -> Picture, text, dict or None
Say = Callable[[str, str], None]  # where, what is wrong there


class ShardIndex:
    def __init__(self, shard: Path):
        facts = shard.stat()
        self.shard, self.folder = shard.absolute(), cache_folder() / "shards"
        self.of_path = _short(str(self.shard))
        self.file = self.folder / f"{self.of_path}-{_short(f'{VERSION} {facts.st_size} {facts.st_mtime_ns}')}.jsonl"

    def read(self) -> tuple[list[tuple[str, Members]], list[tuple[str, str]]] | None:
        """Samples and what was wrong with others; None when there is no whole index."""
        samples, problems, ended = list[tuple[str, Members]](), list[tuple[str, str]](), False
        try:
            with open(self.file, encoding="utf-8") as file:
                for line in file:
                    kind, *content = json.loads(line)
                    if kind == "sample":
                        samples.append((content[0], {suffix: self._member(m) for suffix, m in content[1].items()}))
                    elif kind == "problem":
                        problems.append((content[0], content[1]))
                    else:
                        ended = content == [len(samples)]
        except (OSError, ValueError, TypeError, AttributeError, IndexError):
            return None
        return (samples, problems) if ended else None

    def _member(self, kept: Any) -> Any:
        if isinstance(kept, list):
            return Picture(path=str(self.shard), offset=int(kept[0]), length=int(kept[1]))
        return kept["text"] if isinstance(kept, dict) and "text" in kept else kept and kept["json"]

    def kept(self, samples: Iterator[tuple[str, Members]],
             told: list[tuple[str, str]]) -> Iterator[tuple[str, Members]]:  # fmt: skip
        """The samples as they come. Once the last has come, the index stands: not when the caller or the shard stopped
        before. `told`: what was said of the shard by then."""
        file, count = self._aside(), 0
        try:
            for key, members in samples:
                file = _write(file, ["sample", key, {suffix: _plain(m) for suffix, m in members.items()}])
                count += 1
                yield key, members
            for place, reason in told:
                file = _write(file, ["problem", place, reason])
            file = _write(file, ["end", count])
            if file is not None:
                self._publish(file)
                file = None
        finally:
            if file is not None:
                file.close()
                Path(file.name).unlink(missing_ok=True)

    def _aside(self) -> TextIO | None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix="writing-", suffix=".jsonl", dir=self.folder)
            os.close(handle)
            return open(name, "w", encoding="utf-8")
        except OSError:
            return None

    def _publish(self, file: TextIO) -> None:
        try:
            file.close()
            for old in self.folder.glob(f"{self.of_path}-*.jsonl"):
                old.unlink(missing_ok=True)
            os.replace(file.name, self.file)
        except OSError:
            Path(file.name).unlink(missing_ok=True)


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _plain(member: Any) -> Any:
    """As JSON: a picture is [offset, length], a text {"text": ...}, a .json {"json": ...}, anything else None."""
    if isinstance(member, Picture):
        return [member.offset, member.length]
    if isinstance(member, str):
        return {"text": member}
    return None if member is None else {"json": member}


def _write(file: TextIO | None, line: list[Any]) -> TextIO | None:
    """None when the disk takes no more; what stood there is removed."""
    if file is None:
        return None
    try:
        file.write(json.dumps(line) + "\n")
        return file
    except (OSError, ValueError, TypeError):  # ValueError, TypeError: a .json that cannot be written as it was read
        with suppress(OSError):
            file.close()
        Path(file.name).unlink(missing_ok=True)
        return None
