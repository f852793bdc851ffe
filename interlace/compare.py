"""Which fusion wins on your data: the same towers, rows, steps and seeds, one thing changed."""

from __future__ import annotations

import copy
import json
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from interlace.data.rows import Source
from interlace.data.sources import open_source
from interlace.errors import UserError
from interlace.evaluate import blind_of, evaluate, rows_of
from interlace.held import Kept, Score
from interlace.ranges import RANGES, check_range
from interlace.run import MARK, Run, write_json
from interlace.settings import Settings, load_settings
from interlace.tasks.uncertainty import Difference, holm, paired_difference
from interlace.train import train

VERSION = 2  # of what is kept of a run's scores; another one, and they are computed again
ALPHA = 0.05
FLIPS = 20_000  # of a test that comes out below ALPHA at a first look of 1,000
Variant = tuple[str, str]  # streams, fusion
KeptScores = dict[tuple[str, str], Kept]  # (source, measure) -> the value of each query


def compare(config: str | None, overrides: list[str], fusions: list[str], streams: list[str], seeds: list[int],
            out: Path, split: str = "test") -> dict[str, Any]:  # fmt: skip
    """Trains each fusion x streams x seed (finished runs are found again), scores all on `split` of each source, tests
    every difference between two variants, prints both tables and writes `comparison.json` and `comparison.md` to `out`.

    Raises UserError for settings that cannot work or would be ignored, before anything is trained.
    """
    _check_varied(overrides, {"--fusion": fusions, "--streams": streams, "--seeds": seeds})
    base = load_settings(config, overrides)
    _check_composed(base)
    variants = [(s, f) for s in streams for f in fusions]
    for kind, fusion in variants:
        from interlace.schedule import fused

        fused(fusion, kind, base.model.layers, "pre")  # says so now, not after the first runs
    if not seeds:
        raise UserError("compare needs at least one seed, for instance --seeds 0,1,2.")
    names = base.data.source if isinstance(base.data.source, list) else [base.data.source]
    sources = {n: open_source(n, base.data.columns or None, pictures=base.data.pictures or None) for n in names}
    results: list[dict[str, Any]] = []
    kept: dict[tuple[Variant, int], KeptScores] = {}
    for n, (seed, (kind, fusion)) in enumerate([(s, v) for s in seeds for v in variants]):
        settings = variant(base, fusion, kind, seed, out)
        print(f"[{n + 1}/{len(seeds) * len(variants)}] {kind} stream, {fusion} fusion, seed {seed}", flush=True)
        result, kept[(kind, fusion), seed] = measured(train(settings), settings, sources, split)
        results.append(result)
        write(out, results, [])
    tests = differences(kept)
    write(out, results, tests)
    print(table(results))
    print("\n" + what_differs(tests))
    return {"results": results, "differences": [asdict(t) for t in tests]}


VARIED = {"model.fusion": "--fusion", "model.streams": "--streams", "train.seed": "--seeds", "train.out": "--out"}


def _check_varied(overrides: list[str], given: dict[str, list]) -> None:
    """Raises UserError for a value that stands twice, a seed that is none, and a key that every run gets anew."""
    for flag, values in given.items():
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:  # one run under two names tells nothing about chance
            raise UserError(f"{flag} has {twice[0]} more than once: name each once.")
    for seed in given["--seeds"]:
        check_range("each of --seeds", seed, RANGES["train.seed"])
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in VARIED:
            raise UserError(f"{override} would have no effect: compare sets {key} for each run. Say it with "
                            f"{VARIED[key]}.")  # fmt: skip


def _check_composed(base: Settings) -> None:
    """Raises UserError for a model that says itself where its streams meet: all its runs would be the same."""
    for key, value in (("model.system", base.model.system), ("model.start", base.model.start)):
        if value:
            raise UserError(f"compare varies model.fusion and model.streams, which {key}={value} fixes: take a "
                            "composed recipe such as demo.")  # fmt: skip


def variant(base: Settings, fusion: str, streams: str, seed: int, out: Path) -> Settings:
    settings = copy.deepcopy(base)
    settings.model.fusion, settings.model.streams, settings.train.seed = fusion, streams, seed
    settings.train.out = str(out / f"{streams}-{fusion}-{seed}")
    settings.train.evaluate = False  # the validation split is not what is compared
    return settings


def write(out: Path, results: list[dict[str, Any]], tests: list[Comparison]) -> None:
    write_json(out / "comparison.json", {"results": results, "differences": [asdict(t) for t in tests]})
    text = table(results) + (f"\n\n## What differs\n\n{what_differs(tests)}" if tests else "")
    (out / "comparison.md").write_text(text + "\n")


# ------------------------------------------------------------------------------------------------- scores of each run


def measured(folder: Path, settings: Settings, sources: dict[str, Source],
             split: str) -> tuple[dict[str, Any], KeptScores]:  # fmt: skip
    """The run's scores on each source, and the value of each query. Both are kept in its folder, `{split}.json` and
    `{split}.npz`, and computed again only where they are of another version, run or data."""
    facts = json.loads((folder / MARK).read_text())
    file, rows = folder / f"{split}.json", folder / f"{split}.npz"
    wanted = {"version": VERSION, "run": facts["fingerprint"],
              "data": {name: source.fingerprint for name, source in sources.items()}}  # fmt: skip
    content = _read(file)
    if not rows.is_file() or {k: content.get(k) for k in wanted} != wanted:
        run = Run.load(folder)
        scores = {name: evaluate(run, source, split) for name, source in sources.items()}
        kept = {(name, measure): score.kept for name, metrics in scores.items()
                for measure, score in rows_of(metrics) if isinstance(score, Score) and score.kept}  # fmt: skip
        save_kept(rows, kept)
        content = {**wanted, "scores": scores}
        write_json(file, content)  # after the rows: with it both are whole
    result = {"fusion": settings.model.fusion, "streams": settings.model.streams, "seed": settings.train.seed,
              "seconds": facts["train_seconds"], "steps": facts["steps"], "parameters": facts["parameters"],
              "trained": facts["trained"], "scores": content["scores"]}  # fmt: skip
    return result, load_kept(rows)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def save_kept(file: Path, kept: KeptScores) -> None:
    """Arrays `names` (M, 2) of source and measure, and for each m `values_m`, `ids_m`, `groups_m`, all (Q,)."""
    arrays: dict[str, Any] = {"names": np.array(list(kept), dtype=np.str_).reshape(-1, 2)}
    for m, part in enumerate(kept.values()):
        arrays |= {f"values_{m}": part.values, f"ids_{m}": part.ids, f"groups_{m}": part.groups}
    aside = file.with_name(file.name + ".part")
    with open(aside, "wb") as stream:
        np.savez_compressed(stream, **arrays)
    os.replace(aside, file)


def load_kept(file: Path) -> KeptScores:
    with np.load(file, allow_pickle=False) as arrays:
        return {(str(source), str(measure)): Kept(arrays[f"values_{m}"], arrays[f"ids_{m}"], arrays[f"groups_{m}"])
                for m, (source, measure) in enumerate(arrays["names"])}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- what differs


@dataclass(frozen=True)
class Comparison:
    """first - second on the same queries, each query's value averaged over `seeds`. The interval and p are over groups
    of queries: they hold for these trained models, and how much another seed would change is in `by_seed`."""

    source: str
    measure: str
    first: Variant
    second: Variant
    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    queries: int
    groups: int
    seeds: list[int]
    by_seed: list[float]


def differences(kept: dict[tuple[Variant, int], KeptScores]) -> list[Comparison]:
    """A test of each measure for each two variants that share a seed, in the order of the table; p corrected for the
    number of all of them."""
    variants = list(dict.fromkeys(variant for variant, _ in kept))
    measures = list(dict.fromkeys(name for scores in kept.values() for name in scores))
    found: list[tuple[tuple[str, str], Variant, Variant, list[int], list[float], Difference]] = []
    wanted = [(m, a, b) for m in measures for a, b in combinations(variants, 2)]
    # the finest p there is must survive the correction
    flips = max(FLIPS, 2 * int(len(wanted) / ALPHA))
    for measure, first, second in tqdm(wanted, desc="tests", unit="test", leave=False, delay=2, disable=None):
        seeds = [s for s in dict.fromkeys(s for _, s in kept)
                 if all(measure in kept.get((v, s), {}) for v in (first, second))]  # fmt: skip
        if not seeds:
            continue
        pairs = [(kept[first, s][measure], kept[second, s][measure]) for s in seeds]
        difference, by_seed = paired(pairs, flips)
        if difference is not None:
            found.append((measure, first, second, seeds, by_seed, difference))
    corrected = holm([d.p for *_, d in found])
    return [Comparison(*measure, first, second, d.mean, d.low, d.high, d.p, p, d.values, d.groups, seeds, by_seed)
            for (measure, first, second, seeds, by_seed, d), p in zip(found, corrected)]  # fmt: skip


def paired(pairs: Sequence[tuple[Kept, Kept]], flips: int = FLIPS) -> tuple[Difference | None, list[float]]:
    """One pair of kept scores a seed -> the difference of the means over seeds, query by query, and each seed's own.
    Queries that not all of them were asked, or that one skipped, are left out; None when fewer than two are left."""
    ids = pairs[0][0].ids
    for part in (part for pair in pairs for part in pair):
        ids = np.intersect1d(ids, part.ids)
    values = np.array([[_at(part, ids, part.values) for part in pair] for pair in pairs])  # (S, 2, Q)
    known = ~np.isnan(values).any(axis=(0, 1))
    if known.sum() < 2:
        return None, []
    values, groups = values[:, :, known], _at(pairs[0][0], ids, pairs[0][0].groups)[known]
    first, second = values.mean(axis=0)
    difference = paired_difference(first, second, groups=groups.tolist())
    if difference.p < ALPHA:
        difference = paired_difference(first, second, n=flips, groups=groups.tolist())
    return difference, [float(d) for d in (values[:, 0] - values[:, 1]).mean(axis=1)]


def _at(part: Kept, ids: np.ndarray, of: np.ndarray) -> np.ndarray:
    order = np.argsort(part.ids, kind="stable")
    return of[order[np.searchsorted(part.ids, ids, sorter=order)]]


def what_differs(tests: list[Comparison]) -> str:
    """Markdown: the differences with p below 0.05 before correction, smallest p first, and how many that is by luck."""
    if not tests:
        return "One variant, or no common seed: nothing to test."
    listed = sorted((t for t in tests if t.p < ALPHA), key=lambda t: (t.p, -abs(t.mean)))
    sure = sum(t.p_holm < ALPHA for t in listed)
    lines = []
    if listed:
        lines = ["| source | measure | first | second | first - second | 95% interval | by seed | p | p, corrected |",
                 "| --- | --- | --- | --- | ---: | :---: | :---: | ---: | ---: |"]  # fmt: skip
    for t in listed:
        seeds = ", ".join(f"{100 * d:+.1f}" for d in t.by_seed)
        names = [f"{fusion}, {streams}" for streams, fusion in (t.first, t.second)]
        lines.append(f"| {t.source} | {t.measure} | {names[0]} | {names[1]} | {100 * t.mean:+.1f} | {100 * t.low:+.1f} "
                     f"to {100 * t.high:+.1f} | {seeds} | {small(t.p)} | {small(t.p_holm)} |")  # fmt: skip
    verdict = (f"{len(tests)} paired tests, each measure for each two variants. {len(listed)} have p below {ALPHA:g} "
               f"before any correction, where luck alone gives about {ALPHA * len(tests):.0f}; after Holm's correction "
               f"for the {len(tests)}: {sure or 'none'}.")  # fmt: skip
    how = ("Per cent. Query by query over the same rows or questions, averaged over the seeds both have; whole groups "
           "of rows are drawn, or change sign. The intervals are not corrected. They hold for these trained models; "
           "how far another seed moves a difference is seen in `by seed`.")  # fmt: skip
    return "\n\n".join(part for part in (verdict, "\n".join(lines), how if listed else "") if part)


def small(p: float) -> str:
    return f"{p:.4f}" if p < 0.001 else f"{p:.3f}"


# --------------------------------------------------------------------------------------------------- the big table


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row per measure, one column per variant: mean over seeds, with the range from lowest to highest."""
    variants = list(dict.fromkeys((r["streams"], r["fusion"]) for r in results))
    by = {v: [r for r in results if (r["streams"], r["fusion"]) == v] for v in variants}
    lines = ["| source | measure | " + " | ".join(f"{f}, {s}" for s, f in variants) + " | chance |",
             "| --- | --- | " + " | ".join("---:" for _ in variants) + " | ---: |"]  # fmt: skip
    for source in results[0]["scores"]:
        for name, first in rows_of(results[0]["scores"][source]):
            cells = []
            for v in variants:
                scores = [dict(rows_of(r["scores"][source])).get(name, {}) for r in by[v]]
                cells.append(cell([s["value"] for s in scores if "value" in s], [blind_of(s) for s in scores]))
            chance = "" if first.get("chance") is None else f"{100 * first['chance']:.1f}"
            lines.append(f"| {source} | {name} | " + " | ".join(cells) + f" | {chance} |")
    seconds = " | ".join(f"{statistics.mean(r['seconds'] for r in by[v]):.0f}" for v in variants)
    trained = " | ".join(f"{by[v][0]['trained'] / 1e6:.2f}" for v in variants)
    lines += [f"| | seconds of training | {seconds} | |", f"| | trained parameters, M | {trained} | |"]
    seeds = len({r["seed"] for r in results})
    return "\n".join(lines) + (f"\n\nPer cent. Mean over {seeds} seeds; in brackets lowest to highest seed; after the "
                               "slash the same models blind (another row's picture; for answers, captions and hidden "
                               "words also a white one, the better).")  # fmt: skip


def cell(values: list[float], blind: list[float | None]) -> str:
    if not values:
        return ""
    spread = f" [{100 * min(values):.0f} to {100 * max(values):.0f}]" if len(values) > 1 else ""
    known = [b for b in blind if b is not None]
    return f"{100 * statistics.mean(values):.1f}{spread}" + (f" / {100 * statistics.mean(known):.1f}" if known else "")
