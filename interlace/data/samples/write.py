"""What the sample sets share: groups and splits without leaks, deterministic choices, and the files of the folder
form."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from interlace.data import duplicates
from interlace.data.pictures import open_picture
from interlace.data.sources.build import hash64, join_equal, join_pairs, normalised

EPOCH = 1_577_836_800  # 2020-01-01: files made twice get equal times, so the fingerprint is the same on every machine
LARGE = 0.02  # a group above this share of the rows always trains: drawn into val it would be most of val


@dataclass
class Item:
    id: str
    file: str  # name under pictures/
    data: bytes  # its encoded bytes
    caption: str
    name: str
    facts: dict[str, Any] = field(default_factory=dict)  # attribute -> value
    asks: list[tuple[str, str, str]] = field(default_factory=list)  # (kind, question, answer)


def choose(key: str, options: Sequence[str]) -> str:
    """One of the options, always the same for the same key."""
    return options[hash64(key) % len(options)]


def share(key: str) -> float:
    """A number in 0..1, always the same for the same key: keeps part of a too common answer."""
    return hash64(key) / 2.0**64


def groups_of(items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """((N,) uint64 group codes, (N,) uint64 perceptual hashes): one group per name or near-identical picture."""
    signs = [duplicates.signature(open_picture(item.data), item.data) for item in items]
    hashes = np.array([sign.bits for sign in signs], np.uint64)
    labels = join_equal(
        np.array([hash64(normalised(item.name)) for item in items], np.uint64),
        np.array([int(sign.sha[:16], 16) for sign in signs], np.uint64),
    )
    near = duplicates.near_pairs(hashes, np.stack([sign.thumb for sign in signs]))
    return join_pairs(labels, near[:, 0], near[:, 1]), hashes


def exact_splits(groups: np.ndarray) -> np.ndarray:
    """(N,) split names: whole groups, in the order of their hash, fill test and val to 10% each; the rest trains."""
    codes, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    names = np.array(["train"] * len(codes), dtype=object)
    room = {"test": 0.1 * len(groups), "val": 0.1 * len(groups)}
    for position in np.argsort([hash64(f"split {code}") for code in codes.tolist()]):
        if counts[position] > max(LARGE * len(groups), 1):
            continue
        for split in room:
            if room[split] >= counts[position]:
                room[split] -= counts[position]
                names[position] = split
                break
    return names[inverse.reshape(-1)]


def write_folder(folder: Path, items: Sequence[Item], licence: str) -> None:
    """pairs.csv, questions.jsonl (when anything is asked), pictures/ and LICENCE.txt, the same bytes every time."""
    groups, hashes = groups_of(items)
    splits = exact_splits(groups)
    facts = list(dict.fromkeys(key for item in items for key in item.facts))
    with open(folder / "pairs.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "caption", "name", "group", "split", "phash", *facts])
        for item, group, split, bits in zip(items, groups.tolist(), splits.tolist(), hashes.tolist()):
            cells = [_cell(item.facts.get(key)) for key in facts]
            image = f"pictures/{item.file}"
            table.writerow([item.id, image, item.caption, item.name, f"{group:016x}", split, f"{bits:016x}", *cells])
    if any(item.asks for item in items):
        with open(folder / "questions.jsonl", "w", encoding="utf-8") as file:
            for item in items:
                for kind, question, answer in item.asks:
                    line = {
                        "id": f"{item.id}:{kind}",
                        "pair_id": item.id,
                        "question": question,
                        "answers": [[answer, 1.0]],
                    }
                    file.write(json.dumps({**line, "kind": kind}, ensure_ascii=False) + "\n")
    (folder / "LICENCE.txt").write_text(licence, encoding="utf-8")
    for item in items:
        (folder / "pictures" / item.file).write_bytes(item.data)
        os.utime(folder / "pictures" / item.file, (EPOCH, EPOCH))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
