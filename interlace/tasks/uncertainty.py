"""How sure a mean is: intervals by the bootstrap, and whether one model really beats another on the same queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWN_AT_ONCE = 4_000_000  # indices of one batch of resamples: 32 MB


@dataclass(frozen=True)
class Interval:
    """The mean and its interval. low and high are nan when fewer than two groups exist: one sample has no spread."""

    mean: float
    low: float
    high: float
    level: float
    values: int
    groups: int


@dataclass(frozen=True)
class Difference:
    """mean = first - second, with its interval; p: how often chance alone makes a difference this large."""

    mean: float
    low: float
    high: float
    p: float
    level: float
    values: int
    groups: int


def bootstrap_interval(
    per_query_values: Any, n: int = 1000, seed: int = 0, level: float = 0.95, groups: Sequence[Any] | None = None
) -> Interval:
    """Percentile interval of a mean by the (cluster) bootstrap: draw G groups with replacement n times, each time
    m* = sum of the drawn groups' values / number of their values; the interval holds the middle `level` of the m*.
    Efron & Tibshirani 1993, chapter 13; clusters: Cameron, Gelbach & Miller 2008 (doi 10.1162/rest.90.3.414).

    per_query_values: (Q,); nan (a skipped query) is left out. groups: (Q,), values of one group are drawn together:
    give the listing or product when its photographs are not independent, otherwise the interval is too narrow.
    When all values are equal (0 or 100%) the interval has no width: read it as "too few queries to say".
    Raises ValueError when nothing is left, or n, level make no sense.
    """
    if n < 1 or not 0 < level < 1:
        raise ValueError(f"expected n >= 1 and 0 < level < 1, got n={n}, level={level}")
    sums, sizes = _clusters(per_query_values, groups)
    mean = float(sums.sum() / sizes.sum())
    low, high = _percentiles(sums, sizes, n, seed, level)
    return Interval(mean, low, high, level, int(sizes.sum()), len(sums))


def paired_difference(
    first: Any, second: Any, n: int = 1000, seed: int = 0, level: float = 0.95, groups: Sequence[Any] | None = None
) -> Difference:
    """Is `first` better than `second` on the same queries? The mean of d = first - second, its bootstrap interval, and
    a two-sided sign-flip test: p = (1 + |{flips : |mean of flipped d| >= |mean of d|}|) / (1 + n). Under "no
    difference" the sign of each group's d is a coin. Fisher's paired randomisation test; for retrieval: Smucker, Allan
    & Carterette 2007 (doi 10.1145/1321440.1321528).

    first, second: (Q,), the same queries in the same order; a query that is nan in either is left out of both.
    groups: (Q,), as in `bootstrap_interval`; a group's sign is flipped as a whole.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"expected the same queries twice, got {first.shape} and {second.shape} values")
    sums, sizes = _clusters(first - second, groups)
    total = float(sums.sum())
    rng = np.random.default_rng(seed)
    as_far, rounding = 0, 1e-12 * float(np.abs(sums).sum())  # flips that only differ in rounding are equally far
    for step in _steps(n, len(sums)):
        flips = rng.integers(0, 2, size=(step, len(sums)), dtype=np.int8) * 2 - 1  # (step, G)
        as_far += int((np.abs(flips @ sums) >= abs(total) - rounding).sum())
    low, high = _percentiles(sums, sizes, n, seed, level)
    mean = total / float(sizes.sum())
    return Difference(mean, low, high, (1 + as_far) / (1 + n), level, int(sizes.sum()), len(sums))


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the same order: reject those below alpha and the chance of even one false
    rejection stays below alpha, however the tests depend on each other. Sorted, the n-th smallest of N is multiplied by
    N - n + 1, and never falls below one before it. Holm 1979 (Scandinavian Journal of Statistics 6:65-70)."""
    out, least = [0.0] * len(p), 0.0
    for place, at in enumerate(sorted(range(len(p)), key=lambda n: p[n])):
        least = max(least, min(1.0, (len(p) - place) * p[at]))
        out[at] = least
    return out


def _clusters(values: Any, groups: Sequence[Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of values per group: (G,), (G,). The mean of a resample needs no more than these."""
    values = np.asarray(values, dtype=np.float64)
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"expected one group per value, got {len(groups)} groups and {len(values)} values")
    known = ~np.isnan(values)
    if not known.any():
        raise ValueError("expected at least one value, got none that is not nan")
    if groups is None:
        return values[known], np.ones(int(known.sum()))
    codes: dict[Any, int] = {}
    member = np.array([codes.setdefault(g, len(codes)) for g, keep in zip(groups, known) if keep])
    return np.bincount(member, weights=values[known]), np.bincount(member).astype(np.float64)


def _percentiles(sums: np.ndarray, sizes: np.ndarray, n: int, seed: int, level: float) -> tuple[float, float]:
    if len(sums) < 2: return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = []
    for step in _steps(n, len(sums)):
        drawn = rng.integers(0, len(sums), size=(step, len(sums)))  # (step, G)
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _steps(n: int, groups: int) -> list[int]:
    size = max(1, DRAWN_AT_ONCE // groups)
    return [min(size, n - done) for done in range(0, n, size)]
