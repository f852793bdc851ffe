"""`interlace data corrupt`: a table with a known share of wrong captions, to measure what finds them."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from interlace.bars import bar
from interlace.bootstrap.table import Table
from interlace.data.rows import Source, split_code
from interlace.data.sources.build import hash64, join_equal, normalised
from interlace.errors import UserError

ADDED = ("caption_true", "corrupted")


@dataclass
class Corrupted:
    folder: Path
    rows: int  # in the new table
    candidates: int  # of the split, with a caption
    corrupted: int
    lost: list[tuple[str, str]]  # rows whose picture could not be copied

    def lines(self) -> list[str]:
        share = f"{self.corrupted:,} of {self.candidates:,} captions stand with pictures of another group"
        return [share, *(f"left out: {id}: {why}" for id, why in self.lost[:10])]


def corrupt(source: Source, out: str | Path, share: float = 0.3, seed: int = 0, split: str = "train") -> Corrupted:
    """Writes `source` to the folder `out` with `share` of the split's captions exchanged among pictures of other
    groups. The truth stays in the columns `caption_true` and `corrupted` (yes, no); groups, splits, attributes and
    questions stay with their pictures. No caption goes to a picture of its group, or to one that has the same words.

    Raises UserError for a share that is no share, a seed below 0, captions that cannot be exchanged (one group holds
    more than half of them), and a folder that is there already.
    """
    folder = Path(out).expanduser()
    if not 0 < share <= 1:
        raise UserError(f"share: expected more than 0 and at most 1, got {share}.")
    if seed < 0:
        raise UserError(f"seed is at least 0; got {seed}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: choose another folder, or remove it first.")
    captions = source.captions()
    rows = np.array([i for i in source.indices(split).tolist() if captions[i].as_py().strip()], np.int64)
    wanted = round(share * len(rows))
    if wanted < 2:
        raise UserError(f"a share of {share} of the {len(rows)} captions in the {split!r} split of {source.name} "
                        "leaves fewer than 2 to exchange: give a larger share or source.")  # fmt: skip
    rng = np.random.default_rng([seed, split_code(split)])
    chosen = np.sort(rng.choice(rows, wanted, replace=False))
    texts = [captions[i].as_py() for i in chosen.tolist()]
    others = exchanged(clusters(source.group_codes[chosen], texts), rng)
    if others is None:
        raise UserError(f"one group holds more than half of the {wanted} captions to exchange, so some would stay in "
                        "it: choose another seed or share, or a source with more groups.")  # fmt: skip
    wrong = {int(i): texts[other] for i, other in zip(chosen, others)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with Table(aside, source, ADDED) as table:
            for i in bar(range(len(source)), desc="writing", unit=" rows", leave=False):
                true = captions[i].as_py()
                table.row(i, wrong.get(i, true), [true, i in wrong])
        table.company(f"Made from {source.name}: {wanted} captions of its {split} split were exchanged on purpose "
                      f"(share {share}, seed {seed}); the column caption_true has the true ones. What follows is what "
                      "the source says.")  # fmt: skip
        aside.chmod(0o755)
        if folder.exists():
            folder.rmdir()  # empty, as checked
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Corrupted(folder, table.rows, len(rows), wanted, table.lost)


def clusters(groups: np.ndarray, texts: list[str]) -> np.ndarray:
    """(N,) uint64 groups and texts -> (N,) uint64: rows of one group or with the same words have equal numbers."""
    return join_equal(groups, np.array([hash64(normalised(text)) if normalised(text) else 0 for text in texts],
                                       np.uint64))  # fmt: skip


def exchanged(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """(N,) for each row another one with another label, each once; None where a label has more than half of the
    rows."""
    order = rng.permutation(len(labels))
    _, first, inverse, counts = np.unique(labels[order], return_index=True, return_inverse=True, return_counts=True)
    if len(labels) < 2 or counts.max() > len(labels) // 2:
        return None
    together = order[np.argsort(first[inverse.reshape(-1)], kind="stable")]  # a label's rows stand together
    out = np.empty(len(labels), np.int64)
    out[together] = np.roll(together, counts.max())
    return out
