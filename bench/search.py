"""Search: how long a query takes, what it finds, and what the index costs, against numpy over an array in memory.

    python -m bench.search --out docs/bench/search.json
    python -m bench.search --sizes 1400 200000 --dim 384
    python -m bench.search --index runs/demo/index --where "price < 300" --sizes        # an index of your own

ours    Index.nearest, k = 10, rows with their attributes: exact, approximate, and as shipped (the index decides)
numpy   (N, D) float32 in memory, one multiplication and an argpartition; a filter is a mask over an array in memory
lancedb the same table and settings asked directly, ids only: what our interface adds

Synthetic rows are clustered, about 100 to a cluster (cosine 0.7 within), for uniform noise has no neighbours worth
finding; queries are new points of the same clusters. Turning a text or a picture into a vector is not included.
Memory is the peak of a process of its own, which does nothing else.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from bench.common import keep, load, machine, parser, show
from interlace.data.rows import Pair, Picture
from interlace.search.embed import Encoder
from interlace.search.filters import Filter, matches, parse, where_text
from interlace.search.index import TABLE, Index
from interlace.search.rows import Row

ROOT = Path(__file__).resolve().parents[1]
K = 10
RECALL_OVER = 5  # recall is asked of this many times as many queries as time
BLOCK = 2048  # rows of one commit
LATENCY = [
    "rows", "filter", "passes", "search", "p50 ms", "p95 ms", "numpy p50", "numpy p95", "vs numpy", "range",
    "vs lancedb", "recall@10",
]  # fmt: skip
COST = ["rows", "dim", "insert s", "index s", "disk MB", "settled MB", "vectors MB", "build MB", "query MB", "numpy MB"]
# price is uniform in 0..1000: 1% leaves few rows; 30% of 200 thousand leaves too many to compare with all of them
FILTERS = {"none": None, "1%": "price < 10", "30%": "price < 300"}


@dataclass
class Origin:
    """What `Index.create` reads of a run. The vectors are drawn, so nothing here encodes."""

    folder: Path
    dim: int
    fingerprint: str = "synthetic"


# ---------------------------------------------------------------------------------------------------------- the rows
def synthetic(rows: int, dim: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of unit vectors (b, D) and prices (b,); the same for every process that asks."""
    centres = _centres(rows, dim)
    for start in range(0, rows, BLOCK):
        rng = np.random.default_rng([seed, start])
        size = min(BLOCK, rows - start)
        yield _around(centres[rng.integers(0, len(centres), size)], rng), rng.uniform(0, 1000, size)


def queries_for(rows: int, dim: int, count: int) -> np.ndarray:
    rng = np.random.default_rng([1, rows])
    centres = _centres(rows, dim)
    return _around(centres[rng.integers(0, len(centres), count)], rng)


def _centres(rows: int, dim: int) -> np.ndarray:
    return _unit(np.random.default_rng(2).normal(size=(max(1, rows // 100), dim)))


def _around(centres: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    spread = (1 / 0.7 - 1) ** 0.5  # two points of a cluster then have a cosine of 1 / (1 + spread^2) = 0.7
    return _unit(centres + spread * rng.normal(size=centres.shape) / centres.shape[1] ** 0.5)


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


# --------------------------------------------------------------------------------------- what runs in its own process
def build(folder: Path, rows: int, dim: int) -> dict[str, float]:
    """An index of synthetic rows, through the same commits a build makes; only the pictures are missing."""
    start = time.perf_counter()
    run = cast(Encoder, Origin(folder, dim))
    index = Index.create(folder, run, {"price": "number", "kind": "text"}, thumbnail=0)
    done = 0
    for vectors, prices in synthetic(rows, dim):
        index.commit([row(done + i, vector, float(price)) for i, (vector, price) in enumerate(zip(vectors, prices))])
        done += len(vectors)
    inserted = time.perf_counter()
    index.refresh_vector_index()
    index.optimise()
    index.manifest.complete, index.manifest.rows = True, done
    index.save()
    return {"insert_s": inserted - start, "index_s": time.perf_counter() - inserted, "peak_mb": peak_mb()}


def row(n: int, vector: np.ndarray, price: float) -> Row:
    attributes: dict[str, Any] = {"price": price, "kind": f"kind {n % 20}"}
    picture = Picture(path=f"pictures/{n}.jpg")
    pair = Pair(f"row-{n}", picture, f"thing number {n}", f"group-{n}", "train", attributes, f"thing {n}")
    return Row(pair, (n, n), vector, None, None)


def ask(folder: Path, rows: int, dim: int, count: int) -> dict[str, float]:
    """Memory of a process that opens the index and answers queries, as shipped."""
    index, found = Index.open(folder), 0
    for query in queries_for(rows, dim, count):
        found += len(index.nearest(query, K))
    return {"peak_mb": peak_mb(), "found": found}


def ask_numpy(folder: Path, rows: int, dim: int, count: int) -> dict[str, float]:
    """The rival's memory: the array, loaded in blocks."""
    rival, found = Rival.of_synthetic(rows, dim), 0
    for query in queries_for(rows, dim, count):
        found += len(rival.nearest(query, None)[0])
    return {"peak_mb": peak_mb(), "found": found}


def peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


ALONE: dict[str, Callable[..., dict[str, float]]] = {"build": build, "ask": ask, "ask_numpy": ask_numpy}


def alone(what: str, folder: Path, rows: int, dim: int, *more: int) -> dict[str, float]:
    """One of the three above in a fresh interpreter, for its peak memory is only its own there."""
    arguments = json.dumps([str(folder), rows, dim, *more])
    code = f"import json; from pathlib import Path; from bench import search as s; f, *n = json.loads({arguments!r}); "
    code += f"print(json.dumps(s.ALONE[{what!r}](Path(f), *n)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------- latency
class Rival:
    """Everything in memory: ids, vectors (N, D), and for each filter the rows that pass."""

    def __init__(self, ids: list[str], vectors: np.ndarray, passes: dict[str, np.ndarray]):
        self.ids, self.vectors, self.passes = ids, vectors, passes

    @classmethod
    def of_synthetic(cls, rows: int, dim: int) -> Rival:
        vectors, prices = np.empty((rows, dim), np.float32), np.empty(rows)
        for i, (block, price) in enumerate(synthetic(rows, dim)):
            vectors[i * BLOCK : i * BLOCK + len(block)], prices[i * BLOCK : i * BLOCK + len(block)] = block, price
        passes = {where: prices < float(where.split()[-1]) for where in FILTERS.values() if where}
        return cls([f"row-{i}" for i in range(rows)], vectors, passes)

    @classmethod
    def of_index(cls, index: Index, wheres: list[str]) -> Rival:
        columns = index.filter_columns
        fields = dict.fromkeys(["id", "vector", *(c.field for c in columns)])  # each once
        table = index.sample(len(index), list(fields))
        vectors = np.stack(table["vector"].to_numpy(zero_copy_only=False)).astype(np.float32)
        rows = table.drop_columns(["vector"]).to_pylist()
        passes = {}
        for where in wheres:
            tree = parse(where, columns)
            passes[where] = np.array([matches(tree, {c.name: row[c.field] for c in columns}) for row in rows], bool)
        return cls(table["id"].to_pylist(), vectors, passes)

    def nearest(self, query: np.ndarray, where: str | None, k: int = K) -> tuple[np.ndarray, np.ndarray]:
        """Rows and cosines, best first."""
        passing = None if where is None else np.flatnonzero(self.passes[where])
        scores = (self.vectors if passing is None else self.vectors[passing]) @ query
        near = np.arange(len(scores)) if len(scores) <= k else np.argpartition(-scores, k)[:k]
        near = near[np.argsort(-scores[near])]
        return near if passing is None else passing[near], scores[near]


def latency(
    index: Index, rival: Rival, queries: np.ndarray, wheres: dict[str, str | None], repeats: int
) -> list[dict[str, Any]]:
    """One row of figures per filter and way of searching; each way takes turns with its rivals. Recall is over all
    queries, time over the first of every RECALL_OVER, once per round."""
    ways: dict[str, bool | None] = {"exact": None}
    if index.manifest.vector_index is not None:
        ways = {"exact": True, "approximate": False, "as shipped": None}
    rows, timed = [], queries[:: min(RECALL_OVER, len(queries))]
    bar = tqdm(total=len(wheres) * len(ways) * repeats, desc=f"{len(rival.ids):,} rows", unit="round", leave=False)
    for label, where in wheres.items():
        tree = parse(where, index.filter_columns) if where else None
        truth = [rival.nearest(query, where)[1] for query in queries]
        for way, exact in ways.items():
            sides: list[Callable[[np.ndarray], Any]] = [
                partial(index.nearest, k=K, where=tree, exact=exact),
                partial(rival.nearest, where=where),
                directly(index, tree, index.searches_exactly(tree) if exact is None else exact),
            ]
            recall = np.mean([share_found(sides[0](query), best) for query, best in zip(queries, truth)])
            before, took = load(), np.zeros((len(sides), repeats, len(timed)))
            for repeat in range(repeats):
                for side in np.roll(np.arange(len(sides)), repeat):
                    took[side, repeat] = [milliseconds(sides[side], query) for query in timed]
                bar.update()
            p50 = np.median(took, axis=2)  # (sides, repeats)
            numpy_rounds, lancedb_rounds = p50[1] / p50[0], p50[2] / p50[0]
            rows.append({
                "rows": len(rival.ids), "filter": label, "search": way, "recall@10": float(recall),
                "passes": int(rival.passes[where].sum()) if where else len(rival.ids),
                "p50 ms": float(np.median(took[0])), "p95 ms": float(np.quantile(took[0], 0.95)),
                "numpy p50": float(np.median(took[1])), "numpy p95": float(np.quantile(took[1], 0.95)),
                "lancedb p50": float(np.median(took[2])), "vs lancedb": float(np.median(lancedb_rounds)),
                "vs numpy": float(np.median(numpy_rounds)),
                "range": f"{numpy_rounds.min():.2g}-{numpy_rounds.max():.2g}", "load": before,
            })  # fmt: skip
    bar.close()
    return rows


def directly(index: Index, tree: Filter | None, exact: bool) -> Callable[[np.ndarray], Any]:
    import lancedb

    table = lancedb.connect(index.folder / "lance").open_table(TABLE)
    settings = index.manifest.vector_index

    def ask(query: np.ndarray) -> Any:
        asked: Any = table.search(query, vector_column_name="vector")
        asked = asked.distance_type("cosine").select(["id", "_distance"]).limit(K)
        if tree is not None:
            asked = asked.where(where_text(tree), prefilter=True)
        if exact or settings is None:
            return asked.bypass_vector_index().to_arrow()
        return asked.nprobes(settings.nprobes).refine_factor(settings.refine).to_arrow()

    return ask


def milliseconds(search: Callable[[np.ndarray], Any], query: np.ndarray) -> float:
    start = time.perf_counter()
    search(query)
    return (time.perf_counter() - start) * 1000


def share_found(hits: list[Any], best: np.ndarray) -> float:
    """Part of the true first k that was found: a hit counts if its cosine is at least the k-th best, so that equal rows
    are not taken for misses."""
    if not len(best):
        return 1.0
    return sum(score >= best[-1] - 1e-5 for _, score in hits) / len(best)


# -------------------------------------------------------------------------------------------------------- the command
def measure(rows: int, dim: int, count: int, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "index"
        made = alone("build", folder, rows, dim)
        asked, asked_numpy = alone("ask", folder, rows, dim, count), alone("ask_numpy", folder, rows, dim, count)
        queries = queries_for(rows, dim, RECALL_OVER * count)
        figures = latency(Index.open(folder), Rival.of_synthetic(rows, dim), queries, FILTERS, repeats)
        disk, settled = megabytes(folder), megabytes_settled(folder)
    return figures, {
        "rows": rows, "dim": dim, "insert s": made["insert_s"], "index s": made["index_s"], "disk MB": disk,
        "settled MB": settled, "vectors MB": rows * dim * 4 / 1e6,
        "build MB": made["peak_mb"], "query MB": asked["peak_mb"], "numpy MB": asked_numpy["peak_mb"],
    }  # fmt: skip


def measure_index(
    folder: Path, wheres: list[str], count: int, repeats: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """An index that exists. Queries: its own vectors, each turned a little, as no run is needed for that."""
    index = Index.open(folder)
    rival = Rival.of_index(index, wheres)
    rng = np.random.default_rng(0)
    picked = rival.vectors[rng.integers(0, len(rival.vectors), RECALL_OVER * count)]
    figures = latency(index, rival, _around(picked, rng), {"none": None} | {w: w for w in wheres}, repeats)
    rows, dim = rival.vectors.shape
    return figures, {"rows": rows, "dim": dim, "disk MB": megabytes(folder), "vectors MB": rows * dim * 4 / 1e6}


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def megabytes_settled(folder: Path) -> float:
    """Without the versions of the table that queries in flight might have been reading: those go with a later write."""
    import lancedb

    lancedb.connect(folder / "lance").open_table(TABLE).optimize(cleanup_older_than=timedelta(0))
    return megabytes(folder)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("--sizes", type=int, nargs="*", default=[1400, 200_000], help="synthetic rows; none to skip")
    options.add_argument("--dim", type=int, default=384)
    options.add_argument("--queries", type=int, default=20, help="queries of one round; five times as many for recall")
    options.add_argument("--index", type=Path, help="measure this index as well (the folder with index.json)")
    options.add_argument("--where", action="append", default=[], help="with --index: a filter to measure under")
    given = options.parse_args(argv)
    facts = machine("lancedb", "numpy", "pyarrow")
    figures: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    if given.index:
        found, cost = measure_index(given.index, given.where, given.queries, given.repeats)
        figures += found
        costs.append(cost)
    for rows in given.sizes:
        found, cost = measure(rows, given.dim, given.queries, given.repeats)
        figures += found
        costs.append(cost)
    notes = [
        f"{facts['cpu']}, {facts['cores']} cores, load {facts['load']} at the start; "
        f"LanceDB {facts['packages']['lancedb']}, numpy {facts['packages']['numpy']}",
        f"{given.dim} dimensions, {given.queries} queries, {given.repeats} alternating rounds, one query at a time; "
        f"recall over {RECALL_OVER * given.queries} queries",
        "vs: the other's p50 over ours, above 1 we are faster, with the range over the rounds; ours returns rows from "
        "disk, numpy row numbers from memory; recall@10 against numpy's exact answer",
    ]
    show("Search latency", LATENCY, figures, notes)
    show("What the index costs", COST, costs, [
        "insert: commits of 2,048 rows with attributes and no thumbnails; index: the approximate index and compaction",
        "disk: right after the build; settled: once old versions of the table are gone, ten minutes later",
        "build, query, numpy MB: peak memory of a process of its own, the interpreter and its imports included",
    ])  # fmt: skip
    content = {"machine": facts, "queries": given.queries, "repeats": given.repeats, "latency": figures, "cost": costs}
    keep(given.out, content)
    return content


if __name__ == "__main__":
    main()
