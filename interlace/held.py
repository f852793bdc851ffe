"""Held-out rows in memory, what a score is, and which picture a row gets when it is scored blind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from interlace.data.pictures import BadPicture
from interlace.data.rows import Pair, Source
from interlace.errors import UserError
from interlace.model import Half
from interlace.run import Run, chunks
from interlace.tasks.uncertainty import bootstrap_interval

MOST_RERANKED = 2000  # rows: halves of all pictures are held in memory for it


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


def readable(run: Run, source: Source, rows: np.ndarray, title: str):
    """(position, pair, what the run sees of its picture) of the rows that can be read, with a bar."""
    for row in tqdm(rows, desc=title, unit="picture", leave=False, disable=None if len(rows) > 200 else True):
        pair = source.pair(int(row))
        try:
            yield int(row), pair, run.see(pair.id, pair.picture)
        except BadPicture:
            continue


def sample_rows(rows: np.ndarray, limit: int, seed: int = 0) -> np.ndarray:
    """All of them, or a seeded sample of `limit` in order: an evaluation is quadratic in its rows. Raises UserError for
    a limit below 1."""
    if limit < 1:
        raise UserError(f"limit, the rows at the most, is at least 1; got {limit}.")
    if len(rows) <= limit:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))


@torch.inference_mode()
def hold(run: Run, source: Source, split: str, limit: int = 10_000) -> Held:
    """Encodes a split, its image halves too where something will be fused with them. Raises UserError when it is empty
    or nothing in it can be read."""
    rows = sample_rows(np.asarray(source.indices(split)), limit)
    if not len(rows):
        raise UserError(f"{source.name} has no rows in its {split!r} split.")
    pairs, kept, images, halves = [], [], [], []
    keep_halves = (run.can_match or "mlm" in run.model.heads) and len(rows) <= MOST_RERANKED
    for chunk in chunks(readable(run, source, rows, f"encoding {split}"), 32):
        half = run.half_image([picture for _, _, picture in chunk])
        if run.dim:
            images.append(run.model.alone(half, "image").float().cpu().numpy())
        if keep_halves:
            halves.append(half)
        kept += [row for row, _, _ in chunk]
        pairs += [pair for _, pair, _ in chunk]
    if not pairs:
        raise UserError(f"none of the {len(rows)} pictures in the {split!r} split of {source.name} can be read: run "
                        "`interlace data check`.")  # fmt: skip
    vectors = np.concatenate(images) if images else np.zeros((len(pairs), 0), np.float32)
    texts = run.encode_texts([p.caption for p in pairs]) if run.dim else np.zeros((len(pairs), 0), np.float32)
    return Held(pairs, np.array(kept), vectors, texts, Half.stack(halves) if halves else None,
                len(rows) - len(pairs))  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """The value of each query, what it is the query of, and its group: what a paired test of two runs needs."""

    values: np.ndarray  # (Q,) float64, nan where skipped
    ids: np.ndarray  # (Q,) positions of rows or questions in the source
    groups: np.ndarray  # (Q,) str


class Score(dict[str, Any]):
    """Plain numbers, written as JSON like any dict; `kept` is not among them and does not survive a file."""

    kept: Kept | None = None


def scored(values: np.ndarray, groups: Sequence[str], chance: float | None = None, blind: float | None = None,
           ids: np.ndarray | None = None) -> Score:  # fmt: skip
    interval = bootstrap_interval(values, groups=groups)
    out = Score(value=interval.mean, low=interval.low, high=interval.high, queries=interval.values)
    out.update({k: v for k, v in (("chance", chance), ("blind", blind)) if v is not None})
    if ids is not None:
        out.kept = Kept(np.asarray(values, np.float64), np.asarray(ids), np.array(groups, dtype=np.str_))
    return out


def shuffled(groups: Sequence[Any], seed: int = 0) -> np.ndarray:
    """(N,) for each row another row whose picture it gets, each picture once: of another group, wherever no group has
    more than half of the rows; of another row at least (N > 1)."""
    n = len(groups)
    members: dict[Any, list[int]] = {}
    for row in np.random.default_rng(seed).permutation(n):
        members.setdefault(groups[row], []).append(int(row))
    order = np.array([row for rows in members.values() for row in rows], dtype=np.int64)  # a group stands together
    out = np.empty(n, dtype=np.int64)
    out[order] = np.roll(order, max(1, min(max(map(len, members.values())), n // 2)))
    return out
