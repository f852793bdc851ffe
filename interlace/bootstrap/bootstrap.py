"""CapFilt on a table of one's own: a caption is written for every picture, old and new are judged, what belongs stays.
BLIP (Li et al. 2022, arXiv:2201.12086), section 4.

A folder NEW becomes an ordinary table, with the history of every row:

    pairs.csv, questions.jsonl, LICENCE.txt   what `open_source` reads
    lineage.jsonl    a line for every row of the source: both texts, their scores, the verdict
    skipped.jsonl    rows whose picture cannot be read
    review.html      the verdicts to look at, the most doubtful first
    report.json      written last: counts, the threshold and where it comes from
    .bootstrap/      the two fine-tuned runs, and the scores as they were made
"""

from __future__ import annotations

import heapq
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from interlace.bars import bar
from interlace.bootstrap.folds import Filters
from interlace.bootstrap.judge import Judge
from interlace.bootstrap.models import Finetune, check_captioner, check_filter, filter_of_fold, finetuned
from interlace.bootstrap.parts import Parts
from interlace.bootstrap.score import batches
from interlace.bootstrap.sheet import write_sheet
from interlace.bootstrap.table import Table
from interlace.bootstrap.threshold import POOR, Decision, fit, held_out, labelled
from interlace.data.rows import Source
from interlace.errors import UserError
from interlace.ranges import RANGES, check_range
from interlace.run import Run, write_json
from interlace.search.lock import disk_trouble

WORK, PLAN, PARTS, REPORT = ".bootstrap", "plan.json", "scored.jsonl", "report.json"
SPLIT = "train"  # what is cleaned; held-out rows are what the result is measured on, so they stay as they are
ADDED = ("verdict", "text_web", "text_synthetic", "match_web", "match_synthetic", "cosine_web", "cosine_synthetic")
MOST_BAD = 0.5  # of the pictures: more cannot be read because of a few broken files


@dataclass
class Report:
    """What became of the rows. `verdicts`: keep (the web text passes), replace (only the synthetic one does), drop
    (neither), bad (its picture cannot be read); `added`: synthetic rows beside kept ones."""

    folder: Path
    threshold: dict[str, Any]
    verdicts: dict[str, int]
    added: int
    untouched: int  # rows of other splits
    rows: int  # in the new table
    questions: int
    questions_lost: int  # about rows that are not there any more
    passed: dict[str, float]  # share of the web and of the synthetic texts at or above the threshold
    captioner: str
    filter: str
    decided: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        t, v = self.threshold, self.verdicts
        fitted = ""
        if "auc" in t:
            fitted = (f": precision {t['precision']:.2f}, recall {t['recall']:.2f}, balanced accuracy "
                      f"{t['balanced_accuracy']:.2f}, area under the curve {t['auc']:.2f} on {t['pairs']:,} pairs")
        said = [f"threshold {t['threshold']:.4g} of {t['by']}, from {t['from']}{fitted}"]
        if t.get("auc", 1.0) < POOR:
            said.append(f"WARNING: the filter hardly tells true pairs from wrong ones (area {t['auc']:.2f}, a coin has "
                        "0.50): do not trust its verdicts. Train it longer, or name a better run with --filter.")
        if "wrong" in t:
            said.append(f"about {t['wrong']:.0%} of the web texts seem wrong, from how many pass")
        said.append(f"web texts that pass: {self.passed['web']:.1%}, synthetic ones: {self.passed['synthetic']:.1%}")
        said.append(f"keep {v['keep']:,}, replace {v['replace']:,}, drop {v['drop']:,}, picture unreadable {v['bad']:,}"
                    + (f"; {self.added:,} synthetic texts added beside kept ones" if self.added else ""))
        said.append(f"{self.rows:,} rows in the new table, {self.untouched:,} of them of other splits, as they were; "
                    f"{self.questions:,} questions" + (f" ({self.questions_lost:,} went with their rows)"
                                                       if self.questions_lost else ""))  # fmt: skip
        return [*said, f"review: {self.folder / 'review.html'}", f"table: {self.folder}"]


def bootstrap(run: str | Path, source: Source, out: str | Path, *, captioner: str | Path = "",
              filter: str | Path = "", finetune: Finetune | None = None, clean: Source | None = None,
              named: dict[str, Any] | None = None, decision: Decision | None = None, top_p: float = 0.9,
              max_length: int = 0, seed: int = 0, batch: int = 32, write: bool = True,
              folds: int = 0, progress: bool = True) -> Report:  # fmt: skip
    """Writes `source` to the folder `out` with the captions of its training split judged, replaced or left out.

    From the run (with contrast, match and a decoder) a captioner and a filter are fine-tuned on `clean`, else on the
    source itself; without `finetune` they are the run as it is. `captioner`, `filter`: other runs in their place. Each
    picture gets one caption drawn from the nucleus `top_p` by the seed and the row's id. The filter scores the web and
    the synthetic text; `decision` says from where on a text passes. A web text that passes is kept; else the synthetic
    one replaces it, if that passes; else the row is left out, and its questions. Splits, groups, attributes and
    questions of the others stay.

    A kill costs a batch: the same call goes on. Once the scores are there, another `decision` is a matter of seconds.
    `write` False: nothing is written, texts are kept or left out; then no run has to write. `folds`: so many filters,
    each of the filter run's parts and trained on the other folds' rows for `finetune.steps`, judge the rows they did
    not learn from.
    `named`: keys of `data` for the configs of the fine-tuned runs (source, columns, pictures).

    Raises UserError: a run without a part it needs, no captions in the training split, more folds than it has groups, a
    folder with another plan, a threshold that cannot be fitted, or one that not a single text passes.
    """
    decision = decision or Decision()
    decision.check()
    _check(top_p, max_length, batch, seed, finetune)
    folder = Path(out).expanduser()
    rows = source.indices(SPLIT)
    if not len(rows):
        raise UserError(f"{source.name} has no rows in its {SPLIT!r} split, so there is nothing to clean.")
    base = Run.load(run)
    if not write and (str(captioner) or decision.both):
        raise UserError("where nothing is written there is nothing for a captioner to do, and no second text to add: "
                        "leave --captioner and --both out, or write.")  # fmt: skip
    roles = {"captioner": captioner, "filter": filter} if write else {"filter": filter}
    runs = {role: Run.load(given) if str(given) else base for role, given in roles.items()}
    if write:
        check_captioner(runs["captioner"])
    check_filter(runs["filter"], decision.by)
    if folds and (folds == 1 or folds < 0 or finetune is None or clean is not None):
        raise UserError("folds: 2 or more filters, each trained on the rows of the others' folds, so with fine-tuning "
                        f"and without --clean; got {folds}.")  # fmt: skip
    groups = len(np.unique(np.asarray(source.group_codes)[rows]))
    if folds > groups:
        raise UserError(f"folds: at most as many as the {SPLIT} split of {source.name} has groups, {groups}; got "
                        f"{folds}.")  # fmt: skip
    if decision.threshold is None:  # said before the hours that training takes
        labelled(source, decision.labels) if decision.labels else held_out(source)
    learnt_from = clean or source
    plan = {"source": source.fingerprint, "captioner": runs["captioner"].fingerprint if write else "",
            "filter": runs["filter"].fingerprint, "finetune": asdict(finetune) if finetune else None,
            "learnt_from": learnt_from.fingerprint if finetune else "", "top_p": top_p, "max_length": max_length,
            "seed": seed, "batch": batch, "folds": folds}  # fmt: skip
    with _held(folder):
        _same_plan(folder, plan)
        report = _finished(folder, decision)
        if report is None:
            names = named or {"source": learnt_from.name}
            if finetune is not None:
                for role in runs if not folds else [role for role in runs if role != "filter"]:
                    where = finetuned(runs[role], role, learnt_from, names, folder / WORK / role, finetune,
                                      seed)  # fmt: skip
                    runs[role] = Run.load(where)
            filters = Filters(source, [runs["filter"]])
            if folds and finetune is not None:
                each = [filter_of_fold(runs["filter"], source, n, folds, names, folder / WORK / f"filter-{n + 1}",
                                       finetune, seed) for n in range(folds)]  # fmt: skip
                filters = Filters(source, [Run.load(one) for one in each])
            parts = _scored(folder, source, runs, filters, plan, progress)
            report = _decide(folder, source, runs, filters, parts, decision, batch, progress)
    if progress:
        print("\n".join(report.lines()))
    return report


def _check(top_p: float, max_length: int, batch: int, seed: int, finetune: Finetune | None) -> None:
    if not 0 < top_p <= 1:
        raise UserError("top_p is the share of the probability that words are drawn from, above 0 and at most 1; "
                        f"got {top_p}.")  # fmt: skip
    if max_length < 0 or max_length in (1, 2):
        raise UserError("max_length counts tokens, start and end included: 3 or more, or 0 for as many as in "
                        f"training; got {max_length}.")  # fmt: skip
    if batch < 1:
        raise UserError(f"batch: expected 1 or more pictures, got {batch}.")
    check_range("seed", seed, RANGES["train.seed"])
    if finetune is None:
        return
    if finetune.steps < 1:  # to a training 0 would mean as many as its epochs give
        raise UserError(f"steps of each fine-tuning are at least 1; got {finetune.steps}. Leave fine-tuning out with "
                        "--no-finetune.")  # fmt: skip
    for name in ("batch", "lr"):  # before the folder is made, which would hold the wrong plan
        check_range(f"{name} of the fine-tuning", getattr(finetune, name), RANGES[f"train.{name}"])


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One process at a time. Raises UserError for a folder that holds something else or is being written."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / WORK).is_dir():
        raise UserError(f"{folder} holds something else: choose a folder that is empty or not there yet.")
    try:
        (folder / WORK).mkdir(parents=True, exist_ok=True)
        with FileLock(folder / WORK / "lock", timeout=0), disk_trouble(folder):
            yield
    except Timeout:
        raise UserError(f"another process is writing to {folder}. Wait until it has finished, or stop it.") from None
    except PermissionError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}. Choose a folder of your own.") from None


def _same_plan(folder: Path, plan: dict[str, Any]) -> None:
    file = folder / WORK / PLAN
    if not file.is_file():
        write_json(file, plan)
        return
    before = json.loads(file.read_text())
    words = {"source": "the source", "captioner": "the captioner's run", "filter": "the filter's run",
             "learnt_from": "what the models are fine-tuned on"}  # fmt: skip
    differ = [f"{words[key]} is another one" if key in words else f"{key} was {before.get(key)!r}, is {value!r}"
              for key, value in plan.items() if before.get(key) != value]  # fmt: skip
    if differ:
        raise UserError(f"{folder} holds texts made otherwise ({'; '.join(differ[:3])}). Choose another --out, or "
                        "remove the folder.")  # fmt: skip


def _finished(folder: Path, decision: Decision) -> Report | None:
    """The report of a table that was decided in this way already."""
    try:
        said = json.loads((folder / REPORT).read_text())
        if said["decided"] == asdict(decision) and (folder / "pairs.csv").is_file():
            return Report(folder, **said)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


# ------------------------------------------------------------------------------------------------------- the scores


def _scored(folder: Path, source: Source, runs: dict[str, Run], filters: Filters, plan: dict[str, Any],
            progress: bool) -> Parts:  # fmt: skip
    rows = source.indices(SPLIT).tolist()
    parts = Parts(folder / WORK / PARTS, len(rows), plan["batch"])
    if parts.done == len(rows):
        return parts
    judge = Judge(runs.get("captioner"), filters, source, plan["seed"], plan["top_p"], plan["max_length"])
    bad = sum("bad" in line for line in parts)
    doing = "writing and judging" if "captioner" in runs else "judging"
    with bar(total=len(rows), initial=parts.done, unit=" pictures", desc=doing, smoothing=0.05,
             disable=not progress) as todo:  # fmt: skip
        for some in batches(source, rows[parts.done :], plan["batch"], judge.side):
            lines = judge.lines(some)
            parts.append(lines)
            bad += sum("bad" in line for line in lines)
            todo.update(len(lines))
            if bad:
                todo.set_postfix_str(f"{bad} unreadable")
            if parts.done >= 200 and bad > MOST_BAD * parts.done:
                raise UserError(f"{bad} of the first {parts.done} pictures of {source.name} cannot be read: run "
                                "`interlace data check`.")  # fmt: skip
    return parts


# ----------------------------------------------------------------------------------------------------- the verdicts


def verdict_of(line: dict[str, Any], by: str, threshold: float) -> str:
    """keep, replace, drop or bad: a scored line as its scores have it. A text without words does not pass."""
    if "bad" in line:
        return "bad"
    if passes(line[f"{by}_web"], threshold):
        return "keep"
    return "replace" if passes(line[f"{by}_synthetic"], threshold) else "drop"


def passes(score: float | None, threshold: float) -> bool:
    return score is not None and score >= threshold


def doubt(line: dict[str, Any], by: str, threshold: float) -> float:
    """How far the score that decided lies from the threshold: the less, the more doubtful the verdict."""
    web, synthetic = line[f"{by}_web"], line[f"{by}_synthetic"]
    far = [abs(web - threshold)] if web is not None else []
    if not passes(web, threshold) and synthetic is not None:
        far.append(abs(synthetic - threshold))
    return min(far, default=float("inf"))


def _decide(folder: Path, source: Source, runs: dict[str, Run], filters: Filters, parts: Parts, decision: Decision,
            batch: int, progress: bool) -> Report:  # fmt: skip
    web = [line[f"{decision.by}_web"] for line in parts if line.get(f"{decision.by}_web") is not None]
    found = fit(filters, source, decision, batch, np.array(web))
    by, threshold = found["by"], found["threshold"]
    counts = _counted(source, parts, by, threshold)
    # from here on the table is not the old one any more, and not yet the new one
    (folder / REPORT).unlink(missing_ok=True)
    (folder / "pairs.csv").unlink(missing_ok=True)
    aside = folder / WORK / "table"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    doubtful: list[tuple[float, int, dict[str, Any]]] = []
    lines = iter(parts)
    added = 0
    with (
        Table(aside, source, ADDED) as table,
        open(aside / "lineage.jsonl", "w", encoding="utf-8") as lineage,
        open(aside / "skipped.jsonl", "w", encoding="utf-8") as skipped,
        bar(total=len(source), desc="writing the table", unit=" rows", leave=False, disable=not progress) as todo,
    ):
        for i in range(len(source)):
            todo.update()
            if source.split_of(i) != SPLIT:
                pair = source.pair(i)
                table.row(i, pair.caption)
                _say(lineage, {"id": pair.id, "verdict": "untouched", "web": pair.caption, "text": pair.caption})
                continue
            line = next(lines)
            verdict = verdict_of(line, by, threshold)
            said = {"id": line["id"], "verdict": verdict, **{k: v for k, v in line.items() if k not in ("row", "id")}}
            if verdict == "bad":
                _say(lineage, said)
                _say(skipped, {"id": line["id"], "picture": str(source.picture(i)), "reason": line["bad"]})
                continue
            said["text"] = {"keep": line["web"], "replace": line["synthetic"], "drop": ""}[verdict]
            scores = [line["web"], line["synthetic"], line["match_web"], line["match_synthetic"], line["cosine_web"],
                      line["cosine_synthetic"]]  # fmt: skip
            if verdict != "drop":
                table.row(i, said["text"], [verdict, *scores])
            if decision.both and verdict == "keep" and passes(line[f"{by}_synthetic"], threshold):
                said["added"] = f"{line['id']}+synthetic"
                added += table.row(i, line["synthetic"], ["add", *scores], id=said["added"])
            _say(lineage, said)
            _keep_doubtful(doubtful, (-doubt(line, by, threshold), -i, {**said, "row": i}), decision.sheet)
        for id, why in table.lost:
            _say(skipped, {"id": id, "picture": "", "reason": why})
        lineage.flush()
        os.fsync(lineage.fileno())
    questions = table.company(_note(source, runs, found))
    writer = str(runs["captioner"].folder) if "captioner" in runs else ""
    report = Report(folder, found, counts["verdicts"], added, len(source) - len(source.indices(SPLIT)), table.rows,
                    questions, source.n_questions - questions, counts["passed"],
                    writer, str(runs["filter"].folder), asdict(decision))
    shown = [line for _, _, line in sorted(doubtful, key=lambda one: (-one[0], -one[1]))]
    write_sheet(aside / "review.html", source, shown, report)
    _put(aside, folder)
    write_json(folder / REPORT, {k: v for k, v in asdict(report).items() if k != "folder"})
    return report


def _counted(source: Source, parts: Parts, by: str, threshold: float) -> dict[str, Any]:
    """Verdicts, and shares of texts that pass. Raises UserError when none does."""
    verdicts: Counter[str] = Counter()
    passed, texts = Counter[str](), Counter[str]()
    highest = {"web": float("-inf"), "synthetic": float("-inf")}
    for line in parts:
        verdicts[verdict_of(line, by, threshold)] += 1
        for kind in highest:
            score = line.get(f"{by}_{kind}")
            if score is not None:
                texts[kind] += 1
                passed[kind] += passes(score, threshold)
                highest[kind] = max(highest[kind], score)
    if verdicts["keep"] + verdicts["replace"] == 0:
        top = ", ".join(f"{kind} {value:.4g}" for kind, value in highest.items() if texts[kind]) or "none has a score"
        raise UserError(f"not one of the {sum(texts.values()):,} texts of {source.name} passes the threshold "
                        f"{threshold:.4g} (highest {by}: {top}), so the new table would be empty. Give a lower "
                        "--threshold or --precision, or a filter that was trained longer.")  # fmt: skip
    return {"verdicts": {name: verdicts[name] for name in ("keep", "replace", "drop", "bad")},
            "passed": {kind: passed[kind] / max(texts[kind], 1) for kind in highest}}  # fmt: skip


def _keep_doubtful(heap: list, item: tuple[float, int, dict[str, Any]], most: int) -> None:
    """The `most` items whose doubt is the least far from the threshold; of equal ones the first rows."""
    if len(heap) < most:
        heapq.heappush(heap, item)
    elif heap and item[:2] > heap[0][:2]:
        heapq.heapreplace(heap, item)


def _note(source: Source, runs: dict[str, Run], found: dict[str, Any]) -> str:
    replaced = ""
    if "captioner" in runs:
        replaced = f"replaced by texts that a model wrote ({runs['captioner'].folder.name}), or "
    return (f"Made from {source.name} by `interlace bootstrap`: texts of its {SPLIT} split that a filter "
            f"({runs['filter'].folder.name}) scored below {found['threshold']:.4g} were {replaced}left out; "
            "lineage.jsonl says which. What follows is what the source says.")  # fmt: skip


def _say(file: Any, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _put(aside: Path, folder: Path) -> None:
    """The files of the new table in the place of the old ones, pairs.csv last: with it the folder is a table."""
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    (folder / "questions.jsonl").unlink(missing_ok=True)
    names = sorted(p.name for p in aside.iterdir())
    for name in sorted(names, key=lambda name: name == "pairs.csv"):
        os.replace(aside / name, folder / name)
    aside.rmdir()
