"""How good a run is on held-out rows, and whether it looks at the picture: every score with its interval, its chance
level, and the same score blind.

Blind is the same model with pictures that say nothing about the row. Search is scored with every row holding the
picture of a row of another group; one white picture for all would tie all scores, which is no test. Answers, captions
and hidden words are scored with such a picture and with a white one, and the higher counts: a white one may mislead
less.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from interlace.data.rows import Pair, Source
from interlace.evaluate_words import (
    CAPTIONED,
    GUESSED,
    WRITTEN,
    answer_logits,
    answering,
    captioning,
    guessing,
    listed,
    own_words,
)
from interlace.held import MOST_RERANKED, Held, Score, hold, scored, shuffled
from interlace.run import Run, chunks
from interlace.tasks.binding import asked_what_stands_where, binding
from interlace.tasks.metrics import (
    Cosine,
    SameGroup,
    chance_recall,
    mean_average_precision,
    recall_at_k,
)

KS = (1, 5, 10)
RERANKED = 20  # candidates the fusion layers see per query
FITTED, FEWEST_FITTED, WRONG = 1000, 20, 8  # rows the match logit is fitted on, least groups, wrong texts of each
MATCHED = 100  # rows of a search by matching alone: every text with every picture, so that costs grow with the square
PROVENANCE = ("source", "creator", "author", "provider", "photographer", "licence", "license")
FEWEST_PER_CATEGORY, MOST_CATEGORIES = 2, 60  # an attribute is a category when its values repeat


def evaluate(run: Run, source: Source, split: str = "test", limit: int = 10_000, blind: bool = True) -> dict[str, Any]:
    """Retrieval both ways, image-to-image by category, answers, captions; what the run cannot do is left out, and said
    under "cannot".

    The result is plain numbers: {"value", "low", "high" (95% cluster bootstrap by group), "chance", "blind"}. Each such
    score is a `Score`, which keeps its rows for paired tests.
    """
    needs_rows = run.dim or run.can_match
    held = hold(run, source, split, limit if run.dim else min(limit, MATCHED)) if needs_rows else None
    rows = len(held.pairs) if held else min(limit, len(source.indices(split)))
    result: dict[str, Any] = {"split": split, "rows": rows, "unreadable": held.unreadable if held else 0,
                              "source": source.name, "data_fingerprint": source.fingerprint}  # fmt: skip
    if held is not None:
        captioned = np.array([n for n, p in enumerate(held.pairs) if p.caption.strip()], dtype=np.int64)
        if len(captioned) > 1:
            result["retrieval" if run.dim else "matching"] = (retrieval if run.dim else matching)(
                run, held, captioned, blind)  # fmt: skip
            if run.can_match and held.halves is not None:
                verdicts = match_accuracy(run, held, captioned, blind)
                result["match"] = verdicts["all"]
                if "head" in verdicts:
                    result["match_head"] = verdicts["head"]
        if run.dim:
            result["image_to_image"] = by_category(held.images, held.pairs, source, held.rows, blind)
    if run.can_match and asked_what_stands_where(source, split):
        result["binding"] = binding(run, source, split, limit, blind)
    if len(source.question_indices(split)):
        if run.can_answer:
            result["vqa"] = answering(run, source, split, limit, blind, listed(run), run.answers)
        if run.can_write_answers:
            result["vqa_written"] = answering(run, source, split, min(limit, WRITTEN), blind, own_words(run))
    if "mlm" in run.model.heads and (run.learnt is None or "mlm" in run.learnt):  # prefix_lm writes by the same head
        result |= guessing(run, source, split, min(limit, GUESSED), blind)
    if run.can_caption:
        result |= captioning(run, source, split, min(limit, CAPTIONED), blind)
    return result | {"cannot": cannot(run, source, split)}


def cannot(run: Run, source: Source, split: str) -> list[str]:
    """What is missing from the scores, and why, a sentence each."""
    out = []
    if not run.dim:
        instead = f"; searched by matching, among {MATCHED} rows at the most" if run.can_match else ""
        out.append(f"search by vectors: no contrast head, train with the itc objective{instead}")
    if not run.can_match:
        out.append("match a text with a picture: no match head, train with the itm objective")
    if not (run.can_answer or run.can_write_answers):
        out.append("answer questions: no answer list, train with the vqa objective")
    elif not len(source.question_indices(split)):
        out.append(f"be scored on answers: {source.name} has no questions in its {split!r} split")
    if not run.can_caption:
        out.append("write captions: train with the lm or prefix_lm objective")
    return out


# ----------------------------------------------------------------------------------------------------------- retrieval


def two_way(scores: Any, groups: list, blind: Any = None, ids: np.ndarray | None = None) -> dict[str, Any]:
    """Scores (N text, N image) -> {"t2i": {"R@1": {...}}, "i2t": ...}."""
    same = SameGroup(groups, groups)
    chance = chance_recall(same.counts(), len(groups), KS)
    out: dict[str, Any] = {}
    for name, turned in (("t2i", False), ("i2t", True)):
        recall = recall_at_k(scores.T if turned else scores, same, KS)
        dark = None if blind is None else recall_at_k(blind.T if turned else blind, same, KS)
        out[name] = {f"R@{k}": scored(recall.hits(k), groups, chance[k], dark.at[k] if dark else None, ids) for k in KS}
        out[name]["median_rank"] = recall.median_rank
    return out


def retrieval(run: Run, held: Held, rows: np.ndarray, blind: bool) -> dict[str, Any]:
    images, texts, ids = held.images[rows], held.texts[rows], held.rows[rows]
    groups = [held.groups[r] for r in rows]
    other = shuffled(groups)
    scores = Cosine(texts, images)
    result = two_way(scores, groups, Cosine(texts, images[other]) if blind else None, ids)
    if run.can_match and held.halves is not None:
        cosine = np.asarray(scores)
        mixed = reranked(cosine, match_logits(run, held, rows, best(cosine)), run.match_weight)
        # who is a candidate of whom goes with the picture, so what the other picture would be told is known already
        result["reranked"] = two_way(mixed, groups, mixed[:, other] if blind else None, ids)
        result["reranked"] |= {"candidates": RERANKED, "match_weight": run.match_weight}
    return result


def matching(run: Run, held: Held, rows: np.ndarray, blind: bool) -> dict[str, Any]:
    """Retrieval by the match logit of every text with every picture: all there is without a contrast head, and how
    single-stream systems search (UNITER, arXiv:1909.11740, section 4.2; ViLT)."""
    groups = [held.groups[r] for r in rows]
    logits = match_logits(run, held, rows, np.ones((len(rows), len(rows)), bool))
    return two_way(logits, groups, logits[:, shuffled(groups)] if blind else None, held.rows[rows])


def match_accuracy(run: Run, held: Held, rows: np.ndarray, blind: bool) -> dict[str, Score]:
    """Does the text belong to the picture: each row's own text, and `WRONG` texts of other groups drawn at random
    (which one it is moves the score of a hundred rows by points); own and wrong count half, so that always saying no
    gives a half. Blind: all beside a picture of another row. {"all": by what the run says, "head": by its match head
    alone, where the cosine has a say too}."""
    groups = [held.groups[r] for r in rows]
    own = np.arange(len(rows))
    others, third = [shuffled(groups, seed) for seed in range(WRONG)], shuffled(groups, seed=WRONG)
    fits: dict[str, tuple[float, ...]] = {"all": run.match_fit}
    if run.match_fit[2]:
        fits["head"] = (*run.match_head_fit, 0.0)

    def right(beside: np.ndarray) -> dict[str, np.ndarray]:
        true, *wrong = (match_signs(run, held, rows, text, beside) for text in (own, *others))
        return {name: ((odds(true, fit) > 0) + np.mean([odds(signs, fit) <= 0 for signs in wrong], axis=0)) / 2
                for name, fit in fits.items()}  # fmt: skip

    seen, dark = right(own), right(third) if blind else {}
    return {name: scored(values, groups, 0.5, float(dark[name].mean()) if dark else None, held.rows[rows])
            for name, values in seen.items()}  # fmt: skip


def odds(signs: np.ndarray, fit: tuple[float, ...]) -> np.ndarray:
    """Signs (N, 2) -> log odds (N,)."""
    scale, offset, weight = fit
    return scale * signs[:, 0] + offset + weight * signs[:, 1]


@torch.inference_mode()
def match_signs(run: Run, held: Held, rows: np.ndarray, text: np.ndarray, beside: np.ndarray) -> np.ndarray:
    """Numbers (N,) of the `rows` whose text and whose picture -> (N, 2): the match head's logit, and the cosine of the
    vectors, 0 without a contrast head."""
    parts = []
    for places in chunks(range(len(text)), 64):
        words = run._words([held.pairs[rows[text[n]]].caption for n in places])
        half = held.halves.rows(torch.from_numpy(rows[beside[places]]))  # type: ignore[union-attr]
        parts.append(run.head_logits(run.model.half_text(*words), half).cpu().numpy())
    cosine = (held.texts[rows[text]] * held.images[rows[beside]]).sum(-1)  # of (N, 0): zeros
    return np.stack([np.concatenate(parts), cosine], axis=1).astype(np.float64)


def best(scores: np.ndarray) -> np.ndarray:
    """(N, N) -> (N, N) bool: the RERANKED highest of each row and of each column."""
    k = min(RERANKED, len(scores))
    out = np.zeros(scores.shape, bool)
    np.put_along_axis(out, np.argpartition(-scores, k - 1, axis=1)[:, :k], True, axis=1)
    np.put_along_axis(out, np.argpartition(-scores, k - 1, axis=0)[:k], True, axis=0)
    return out


@torch.inference_mode()
def match_logits(run: Run, held: Held, rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """wanted (N, N) bool, text by picture -> (N, N) logit of the match probability, nan where not wanted."""
    n = len(rows)
    out = np.full((n, n), np.nan, np.float32)
    model, texts = run.model, [held.pairs[r].caption for r in rows]
    for t in tqdm(range(n), desc="re-ranking", unit="query", leave=False, disable=None if n > 200 else True):
        columns = np.flatnonzero(wanted[t])
        half = model.half_text(*run._words([texts[t]])).rows(torch.zeros(len(columns), dtype=torch.long))
        image = held.halves.rows(torch.from_numpy(rows[columns]))  # type: ignore[union-attr]
        cosine = torch.from_numpy(held.images[rows[columns]] @ held.texts[rows[t]])  # of (N, 0) and (0,): zeros
        out[t, columns] = run.match_logits(half, image, cosine).cpu().numpy()
    return out


def reranked(scores: np.ndarray, logits: np.ndarray, weight: float) -> np.ndarray:
    """Candidates by cosine + weight * match logit, above all others (BLIP's second stage, arXiv:2201.12086, section
    5.1, which adds the two with weight 1; a model trained on few pairs deserves less trust in its matching)."""
    seen = ~np.isnan(logits)
    return np.where(seen, 1e3 + scores + weight * np.nan_to_num(logits), scores)


WEIGHTS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def fit_match_weight(run: Run, source: Source) -> float:
    """The weight of the match logit with the best mean reciprocal rank, both directions, on the validation split: 0
    where matching does not help, so that re-ranking never makes a search worse than it was there."""
    held = hold(run, source, "val", MOST_RERANKED)
    rows = np.array([n for n, p in enumerate(held.pairs) if p.caption.strip()])
    if not run.can_match or held.halves is None or len(rows) < 2:
        return 0.0
    groups = [held.groups[r] for r in rows]
    scores = np.asarray(Cosine(held.texts[rows], held.images[rows]))
    logits, same = match_logits(run, held, rows, best(scores)), SameGroup(groups, groups)

    def reciprocal(weight: float) -> float:
        mixed = reranked(scores, logits, weight)
        ranks = np.concatenate([recall_at_k(m, same, KS).ranks for m in (mixed, mixed.T)])
        return float(np.nanmean(1 / ranks))

    return max(WEIGHTS, key=lambda w: (round(reciprocal(w), 6), -w))


# ------------------------------------------------------------------------------------------------------ image to image


def categories(source: Source, pairs: list[Pair]) -> list[str]:
    """Text attributes whose values repeat often enough to be categories, and say what is in the picture rather than
    where the row comes from."""
    found = []
    for name, kind in source.columns.items():
        if kind != "text" or name.lower() in PROVENANCE:
            continue
        values = [p.attributes.get(name) for p in pairs]
        known = [v for v in values if v is not None]
        distinct = len(set(known))
        if known and 2 <= distinct <= min(MOST_CATEGORIES, len(known) // FEWEST_PER_CATEGORY):
            found.append(name)
    return found


def by_category(images: np.ndarray, pairs: list[Pair], source: Source, rows: np.ndarray | None = None,
                blind: bool = False) -> dict[str, Any]:  # fmt: skip
    """mAP of picture-to-picture search, for each attribute that is a category. A row's own group (the same thing again)
    is left out of its gallery. `rows`: (N,) positions in the source, kept with the scores."""
    out: dict[str, Any] = {}
    groups = [p.group for p in pairs]
    others = images[shuffled(groups)] if blind else None
    for name in categories(source, pairs):
        labels = [p.attributes.get(name) for p in pairs]
        found = mean_average_precision(Cosine(images, images), labels, groups=groups)
        if np.isnan(found.value):
            continue
        dark = None if others is None else mean_average_precision(Cosine(others, others), labels, groups=groups).value
        out[name] = {"mAP": scored(found.per_query, groups, found.chance, dark, rows),
                     "values": len(set(labels) - {None})}  # fmt: skip
    return out


# --------------------------------------------------------------------------------------------------------- temperature


def fit_match(run: Run, source: Source) -> dict[str, tuple[float, ...]]:
    """What makes validation verdicts honest: {"match_fit": scale and offset of the match head's logit and weight of the
    cosine, "match_head_fit": scale and offset of the head alone}; {} where there is too little to fit them on.

    Platt scaling (Guo et al. 2017, arXiv:1706.04599, section 4.1), own and wrong pairs counting half each: what was
    learnt by heart is known for sure, and a head that saw every training pair a dozen times finds new ones too strange
    and says "no match" too often. The cosine is a second witness, as where BLIP ranks by the sum of the two
    (arXiv:2201.12086, section 5.1): pairs that one of them takes wrong the other often knows. A witness whose words
    have nothing to do with what is there weighs nothing, as one that says the same of all pairs."""
    held = hold(run, source, "val", FITTED)
    rows = np.array([n for n, p in enumerate(held.pairs) if p.caption.strip()], dtype=np.int64)
    groups = [held.groups[r] for r in rows]
    if held.halves is None or len(set(groups)) < FEWEST_FITTED:
        return {}
    own = np.arange(len(rows))
    wrong = [match_signs(run, held, rows, shuffled(groups, seed), own) for seed in range(1, 1 + WRONG)]
    signs = torch.from_numpy(np.concatenate([match_signs(run, held, rows, own, own), *wrong]))
    true = torch.arange(len(signs)) < len(own)
    scale, offset = platt(signs[:, :1], true)
    head = (scale, offset) if scale else (1.0, 0.0)
    scale, weight, offset = platt(signs, true)
    both = (scale, offset, weight) if scale or weight else (1.0, 0.0, 0.0)
    return {"match_fit": both, "match_head_fit": head}


def platt(signs: torch.Tensor, true: torch.Tensor) -> tuple[float, ...]:
    """Signs (N, F) and whether the pairs belong together (N,) -> a weight for each sign, and the offset; 0 for a sign
    that says the same of all, or that speaks for the contrary."""
    weights, offset = torch.zeros(signs.shape[1], dtype=torch.double), 0.0
    spread = signs.std(0)  # so that one step fits all heads, soft and loud
    some = spread > 1e-6
    while some.any():
        line, offset = logistic(signs[:, some] / spread[some], true)
        weights.zero_()
        weights[some] = line / spread[some]
        if (weights[some] > 0).all():
            return (*(float(f"{w:.6g}") for w in weights), round(offset, 4))
        some = weights > 0
    return (*weights.zero_().tolist(), 0.0)


def logistic(x: torch.Tensor, true: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(N, F), (N,) bool -> (F,) and the offset of a logistic regression in which both classes count half."""
    target, weight = true.double(), torch.where(true, 1.0, true.sum() / (~true).sum()).double()
    line = torch.ones(x.shape[1] + 1, dtype=torch.double, requires_grad=True)
    fitting = torch.optim.LBFGS([line], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        fitting.zero_grad()
        out = F.binary_cross_entropy_with_logits(x @ line[:-1] + line[-1], target, weight)
        out = out + 1e-4 * (line[:-1] ** 2).sum()  # where all pairs are told apart, no scale is too large
        out.backward()
        return out

    fitting.step(loss)
    found = line.detach()
    return found[:-1], float(found[-1])


def fit_temperature(run: Run, source: Source) -> float:
    """The temperature that makes validation probabilities honest: least negative log-likelihood of the right answer.
    Guo et al. 2017 (arXiv:1706.04599), section 4.2; searched on a grid, since it is one number."""
    asked, logits = answer_logits(run, source, "val", 5000)
    place = {a: n for n, a in enumerate(run.answers)}
    target = np.array([place.get(max(q.answers, key=lambda a: a[1])[0], -1) if q.answers else -1 for q in asked])
    known = torch.from_numpy(target >= 0)
    if not known.any():
        return 1.0
    x, y = torch.from_numpy(logits)[known], torch.from_numpy(target)[known]
    grid = torch.logspace(-1, 1, 81)
    losses = torch.stack([torch.nn.functional.cross_entropy(x / t, y) for t in grid])
    return round(float(grid[losses.argmin()]), 4)


# ----------------------------------------------------------------------------------------------------------- for people


def rows_of(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Flat (name, score) rows in reading order."""
    out: list[tuple[str, dict[str, Any]]] = []
    found = metrics.get("retrieval", {})
    ways = {"": found, f" re-ranked top {RERANKED}": found.get("reranked", {}),
            " by matching": metrics.get("matching", {})}  # fmt: skip
    for title, part in ways.items():
        for key, name in (("t2i", "text to image"), ("i2t", "image to text")):
            out += [(f"{name} R@{k}{title}", part[key][f"R@{k}"]) for k in KS if key in part]
    if "match" in metrics:
        out.append(("match or not, balanced accuracy", metrics["match"]))
    if "match_head" in metrics:
        out.append(("match or not, by the match head alone", metrics["match_head"]))
    out += [(f"image to image mAP by {name}", v["mAP"]) for name, v in metrics.get("image_to_image", {}).items()]
    for key, name in (("vqa", "answers"), ("vqa_written", "written answers")):
        if part := metrics.get(key):
            out.append((f"{name}, accuracy", part["accuracy"]))
            out += [(f"{name}: {kind or 'all'}", v) for kind, v in part["by_kind"].items()]
    if part := metrics.get("binding"):
        named = (("text", "caption"), ("image", "picture"), ("both", "both of a twin"))
        out += [(f"what stands where, {name}", part[key]) for key, name in named if key in part]
    if "hidden_words" in metrics:
        out.append(("hidden words guessed", metrics["hidden_words"]))
    out += [(f"captions, {name}", v) for name, v in metrics.get("captions", {}).items()]
    return out


def blind_of(score: dict[str, Any]) -> float | None:
    """The score blind; files of older versions hold only the two it is the higher of."""
    if "blind" in score:
        return score["blind"]
    return max((score[k] for k in ("shuffled", "blank") if score.get(k) is not None), default=None)


def markdown(metrics: dict[str, Any]) -> str:
    """The scores as a table; without any, nothing."""

    def number(x: float | None) -> str:
        return "" if x is None or x != x else f"{100 * x:.1f}"

    lines = ["| measure | score | 95% interval | chance | blind |", "| --- | ---: | :---: | ---: | ---: |"]
    for name, s in rows_of(metrics):
        spread = f"{number(s['low'])} to {number(s['high'])}" if "low" in s else ""
        cells = (number(s["value"]), spread, number(s.get("chance")), number(blind_of(s)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def notes(metrics: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know, a line each: what blind is, and what this run cannot do."""
    said = ["Blind: the same model on pictures of other rows; for answers, captions and hidden words also on a white "
            "one, and the higher counts."] if rows_of(metrics) else []  # fmt: skip
    return said + [f"This run cannot {what}." for what in metrics.get("cannot", [])]


def print_metrics(metrics: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    lines = markdown(metrics).splitlines()
    if lines:
        table = Table(title=f"{metrics['source']}, {metrics['split']} split: {metrics['rows']} rows")
        for column in lines[0].strip("| ").split(" | "):
            table.add_column(column, justify="left" if column == "measure" else "right")
        for line in lines[2:]:
            table.add_row(*[cell.strip() for cell in line.strip("|").split("|")])
        Console().print(table)
    for note in notes(metrics):
        print(note)
