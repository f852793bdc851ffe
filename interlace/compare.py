"""Which fusion wins on your data: the same towers, rows, steps and seeds, one thing changed."""

from __future__ import annotations

import copy
import json
import statistics
from pathlib import Path
from typing import Any

from interlace.data.sources import open_source
from interlace.errors import UserError
from interlace.evaluate import evaluate, rows_of
from interlace.run import MARK, Run, write_json
from interlace.settings import Settings, load_settings
from interlace.train import train


def compare(config: str | None, overrides: list[str], fusions: list[str], streams: list[str], seeds: list[int],
            out: Path, split: str = "test") -> dict[str, Any]:  # fmt: skip
    """Trains each fusion x streams x seed (finished runs are found again), scores all on `split` of each source, prints
    one table and writes `comparison.json` and `comparison.md` to `out`.

    Raises UserError for settings that cannot work, before anything is trained.
    """
    base = load_settings(config, overrides)
    variants = [(f, s) for s in streams for f in fusions]
    for fusion, kind in variants:
        from interlace.schedule import fused

        fused(fusion, kind, base.model.layers, "pre")  # says so now, not after the first runs
    if not seeds:
        raise UserError("compare needs at least one seed, for instance --seeds 0,1,2.")
    sources = base.data.source if isinstance(base.data.source, list) else [base.data.source]
    results: list[dict[str, Any]] = []
    for n, (seed, (fusion, kind)) in enumerate([(s, v) for s in seeds for v in variants]):
        settings = variant(base, fusion, kind, seed, out)
        print(f"[{n + 1}/{len(seeds) * len(variants)}] {kind} stream, {fusion} fusion, seed {seed}", flush=True)
        results.append(measured(train(settings), settings, sources, split))
        write_json(out / "comparison.json", results)
        (out / "comparison.md").write_text(table(results) + "\n")
    print(table(results))
    return {"results": results}


def variant(base: Settings, fusion: str, streams: str, seed: int, out: Path) -> Settings:
    settings = copy.deepcopy(base)
    settings.model.fusion, settings.model.streams, settings.train.seed = fusion, streams, seed
    settings.train.out = str(out / f"{streams}-{fusion}-{seed}")
    settings.train.evaluate = False  # the validation split is not what is compared
    return settings


def measured(folder: Path, settings: Settings, sources: list[str], split: str) -> dict[str, Any]:
    """The run's scores on each source, kept in its folder so that they are not computed twice."""
    file = folder / f"{split}.json"
    if not file.is_file():
        run = Run.load(folder)
        columns, pictures = settings.data.columns or None, settings.data.pictures or None
        opened = {s: open_source(s, columns, pictures=pictures) for s in sources}
        write_json(file, {s: evaluate(run, source, split) for s, source in opened.items()})
    facts = json.loads((folder / MARK).read_text())
    return {"fusion": settings.model.fusion, "streams": settings.model.streams, "seed": settings.train.seed,
            "seconds": facts["train_seconds"], "steps": facts["steps"], "parameters": facts["parameters"],
            "trained": facts["trained"], "scores": json.loads(file.read_text())}  # fmt: skip


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
                cells.append(cell([s["value"] for s in scores if "value" in s], [dark(s) for s in scores]))
            chance = "" if first.get("chance") is None else f"{100 * first['chance']:.1f}"
            lines.append(f"| {source} | {name} | " + " | ".join(cells) + f" | {chance} |")
    seconds = " | ".join(f"{statistics.mean(r['seconds'] for r in by[v]):.0f}" for v in variants)
    trained = " | ".join(f"{by[v][0]['trained'] / 1e6:.2f}" for v in variants)
    lines += [f"| | seconds of training | {seconds} | |", f"| | trained parameters, M | {trained} | |"]
    seeds = len({r["seed"] for r in results})
    return "\n".join(lines) + (f"\n\nPer cent. Mean over {seeds} seeds; in brackets lowest to highest seed; after the "
                               "slash the same models blind (another row's picture or a white one, "
                               "the better).")  # fmt: skip


def dark(score: dict[str, Any]) -> float | None:
    if "blind" in score:
        return score["blind"]
    return max((score[k] for k in ("shuffled", "blank") if score.get(k) is not None), default=None)


def cell(values: list[float], blind: list[float | None]) -> str:
    if not values:
        return ""
    spread = f" [{100 * min(values):.0f} to {100 * max(values):.0f}]" if len(values) > 1 else ""
    known = [b for b in blind if b is not None]
    return f"{100 * statistics.mean(values):.1f}{spread}" + (f" / {100 * statistics.mean(known):.1f}" if known else "")
