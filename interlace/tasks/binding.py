"""Does a model know what stands where? Two captions with the same words, two pictures with the same things.

Scenes come as twins (`interlace data scenes`): pictures a and b show the same things, two of them exchanged, and each
one's caption is the other's with two names exchanged. A model that sees only which things there are scores both
captions alike. Measures of Winoground (Thrush et al. 2022, arXiv:2204.03162, section 4), s = match logit:

    text     s(caption a, picture a) > s(caption b, picture a)     chance 1/2
    image    s(caption a, picture a) > s(caption a, picture b)     chance 1/2
    both     all four comparisons of a twin are right              chance 1/6
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from interlace.bars import bar
from interlace.data.pictures import BadPicture, open_picture
from interlace.data.rows import Pair, Source
from interlace.errors import UserError
from interlace.held import sample_rows, scored
from interlace.run import Run, chunks

BATCH = 32


def is_binding(source: Source) -> bool:
    """Whether the rows say what their caption is with two things exchanged."""
    return "swapped" in source.columns


def asked_what_stands_where(source: Source, split: str) -> bool:
    """Whether rows of the split say so; of joined sources, perhaps one has scenes."""
    if not is_binding(source):
        return False
    rows = sample_rows(np.asarray(source.indices(split)), 1000)
    return any(source.pair(row).attributes["swapped"] for row in rows.tolist())


def binding(run: Run, source: Source, split: str = "test", limit: int = 10_000, blind: bool = True) -> dict[str, Any]:
    """Shares with their intervals (95%, cluster bootstrap by group: scenes of the same names), by number of things and
    kind of exchange; `blind`: the same captions beside the picture of a scene with other names.

    A tie counts half. Image and both are measured where a twin is there (column `twin`). Raises UserError for a run
    that cannot match and a source without swapped captions in the split.
    """
    if not run.can_match:
        raise UserError(f"the run in {run.folder} has no match head: train it with the binding or the itm objective.")
    if not is_binding(source):
        raise UserError(f"{source.name} has no column 'swapped', the caption with two things exchanged: make scenes "
                        "with `interlace data scenes`.")  # fmt: skip
    found = [(int(row), source.pair(int(row))) for row in sample_rows(np.asarray(source.indices(split)), limit)]
    found = [(row, p) for row, p in found if p.caption.strip() and p.attributes["swapped"]]
    rows, pairs = np.array([row for row, _ in found], np.int64), [p for _, p in found]
    if not pairs:
        raise UserError(f"{source.name} has no rows with a swapped caption in its {split!r} split.")
    texts = [(p.caption, str(p.attributes["swapped"])) for p in pairs]
    scores = two_captions(run, pairs, texts, f"reading {split}")  # (N, 2), nan where unreadable
    kept = ~np.isnan(scores[:, 0])
    unreadable = int((~kept).sum())
    if not kept.any():
        raise UserError(f"none of the {len(pairs)} pictures of {source.name} can be read: run `interlace data check`.")
    pairs, scores, texts = [p for p, k in zip(pairs, kept) if k], scores[kept], [t for t, k in zip(texts, kept) if k]
    rows = rows[kept]
    shown = better(scores[:, 0], scores[:, 1])  # (N,)
    dark = None
    if blind and (other := of_other_names(pairs)) is not None:
        dark_scores = two_captions(run, [pairs[n] for n in other], texts, f"reading {split}, other pictures")
        dark = float(np.nanmean(better(dark_scores[:, 0], dark_scores[:, 1])))
    groups = [p.group for p in pairs]
    out: dict[str, Any] = {"split": split, "rows": len(pairs), "unreadable": unreadable, "source": source.name,
                           "data_fingerprint": source.fingerprint}  # fmt: skip
    out["text"] = scored(shown, groups, 0.5, dark, rows)
    a, b = twins(pairs)
    if len(a):
        image_a, image_b = better(scores[a, 0], scores[b, 1]), better(scores[b, 0], scores[a, 1])
        of = [groups[n] for n in a]
        out["image"] = scored(np.concatenate([image_a, image_b]), of + of, 0.5, ids=np.concatenate([rows[a], rows[b]]))
        four = np.stack([shown[a], shown[b], image_a, image_b])
        out["both"] = scored((four.min(0) == 1).astype(float), of, 1 / 6, ids=rows[a])
    out["by_kind"] = {}
    for column in ("cells", "swap"):
        values = [p.attributes.get(column) for p in pairs]
        for value in sorted({v for v in values if v is not None}, key=str):
            mine = np.array([v == value for v in values])
            name = f"{value:g} things" if isinstance(value, float) else f"exchanged {value}"
            out["by_kind"][name] = scored(shown[mine], [g for g, m in zip(groups, mine) if m], 0.5)
    return out


def better(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 where the first is higher, 0 where lower, 1/2 for a tie: a model that cannot tell scores a half."""
    return (np.sign(first - second) + 1) / 2


def twins(pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Positions (M,), (M,) of the rows whose twin is among the rows, each couple once."""
    at = {p.id.rsplit("/", 1)[-1]: n for n, p in enumerate(pairs)}  # joined sources put their name before the id
    found = [(n, at[str(p.attributes["twin"])]) for n, p in enumerate(pairs)
             if p.attributes.get("twin") and str(p.attributes["twin"]) in at]  # fmt: skip
    once = [(a, b) for a, b in found if a < b]
    return np.array([a for a, _ in once], dtype=np.int64), np.array([b for _, b in once], dtype=np.int64)


def of_other_names(pairs: list[Pair], seed: int = 0) -> np.ndarray | None:
    """(N,) for each row one of another group; None when all are one group."""
    rng, groups = np.random.default_rng(seed), [p.group for p in pairs]
    if len(set(groups)) < 2:
        return None
    out = np.empty(len(pairs), np.int64)
    for n, group in enumerate(groups):
        out[n] = next(m for m in iter(lambda: int(rng.integers(len(pairs))), None) if groups[m] != group)
    return out


@torch.inference_mode()
def two_captions(run: Run, shown: list[Pair], texts: list[tuple[str, str]], title: str) -> np.ndarray:
    """Match logits (N, 2) of both texts beside each picture, which is encoded once; nan for one that cannot be read."""
    model, out = run.model, np.full((len(shown), 2), np.nan)
    with bar(total=len(shown), desc=title, unit="scene", leave=False, mininterval=1) as progress:
        for positions in chunks(range(len(shown)), BATCH):
            pictures, kept = [], []
            for n in positions:
                try:
                    pictures.append(open_picture(shown[n].picture, size_hint=run.processor.size))
                    kept.append(n)
                except BadPicture:
                    continue
            progress.update(len(positions))
            if not kept:
                continue
            image = run.half_image(pictures)
            words = model.half_text(*run._words([text for n in kept for text in texts[n]]))
            beside = torch.arange(len(kept), device=model.device).repeat_interleave(2)
            fused = model.fuse(words, image.rows(beside), asked=model.asked_by("match"))
            logits = model.heads["match"](fused.pooled_text, fused.pooled_image).float()  # (2K, 2)
            out[kept] = (logits[:, 1] - logits[:, 0]).view(-1, 2).cpu().numpy()
    return out


def print_binding(result: dict[str, Any]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    title = f"{result['source']}, {result['split']} split: {result['rows']} scenes"
    table = Table("right", "share", "95% interval", "chance", "blind", title=title)
    names = {"text": "which caption", "image": "which picture", "both": "both of a twin"}
    for name, s in [*((names[k], result[k]) for k in names if k in result), *result["by_kind"].items()]:
        blind = f"{100 * s['blind']:.1f}" if "blind" in s else ""
        table.add_row(name, f"{100 * s['value']:.1f}", f"{100 * s['low']:.1f} to {100 * s['high']:.1f}",
                      f"{100 * s['chance']:.1f}", blind)  # fmt: skip
    Console().print(table)
    print("blind: the same captions beside the picture of a scene with other names")
