"""How good a ranking is: recall@k, median rank, mean average precision, and what chance alone would score.

Everything here is a pure function: arrays in, a small dataclass out, shares between 0 and 1. What grows with
queries x gallery is only ever read in blocks of rows: `scores` may be a numpy array, a memory map, a torch tensor, or
`Cosine(queries, gallery)`, which computes the block asked for and forgets it: 100 thousand x 100 thousand never exists.

Ties are resolved pessimistically: whatever is not relevant and scores the same stands in front. A model that gives
everything one score then lands at the bottom instead of at the luck of a sort.

The scores of answers (`vqa_accuracy`, `soft_score`, ...) and the intervals (`bootstrap_interval`, ...) live in
`interlace.tasks.vqa_score` and `interlace.tasks.uncertainty`; they are importable from here as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from interlace.errors import UserError
from interlace.tasks.uncertainty import Difference, Interval, bootstrap_interval, paired_difference
from interlace.tasks.vqa_score import (
    AnswerScore,
    chance_vqa,
    listed_accuracy,
    majority_answer,
    soft_score,
    soft_score_thirds,
    soft_targets,
    vqa_accuracy,
)

__all__ = [
    "AnswerScore", "Cosine", "Difference", "Interval", "MeanAveragePrecision", "Recall", "SameGroup", "TwoWayRecall",
    "bootstrap_interval", "chance_map", "chance_recall", "chance_vqa", "listed_accuracy", "majority_answer",
    "mean_average_precision", "paired_difference", "recall_at_k", "recall_over_folds", "soft_score",
    "soft_score_thirds", "soft_targets", "text_image_recall", "vqa_accuracy",
]  # fmt: skip

BLOCK_NUMBERS = 8_000_000  # floats of one block of scores: 32 MB, times the two or three copies a block lives through


# ---------------------------------------------------------------------------------------------- what is read in blocks
class Cosine:
    """Similarities that are computed when read: `Cosine(q, g)[a:b]` is a block (b - a, N) of the (Q, N) whole.

    queries: (Q, D), gallery: (N, D), any scale; both are L2-normalised in float32, block by block. A zero row scores 0.
    Raises ValueError when the widths differ.
    """

    def __init__(self, queries: Any, gallery: Any):
        self.queries, self.gallery = as_array(queries), as_array(gallery)
        if self.queries.ndim != 2 or self.gallery.ndim != 2 or self.queries.shape[1] != self.gallery.shape[1]:
            raise ValueError(
                "expected queries (Q, D) and gallery (N, D) of one width D, "
                f"got {self.queries.shape} and {self.gallery.shape}"
            )
        self.shape = (len(self.queries), len(self.gallery))
        self._unit_gallery: np.ndarray | None = None

    def __getitem__(self, rows: slice) -> np.ndarray:
        if self._unit_gallery is None:  # once, not per block: (N, D) is what the caller holds anyway
            self._unit_gallery = unit(self.gallery)
        return unit(self.queries[rows]) @ self._unit_gallery.T

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The whole (Q, N): for small sets and for tests."""
        return np.asarray(self[0 : self.shape[0]], dtype)

    @property
    def T(self) -> Cosine:
        return Cosine(self.gallery, self.queries)

    def part(self, rows: np.ndarray, columns: np.ndarray) -> Cosine:
        return Cosine(self.queries[rows], self.gallery[columns])


class SameGroup:
    """Who is relevant to whom by group: `SameGroup(q, g)[a:b]` is a (b - a, N) block of booleans.

    query_groups: (Q,), gallery_groups: (N,); strings or numbers. `None` belongs to no group, not even to another None.
    """

    def __init__(self, query_groups: Sequence[Any] | np.ndarray, gallery_groups: Sequence[Any] | np.ndarray):
        known: dict[Any, int] = {}
        self.queries = np.array([_code(g, known, -1) for g in _items(query_groups)], dtype=np.int64)  # (Q,)
        self.gallery = np.array([_code(g, known, -2) for g in _items(gallery_groups)], dtype=np.int64)  # (N,)
        self.shape = (len(self.queries), len(self.gallery))

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.queries[rows, None] == self.gallery[None, :]

    def counts(self) -> np.ndarray:
        """(Q,): how many of the gallery are relevant to each query."""
        groups, sizes = np.unique(self.gallery, return_counts=True)
        place = np.searchsorted(groups, self.queries).clip(max=max(len(groups) - 1, 0))
        return np.where(groups[place] == self.queries, sizes[place], 0) if len(groups) else np.zeros(self.shape[0], int)


class Targets:
    """One relevant column per query: (Q,) integers, as a block-readable (Q, N) of booleans."""

    def __init__(self, columns: np.ndarray, gallery: int):
        if len(columns) and (columns.min() < 0 or columns.max() >= gallery):
            raise ValueError(
                f"target columns must lie in 0..{gallery - 1}, got {int(columns.min())}..{int(columns.max())}"
            )
        self.columns, self.shape = columns, (len(columns), gallery)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.columns[rows, None] == np.arange(self.shape[1])[None, :]


# ------------------------------------------------------------------------------------------------------------ recall
@dataclass(frozen=True)
class Recall:
    """at: k -> share of queries with a relevant item in the first k. median_rank: 1 is best.
    ranks: (Q,) rank of the best relevant item, nan where the gallery holds none; such queries are left out of
    the shares and counted in `skipped`."""

    at: dict[int, float]
    median_rank: float
    ranks: np.ndarray
    skipped: int

    def hits(self, k: int) -> np.ndarray:
        """(Q,) of 1, 0 or nan (skipped): the per-query values that `bootstrap_interval` takes."""
        return np.where(np.isnan(self.ranks), np.nan, self.ranks <= k)


@dataclass(frozen=True)
class TwoWayRecall:
    """Both directions of text-image retrieval. r_sum and r_mean: the sum and mean of all shares in both directions
    (times 100 this is the rSum and BLIP's r_mean of the papers, when ks = 1, 5, 10)."""

    text_to_image: Recall
    image_to_text: Recall

    @property
    def r_sum(self) -> float:
        return sum(self.text_to_image.at.values()) + sum(self.image_to_text.at.values())

    @property
    def r_mean(self) -> float:
        return self.r_sum / (len(self.text_to_image.at) + len(self.image_to_text.at))


def recall_at_k(scores: Any, relevant: Any, ks: Sequence[int] = (1, 5, 10), exclude: Any = None) -> Recall:
    """R@k = |{q : min over relevant items of rank(q, item) <= k}| / |Q|, the retrieval recall of Karpathy & Fei-Fei
    2015 (arXiv:1412.2306, section 4.2): with several relevant items, finding any one of them is a hit.

    rank(q) = 1 + |{n not relevant : score(q, n) >= best relevant score}|, so ties count against the model.

    scores:   (Q, N), higher is better; anything that can be read by blocks of rows.
    relevant: (Q, N) booleans, `SameGroup(query_groups, gallery_groups)`, or (Q,) integers: the one right column.
    exclude:  (Q, N) booleans, of the same forms: items taken out of that query's gallery (the query itself).
    Raises ValueError on shapes that do not fit, UserError when scores hold NaN.
    """
    queries, gallery = scores.shape
    relevant = _as_blocks(relevant, queries, gallery, "relevant")
    exclude = None if exclude is None else _as_blocks(exclude, queries, gallery, "exclude")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be positive integers, got {list(ks)}")
    ranks = np.full(queries, np.nan)
    for rows in blocks(queries, gallery, "recall"):
        block, right = _scores_of(scores, rows), _bools_of(relevant, rows)  # (b, N), (b, N)
        wrong = ~right
        if exclude is not None:
            out = _bools_of(exclude, rows)
            right, wrong = right & ~out, wrong & ~out
        best = np.where(right, block, -np.inf).max(axis=1, initial=-np.inf)  # (b,)
        ahead = ((block >= best[:, None]) & wrong).sum(axis=1)  # (b,)
        ranks[rows] = np.where(right.any(axis=1), 1.0 + ahead, np.nan)
    known = ranks[~np.isnan(ranks)]
    shares = {k: float((known <= k).mean()) if len(known) else float("nan") for k in ks}
    return Recall(shares, float(np.median(known)) if len(known) else float("nan"), ranks, queries - len(known))


def text_image_recall(
    scores: Any, text_groups: Sequence[Any], image_groups: Sequence[Any], ks: Sequence[int] = (1, 5, 10)
) -> TwoWayRecall:
    """R@k in both directions; a text and an image belong together when their groups are equal. Image-to-text counts a
    hit when any of the image's texts is in the first k, text-to-image likewise, as BLIP and its predecessors do.

    scores: (T, I) text by image. text_groups: (T,). image_groups: (I,).
    """
    same = SameGroup(text_groups, image_groups)
    return TwoWayRecall(
        recall_at_k(scores, same, ks), recall_at_k(scores.T, SameGroup(image_groups, text_groups), ks)
    )


def recall_over_folds(
    scores: Any,
    text_groups: Sequence[Any],
    image_groups: Sequence[Any],
    size: int = 1000,
    ks: Sequence[int] = (1, 5, 10),
) -> tuple[dict[int, float], dict[int, float]]:
    """The "1K" protocol of COCO: R@k inside each consecutive fold of `size` images and their texts, then the mean over
    the folds. The gallery is smaller, so the numbers are higher than over all images: never compare the two.

    Returns (text-to-image, image-to-text), each k -> mean share. An incomplete last fold is left out, as in the
    protocol; raises ValueError when there is not one whole fold.
    """
    image_groups, text_groups = _items(image_groups), _items(text_groups)
    if len(image_groups) < size:
        raise ValueError(f"a fold needs {size} images, got {len(image_groups)}; lower `size` or report all of them")
    runs = []
    for start in range(0, len(image_groups) - size + 1, size):
        columns = np.arange(start, start + size)
        inside = {image_groups[c] for c in columns}
        rows = np.array([t for t, group in enumerate(text_groups) if group in inside], dtype=np.int64)
        part = scores.part(rows, columns) if isinstance(scores, Cosine) else as_array(scores)[np.ix_(rows, columns)]
        runs.append(text_image_recall(part, [text_groups[r] for r in rows], [image_groups[c] for c in columns], ks))
    return (
        {k: float(np.mean([run.text_to_image.at[k] for run in runs])) for k in ks},
        {k: float(np.mean([run.image_to_text.at[k] for run in runs])) for k in ks},
    )


# ------------------------------------------------------------------------------------------------- average precision
@dataclass(frozen=True)
class MeanAveragePrecision:
    """value: mean over the queries that have something to find. per_query: (Q,), nan for the others, which `skipped`
    counts (a category with one member, or no category). chance: what random rankings of the same galleries score."""

    value: float
    per_query: np.ndarray
    skipped: int
    chance: float


def mean_average_precision(
    similarities: Any, labels: Sequence[Any], exclude_self: bool = True, groups: Sequence[Any] | None = None
) -> MeanAveragePrecision:
    """Image-to-image mAP by category, every item a query against all others.

    AP(q) = 1/|R_q| * sum over r in R_q of precision at the rank of r, over the whole ranking (not mAP@100, not mAP@R):
    the non-interpolated AP of TREC (Manning, Raghavan & Schuetze 2008, equation 8.8). R_q is everything in the gallery
    with q's label. Ties are pessimistic: equal scores that are not relevant stand in front.

    similarities: (N, N), or `Cosine(features, features)`. labels: (N,); None means unknown: such an item is neither
    asked nor ranked, as the "junk" images of the revisited Oxford protocol, for nobody knows if it would be right.
    groups: (N,), if given, items of the query's own group are taken out of its gallery (other views of the same thing
    find each other without any idea of category); otherwise, with exclude_self, only the query itself.
    Raises ValueError unless square, UserError when similarities hold NaN.
    """
    count, gallery = similarities.shape
    labels = _items(labels)
    if count != gallery or len(labels) != count:
        raise ValueError(f"expected (N, N) similarities and N labels, got {(count, gallery)} and {len(labels)}")
    if groups is not None and len(groups) != count:
        raise ValueError(f"expected {count} groups, one per row, got {len(groups)}")
    codes = SameGroup(labels, labels).queries  # (N,), -1 where unknown
    unknown = codes == -1
    own = SameGroup(groups, groups).queries if groups is not None else np.arange(count)
    own = np.where(own == -1, count + np.arange(count), own)  # without a group, a group of its own
    members = _members(codes)
    clan = _members(own)
    values, sizes, galleries = np.full(count, np.nan), np.zeros(count, np.int64), np.zeros(count, np.int64)
    for rows in blocks(count, gallery, "average precision"):
        block = np.array(_scores_of(similarities, rows))  # (b, N), a copy: ours to write into
        if not np.issubdtype(block.dtype, np.floating): block = block.astype(np.float64)
        block[:, unknown] = -np.inf
        for i, q in enumerate(range(rows.start, rows.stop)):
            if unknown[q]: continue
            right, out = members[codes[q]], np.empty(0, np.int64)
            if exclude_self or groups is not None:
                out = clan[own[q]]
                right = right[own[right] != own[q]]
            if not len(right): continue
            found = np.sort(block[i, right])[::-1]  # (R,), best first
            block[i, out] = -np.inf
            gone = int(unknown.sum() + (~unknown[out]).sum())
            ranking = np.sort(block[i])  # (N,), ascending; the `gone` items stand at -inf
            above = gallery - np.searchsorted(ranking, found, side="left")  # (R,) all that score at least as high
            above = above - gone * np.isneginf(found)
            fellows = len(found) - np.searchsorted(found[::-1], found, side="left")  # (R,) relevant among them
            place = np.arange(1, len(found) + 1)
            values[q] = float((place / (place + above - fellows)).mean())
            sizes[q], galleries[q] = len(found), gallery - gone
    known = values[~np.isnan(values)]
    mean = float(known.mean()) if len(known) else float("nan")
    return MeanAveragePrecision(mean, values, count - len(known), chance_map(sizes, galleries))


# ------------------------------------------------------------------------------------------------------------- chance
def chance_recall(
    relevant_counts: Sequence[int] | np.ndarray, gallery: int, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Expected R@k of a random ranking: mean over queries of 1 - C(N - R_q, k) / C(N, k) (hypergeometric: the chance
    that k draws without replacement miss all R_q relevant items).

    relevant_counts: (Q,) how many relevant items each query has (`SameGroup(...).counts()`); 0 is skipped.
    gallery: N, the number of items ranked for a query.
    """
    counts = np.asarray(relevant_counts, dtype=np.int64)
    counts = counts[counts > 0]
    if len(counts) and counts.max() > gallery:
        raise ValueError(f"a query has {counts.max()} relevant items in a gallery of {gallery}")
    sizes, weight = np.unique(counts, return_counts=True)
    shares = {}
    for k in ks:
        draws = np.arange(min(k, gallery))
        miss = np.array([np.prod(np.clip(gallery - size - draws, 0, None) / (gallery - draws)) for size in sizes])
        shares[k] = float(((1 - miss) * weight).sum() / weight.sum()) if len(sizes) else float("nan")
    return shares


def chance_map(relevant_counts: Sequence[int] | np.ndarray, gallery: int | np.ndarray) -> float:
    """Expected mAP of a random ranking, exactly: E[AP] = (H_N + (R - 1)/(N - 1) * (N - H_N)) / N with H_N the N-th
    harmonic number; it follows from E[rel_j rel_k] = R(R - 1)/(N(N - 1)), see Bestgen 2015 (CLEI Electronic Journal,
    "Exact expected average precision of the random baseline for system evaluation"). About R/N for large N.

    relevant_counts: (Q,) without the query itself; 0 is skipped. gallery: N or (Q,), without the query itself.
    """
    counts = np.asarray(relevant_counts, dtype=np.float64)
    sizes = np.broadcast_to(np.asarray(gallery, dtype=np.int64), counts.shape)[counts > 0]  # (Q,)
    counts = counts[counts > 0]
    if not len(counts): return float("nan")
    harmonic = np.cumsum(1.0 / np.arange(1, sizes.max() + 1))[sizes - 1]
    spread = (sizes - harmonic) / np.maximum(sizes - 1, 1)
    return float(((harmonic + (counts - 1) * spread) / sizes).mean())


# ------------------------------------------------------------------------------------------------------- small helpers
def as_array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def unit(rows: np.ndarray) -> np.ndarray:
    """(N, D) float32 with rows of length 1; a zero row stays zero."""
    rows = np.asarray(rows, dtype=np.float32)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length == 0, 1, length)


def blocks(rows: int, columns: int, title: str = "") -> Iterator[slice]:
    """Slices of rows, each of about BLOCK_NUMBERS numbers; with a title, a bar once it has taken two seconds."""
    step = max(1, BLOCK_NUMBERS // max(1, columns))
    starts = range(0, rows, step)
    for start in tqdm(starts, desc=title, unit="block", leave=False, delay=2, disable=None if title else True):
        yield slice(start, min(start + step, rows))


def _scores_of(scores: Any, rows: slice) -> np.ndarray:
    block = as_array(scores[rows])
    if np.isnan(block).any():
        raise UserError(
            f"expected scores that can be ordered, got NaN for queries {rows.start}..{rows.stop - 1}; "
            "the model has probably diverged: look at its loss curve, or lower the learning rate"
        )
    return block


def _bools_of(marks: Any, rows: slice) -> np.ndarray:
    return as_array(marks[rows]).astype(bool, copy=False)


def _as_blocks(marks: Any, queries: int, gallery: int, name: str) -> Any:
    if not hasattr(marks, "shape"): marks = np.asarray(marks)
    if len(marks.shape) == 1:
        columns = as_array(marks)
        if not np.issubdtype(columns.dtype, np.integer):
            raise ValueError(f"{name}: one column per query must be integers, got {columns.dtype}")
        marks = Targets(columns, gallery)
    if tuple(marks.shape) != (queries, gallery):
        raise ValueError(f"{name}: expected ({queries}, {gallery}), as the scores, got {tuple(marks.shape)}")
    return marks


def _items(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, (np.ndarray, torch.Tensor)) else list(values)


def _code(group: Any, known: dict[Any, int], missing: int) -> int:
    return missing if group is None else known.setdefault(group, len(known))


def _members(codes: np.ndarray) -> dict[int, np.ndarray]:
    order = np.argsort(codes, kind="stable")
    names, starts = np.unique(codes[order], return_index=True)
    return {int(name): part for name, part in zip(names, np.split(order, starts[1:]))}
