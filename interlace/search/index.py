"""The index: rows with vectors in LanceDB, behind an interface of our own.

A folder holds `index.json` (what it is, see manifest.py), `lance/` (the table), `skipped.jsonl` (pictures left out by
the last build) and `write.lock`. Any number of processes may read; one writes at a time; readers see each commit.

Up to `exact_below` rows a query is compared with every vector. Above, through an IVF_SQ index, except where a filter
leaves few enough rows to compare all of those: an approximate index loses most under narrow filters.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from interlace.data.rows import Pair, Picture
from interlace.errors import UserError, suggest
from interlace.search.embed import Encoder, embed, skip_of
from interlace.search.filters import Column, Filter, Kind, ids_text, where_text
from interlace.search.lock import HELD, HOLDER, disk_trouble, writing
from interlace.search.manifest import EXACT_BELOW, NAME, Manifest, VectorIndex
from interlace.search.rows import (
    FIXED,
    Item,
    Row,
    Skip,
    attribute_field,
    fingerprints,
    kind_of,
    label_table,
    new_column,
    schema,
    table_of,
)

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
TABLE = "items"
SKIPPED = "skipped.jsonl"
# Old versions of the table go after this time. A query in flight reads one version; none takes this long.
CLEANUP_MARGIN = timedelta(minutes=10)
WAIT = 30.0  # seconds an upsert or delete waits for another writer; a build does not wait
ROWS_PER_PARTITION = 4096  # 245 partitions at a million rows, where the settings were measured
MANY_FILES = 20  # small files of rows after which an upsert tidies up; a build always does
AT_A_TIME = 1000  # ids in one statement


@dataclass
class Upserted:
    added: int = 0
    updated: int = 0
    skipped: list[Skip] = field(default_factory=list)


class Index:
    """Pictures that can be searched. `Index.open(folder, run)` opens one, `build_index` makes one."""

    def __init__(self, folder: Path, manifest: Manifest, run: Encoder | None = None):
        self.folder = folder
        self._manifest = manifest
        self._stamp = self._manifest_stamp()
        self._run = run
        self._table = self._open_table()

    # Opening -----------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, folder: str | Path, run: Encoder | None = None) -> Index:
        """Opens an index for reading, upserts and deletes. Without a run nothing can be added.

        Raises UserError when there is none, when it is half-written or damaged, and when `run` is not the run it was
        built with, because vectors of two runs cannot be compared.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if run is not None:
            check_run(manifest, run, folder)
        return cls(folder, manifest, run)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        run: Encoder,
        columns: Mapping[str, str],
        thumbnail: int = 256,
        exact_below: int = EXACT_BELOW,
    ) -> Index:
        """An empty index. `columns` maps attribute names to "text", "number" or "boolean".

        Raises UserError when the folder holds something else. A half-made index is replaced.
        """
        folder = Path(folder)
        if (folder / NAME).exists():
            raise UserError(f"There is an index at {folder} already. Open it, or rebuild it.")
        with writing(folder):
            return cls._create(folder, run, columns, thumbnail, exact_below)

    @classmethod
    def _create(cls, folder: Path, run: Encoder, columns: Mapping[str, str], thumbnail: int, exact_below: int) -> Index:
        import lancedb
        from lancedb.index import FTS, BTree

        if not run.dim:
            raise UserError(
                f"{run.folder} has no contrast head, so it gives no vectors to search by. "
                "Train it with the itc objective."
            )
        remove(folder)
        mapped: list[Column] = []
        for name, kind in columns.items():
            mapped.append(new_column(name, cast(Kind, kind), [c.field for c in mapped]))
        manifest = Manifest(run.fingerprint, str(run.folder), run.dim, mapped, thumbnail, exact_below)
        with disk_trouble(folder):
            table = lancedb.connect(folder / "lance").create_table(TABLE, schema=schema(run.dim, mapped))
            table.create_index("id", config=BTree())  # an upsert looks ids up: without it, each would read them all
            table.create_index("words", config=FTS())
            manifest.write(folder)  # last: a folder with a manifest has a table
        return cls(folder, manifest, run)

    def _open_table(self) -> Any:
        import lancedb

        with self._reading():
            # interval 0: each query looks for a newer version first (about 1 ms), so readers follow a writer
            db = lancedb.connect(self.folder / "lance", read_consistency_interval=timedelta(0))
            return db.open_table(TABLE)

    def _manifest_stamp(self) -> int:
        try:
            return (self.folder / NAME).stat().st_mtime_ns
        except OSError:
            return 0

    def _fresh(self) -> Any:
        """The table, after following whatever another process did to the index meanwhile."""
        if (stamp := self._manifest_stamp()) != self._stamp:
            manifest = Manifest.read(self.folder)
            if manifest.run != self._manifest.run:
                raise UserError(f"The index at {self.folder} was rebuilt with another run meanwhile. Open it again.")
            self._manifest, self._stamp = manifest, stamp
            self._table = self._open_table()
        return self._table

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """LanceDB's errors about missing or damaged files, as one sentence with the fix."""
        try:
            with disk_trouble(self.folder):
                yield
        except (OSError, RuntimeError, ValueError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"The index at {self.folder} cannot be read: {first}. "
                "If files of it are gone or changed, build it again: interlace index RUN SOURCE --rebuild"
            ) from error

    # What it is --------------------------------------------------------------------------------------------------

    @property
    def columns(self) -> dict[str, str]:
        """Attribute name -> "text" | "number" | "boolean"."""
        return {c.name: c.type for c in self._manifest.columns}

    @property
    def filter_columns(self) -> list[Column]:
        """What filters may name: the attributes, then name, caption, id, split and group, unless an attribute is."""
        own = self._manifest.columns
        return [*own, *(c for c in FIXED if c.name not in self.columns)]

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def complete(self) -> bool:
        """Whether the last build ran through to its end."""
        return self._manifest.complete

    def __repr__(self) -> str:
        return f"Index({str(self.folder)!r}: {len(self):,} rows, {self._manifest.dim} dimensions)"

    def __bool__(self) -> bool:
        return True  # an empty index is still an index

    # Reading -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.count()

    def count(self, where: Filter | None = None) -> int:
        """Rows in all, or those that pass a filter."""
        with self._reading():
            return self._fresh().count_rows(where_text(where) if where is not None else None)

    def _light(self) -> list[str]:
        fields = ["id", "name", "caption", "split_of", "group_of", "picture_path", "picture_offset", "picture_length"]
        return fields + [c.field for c in self._manifest.columns]

    def _item(self, row: Mapping[str, Any]) -> Item:
        ref = Picture(row["picture_path"], row.get("picture_data"), row["picture_offset"], row["picture_length"])
        attributes = {c.name: row[c.field] for c in self._manifest.columns}
        return Item(
            row["id"],
            row["name"],
            row["caption"],
            attributes,
            ref,
            row["split_of"],
            row["group_of"],
            row.get("thumbnail"),
        )

    def get(self, id: str) -> Item | None:
        """One row with its thumbnail, or None when there is no such id."""
        with self._reading():
            table = self._fresh()
            query = table.search().where(ids_text([id])).select([*self._light(), "picture_data", "thumbnail"])
            rows = query.limit(1).to_arrow().to_pylist()
        return self._item(rows[0]) if rows else None

    def vector(self, id: str) -> np.ndarray | None:
        """(D,) float32, unit length; None when there is no such id."""
        with self._reading():
            found = self._fresh().search().where(ids_text([id])).select(["vector"]).limit(1).to_arrow()
        return np.asarray(found["vector"][0].as_py(), dtype=np.float32) if len(found) else None

    def __iter__(self) -> Iterator[Item]:
        """All rows in no particular order, streamed, without thumbnails and bytes of pictures (`get` has those)."""
        for batch in self._stream(self._light()):
            for row in batch.to_pylist():
                yield self._item(row)

    def _stream(self, fields: Sequence[str], size: int = 2048) -> Iterator[pa.RecordBatch]:
        with self._reading():
            yield from self._fresh().search().select(list(fields)).limit(None).to_batches(batch_size=size)

    def values(self, name: str, most: int = 10_000) -> Counter[Any]:
        """How often each value of an attribute occurs; missing ones are not counted. It stops looking at `most`
        different values: such a column is a text of its own for nearly every row."""
        column = next((c for c in self.filter_columns if c.name == name), None)
        if column is None:
            raise UserError(f"No column {name!r} in this index.{suggest(name, self.columns)}")
        counts: Counter[Any] = Counter()
        for batch in self._stream([column.field]):
            counts.update(value for value in batch.column(0).to_pylist() if value is not None)
            if len(counts) >= most:
                break
        return counts

    def sample(self, n: int, fields: Sequence[str], seed: int = 0) -> pa.Table:
        """`n` random rows (all, when there are fewer), the named fields of each."""
        with self._reading():
            table = self._fresh()
            total = table.count_rows()
            picked = np.sort(np.random.default_rng(seed).permutation(total)[:n])
            return table.take_offsets(picked.tolist()).select(list(fields)).to_arrow()

    def nearest(
        self, vector: np.ndarray, k: int, where: Filter | None = None, exact: bool | None = None
    ) -> list[tuple[Item, float]]:
        """The `k` rows most similar to a vector, shape (D,), with their cosines, best first.

        `exact=None` decides by the number of candidates (see the head of this file).
        """
        found = self._nearest(vector, k, [*self._light(), "picture_data"], where, exact).to_pylist()
        return [(self._item(row), 1 - row["_distance"]) for row in found]

    def _nearest(
        self, vector: np.ndarray, k: int, fields: list[str], where: Filter | None = None, exact: bool | None = None
    ) -> pa.Table:
        """For one vector (D,), or for several (N, D): then `query_index` says whose each row is."""
        with self._reading():
            table = self._fresh()
            vector = np.asarray(vector, dtype=np.float32)
            query = table.search(vector if vector.ndim == 1 else list(vector), vector_column_name="vector")
            query = query.distance_type(self._manifest.metric).select([*fields, "_distance"]).limit(k)
            if where is not None:
                query = query.where(where_text(where), prefilter=True)
            ann = self._manifest.vector_index
            if exact if exact is not None else self.searches_exactly(where):
                query = query.bypass_vector_index()
            elif ann is not None:
                query = query.nprobes(ann.nprobes).refine_factor(ann.refine)
            return query.to_arrow()

    def cosines(self, queries: np.ndarray, k: int, exact: bool | None = None) -> np.ndarray:
        """(N, k) the best cosines of each of several queries (N, D), in descending order; -inf where rows ran out."""
        result = np.full((len(queries), k), -np.inf)
        for start in range(0, len(queries), 32):  # one pass over the vectors serves 32 queries
            found = self._nearest(
                np.asarray(queries[start : start + 32]).reshape(-1, self._manifest.dim), k, [], None, exact
            )
            whose, values = found["query_index"].to_numpy(), 1 - found["_distance"].to_numpy()
            for n in range(len(queries[start : start + 32])):
                mine = np.sort(values[whose == n])[::-1]
                result[start + n, : len(mine)] = mine
        return result

    def searches_exactly(self, where: Filter | None = None) -> bool:
        """Whether a query with this filter is compared with every vector that passes."""
        return self._manifest.vector_index is None or self.count(where) <= self._manifest.exact_below

    def words(self, text: str, k: int, where: Filter | None = None) -> list[tuple[Item, float, np.ndarray]]:
        """The `k` rows whose name or caption has most of these words, with BM25 score and vector, best first."""
        from lancedb.query import MatchQuery

        with self._reading():
            table = self._fresh()
            # a query object, not a string: a string would be parsed, and quotes in it would mean a phrase
            query = table.search(MatchQuery(text, column="words"), query_type="fts")  # type: ignore[call-arg]
            if where is not None:
                query = query.where(where_text(where), prefilter=True)
            fields = [*self._light(), "picture_data", "vector", "_score"]
            rows = query.select(fields).limit(k).to_arrow().to_pylist()
        return [(self._item(row), row["_score"], np.asarray(row["vector"], dtype=np.float32)) for row in rows]

    # Writing -----------------------------------------------------------------------------------------------------

    def upsert(self, pairs: Iterable[Pair], batch: int = 64) -> Upserted:
        """Embeds pairs and adds them, or replaces those whose ids exist. Commits batch by batch.

        New attributes become columns. Pictures that cannot be read are skipped and listed in the result.
        """
        if self._run is None:
            raise UserError(
                "This index was opened without a run, so it cannot embed. Open it with Index.open(folder, run)."
            )
        result = Upserted()
        with writing(self.folder, WAIT):
            self._fresh()
            self._touch()
            for some in batched(pairs, 16 * batch):
                self.add_columns({n: kind_of(v) for p in some for n, v in p.attributes.items() if v is not None})
                with_prints: list[tuple[Pair, tuple[int, int]]] = []
                for pair in some:
                    try:
                        with_prints.append((pair, fingerprints(pair)))
                    except OSError as error:
                        result.skipped.append(skip_of(pair, f"missing file ({error.strerror})"))
                for rows, skipped in embed(self._run, with_prints, batch, self._manifest.thumbnail):
                    result.skipped += skipped
                    added, updated = self.commit(rows)
                    result.added += added
                    result.updated += updated
            if self._table.stats()["fragment_stats"]["num_small_fragments"] >= MANY_FILES:
                self.optimise()
        return result

    def delete(self, ids: Iterable[str]) -> int:
        """Removes rows by id and returns how many there were; unknown ids are ignored."""
        with writing(self.folder, WAIT):
            self._fresh()
            self._touch()
            return self.remove_rows(ids)

    def _touch(self) -> None:
        """The index no longer mirrors its source exactly, so the next build has to look at every row."""
        if self._manifest.source:
            self._manifest.source = {}
            self.save()

    # The rest of this part is for whoever holds the write lock: build.py, and the two methods above.

    def save(self) -> None:
        self._manifest.write(self.folder)
        self._stamp = self._manifest_stamp()

    def add_columns(self, columns: Mapping[str, str]) -> None:
        """Columns for new attributes. One whose type changed gets a second field; the first is no longer read."""
        known = self.columns
        fresh = {name: kind for name, kind in columns.items() if known.get(name) != kind}
        if not fresh:
            return
        kept = [c for c in self._manifest.columns if c.name not in fresh]
        taken = set(self._table.schema.names)
        for name, kind in fresh.items():
            kept.append(new_column(name, cast(Kind, kind), taken))
            taken.add(kept[-1].field)
            self._table.add_columns([attribute_field(kept[-1])])
        self._manifest.columns = kept
        self.save()

    def commit(self, rows: Sequence[Row]) -> tuple[int, int]:
        """Writes rows in one transaction, the last of equal ids winning; returns (added, updated)."""
        if not rows:
            return 0, 0
        last = list({row.pair.id: row for row in rows}.values())
        return self._merge(table_of(last, self._manifest.dim, self._manifest.columns))

    def _merge(self, table: pa.Table) -> tuple[int, int]:
        # merge, not add: with the primary key it stays right even if a writer got past the lock
        merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        result = merge.execute(table)
        return result.num_inserted_rows, result.num_updated_rows

    def relabel(self, pairs: Sequence[tuple[Pair, tuple[int, int]]]) -> None:
        """New names, captions and attributes for rows whose pictures are as they were."""
        if pairs:
            table = label_table(pairs, self._manifest.columns)
            self._table.merge_insert("id").when_matched_update_all().execute(table)

    def remove_rows(self, ids: Iterable[str]) -> int:
        before = self._table.count_rows()
        for some in batched(ids, AT_A_TIME):
            self._table.delete(ids_text(some))
        return before - self._table.count_rows()

    def optimise(self) -> None:
        """Merges small files, brings the indexes up to date, removes old versions that no query can be reading."""
        self._table.optimize(cleanup_older_than=CLEANUP_MARGIN)

    def refresh_vector_index(self) -> bool:
        """Builds, rebuilds or drops the approximate index, as the number of rows asks; returns whether it was built."""
        from lancedb.index import Bitmap, BTree, IvfSq

        rows, ann = self._table.count_rows(), self._manifest.vector_index
        if rows <= self._manifest.exact_below:
            if ann is not None:
                self._table.drop_index("vector_idx")
                self._manifest.vector_index = None
            return False
        partitions = max(16, rows // ROWS_PER_PARTITION)
        if ann is not None and 0.5 <= partitions / ann.partitions <= 2:
            return False
        config = IvfSq(distance_type=cast(Any, self._manifest.metric), num_partitions=partitions)
        self._table.create_index("vector", config=config)
        self._manifest.vector_index = VectorIndex(partitions, nprobes=max(1, partitions // 2))
        have = {name for index in self._table.list_indices() for name in index.columns}
        for column in self._manifest.columns:
            if column.field not in have and column.type != "text":  # text may have as many values as rows
                self._table.create_index(column.field, config=BTree() if column.type == "number" else Bitmap())
        return True


def batched(things: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` things, the last one shorter. (itertools has it from Python 3.12 on.)"""
    things = iter(things)
    while some := list(islice(things, size)):
        yield some


def check_run(manifest: Manifest, run: Encoder, folder: Path) -> None:
    if manifest.run != run.fingerprint or manifest.dim != run.dim:
        raise UserError(
            f"The index at {folder} was built with another run ({manifest.run_folder}, {manifest.run[:12]}) than "
            f"{run.folder} ({run.fingerprint[:12]}), and vectors of two runs cannot be compared. "
            f"Open it with that run, or build it again: interlace index {run.folder} SOURCE --rebuild"
        )


def remove(folder: Path) -> None:
    """Removes an index, whole or half, from its folder. Raises UserError when the folder holds anything else."""
    ours = {NAME, "lance", SKIPPED, HELD, HOLDER}
    foreign = [p.name for p in folder.iterdir() if p.name not in ours and not p.name.startswith(f".{NAME}.")]
    if (folder / "lance").is_dir():
        foreign += [f"lance/{p.name}" for p in (folder / "lance").iterdir() if p.name != f"{TABLE}.lance"]
    if foreign:
        raise UserError(f"{folder} holds files that are no index's ({foreign[0]}). Choose an empty or a new folder.")
    for path in folder.iterdir():
        if path.name == "lance":
            shutil.rmtree(path)
        elif path.name not in (HELD, HOLDER):
            os.unlink(path)
