"""How good a run is on held-out rows, and whether it looks at the picture: every score with its interval, its chance
level, and the same score when the picture is another one or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from interlace.data.pictures import BadPicture, open_picture
from interlace.data.rows import Pair, Source
from interlace.errors import UserError
from interlace.model import Half
from interlace.run import Run, chunks
from interlace.tasks.metrics import (
    Cosine,
    SameGroup,
    bootstrap_interval,
    chance_recall,
    mean_average_precision,
    recall_at_k,
)
from interlace.tasks.vqa_score import chance_vqa, listed_accuracy

KS = (1, 5, 10)
RERANKED = 20  # candidates the fusion layers see per query
MOST_RERANKED = 2000  # rows: halves of all pictures are held in memory for it
PROVENANCE = ("source", "creator", "author", "provider", "photographer", "licence", "license")
FEWEST_PER_CATEGORY, MOST_CATEGORIES = 2, 60  # an attribute is a category when its values repeat


@dataclass
class Held:
    """The readable rows of one split with their vectors; pictures are decoded once."""

    pairs: list[Pair]
    rows: np.ndarray  # (N,) positions in the source
    images: np.ndarray  # (N, D)
    texts: np.ndarray  # (N, D)
    halves: Half | None  # image halves (N, I, D), when few enough to hold
    unreadable: int

    @property
    def groups(self) -> list[str]:
        return [p.group for p in self.pairs]


def _read(source: Source, rows: np.ndarray, size: int, title: str):
    """(position, pair, picture) of the rows that can be read, with a bar."""
    for row in tqdm(rows, desc=title, unit="picture", leave=False, disable=None if len(rows) > 200 else True):
        pair = source.pair(int(row))
        try:
            yield int(row), pair, open_picture(pair.picture, size_hint=size)
        except BadPicture:
            continue


def sample_rows(rows: np.ndarray, limit: int, seed: int = 0) -> np.ndarray:
    """All of them, or a seeded sample of `limit` in order: an evaluation is quadratic in its rows."""
    if len(rows) <= limit:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))


@torch.inference_mode()
def hold(run: Run, source: Source, split: str, limit: int = 10_000) -> Held:
    """Encodes a split. Raises UserError when it is empty or nothing in it can be read."""
    rows = sample_rows(np.asarray(source.indices(split)), limit)
    if not len(rows):
        raise UserError(f"{source.name} has no rows in its {split!r} split.")
    pairs, kept, images, halves = [], [], [], []
    keep_halves = run.can_match and len(rows) <= MOST_RERANKED
    for chunk in chunks(_read(source, rows, run.processor.size, f"encoding {split}"), 32):
        half = run.model.half_image(run._pixels([picture for _, _, picture in chunk]))
        if run.dim:
            images.append(run.model.alone(half, "image").float().cpu().numpy())
        if keep_halves:
            halves.append(half.states)
        kept += [row for row, _, _ in chunk]
        pairs += [pair for _, pair, _ in chunk]
    if not pairs:
        raise UserError(f"none of the {len(rows)} pictures in the {split!r} split of {source.name} can be read: run "
                        "`interlace data check`.")  # fmt: skip
    vectors = np.concatenate(images) if images else np.zeros((len(pairs), 0), np.float32)
    texts = run.encode_texts([p.caption for p in pairs]) if run.dim else np.zeros((len(pairs), 0), np.float32)
    return Held(pairs, np.array(kept), vectors, texts, Half(torch.cat(halves), None) if halves else None,
                len(rows) - len(pairs))  # fmt: skip


def evaluate(run: Run, source: Source, split: str = "test", limit: int = 10_000, blind: bool = True) -> dict[str, Any]:
    """Retrieval both ways, image-to-image by category, answers; what the run cannot do is left out.

    The result is plain numbers: {"value", "low", "high" (95% cluster bootstrap by group), "chance", "blind"}.
    """
    held = hold(run, source, split, limit)
    result: dict[str, Any] = {"split": split, "rows": len(held.pairs), "unreadable": held.unreadable,
                              "source": source.name, "data_fingerprint": source.fingerprint}  # fmt: skip
    if run.dim:
        captioned = [n for n, p in enumerate(held.pairs) if p.caption.strip()]
        if len(captioned) > 1:
            result["retrieval"] = retrieval(run, held, np.array(captioned), blind)
        result["image_to_image"] = by_category(held.images, held.pairs, source)
    if run.can_answer and len(source.question_indices(split)):
        result["vqa"] = answering(run, source, split, limit, blind)
    return result


# ----------------------------------------------------------------------------------------------------------- retrieval


def scored(values: np.ndarray, groups: list, chance: float | None = None, blind: float | None = None) -> dict[str, Any]:
    interval = bootstrap_interval(values, groups=groups)
    out = {"value": interval.mean, "low": interval.low, "high": interval.high, "queries": interval.values}
    return out | {k: v for k, v in (("chance", chance), ("blind", blind)) if v is not None}


def two_way(scores: Any, groups: list, blind: Any = None) -> dict[str, Any]:
    """Scores (N text, N image) -> {"t2i": {"R@1": {...}}, "i2t": ...}."""
    same = SameGroup(groups, groups)
    chance = chance_recall(same.counts(), len(groups), KS)
    out: dict[str, Any] = {}
    for name, turned in (("t2i", False), ("i2t", True)):
        recall = recall_at_k(scores.T if turned else scores, same, KS)
        dark = None if blind is None else recall_at_k(blind.T if turned else blind, same, KS)
        out[name] = {f"R@{k}": scored(recall.hits(k), groups, chance[k], dark.at[k] if dark else None) for k in KS}
        out[name]["median_rank"] = recall.median_rank
    return out


def retrieval(run: Run, held: Held, rows: np.ndarray, blind: bool) -> dict[str, Any]:
    images, texts = held.images[rows], held.texts[rows]
    groups = [held.groups[r] for r in rows]
    # shifted by one row in a seeded order: everybody's picture is somebody else's
    other = shuffled(len(rows))
    scores = Cosine(texts, images)
    result = two_way(scores, groups, Cosine(texts, images[other]) if blind else None)
    if held.halves is not None:
        logits = match_logits(run, held, rows, np.asarray(scores))
        result["reranked"] = two_way(reranked(np.asarray(scores), logits, run.match_weight), groups)
        result["reranked"] |= {"candidates": RERANKED, "match_weight": run.match_weight}
    return result


def shuffled(n: int, seed: int = 0) -> np.ndarray:
    """(n,) a permutation without a fixed point (n > 1)."""
    order = np.random.default_rng(seed).permutation(n)
    out = np.empty(n, dtype=np.int64)
    out[order] = np.roll(order, 1)
    return out


@torch.inference_mode()
def match_logits(run: Run, held: Held, rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(N, N) cosine -> (N, N) logit of the match probability for the best of each row and column, nan elsewhere."""
    n = len(rows)
    k = min(RERANKED, n)
    wanted = np.zeros((n, n), bool)
    np.put_along_axis(wanted, np.argpartition(-scores, k - 1, axis=1)[:, :k], True, axis=1)
    np.put_along_axis(wanted, np.argpartition(-scores, k - 1, axis=0)[:k], True, axis=0)
    out = np.full((n, n), np.nan, np.float32)
    model, texts = run.model, [held.pairs[r].caption for r in rows]
    for t in tqdm(range(n), desc="re-ranking", unit="query", leave=False, disable=None if n > 200 else True):
        columns = np.flatnonzero(wanted[t])
        half = model.half_text(*run._words([texts[t]])).rows(torch.zeros(len(columns), dtype=torch.long))
        fused = model.fuse(half, held.halves.rows(torch.from_numpy(rows[columns])))  # type: ignore[union-attr]
        logits = model.heads["match"](fused.pooled_text, fused.pooled_image).float()
        out[t, columns] = (logits[:, 1] - logits[:, 0]).cpu().numpy()
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
    if held.halves is None or len(rows) < 2:
        return 0.0
    groups = [held.groups[r] for r in rows]
    scores = np.asarray(Cosine(held.texts[rows], held.images[rows]))
    logits, same = match_logits(run, held, rows, scores), SameGroup(groups, groups)

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


def by_category(images: np.ndarray, pairs: list[Pair], source: Source) -> dict[str, Any]:
    """mAP of picture-to-picture search, for each attribute that is a category. A row's own group (the same thing again)
    is left out of its gallery."""
    out: dict[str, Any] = {}
    groups = [p.group for p in pairs]
    for name in categories(source, pairs):
        labels = [p.attributes.get(name) for p in pairs]
        found = mean_average_precision(Cosine(images, images), labels, groups=groups)
        if np.isnan(found.value):
            continue
        out[name] = {"mAP": scored(found.per_query, groups, found.chance), "values": len(set(labels) - {None})}
    return out


# ----------------------------------------------------------------------------------------------------------- questions


def answer_logits(run: Run, source: Source, split: str, limit: int, picture: str = "own") -> tuple[list, np.ndarray]:
    """Questions of a split and logits (Q, A). `picture`: "own", "shuffled" (another row's) or "blank" (white)."""
    indices = sample_rows(source.question_indices(split), limit)
    questions = [source.question(int(i)) for i in indices]
    of = another_group(questions) if picture == "shuffled" else range(len(questions))
    shown = [questions[n].picture for n in of]
    kept, logits = [], []
    blank = Image.new("RGB", (run.processor.size, run.processor.size), "white")
    cached: tuple[Any, Image.Image | None] = (None, None)

    def readable():
        nonlocal cached
        for question, ref in zip(questions, shown):
            if picture == "blank":
                yield question, blank
                continue
            if ref != cached[0]:  # the questions about one picture follow each other
                try:
                    cached = (ref, open_picture(ref, size_hint=run.processor.size))
                except BadPicture:
                    cached = (ref, None)
            if cached[1] is not None:
                yield question, cached[1]

    bar = tqdm(total=len(questions), desc=f"answering {split}, {picture} picture", unit="question", leave=False,
               disable=None if len(questions) > 200 else True, mininterval=1)  # fmt: skip
    for chunk in chunks(readable(), 64):
        kept += [question for question, _ in chunk]
        logits.append(run.answer_logits([p for _, p in chunk], [q.question for q, _ in chunk]).cpu().numpy())
        bar.update(len(chunk))
    bar.close()
    return kept, np.concatenate(logits) if logits else np.zeros((0, len(run.answers)), np.float32)


def another_group(questions: list) -> np.ndarray:
    """(Q,) for each question one about a picture of another group (its own where there is but one group)."""
    rng, n = np.random.default_rng(0), len(questions)
    groups = [q.group for q in questions]
    out = np.arange(n)
    for q in range(n):
        for other in rng.integers(0, n, 50):
            if groups[other] != groups[q]:
                out[q] = other
                break
    return out


def answering(run: Run, source: Source, split: str, limit: int, blind: bool) -> dict[str, Any]:
    """Accuracy, by kind, beside chance (the training majority, by kind) and the same model on a shuffled and a blank
    picture. A question whose answer is not in the list counts as wrong."""
    asked, logits = answer_logits(run, source, split, limit)
    said = [run.answers[n] for n in logits.argmax(-1)]
    kinds, answers, groups = [q.kind for q in asked], [q.answers for q in asked], [q.group for q in asked]
    score = listed_accuracy(said, answers, kinds)
    train = list(source.questions("train")) if source.n_questions <= 2_000_000 else []
    chance = chance_vqa([q.answers for q in train], [q.kind for q in train], answers, kinds) if train else None
    majority = chance.majority_by_kind.overall if chance else None
    out: dict[str, Any] = {"accuracy": scored(score.per_question, groups, majority)}
    dark = {}
    if blind:
        for picture in ("shuffled", "blank"):
            same, blind_logits = answer_logits(run, source, split, limit, picture)
            guessed = [run.answers[n] for n in blind_logits.argmax(-1)]
            dark[picture] = listed_accuracy(guessed, [q.answers for q in same], [q.kind for q in same])
        out["accuracy"]["blind"] = max(s.overall for s in dark.values())
        out["accuracy"] |= {picture: s.overall for picture, s in dark.items()}
    out["by_kind"] = {
        kind: {"value": value, "chance": chance.majority_by_kind.by_kind.get(kind) if chance else None,
               **{picture: s.by_kind.get(kind) for picture, s in dark.items()}, "questions": kinds.count(kind)}
        for kind, value in score.by_kind.items()
    }  # fmt: skip
    listed = set(run.answers)
    out["not_in_list"] = sum(not any(a in listed for a, _ in given) for given in answers)
    return out


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
    r = metrics.get("retrieval", {})
    for title, part in (("", r), (f" re-ranked top {RERANKED}", r.get("reranked", {}))):
        for key, name in (("t2i", "text to image"), ("i2t", "image to text")):
            out += [(f"{name} R@{k}{title}", part[key][f"R@{k}"]) for k in KS if key in part]
    out += [(f"image to image mAP by {name}", v["mAP"]) for name, v in metrics.get("image_to_image", {}).items()]
    if "vqa" in metrics:
        out.append(("answers, accuracy", metrics["vqa"]["accuracy"]))
        out += [(f"answers: {kind or 'all'}", v) for kind, v in metrics["vqa"]["by_kind"].items()]
    return out


def markdown(metrics: dict[str, Any]) -> str:
    def number(x: float | None) -> str:
        return "" if x is None or x != x else f"{100 * x:.1f}"

    lines = ["| measure | score | 95% interval | chance | blind |", "| --- | ---: | :---: | ---: | ---: |"]
    for name, s in rows_of(metrics):
        spread = f"{number(s['low'])} to {number(s['high'])}" if "low" in s else ""
        dark = s.get("blind", max((s[k] for k in ("shuffled", "blank") if s.get(k) is not None), default=None))
        lines.append(f"| {name} | {number(s['value'])} | {spread} | {number(s.get('chance'))} | {number(dark)} |")
    return "\n".join(lines)


def print_metrics(metrics: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{metrics['source']}, {metrics['split']} split: {metrics['rows']} rows")
    for line in markdown(metrics).splitlines()[:1]:
        for column in line.strip("| ").split(" | "):
            table.add_column(column, justify="left" if column == "measure" else "right")
    for line in markdown(metrics).splitlines()[2:]:
        table.add_row(*[cell.strip() for cell in line.strip("|").split("|")])
    Console().print(table)
    print("blind: the same model on another row's picture or a white one, whichever scores higher")
