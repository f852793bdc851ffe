"""Regions of a source's pictures into a store: only of pictures it does not have yet, each picture once."""

from __future__ import annotations

import errno
import json
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from interlace.bars import bar
from interlace.data.pictures import BadPicture, open_picture
from interlace.data.rows import Source
from interlace.errors import Stopped, UserError
from interlace.regions.arrays import RegionArrays
from interlace.regions.base import describe, fingerprint
from interlace.regions.keys import hash64
from interlace.regions.store import STORE, RegionStore, Stamp, Writer, place, read_store

COMMIT_SECONDS = 30.0  # at most so much work is lost by a kill
COMMIT_BYTES = 64_000_000
SKIPPED = "skipped.jsonl"
DECODERS = 4


class Extractor(Protocol):
    """GridExtractor and DetectorExtractor are two."""

    facts: dict[str, Any]  # all that decides what comes out, JSON; `fingerprint` is of these
    features_size: int
    beliefs_size: int
    hint: int  # side in pixels of the pictures it looks at; they are not decoded much larger

    def __call__(self, pictures: list[Image.Image]) -> list[RegionArrays]: ...


@dataclass
class ExtractReport:
    """What one run did. `skipped` has the first thousand (id, path, reason); all are in `skipped.jsonl`, and so are
    the first thousand rows that the source left out before, since their picture is missing, for instance."""

    folder: Path
    fingerprint: str
    facts: dict[str, Any] = field(default_factory=dict)
    rows: int = 0  # of the source that have regions now
    pictures: int = 0  # of the source that have regions now; several rows may show one
    added: int = 0
    unchanged: int = 0
    n_skipped: int = 0  # pictures
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    left_out: int = 0  # rows
    left_out_first: tuple[int | str, str] | None = None  # (row, reason)
    regions: tuple[int, float, int] = (0, 0.0, 0)  # per picture in the store: least, mean, most
    bytes: int = 0  # of the store
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        """Pictures looked at in a second."""
        return (self.added + self.n_skipped) / self.seconds if self.seconds else 0.0


def extract(source: Source, extractor: Extractor, out: str | Path, *, batch: int = 32, split: str | None = None,
            progress: bool = True, commit_seconds: float = COMMIT_SECONDS,
            commit_bytes: int = COMMIT_BYTES) -> ExtractReport:  # fmt: skip
    """Puts the regions of every picture of the source (or of one split) into the store at `out`.

    A store holds regions of one extractor, of as many sources as are extracted into it. Pictures it has already are
    not looked at again, unless their file changed since. What was computed is committed every 30 seconds or 64 MB, and
    a run that was stopped continues from its last commit when it is started again. Pictures that cannot be read are
    skipped, counted, and listed in `skipped.jsonl`.

    Raises UserError: `out` holds something else or another extractor's regions, another process is writing to it, the
    disk is full, the source is empty, or not one of its pictures could be used. Raises Stopped on SIGTERM and Ctrl-C,
    after a commit.
    """
    folder = Path(out).expanduser()
    rows = source.indices(split)
    if batch < 1:
        raise UserError(f"a batch has at least 1 picture; got {batch}.")
    if not len(rows):
        raise UserError(f"{source.name} has no pairs{f' in the split {split}' if split else ''}: nothing to extract.")
    with _writing(folder):
        _same_extractor(folder, extractor)
        report = ExtractReport(folder, fingerprint(extractor.facts), extractor.facts)
        writer = Writer(folder, extractor.facts, extractor.features_size, extractor.beliefs_size)
        run = _Run(source, extractor, writer, RegionStore.open(folder), report)
        todo = run.plan(rows, progress)
        started = time.monotonic()
        with open(folder / SKIPPED, "w", encoding="utf-8") as file, _stop_signals() as stop:
            run.list_left_out(file)
            run.go(todo, batch, file, stop, progress, commit_seconds, commit_bytes)
        report.seconds = time.monotonic() - started
        store = RegionStore.open(folder)
        counts = store.counts()
        if not len(counts):
            raise UserError(f"Not one of the {report.n_skipped:,} pictures could be used: "
                            f"{', '.join(f'{why} ({n})' for why, n in report.reasons.most_common(3))}. "
                            f"They are listed in {folder / SKIPPED}.")  # fmt: skip
        report.regions = int(counts.min()), float(counts.mean()), int(counts.max())
        report.bytes = store.bytes
    if progress:
        print_report(report)
    if stop.signal is not None:
        raise Stopped(f"stopped with {report.pictures:,} pictures done; the same command continues from there.",
                      128 + stop.signal)  # fmt: skip
    return report


def _same_extractor(folder: Path, extractor: Extractor) -> None:
    plain = read_store(folder)
    if plain is None:
        if any(file.name not in (".lock", SKIPPED) and file.suffix != ".part" for file in folder.iterdir()):
            raise UserError(f"{folder} holds something else, and no {STORE}; choose an empty folder.")
    elif (had := fingerprint(plain["extractor"])) != (now := fingerprint(extractor.facts)):
        raise UserError(f"{folder} holds regions of another extractor ({had}: {describe(plain['extractor'])}; this one "
                        f"is {now}: {describe(extractor.facts)}). Choose another folder.")  # fmt: skip


class _Run:
    def __init__(self, source: Source, extractor: Extractor, writer: Writer, store: RegionStore, report: ExtractReport):
        self.source, self.extractor, self.writer, self.store, self.report = source, extractor, writer, store, report
        self.rows, self.starts = np.empty(0, np.int64), np.empty(0, np.int64)

    def plan(self, rows: np.ndarray, progress: bool) -> np.ndarray:
        """Numbers of the pictures that have to be looked at. Several rows may show one; `_group` gives them."""
        hashes = np.fromiter((hash64(place(self.source.picture(int(n)))) for n in rows), np.int64, len(rows))
        _, first, owner = np.unique(hashes, return_index=True, return_inverse=True)
        self.rows = rows[np.argsort(owner, kind="stable")]
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(owner))])
        todo = []
        for n in bar(np.argsort(first), desc="looking for changes", unit=" pictures", leave=False, delay=2,
                     disable=not progress):  # fmt: skip
            if self._has(int(self._group(n)[0])):
                self.report.unchanged += 1
                self._count(self._group(n))
            else:
                todo.append(n)
        return np.array(todo, np.int64)

    def _group(self, n: int) -> np.ndarray:
        """(rows,) of picture `n`, as positions in the source."""
        return self.rows[self.starts[n] : self.starts[n + 1]]

    def _has(self, row: int) -> bool:
        pair = self.source.pair(row)
        try:
            now = Stamp.of(pair.picture)
        except OSError:
            return False  # decoding will say why
        if (then := self.store.stamp(place(pair.picture))) is not None:
            return then == now
        then = self.store.stamp(pair.id)  # the folder may have been moved, which touches the time of its files
        return then is not None and then.bytes == now.bytes

    def _count(self, group: np.ndarray) -> None:
        self.report.pictures += 1
        self.report.rows += len(group)

    def go(self, todo: np.ndarray, batch: int, skipped: Any, stop: _Stop, progress: bool, seconds: float,
           most: int) -> None:  # fmt: skip
        last = time.monotonic()
        total = len(todo) + self.report.unchanged
        with bar(total=total, initial=self.report.unchanged, unit=" pictures", desc="extracting", smoothing=0.05,
                 disable=not progress) as done:  # fmt: skip
            for some in self._decoded(todo, batch):
                for group, stamp, result in self._regions(some):
                    pair = self.source.pair(int(group[0]))
                    ids = [self.source.pair(int(n)).id for n in group]
                    if not isinstance(result, str):
                        try:
                            self.writer.add([*ids, place(pair.picture)], stamp, result)
                            self.report.added += 1
                            self._count(group)
                        except BadPicture as bad:
                            result = bad.reason
                    if isinstance(result, str):
                        self._skip(skipped, pair.id, str(pair.picture), result)
                    done.update()
                if self.writer.size > most or time.monotonic() - last > seconds:
                    self._commit()
                    last = time.monotonic()
                if stop.signal is not None:
                    break
            self._commit()

    def _commit(self) -> None:
        try:
            self.writer.commit()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"The disk that holds {self.writer.folder} is full. What was committed is intact: free "
                                "some space and run the same command again.") from error  # fmt: skip
            raise

    def list_left_out(self, file: Any) -> None:
        """The rows that the source itself could not use, of whatever split: they have no picture to look at."""
        problems = self.source.problems
        self.report.left_out, self.report.left_out_first = self.source.n_problems, problems[0] if problems else None
        for row, reason in problems:
            file.write(json.dumps({"row": row, "reason": reason}, ensure_ascii=False) + "\n")
        file.flush()

    def _skip(self, file: Any, id: str, path: str, reason: str) -> None:
        self.report.n_skipped += 1
        self.report.reasons[reason] += 1
        if len(self.report.skipped) < 1000:
            self.report.skipped.append((id, path, reason))
        file.write(json.dumps({"id": id, "path": path, "reason": reason}, ensure_ascii=False) + "\n")
        file.flush()

    def _decode(self, group: np.ndarray) -> tuple[Stamp, Image.Image | str]:
        picture = self.source.picture(int(group[0]))
        try:
            # the stamp first: a file that is exchanged while it is read differs from it the next time
            return Stamp.of(picture), open_picture(picture, size_hint=self.extractor.hint)
        except BadPicture as bad:
            return Stamp(0, 0), bad.reason
        except OSError as error:
            return Stamp(0, 0), "missing file" if isinstance(error, FileNotFoundError) else str(error.strerror or error)

    def _decoded(self, todo: np.ndarray, batch: int) -> Iterator[list[tuple[np.ndarray, Stamp, Image.Image | str]]]:
        """Batches in order; at most two of decoded pictures are in memory."""
        waiting: deque[tuple[np.ndarray, Future[tuple[Stamp, Image.Image | str]]]] = deque()
        groups = (self._group(n) for n in todo)
        with ThreadPoolExecutor(DECODERS, thread_name_prefix="decode") as pool:
            try:
                while True:
                    for group in islice(groups, 2 * batch - len(waiting)):
                        waiting.append((group, pool.submit(self._decode, group)))
                    if not waiting:
                        return
                    some = [waiting.popleft() for _ in range(min(batch, len(waiting)))]
                    yield [(group, *future.result()) for group, future in some]
            finally:
                for _, future in waiting:
                    future.cancel()

    def _regions(self, some: list[tuple[np.ndarray, Stamp, Image.Image | str]]
                 ) -> Iterator[tuple[np.ndarray, Stamp, RegionArrays | str]]:  # fmt: skip
        """Regions of each, or the reason why there are none."""
        pictures = [picture for _, _, picture in some if not isinstance(picture, str)]
        found = iter(self._ask(pictures))
        for group, stamp, picture in some:
            yield group, stamp, picture if isinstance(picture, str) else next(found)

    def _ask(self, pictures: list[Image.Image]) -> list[RegionArrays | str]:
        if not pictures:
            return []
        try:
            return list(self.extractor(pictures))
        except (UserError, MemoryError):
            raise
        except Exception as error:  # one odd picture must not end a long run: find it by asking for one at a time
            if len(pictures) == 1:
                return [_why(error)]
            found = [self._alone(picture) for picture in pictures]
            if all(isinstance(one, str) for one in found):
                raise  # no matter of odd pictures
            return found

    def _alone(self, picture: Image.Image) -> RegionArrays | str:
        try:
            return self.extractor([picture])[0]
        except (UserError, MemoryError):
            raise
        except Exception as error:
            return _why(error)


def _why(error: Exception) -> str:
    return f"the extractor refused it ({str(error).splitlines()[0][:80] if str(error) else type(error).__name__})"


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError(f"Another process is writing to {folder}. Wait until it has finished, or stop it.") from None
    except OSError as error:
        raise UserError(f"Cannot write to {folder}: {error.strerror}. Choose a folder of your own.") from None
    try:
        yield
    finally:
        lock.release()


class _Stop:
    signal: signal.Signals | None = None


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """SIGTERM and the first Ctrl-C are noted, and the loop ends after its batch; a second Ctrl-C ends it at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield stop
        return

    def note(number: int, frame: Any) -> None:
        if stop.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = signal.Signals(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_report(report: ExtractReport) -> None:
    """What a run did, in a few lines."""
    least, mean, most = report.regions
    shown = f"{least}" if least == most else f"{least} to {most} (mean {mean:.1f})"
    did = {"new": report.added, "unchanged": report.unchanged, "skipped": report.n_skipped}
    print(f"{report.folder}: {report.rows:,} rows, {report.pictures:,} pictures, {shown} regions each, "
          f"{report.bytes / 1e6:,.1f} MB")  # fmt: skip
    print(", ".join(f"{count:,} {name}" for name, count in did.items() if count)
          + f"; {report.seconds:.1f} s ({report.per_second:.1f} pictures/s)")  # fmt: skip
    for reason, count in report.reasons.most_common(8):
        example = next((path for _, path, why in report.skipped if why == reason), "")
        print(f"  skipped {count:,}: {reason}, for example {example}")
    if report.left_out_first is not None:
        row, reason = report.left_out_first
        print(f"  left out by the table {report.left_out:,}: for example row {row}, {reason}")
    if report.n_skipped or report.left_out:
        print(f"  all of them: {report.folder / SKIPPED}")
    print(f"fingerprint {report.fingerprint}: {describe(report.facts)}")
