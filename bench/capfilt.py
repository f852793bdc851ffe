"""Does a filter that learnt from wrong captions find them, and does retrieval gain? Captions are exchanged on purpose,
so the truth is known; nothing that trains or judges sees it.

    python -m bench.capfilt --seeds 0,1,2 --out docs/bench/capfilt.json --page docs/capfilt.md

For each seed `interlace data corrupt` exchanges a share of the training captions. All models learn from that table,
from scratch: a small BLIP (contrast, matching, captions) and a composed model (contrast, matching). Both are asked
about every row they learnt from, by match probability and by cosine; on a small table they know their rows by heart,
the wrong ones too. So the composed model is trained K times more, each time without one fold of the rows, and each
judges its fold (`--folds`). The threshold is fitted on validation pairs. BLIP, trained on as captioner, and those
filters clean the table. The composed model then learns from scratch on what they leave, on the rows that a filter
without error would leave, and on the table before anything was exchanged: same steps, same seed.

precision  share of the flagged texts (below the threshold) that were exchanged
recall     share of the exchanged texts that were flagged
area       under the ROC curve: how often a true text scores higher than an exchanged one
R@k        on the untouched test split, mean of text to image and image to text

A run that was stopped goes on; what is finished is not done again.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from bench.common import Row, keep, machine, markdown, parser, show
from interlace.bootstrap import Decision, Finetune, bootstrap, corrupt
from interlace.bootstrap.folds import Filters
from interlace.bootstrap.score import score_pairs
from interlace.bootstrap.threshold import area, fit
from interlace.data.rows import Source
from interlace.data.sources import open_source
from interlace.evaluate import evaluate
from interlace.run import Run
from interlace.settings import load_settings
from interlace.train import train

KS = (1, 5, 10)
FILTERS = ("blip", "composed")
FOUND = ["filter", "judged by", "flagged", "precision", "recall", "area", "area, validation"]
GAINED = ["learnt from", "rows", "wrong", "replaced", *(f"R@{k}" for k in KS), "against noisy, R@10"]
SIZES = ["data.views=1", "data.keep_states_gb=8", "model.text=minilm", "model.image=efficientnet-lite0",
         "model.size=96", "model.layers=2", "train.batch=32", "train.text_lr=0", "train.image_lr=0",
         "train.evaluate=false", "augment.smallest_crop=0.7"]  # fmt: skip
BLIP = ["model.system=blip", "model.width=128", "model.heads=4", "train.lr=1e-3"]
COMPOSED = ["model.width=256", "model.heads=4", "train.lr=1e-3", "objectives={itc: {}, itm: {negatives: drawn}}"]
START, END = "<!-- figures: python -m bench.capfilt -->", "<!-- end of figures -->"


def pretrained(kind: str, folder: Path, data: Path, seed: int, steps: int, more: Sequence[str]) -> Path:
    """A run from scratch on this table: "blip" or "composed"."""
    given = [*SIZES, *(BLIP if kind == "blip" else COMPOSED), f"data.source={data}", f"train.steps={steps}",
             f"train.seed={seed}", f"train.out={folder}"]  # fmt: skip
    if kind == "blip":
        given.append("objectives={lm: {}}")  # passes take their place below
    settings = load_settings(None, [*given, *more])
    if kind == "blip":
        settings.objectives, settings.passes = {}, [{"itc": {}, "itm": {"negatives": "hard"}, "lm": {}}]
    return train(settings)


def judged(run: Path, noisy: Source, file: Path) -> list[Row]:
    """What a filter flags against what was exchanged, by each of its scores."""
    if file.is_file():
        return json.loads(file.read_text())
    filter_, pairs = Run.load(run), {int(i): noisy.pair(i) for i in noisy.indices("train")}
    asked = score_pairs(filter_, noisy, {i: [pair.caption] for i, pair in pairs.items()}, 32)
    answers = [(row, one) for row, (one,) in asked]
    wrong = np.array([bool(pairs[row].attributes["corrupted"]) for row, _ in answers])
    rows = []
    for number, by in enumerate(("match", "cosine")):
        scores = np.array([one[number] for _, one in answers])
        fitted = fit(Filters(noisy, [filter_]), noisy, Decision(by=by), 32, scores)
        rows.append({"judged by": by, **counted(scores, wrong, fitted["threshold"]), "area, validation": fitted["auc"],
                     "threshold": fitted["threshold"]})  # fmt: skip
    file.write_text(json.dumps(rows))
    return rows


def counted(scores: np.ndarray, wrong: np.ndarray, threshold: float) -> dict[str, Any]:
    """scores (N,), wrong (N,) bool -> what is flagged below the threshold, and how much of it rightly."""
    flagged = scores < threshold
    return {"flagged": float(flagged.mean()), "precision": float(wrong[flagged].mean()) if flagged.any() else None,
            "recall": float(flagged[wrong].mean()), "area": area(scores, ~wrong)}  # fmt: skip


def rewritten(folder: Path, out: Path, change: Callable[[dict[str, str]], dict[str, str] | None]) -> Path:
    """The table with its rows changed; None leaves one out."""
    out.mkdir(parents=True, exist_ok=True)
    with open(folder / "pairs.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with open(out / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(new for row in rows if (new := change(row)) is not None)
    return out


def retrieval(folder: Path, noisy: Source) -> dict[str, float]:
    """R@k on the test split, per cent, mean of both ways, by cosine alone."""
    scores = evaluate(Run.load(folder), noisy, "test", blind=False)["retrieval"]
    return {f"R@{k}": 50 * (scores["t2i"][f"R@{k}"]["value"] + scores["i2t"][f"R@{k}"]["value"]) for k in KS}


def what_is_in(folder: Path) -> dict[str, Any]:
    """Training rows of a table; the share of them that has a caption exchanged on purpose, and the share that has one
    written by the model, of which nobody knows whether it is right."""
    pairs = list(open_source(folder).pairs("train"))
    replaced = [p.attributes.get("verdict") == "replace" for p in pairs]
    wrong = [bool(p.attributes["corrupted"]) and not new for p, new in zip(pairs, replaced)]
    return {"rows": len(pairs), "wrong": mean(wrong), "replaced": mean(replaced)}


def by_folds(folder: Path, by: str, folds: int, noisy: Source) -> Row:
    """What the filters of a cleaned table flagged, from its lineage and its report."""
    wrong_of = {pair.id: bool(pair.attributes["corrupted"]) for pair in noisy.pairs("train")}
    lines = [json.loads(line) for line in (folder / "lineage.jsonl").read_text().splitlines()]
    judged_ = [line for line in lines if line.get(f"{by}_web") is not None]
    found = json.loads((folder / "report.json").read_text())["threshold"]
    scores = np.array([line[f"{by}_web"] for line in judged_])
    wrong = np.array([wrong_of[line["id"]] for line in judged_])
    return {"filter": f"composed, {folds} folds", "judged by": by, **counted(scores, wrong, found["threshold"]),
            "area, validation": found["auc"], "threshold": found["threshold"]}  # fmt: skip


def experiment(source: Source, seed: int, work: Path, share: float, steps: int, folds: int, write: int,
               more: Sequence[str] = ()) -> dict[str, Any]:  # fmt: skip
    """One seed: {"found": rows, "gained": rows}."""
    noisy_folder = work / "noisy"
    if not (noisy_folder / "pairs.csv").is_file():
        corrupt(source, noisy_folder, share, seed)
    noisy = open_source(noisy_folder)
    runs = {kind: pretrained(kind, work / kind, noisy_folder, seed, steps, more) for kind in FILTERS}
    filters = [{"filter": kind, **row} for kind in FILTERS
               for row in judged(runs[kind], noisy, runs[kind] / "judged.json")]  # fmt: skip
    tables = {"noisy table": noisy_folder}
    for by in ("match", "cosine"):
        tables[f"cleaned by {by}"] = folder = work / f"clean-{by}"
        if by != "match" and not folder.exists():  # the scores are there: only the decision is another
            shutil.copytree(work / "clean-match" / ".bootstrap", folder / ".bootstrap",
                            ignore=shutil.ignore_patterns("lock"))  # fmt: skip
        bootstrap(runs["blip"], noisy, folder, filter=runs["composed"], finetune=Finetune(write, lr=1e-3),
                  folds=folds, max_length=16, decision=Decision(by=by, sheet=200), seed=seed,
                  named={"source": str(noisy_folder)})  # fmt: skip
        filters.append(by_folds(folder, by, folds, noisy))
        # the same verdicts, but what would be replaced is left out too: the filter alone
        tables[f"kept by {by}"] = rewritten(folder, work / f"kept-{by}",
                                            lambda row: None if row["verdict"] == "replace" else row)  # fmt: skip
    tables["wrong rows left out by the truth"] = rewritten(noisy_folder, work / "truth",
                                                           lambda row: None if row["corrupted"] == "yes" else row)
    tables["no row exchanged"] = rewritten(noisy_folder, work / "clean",
                                           lambda row: {**row, "caption": row["caption_true"], "corrupted": "no"})
    gained: list[Row] = []
    for name, table in tables.items():
        run = runs["composed"]
        if table != noisy_folder:
            run = pretrained("composed", work / f"again-{table.name}", table, seed, steps, more)
        gained.append({"learnt from": name, **what_is_in(table), **retrieval(run, noisy)})
    return {"seed": seed, "found": filters, "gained": gained}


def summary(seeds: list[dict[str, Any]]) -> tuple[list[Row], list[Row]]:
    """Means over the seeds, with the lowest and the highest."""
    filters = []
    for rows in zip(*(one["found"] for one in seeds)):
        row: Row = {"filter": rows[0]["filter"], "judged by": rows[0]["judged by"]}
        row |= {name: spread([r[name] for r in rows], 100) for name in ("flagged", "precision", "recall")}
        filters.append(row | {name: spread([r[name] for r in rows], 1, 2) for name in ("area", "area, validation")})
    gained = []
    noisy = [one["gained"][0]["R@10"] for one in seeds]
    for number, rows in enumerate(zip(*(one["gained"] for one in seeds))):
        row = {"learnt from": rows[0]["learnt from"], "rows": spread([r["rows"] for r in rows])}
        row |= {name: spread([r[name] for r in rows], 100) for name in ("wrong", "replaced")}
        row |= {f"R@{k}": spread([r[f"R@{k}"] for r in rows], 1, 1) for k in KS}
        more = [r["R@10"] - n for r, n in zip(rows, noisy)]
        row["against noisy, R@10"] = spread(more, 1, 1, sign=True) if number else None
        gained.append(row)
    return filters, gained


def spread(values: Sequence[float | None], times: float = 1, digits: int = 0, sign: bool = False) -> str:
    """ "41 [38 to 44]" """
    known = [times * v for v in values if v is not None]
    if not known:
        return "-"
    plus = "+" if sign else ""
    low, middle, high = (f"{v:{plus}.{digits}f}" for v in (min(known), mean(known), max(known)))
    return middle if low == high else f"{middle} [{low} to {high}]"


def onto_page(page: Path, text: str) -> None:
    """Puts the figures between their marks, at the end of a page that has none."""
    before = page.read_text() if page.is_file() else ""
    block = f"{START}\n{text.strip()}\n{END}"
    marked = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    page.write_text(marked.sub(lambda _: block, before) if marked.search(before) else f"{before}\n{block}\n")
    print(f"written: {page}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("sources", nargs="*", default=["furniture", "food"])
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--share", type=float, default=0.3, help="of the training captions that are exchanged")
    options.add_argument("--steps", type=int, default=120, help="of each training from scratch")
    options.add_argument("--folds", type=int, default=3, help="filters that clean, each without a fold of the rows")
    options.add_argument("--write", type=int, default=80, metavar="STEPS",
                         help="of BLIP's further training to write, and of each of those filters")  # fmt: skip
    options.add_argument("--work", type=Path, default=Path("runs/capfilt"))
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as `interlace train` takes")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--page", type=Path, help="put the tables onto this page, e.g. docs/capfilt.md")
    given = options.parse_args(argv)
    torch.set_num_threads(given.threads)
    facts, seeds = machine("torch", "transformers"), []
    source = open_source(given.sources if len(given.sources) > 1 else given.sources[0])
    for seed in map(int, given.seeds.split(",")):
        # a folder belongs to its numbers: other ones make others
        numbers = f"share{given.share:g}-steps{given.steps}-folds{given.folds}-write{given.write}"
        work = given.work / numbers / f"seed{seed}"
        seeds.append(experiment(source, seed, work, given.share, given.steps, given.folds, given.write, given.set))
        report(seeds, given, facts, source)
    return {"seeds": seeds}


def report(seeds: list[dict[str, Any]], given: Any, facts: dict[str, Any], source: Source) -> None:
    """After each seed: what there is so far."""
    filters, gained = summary(seeds)
    train_rows, test_rows = len(source.indices("train")), len(source.indices("test"))
    notes = [
        f"{source.name}: {train_rows:,} training pairs, {given.share:.0%} of them exchanged; {test_rows} test pairs; "
        f"{given.steps} steps of 32 rows, {given.write} of each of the {given.folds} filters that clean; "
        f"seeds {', '.join(str(one['seed']) for one in seeds)}; mean, in brackets lowest to highest seed; per cent "
        "but for areas and rows",
    ]
    show("Wrong captions found", FOUND, filters, notes)
    show("Retrieval after learning again", GAINED, gained, notes)
    if given.out:
        content = {"machine": facts, "share": given.share, "steps": given.steps, "folds": given.folds,
                   "write": given.write}  # fmt: skip
        keep(given.out, {**content, "source": source.name, "train rows": train_rows, "test rows": test_rows,
                         "seeds": seeds})  # fmt: skip
    if given.page:
        text = markdown("Wrong captions found", FOUND, filters, []) + markdown("Retrieval after learning again", GAINED,
                                                                               gained, notes)  # fmt: skip
        onto_page(given.page, text)


if __name__ == "__main__":
    main()
