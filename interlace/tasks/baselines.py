"""What one gets without training a model: frozen towers and closed forms. A trained model has to beat these.

`ridge_alignment` joins any picture tower to any text tower by one linear map; `nearest_neighbour_answers` copies the
answer of similar pictures; `question_only_prior` never looks at the picture. All choices (strength of the ridge, number
of neighbours) are made on the training rows alone, with whole groups held out. Memory: the features the caller holds,
plus (D, D) sums and blocks of rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from interlace.errors import UserError
from interlace.tasks.metrics import Cosine, SameGroup, as_array, blocks, recall_at_k, unit
from interlace.tasks.vqa_score import WeightedAnswers, majority_answer

LAMBDAS = tuple(10.0**power for power in range(-5, 3))
HELD_OUT = 2000  # rows of a fold that are ranked to choose lambda: enough to order the candidates, and never quadratic


class Asked(Protocol):
    """What a baseline reads of a question; `interlace.data.rows.Question` has it all."""

    @property
    def question(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def answers(self) -> WeightedAnswers: ...


# ------------------------------------------------------------------------------------------------------ ridge alignment
@dataclass(frozen=True)
class RidgeAlignment:
    """similarities: (T, I) text by image, computed when read, as `text_image_recall` takes them.
    chosen: the lambda used. held_out: lambda -> mean reciprocal rank on held-out training rows.
    pictures: (I, Dt), texts: (T, Dt), the test rows after mapping and centring."""

    similarities: Cosine
    chosen: float
    held_out: dict[float, float]
    pictures: np.ndarray
    texts: np.ndarray


def ridge_alignment(
    image_features_train: Any,
    text_features_train: Any,
    image_test: Any,
    text_test: Any,
    lambdas: Sequence[float] = LAMBDAS,
    folds: int = 5,
    groups: Sequence[Any] | None = None,
    seed: int = 0,
) -> RidgeAlignment:
    """One linear map from frozen picture features to frozen text features:

        W = (X'X + lambda * s * I)^-1 X'Y,   s = trace(X'X) / Di

    (Hoerl & Kennard 1970, doi 10.1080/00401706.1970.10488634), X and Y L2-normalised per row and centred by the
    training means, lambda relative to the mean eigenvalue s so that one list of candidates fits any tower. A picture is
    then compared to a text by the cosine of (x - mean_x) W and (y - mean_y). Lambda is the candidate with the best mean
    reciprocal rank over `folds` held-out folds of the training rows, whole groups at a time, both directions.

    image_features_train: (N, Di), text_features_train: (N, Dt), row i of both is one pair. image_test: (I, Di),
    text_test: (T, Dt). groups: (N,), rows of one group are never split between folds and all count as right for each
    other; default: every row its own. Raises UserError with too few groups for the folds, ValueError on odd shapes.
    """
    x, y = as_array(image_features_train), as_array(text_features_train)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"expected paired features (N, Di) and (N, Dt), got {x.shape} and {y.shape}")
    if not len(lambdas) or min(lambdas) <= 0:
        raise ValueError(f"expected positive lambdas, got {list(lambdas)}")
    groups = list(range(len(x))) if groups is None else list(groups)
    fold = fold_of_groups(groups, folds, seed)  # (N,)
    parts = [_Sums.of(x, y, np.flatnonzero(fold == f)) for f in range(folds)]
    whole = _Sums.total(parts)

    reciprocal: dict[float, list[float]] = {strength: [] for strength in lambdas}
    rng = np.random.default_rng(seed)
    for f in range(folds):
        rows = np.flatnonzero(fold == f)
        if len(rows) > HELD_OUT: rows = np.sort(rng.choice(rows, HELD_OUT, replace=False))
        same = SameGroup([groups[r] for r in rows], [groups[r] for r in rows])
        ridge = _Ridge(whole - parts[f])
        texts = ridge.texts(y[rows])
        for strength in lambdas:
            scores = Cosine(texts, ridge.pictures(x[rows], ridge.weights(strength)))
            ranks = [recall_at_k(scores, same).ranks, recall_at_k(scores.T, same).ranks]
            reciprocal[strength].append(float((1.0 / np.concatenate(ranks)).mean()))
    held_out = {strength: float(np.mean(values)) for strength, values in reciprocal.items()}
    chosen = max(held_out, key=lambda strength: (held_out[strength], strength))  # of equals the stronger

    ridge = _Ridge(whole)
    pictures, texts = ridge.pictures(as_array(image_test), ridge.weights(chosen)), ridge.texts(as_array(text_test))
    return RidgeAlignment(Cosine(texts, pictures), chosen, held_out, pictures, texts)


@dataclass
class _Sums:
    """All that ridge regression needs to know of some rows, so that a fold is left out by subtraction."""

    n: int
    x: np.ndarray  # (Di,)
    y: np.ndarray  # (Dt,)
    xx: np.ndarray  # (Di, Di)
    xy: np.ndarray  # (Di, Dt)

    @staticmethod
    def of(x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> _Sums:
        sums = _Sums(0, *(np.zeros(s) for s in (x.shape[1], y.shape[1], (x.shape[1],) * 2, (x.shape[1], y.shape[1]))))
        for part in blocks(len(rows), x.shape[1] + y.shape[1]):
            a, b = unit(x[rows[part]]).astype(np.float64), unit(y[rows[part]]).astype(np.float64)
            sums = sums + _Sums(len(a), a.sum(0), b.sum(0), a.T @ a, a.T @ b)
        return sums

    @staticmethod
    def total(parts: Sequence[_Sums]) -> _Sums:
        whole = parts[0]
        for part in parts[1:]:
            whole = whole + part
        return whole

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, f) + getattr(other, f) for f in ("n", "x", "y", "xx", "xy")))

    def __sub__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, f) - getattr(other, f) for f in ("n", "x", "y", "xx", "xy")))


class _Ridge:
    """The centred normal equations, decomposed once, so that every lambda costs one multiplication."""

    def __init__(self, sums: _Sums):
        self.mean_x, self.mean_y = sums.x / sums.n, sums.y / sums.n
        centred = sums.xx - sums.n * np.outer(self.mean_x, self.mean_x)  # (Di, Di)
        values, self.vectors = np.linalg.eigh(centred)
        self.values = values.clip(min=0)
        self.scale = max(float(np.trace(centred)) / len(centred), np.finfo(float).tiny)
        self.target = self.vectors.T @ (sums.xy - sums.n * np.outer(self.mean_x, self.mean_y))  # (Di, Dt)

    def weights(self, strength: float) -> np.ndarray:
        return (self.vectors / (self.values + strength * self.scale)) @ self.target  # (Di, Dt)

    def pictures(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        mapped = np.empty((len(x), weights.shape[1]), dtype=np.float32)
        for rows in blocks(len(x), x.shape[1]):
            mapped[rows] = (unit(x[rows]) - self.mean_x) @ weights
        return mapped

    def texts(self, y: np.ndarray) -> np.ndarray:
        return (unit(y) - self.mean_y).astype(np.float32)


# -------------------------------------------------------------------------------------------------------------- answers
@dataclass(frozen=True)
class NeighbourAnswers:
    """predictions: (Q,) one answer per test question. chosen: how many neighbours vote, decided on training questions.
    held_out: k -> accuracy on held-out training questions (empty when only one k was given)."""

    predictions: list[str]
    chosen: int
    held_out: dict[int, float]


def nearest_neighbour_answers(
    train_features: Any,
    train_questions: Sequence[Asked],
    test_features: Any,
    test_questions: Sequence[Asked],
    ks: Sequence[int] = (1, 3, 5, 10, 20, 50),
    train_rows: Sequence[int] | np.ndarray | None = None,
    test_rows: Sequence[int] | np.ndarray | None = None,
    seed: int = 0,
) -> NeighbourAnswers:
    """Answer as the k most similar training pictures were answered, among questions of the same kind. A neighbour's
    vote for each of its answers is (1 + cosine) / 2 * worth. No neighbour at all: the training majority.

    train_features: (P, D) frozen picture features, one row per question; where several questions share a picture, give
    one row per picture, and train_rows (Q,): the row of each question. test_features, test_rows: likewise.
    ks: candidates; more than one, and a fifth of the training groups is held out to choose.
    """
    train, test = unit(as_array(train_features)), unit(as_array(test_features))
    train_at, test_at = _rows(train_rows, train_questions, train), _rows(test_rows, test_questions, test)
    if not len(train_questions):
        raise UserError("expected training questions to copy answers from, got none; check the split of the source")
    held_out: dict[int, float] = {}
    if len(ks) > 1:
        asked = np.arange(len(train_questions))
        fold = fold_of_groups([q.group for q in train_questions], 5, seed)
        known, probe = asked[fold != 0], asked[fold == 0]
        votes = _vote(train, train_at, train_questions, known, train, train_at, train_questions, probe, ks)
        for k, said in votes.items():
            worth = [dict(train_questions[q].answers).get(answer, 0.0) for q, answer in zip(probe, said)]
            held_out[k] = float(np.mean(worth))
    chosen = max(ks, key=lambda k: (held_out.get(k, 0.0), k))
    everyone = np.arange(len(train_questions)), np.arange(len(test_questions))
    votes = _vote(train, train_at, train_questions, everyone[0], test, test_at, test_questions, everyone[1], [chosen])
    return NeighbourAnswers(votes[chosen], chosen, held_out)


def question_only_prior(train_questions: Sequence[Asked], test_questions: Sequence[Asked]) -> list[str]:
    """The blind answer: what was worth most over the training questions with the same words; for unseen words, over
    the same kind; for an unseen kind, over all. (Q,) answers. What a model scores above this, the picture told it."""
    by_text: dict[Any, list[WeightedAnswers]] = defaultdict(list)
    for asked in train_questions:
        for key in (("text", _words(asked.question)), ("kind", asked.kind), ("all", "")):
            by_text[key].append(asked.answers)
    best = {key: majority_answer(answers) for key, answers in by_text.items() if any(a for a in answers)}
    if not best:
        raise UserError("expected training questions with answers, got none; check the split of the source")
    return [
        next(best[key] for key in (("text", _words(q.question)), ("kind", q.kind), ("all", "")) if key in best)
        for q in test_questions
    ]


def fold_of_groups(groups: Sequence[Any], folds: int, seed: int = 0) -> np.ndarray:
    """(N,) the fold of each row, 0..folds - 1; a group stays whole, and the folds get equally many groups (not rows).
    Raises UserError when there are fewer groups than folds."""
    codes: dict[Any, int] = {}
    member = np.array([codes.setdefault(g, len(codes)) for g in groups], dtype=np.int64)
    if len(codes) < folds:
        raise UserError(
            f"expected at least {folds} groups to hold some out, got {len(codes)} over {len(member)} rows; "
            "use fewer folds, or check the group column"
        )
    order = np.random.default_rng(seed).permutation(len(codes))
    return (order % folds)[member]


def _vote(
    train: np.ndarray, train_at: np.ndarray, train_questions: Sequence[Asked], known: np.ndarray,
    test: np.ndarray, test_at: np.ndarray, test_questions: Sequence[Asked], asked: np.ndarray,
    ks: Sequence[int],
) -> dict[int, list[str]]:  # fmt: skip
    """For each k the answers to `asked` (indices of test_questions), from `known` (indices of train_questions)."""
    fallback = majority_answer([train_questions[q].answers for q in known])
    said: dict[int, dict[int, str]] = {k: {} for k in ks}
    known_of, asked_of = _by_kind(train_questions, known), _by_kind(test_questions, asked)
    for kind, questions in asked_of.items():
        neighbours = known_of.get(kind, np.empty(0, np.int64))
        most = min(max(ks), len(neighbours))
        for part, scores in _similar(test[test_at[questions]], train, train_at[neighbours]):
            if most:
                near = np.argpartition(-scores, most - 1, axis=1)[:, :most]  # (b, most)
                weight = np.take_along_axis(scores, near, axis=1)
                order = np.argsort(-weight, axis=1, kind="stable")
                near, weight = np.take_along_axis(near, order, axis=1), np.take_along_axis(weight, order, axis=1)
            for i, q in enumerate(questions[part]):
                for k in ks:
                    votes: dict[str, float] = defaultdict(float)
                    for j in range(min(k, most)):
                        for answer, worth in train_questions[neighbours[near[i, j]]].answers:
                            votes[answer] += (1 + float(weight[i, j])) / 2 * worth
                    said[k][int(q)] = max(votes, key=lambda a: votes[a]) if votes else fallback
    return {k: [answers[int(q)] for q in asked] for k, answers in said.items()}


def _similar(queries: np.ndarray, gallery: np.ndarray, columns: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of cosine similarity to the gallery rows `columns`, which may repeat a row (several questions about one
    picture): each distinct row is multiplied once."""
    distinct, place = np.unique(columns, return_inverse=True)
    rows = gallery[distinct]
    for part in blocks(len(queries), max(len(columns), 1), "nearest pictures"):
        yield part, (queries[part] @ rows.T)[:, place]


def _by_kind(questions: Sequence[Asked], which: np.ndarray) -> dict[str, np.ndarray]:
    parts: dict[str, list[int]] = defaultdict(list)
    for q in which:
        parts[questions[q].kind].append(int(q))
    return {kind: np.array(part, dtype=np.int64) for kind, part in parts.items()}


def _rows(rows: Sequence[int] | np.ndarray | None, questions: Sequence[Asked], features: np.ndarray) -> np.ndarray:
    at = np.arange(len(features)) if rows is None else np.asarray(rows, dtype=np.int64)
    if len(at) != len(questions):
        raise ValueError(f"expected a feature row for each of {len(questions)} questions, got {len(at)}")
    return at


def _words(question: str) -> str:
    return " ".join(question.lower().split())
