"""What earlier runs said of each query, kept beside the figures of `bench.systems`: machines change, and a seed that
was trained on one is compared with seeds trained on another. Headline measures alone; a seed counts as long as its
recipes, and the measures, are what they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from interlace.held import Kept
from interlace.settings import find_recipe

Run = tuple[str, int, str, str]  # system, seed, recipe, after or without
Archive = dict[Run, dict[str, Kept]]  # measure -> each query's value


def digest(recipes: Sequence[str], scored: Sequence[str] = ()) -> str:
    """Of the recipes' text, and of what is said of how their runs are scored."""
    text = "\n".join([*scored, *(find_recipe(name).read_text(encoding="utf-8") for name in recipes)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(file: Path, archive: Mapping[Run, Mapping[str, Kept]]) -> None:
    """Values as float32; which queries they are of is the same for most runs and stands there once."""
    arrays: dict[str, np.ndarray] = {}
    asked: dict[bytes, int] = {}
    for (system, seed, recipe, which), measures in sorted(archive.items()):
        for measure, kept in sorted(measures.items()):
            ids, groups = np.asarray(kept.ids, np.int32), np.asarray(kept.groups, np.str_)
            number = asked.setdefault(ids.tobytes() + "\n".join(groups.tolist()).encode(), len(asked))
            arrays |= {f"ids {number}": ids, f"groups {number}": groups}
            arrays[f"{number}|{system}|{seed}|{recipe}|{which}|{measure}"] = np.asarray(kept.values, np.float32)
    with open(file, "wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]  # numpy's hint of a keyword of its own


def load(file: Path) -> Archive:
    """Empty where there is no file."""
    found: Archive = {}
    if not file.is_file():
        return found
    with np.load(file, allow_pickle=False) as arrays:
        for key in arrays.files:
            if "|" in key:
                number, system, seed, recipe, which, measure = key.split("|")
                kept = Kept(arrays[key].astype(np.float64), arrays[f"ids {number}"], arrays[f"groups {number}"])
                found.setdefault((system, int(seed), recipe, which), {})[measure] = kept
    return found
