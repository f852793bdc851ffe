"""Filters that judge only what they did not learn from. A filter knows a small table by heart after a few rounds, its
wrong captions too, and finds them all fitting. So the groups of rows are dealt into folds, each fold is judged by a
filter that learnt from the others alone, and a caption that contradicts what the rest of the table says stands out
(out-of-sample scores, as in confident learning: Northcutt et al. 2021, arXiv:1911.00068, section 3).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np

from interlace.bootstrap.score import Score, score_pairs
from interlace.data.rows import Source, split_code
from interlace.errors import UserError
from interlace.run import Run

SPLIT = "train"


def fold_of(source: Source, rows: Sequence[int] | np.ndarray, folds: int) -> np.ndarray:
    """(n,) rows -> (n,) number of their fold: the groups of each split, shuffled and dealt in turn, the same in every
    process."""
    codes = np.asarray(source.group_codes).astype(np.uint64)
    mixed = (codes ^ (codes >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)  # neighbouring codes part ways
    keys = (np.asarray(source.split_codes).astype(np.uint64) << np.uint64(61)) | (mixed >> np.uint64(3))
    return np.searchsorted(np.unique(keys), keys[np.asarray(rows, np.int64)]) % folds


def without(source: Source, fold: int, folds: int) -> Source:
    """The source with one fold of its training rows moved out of the training split. Raises UserError when that leaves
    nothing."""
    out = copy.copy(source)
    rows = source.indices(SPLIT)
    codes = np.array(source.split_codes)
    codes[rows[fold_of(source, rows, folds) == fold]] = split_code("test")
    out.split_codes, out.fingerprint = codes, f"{source.fingerprint}-{fold + 1}-of-{folds}"
    if not len(out.indices(SPLIT)):
        raise UserError(f"all training rows of {source.name} are of one group, which no {folds} folds can part.")
    return out


class Filters:
    """Who judges which row: one filter all of them, or one a fold."""

    def __init__(self, source: Source, runs: list[Run]):
        self.source, self.runs = source, runs

    @property
    def first(self) -> Run:
        return self.runs[0]

    def parted(self, rows: Sequence[int]) -> list[tuple[Run, list[int]]]:
        """Each filter with the positions in `rows` of those it judges; none without."""
        of = fold_of(self.source, rows, len(self.runs)) if len(rows) else np.zeros(0, np.int64)
        parts = [(run, np.flatnonzero(of == n).tolist()) for n, run in enumerate(self.runs)]
        return [(run, places) for run, places in parts if places]

    def score_pairs(self, texts: dict[int, list[str]], batch: int) -> Iterator[tuple[int, list[Score]]]:
        """As `score.score_pairs`, each row by its own filter."""
        rows = list(texts)
        for run, places in self.parted(rows):
            yield from score_pairs(run, self.source, {rows[n]: texts[rows[n]] for n in places}, batch)
