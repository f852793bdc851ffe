"""Where two kinds of vectors agree: regularised canonical correlations.

    X'X + r_x s_x I = C_x,   Y'Y + r_y s_y I = C_y        rows centred, s the mean eigenvalue of each
    C_x^-1/2 X'Y C_y^-1/2 = U diag(c) V'                  c: the correlations, falling
    x -> diag(c^p) U' C_x^-1/2 (x - mean x)               and y -> diag(c^p) V' C_y^-1/2 (y - mean y)

Hotelling 1936; with the two ridges Vinod 1976 (doi 10.1016/0304-4076(76)90010-5); weighting by a power of the
correlations Gong et al. 2014 (arXiv:1212.4522, section 3.3).

Ridge regression of captions on pictures compares the two where captions differ loudly, be it visible or not. Here a
direction counts by how well partners agree on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from interlace.tasks.baselines import HELD_OUT, fold_of_groups
from interlace.tasks.metrics import Cosine, SameGroup, recall_at_k

# Of the picture's side and the text's. Weaker ones than these win over held-out training rows, and lose over new ones:
# what aligned the stems, or pre-trained the model, has seen the captions of those rows.
RIDGES = tuple((image, text) for image in (0.3, 1.0, 3.0) for text in (0.3, 1.0))
POWERS = (2,)


@dataclass(frozen=True)
class Canonical:
    """`image` (Di, P), `text` (Dt, P): the maps of centred vectors, P the smaller width, weights and all.
    `correlations` (P,). `chosen`: ridges of the image and the text side, and the power. `held_out`: mean reciprocal
    rank of each candidate over held-out rows."""

    image: np.ndarray
    text: np.ndarray
    correlations: np.ndarray
    chosen: tuple[float, float, int]
    held_out: dict[tuple[float, float, int], float]


def canonical(image: np.ndarray, text: np.ndarray, groups: Sequence[Any] | None = None, folds: int = 3, seed: int = 0,
              ridges: Sequence[tuple[float, float]] = RIDGES, powers: Sequence[int] = POWERS) -> Canonical:  # fmt: skip
    """image (N, Di), text (N, Dt), row i of both is one pair. Ridges and power are the candidates with the best mean
    reciprocal rank, both directions, over held-out folds of whole `groups` (N,), whose rows count as right for each
    other; default: every row its own. Raises UserError with fewer groups than folds, ValueError on odd shapes."""
    x, y = np.asarray(image, np.float64), np.asarray(text, np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"expected paired vectors (N, Di) and (N, Dt), got {x.shape} and {y.shape}")
    groups = list(range(len(x))) if groups is None else list(groups)
    candidates = [(*ridge, power) for ridge in ridges for power in powers]
    held_out = dict.fromkeys(candidates, 0.0)
    if len(candidates) > 1:
        fold, rng = fold_of_groups(groups, folds, seed), np.random.default_rng(seed)
        for f in range(folds):
            rows = np.flatnonzero(fold == f)
            if len(rows) > HELD_OUT: rows = np.sort(rng.choice(rows, HELD_OUT, replace=False))
            same = SameGroup([groups[r] for r in rows], [groups[r] for r in rows])
            known = fold != f
            sides = _Sides(x[known], y[known])
            for ridge in ridges:
                to_image, to_text, correlations = sides.maps(*ridge)
                seen, said = (x[rows] - sides.mean_x) @ to_image, (y[rows] - sides.mean_y) @ to_text
                for power in powers:
                    scores = Cosine(said * correlations**power, seen * correlations**power)
                    ranks = [recall_at_k(scores, same).ranks, recall_at_k(scores.T, same).ranks]
                    held_out[(*ridge, power)] += float((1.0 / np.concatenate(ranks)).mean()) / folds
    chosen = max(held_out, key=lambda candidate: (held_out[candidate], candidate))  # of equals the stronger
    to_image, to_text, correlations = _Sides(x, y).maps(*chosen[:2])
    weights = correlations ** chosen[2]
    return Canonical(to_image * weights, to_text * weights, correlations, chosen, held_out)


class _Sides:
    """Both covariances, decomposed once, so that a pair of ridges costs one small decomposition."""

    def __init__(self, x: np.ndarray, y: np.ndarray):
        self.mean_x, self.mean_y = x.mean(0), y.mean(0)
        x, y = x - self.mean_x, y - self.mean_y
        self.values_x, self.vectors_x = np.linalg.eigh(x.T @ x)
        self.values_y, self.vectors_y = np.linalg.eigh(y.T @ y)
        self.between = self.vectors_x.T @ (x.T @ y) @ self.vectors_y  # (Di, Dt)

    def maps(self, ridge_x: float, ridge_y: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> (Di, P), (Dt, P), correlations (P,), without weights."""
        white_x, white_y = _whitening(self.values_x, ridge_x), _whitening(self.values_y, ridge_y)
        u, correlations, v = np.linalg.svd(white_x[:, None] * self.between * white_y, full_matrices=False)
        return (self.vectors_x * white_x) @ u, (self.vectors_y * white_y) @ v.T, correlations.clip(0, 1)


def _whitening(values: np.ndarray, ridge: float) -> np.ndarray:
    values = values.clip(min=0)
    return 1 / np.sqrt(values + ridge * max(float(values.mean()), np.finfo(float).tiny))
