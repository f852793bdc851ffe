"""From which score on a text counts as belonging to its picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from interlace.bars import bar
from interlace.bootstrap.corrupt import clusters, exchanged
from interlace.bootstrap.folds import Filters
from interlace.data.rows import Source
from interlace.errors import UserError, suggest
from interlace.held import sample_rows

FEWEST = 10  # pairs of each kind, below which no threshold is worth fitting
MOST = 2000  # pairs that are looked at
POOR = 0.6  # area under the curve below which the filter hardly knows anything


@dataclass
class Decision:
    """How texts are judged. `by`: match (the ITM head's probability, as BLIP) or cosine. `threshold`: given, else
    fitted: on rows that `labels` says the truth of (a column with yes for captions that belong to their pictures, or
    COLUMN=VALUE), else on the validation split's pairs and the same with captions exchanged. `precision`: the lowest
    threshold that reaches it there; 0: the one that judges most texts right at the share of wrong ones that there seems
    to be. `both`: a synthetic text that passes becomes a row of its own beside a web text that passes, as in the paper.
    `sheet`: rows on the page to review."""

    by: str = "match"
    threshold: float | None = None
    labels: str = ""
    precision: float = 0.0
    both: bool = False
    sheet: int = 300

    def check(self) -> None:
        if self.by not in ("match", "cosine"):
            raise UserError(f"texts are judged by match or cosine; got {self.by!r}."
                            f"{suggest(self.by, ('match', 'cosine'))}")  # fmt: skip
        if not 0 <= self.precision <= 1:
            raise UserError(f"precision: expected a share from 0 to 1, such as 0.95; got {self.precision}.")
        if self.threshold is not None and (self.labels or self.precision):
            raise UserError("a threshold that is given is not fitted: leave --labels and --precision out, or the "
                            "threshold.")  # fmt: skip
        if self.sheet < 0:
            raise UserError(f"sheet: expected a number of rows, 0 for none; got {self.sheet}.")


def labelled(source: Source, given: str) -> list[tuple[int, list[str], list[bool]]]:
    """(row, its caption, whether it is true) by the column the user names. Raises UserError for an unknown column or
    too few of a kind."""
    column, sign, value = given.partition("=")
    if column not in source.columns:
        known = ", ".join(source.columns) or "none"
        raise UserError(f"no column {column!r} in {source.name} to learn the threshold from; there are: {known}."
                        f"{suggest(column, source.columns)}")  # fmt: skip
    if not sign and source.columns[column] != "boolean":
        raise UserError(f"the column {column!r} is {source.columns[column]}, not yes or no: say which value means that "
                        f"the caption is right, {column}=VALUE.")  # fmt: skip
    said = {True: "yes", False: "no"}
    out = []
    captions = source.captions()
    for i, cell in enumerate(source.attribute(column)):
        if cell is None or not captions[i].as_py().strip():
            continue
        true = str(said.get(cell, cell) if isinstance(cell, bool) else cell) == value if sign else bool(cell)
        out.append((i, [captions[i].as_py()], [true]))
    kept = [out[n] for n in sample_rows(np.arange(len(out)), 2 * MOST)]
    right = sum(marks[0] for _, _, marks in kept)
    if min(right, len(kept) - right) < FEWEST:
        raise UserError(f"the column {column!r} calls {right} captions right and {len(kept) - right} wrong: "
                        f"a threshold needs at least {FEWEST} of each. Give --threshold, or label more rows.")
    return kept


def held_out(source: Source) -> list[tuple[int, list[str], list[bool]]]:
    """Pairs of the validation split, and the same pictures with captions of others. Raises UserError when they are too
    few."""
    captions = source.captions()
    rows = np.array([i for i in source.indices("val").tolist() if captions[i].as_py().strip()], np.int64)
    rows = sample_rows(rows, MOST)
    texts = [captions[i].as_py() for i in rows.tolist()]
    other = None
    if len(rows) >= FEWEST:
        other = exchanged(clusters(source.group_codes[rows], texts), np.random.default_rng(0))
    if other is None:
        raise UserError(f"the validation split of {source.name} has {len(rows)} pairs that could be exchanged: a "
                        f"threshold needs at least {FEWEST}, of several groups. Give --threshold, or --labels.")
    return [(int(row), [texts[n], texts[other[n]]], [True, False]) for n, row in enumerate(rows)]


def fit(filters: Filters, source: Source, how: Decision, batch: int,
        web: np.ndarray | None = None) -> dict[str, Any]:  # fmt: skip
    """{"threshold", "by", "from", and, where it was fitted: "pairs", "precision", "recall", "balanced_accuracy",
    "auc", "wrong"}. `web` (N,): scores of the texts that are to be judged. Raises UserError when the precision asked
    for is out of reach."""
    if how.threshold is not None:
        return {"threshold": float(how.threshold), "by": how.by, "from": "given"}
    pairs = labelled(source, how.labels) if how.labels else held_out(source)
    where = f"the column {how.labels}" if how.labels else "validation pairs, true and exchanged"
    values: list[float] = []
    true: list[bool] = []
    marks = {row: said for row, _, said in pairs}
    asked = filters.score_pairs({row: texts for row, texts, _ in pairs}, batch)
    for row, found in bar(asked, total=len(pairs), desc="threshold", unit=" pictures", leave=False):
        true += marks[row]
        values += [float(score[how.by == "cosine"] or 0.0) for score in found]
    if min(sum(true), len(true) - sum(true)) < FEWEST:
        raise UserError(f"of the pictures of {where} fewer than {FEWEST} can be read: run `interlace data check`.")
    chosen = best(np.array(values), np.array(true), how.precision, web)
    if chosen is None:
        reached = max(precision for _, precision, _, _ in curve(np.array(values), np.array(true)))
        raise UserError(f"no threshold has a precision of {how.precision:g} on {where}: the best is {reached:.2f}. Ask "
                        "for less, or train the filter longer.")  # fmt: skip
    return {**chosen, "by": how.by, "from": where, "pairs": len(values), "auc": area(np.array(values), np.array(true))}


Point = tuple[float, float, float, float]  # threshold, precision, recall, balanced accuracy


def curve(values: np.ndarray, true: np.ndarray) -> list[Point]:
    """One point for each threshold that parts the pairs differently, from the lowest; the middle between two scores.
    values (N,), true (N,) bool, with both kinds present."""
    order = np.argsort(values, kind="stable")
    values, true = values[order], true[order]
    starts = np.flatnonzero(np.r_[True, values[1:] > values[:-1]])  # the first of each distinct score
    right = true.sum() - np.r_[0, np.cumsum(true)][starts]  # true ones that pass
    passing = len(values) - starts
    wrong = passing - right
    below = np.where(starts > 0, values[np.maximum(starts - 1, 0)], values[0])
    # six digits, as the scores: a middle that rounds onto the lower one would let it pass
    middles = np.round((below + values[starts]) / 2, 6)
    middles = np.where(middles > below, middles, values[starts])
    balanced = (right / true.sum() + 1 - wrong / (~true).sum()) / 2
    return list(zip(middles.tolist(), (right / passing).tolist(), (right / true.sum()).tolist(), balanced.tolist()))


def best(values: np.ndarray, true: np.ndarray, precision: float = 0.0,
         web: np.ndarray | None = None) -> dict[str, float] | None:  # fmt: skip
    """The lowest threshold of that precision, so the most pairs pass. Without one, that of the best balanced accuracy,
    or, where there are texts to judge, `web` (N,), that of the best accuracy at their own share of wrong ones: in a
    table of which one text in twenty is wrong, a threshold made for halves would cost more true texts than it finds
    wrong ones. That share, "wrong", is the one at which as many would pass as do (adjusted count: Forman 2008, Data
    Mining and Knowledge Discovery 17). None when no threshold reaches the precision."""
    points = curve(values, true)
    if precision:
        points = [p for p in points if p[1] >= precision]
        return None if not points else dict(zip(NAMES, points[0]))
    chosen, more = max(points, key=lambda p: p[3]), {}
    if web is not None and len(web):
        threshold, _, recall, balanced = chosen
        false = recall + 1 - 2 * balanced  # share of wrong ones that pass
        wrong = float(np.clip((recall - np.mean(web >= threshold)) / max(recall - false, 1e-9), 0, 1))
        chosen = max(points, key=lambda p: (1 - wrong) * p[2] + wrong * (2 * p[3] - p[2]))
        more = {"wrong": wrong}
    return dict(zip(NAMES, chosen)) | more


NAMES = ("threshold", "precision", "recall", "balanced_accuracy")


def area(values: np.ndarray, true: np.ndarray) -> float:
    """Under the ROC curve: how often a true pair scores higher than a wrong one, ties counting half."""
    order = np.argsort(values, kind="stable")
    _, inverse, counts = np.unique(values[order], return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = np.empty(len(values))
    ranks[order] = (ends - (counts - 1) / 2)[inverse.reshape(-1)]  # the mean rank of equal scores
    n, m = int(true.sum()), int((~true).sum())
    return float((ranks[true].sum() - n * (n + 1) / 2) / (n * m)) if n and m else float("nan")
