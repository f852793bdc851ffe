"""Making an index mirror a source: only what changed is embedded, whatever was committed survives a kill."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from interlace.bars import bar
from interlace.data.rows import Pair, Source
from interlace.errors import UserError, shown
from interlace.search import calibrate
from interlace.search.embed import Encoder, embed, skip_of, threads
from interlace.search.index import SKIPPED, Index, batched, check_run, remove
from interlace.search.lock import disk_trouble, writing
from interlace.search.manifest import EXACT_BELOW, NAME, Manifest
from interlace.search.rows import Row, Skip, fingerprints, hash64

# A commit rewrites the table's list of files, so a commit for each batch of 64 would be quadratic in rows.
COMMIT_ROWS = 2048
COMMIT_SECONDS = 15.0  # a slow encoder commits this often; at most this much work is lost by a kill
OPTIMISE_EVERY = 256  # commits: about half a million rows
LOOK_AHEAD = 512  # pairs whose files are examined at once


@dataclass
class IndexReport:
    """What one build did. `skipped` has the first thousand; all of them are in `skipped.jsonl`."""

    folder: Path
    rows: int = 0  # in the index now
    added: int = 0
    updated: int = 0  # embedded again: the picture had changed
    relabelled: int = 0  # only the text or an attribute had changed
    unchanged: int = 0
    removed: int = 0  # no longer in the source
    n_skipped: int = 0
    skipped: list[Skip] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    partitions: int | None = None  # of the approximate index; None: every search is exact
    recall: float | None = None  # of the approximate index, recall@10 against exact search
    seconds: float = 0.0
    megabytes: float = 0.0

    def note(self, skip: Skip) -> None:
        self.n_skipped += 1
        self.reasons[skip.reason] += 1
        if len(self.skipped) < 1000:
            self.skipped.append(skip)


def build_index(
    run: Encoder,
    source: Source,
    where: str | Path | None = None,
    batch: int = 64,
    *,
    split: str | None = None,
    rebuild: bool = False,
    thumbnail: int = 256,
    exact_below: int = EXACT_BELOW,
    progress: bool = True,
    committed: Callable[[list[str]], None] | None = None,
) -> IndexReport:
    """Makes the index at `where` (default: `index` in the run's folder) mirror a source, or one split of it.

    New and changed pictures are embedded, in batches of `batch`; rows that left the source are removed; the rest is
    not touched. Work is committed every 2,048 rows or 15 seconds, and a build that was killed continues from its last
    commit when it is started again. Pictures that cannot be read are skipped, counted, and listed in `skipped.jsonl`.
    Memory does not grow with the size of pictures or texts, only by about 40 bytes a row.

    Args:
        rebuild: start over, for instance with another run.
        thumbnail: longest side of the stored small pictures in pixels; 0 stores none. Counts when an index is made.
        exact_below: up to this many rows (or rows that pass a filter) every vector is compared. Counts likewise.
        progress: show a bar with the time left, and the report at the end.
        committed: called with the ids of each commit, after it.

    Raises UserError: another process is writing (named by its id), the index belongs to another run, the folder holds
    something else, the disk is full, the source is empty, or not one picture of it could be read; and for a path in
    place of a run or a source.
    """
    started = time.monotonic()
    if not hasattr(run, "encode_pictures"):
        raise UserError(f"Expected a loaded run, got {shown(run)}. Run.load(path) loads one.")
    if not hasattr(source, "indices"):
        raise UserError(f"Expected a source, got {shown(source)}. open_source(path) opens one: "
                        "build_index(run, open_source(path)).")  # fmt: skip
    folder = Path(where) if where is not None else Path(run.folder) / "index"
    chosen = source.indices(split)
    if len(chosen) == 0:
        raise UserError(
            f"{source.name} has no pairs{f' in the split {split}' if split else ''}, so there is nothing to index. "
            "Look at it with: interlace data show SOURCE"
        )
    report = IndexReport(folder)
    with writing(folder):
        index = _open(folder, run, source, rebuild, thumbnail, exact_below)
        origin = {"name": source.name, "fingerprint": source.fingerprint, "licence": source.licence, "split": split}
        if index.complete and index.manifest.source == origin:
            report.unchanged = len(index)
            _recall_skipped(folder, report)
        else:
            index.manifest.complete = False
            index.manifest.source = {}
            index.add_columns(source.columns)
            index.manifest.columns = [c for c in index.manifest.columns if c.name in source.columns]
            index.save()
            with (
                open(folder / SKIPPED, "w", encoding="utf-8") as file,
                bar(total=len(chosen), unit=" pictures", desc="indexing", disable=not progress, smoothing=0.05) as todo,
            ):
                _Build(index, run, report, file, todo, batch, committed).go(source.pair(i) for i in chosen)
            _finish(index, run, report)
            index.manifest.source = origin
            index.manifest.complete = True
            index.save()
        ann = index.manifest.vector_index
        report.rows = len(index)
        report.partitions, report.recall = (ann.partitions, ann.recall) if ann else (None, None)
    report.seconds = time.monotonic() - started
    report.megabytes = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6
    if progress:
        from interlace.search.show import print_report

        print_report(report)
    return report


def _open(folder: Path, run: Encoder, source: Source, rebuild: bool, thumbnail: int, exact_below: int) -> Index:
    if rebuild or not (folder / NAME).exists():  # a folder without a manifest is empty or was left half-made
        remove(folder)
        return Index._create(folder, run, source.columns, thumbnail, exact_below)
    manifest = Manifest.read(folder)
    check_run(manifest, run, folder)
    return Index(folder, manifest, run)


def _recall_skipped(folder: Path, report: IndexReport) -> None:
    """What the build that made this index skipped: still the answer to "why is it not there?"."""
    if (folder / SKIPPED).exists():
        with open(folder / SKIPPED, encoding="utf-8") as file:
            for line in file:
                report.note(Skip(**json.loads(line)))


def _finish(index: Index, run: Encoder, report: IndexReport) -> None:
    if not len(index):
        worst = ", ".join(f"{reason} ({count})" for reason, count in report.reasons.most_common(3))
        raise UserError(
            f"Not one of the {report.n_skipped:,} pictures could be indexed: {worst}. "
            f"Are the paths right? They are listed in {index.folder / SKIPPED}."
        )
    index.optimise()
    built = index.refresh_vector_index()
    changed = report.added + report.updated + report.relabelled + report.removed
    if built or (changed and index.manifest.vector_index):
        calibrate.tune(index, run)
    if changed or not index.manifest.similar:
        index.manifest.similar = calibrate.similar_enough(index, run)
    index.manifest.rows = len(index)


class _Build:
    def __init__(
        self,
        index: Index,
        run: Encoder,
        report: IndexReport,
        skipped: IO[str],
        bar: tqdm,
        batch: int,
        committed: Callable[[list[str]], None] | None,
    ):
        self.index, self.run, self.report, self.bar = index, run, report, bar
        self.batch, self.file, self.told = batch, skipped, committed
        self.known = _Known(index)
        self.ready: list[Row] = []
        self.labels: list[tuple[Pair, tuple[int, int]]] = []
        self.commits = 0
        self.last_commit = time.monotonic()

    def go(self, pairs: Iterator[Pair]) -> None:
        with disk_trouble(self.index.folder):
            for rows, skipped in embed(self.run, self._changed(pairs), self.batch, self.index.manifest.thumbnail):
                for skip in skipped:
                    self._skip(skip)
                self.ready += rows
                self.bar.update(len(rows))
                if len(self.ready) >= COMMIT_ROWS or time.monotonic() - self.last_commit > COMMIT_SECONDS:
                    self._commit()
            self._commit()
            self.report.removed = self.index.remove_rows(self.known.gone(self.index))

    def _changed(self, pairs: Iterator[Pair]) -> Iterator[tuple[Pair, tuple[int, int]]]:
        """Those pairs whose picture is new or changed. Files are examined in threads: a network disk answers slowly."""
        with ThreadPoolExecutor(threads()) as pool:
            for some in batched(pairs, LOOK_AHEAD):
                for pair, prints in zip(some, pool.map(_fingerprints, some)):
                    if not self.known.first_time(pair.id):
                        self._skip(skip_of(pair, "its id occurs twice in the source; the first is kept"))
                    elif isinstance(prints, str):
                        self._skip(skip_of(pair, prints))
                    elif (had := self.known.prints(pair.id)) is None or had[0] != prints[0]:
                        yield pair, prints
                    else:
                        self._same_picture(pair, prints, had)

    def _same_picture(self, pair: Pair, prints: tuple[int, int], had: tuple[int, int]) -> None:
        self.bar.update()
        if had[1] == prints[1]:
            self.report.unchanged += 1
            return
        self.report.relabelled += 1
        self.labels.append((pair, prints))
        if len(self.labels) >= COMMIT_ROWS:
            self._commit()

    def _skip(self, skip: Skip) -> None:
        self.bar.update()
        self.report.note(skip)
        self.file.write(json.dumps(asdict(skip), ensure_ascii=False) + "\n")
        self.file.flush()

    def _commit(self) -> None:
        added, updated = self.index.commit(self.ready)
        self.index.relabel(self.labels)
        self.report.added += added
        self.report.updated += updated
        ids = [row.pair.id for row in self.ready] + [pair.id for pair, _ in self.labels]
        self.ready, self.labels = [], []
        self.last_commit = time.monotonic()
        self.commits += 1
        if self.commits % OPTIMISE_EVERY == 0:
            self.index.optimise()
        if self.told and ids:
            self.told(ids)


def _fingerprints(pair: Pair) -> tuple[int, int] | str:
    try:
        return fingerprints(pair)
    except FileNotFoundError:
        return "missing file"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


class _Known:
    """What the index has, as arrays of 64-bit hashes: 24 bytes a row, where a dict of texts would take 300.

    Two ids with one hash are as good as impossible (3 in a million that there is a single such pair in ten million).
    """

    def __init__(self, index: Index):
        ids, pictures, labels = [], [], []
        for batch in index._stream(["id", "picture_print", "row_print"], size=8192):
            ids.append(np.array([hash64(i) for i in batch.column(0).to_pylist()], dtype=np.int64))
            pictures.append(batch.column(1).to_numpy())
            labels.append(batch.column(2).to_numpy())
        none = [np.empty(0, dtype=np.int64)]
        self.ids = np.concatenate(ids or none)
        order = np.argsort(self.ids)
        self.ids = self.ids[order]
        self.pictures, self.labels = np.concatenate(pictures or none)[order], np.concatenate(labels or none)[order]
        self.seen = np.zeros(len(self.ids), dtype=bool)
        self.fresh: set[int] = set()  # ids met that the index does not have, until there are many of them
        self.many: np.ndarray = none[0]  # and the rest of those, sorted

    def _at(self, hashed: int) -> int | None:
        at = int(np.searchsorted(self.ids, hashed))
        return at if at < len(self.ids) and self.ids[at] == hashed else None

    def prints(self, id: str) -> tuple[int, int] | None:
        at = self._at(hash64(id))
        return None if at is None else (int(self.pictures[at]), int(self.labels[at]))

    def first_time(self, id: str) -> bool:
        """Notes that the source has this id; False when it was noted before."""
        hashed = hash64(id)
        if (at := self._at(hashed)) is not None:
            before, self.seen[at] = bool(self.seen[at]), True
            return not before
        spot = int(np.searchsorted(self.many, hashed))
        if hashed in self.fresh or (spot < len(self.many) and self.many[spot] == hashed):
            return False
        self.fresh.add(hashed)
        if len(self.fresh) >= max(100_000, len(self.many) // 2):
            self.many = np.sort(np.concatenate([self.many, np.fromiter(self.fresh, dtype=np.int64)]))
            self.fresh.clear()
        return True

    def gone(self, index: Index) -> Sequence[str]:
        """Ids the index had and the source has no more."""
        if self.seen.all():
            return []
        left = set(self.ids[~self.seen].tolist())
        return [
            i for batch in index._stream(["id"], size=8192) for i in batch.column(0).to_pylist() if hash64(i) in left
        ]
