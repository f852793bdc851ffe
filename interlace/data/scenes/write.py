"""From a source to a folder of scenes: pictures, captions true and swapped, questions, licences."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from interlace.bars import bar
from interlace.data.duplicates import THUMB, near_pairs, perceptual_hash, thumbnail
from interlace.data.pictures import BadPicture, open_picture
from interlace.data.rows import SPLITS, Source
from interlace.data.samples.write import EPOCH
from interlace.data.scenes.draw import Drawer, Scene, Thing
from interlace.data.scenes.words import Asked, ask, caption, noun, priors
from interlace.errors import UserError, suggest

MARGIN = 16  # a sixteenth of a cell stays white at each of its sides, so that neighbours do not touch
HELD = 4096  # decoded cells kept in memory

Drawn = dict[str, list[tuple[str, Scene]]]  # split -> (id, scene), each standing for itself and its twin


@dataclass
class Made:
    """What was written: scenes by split, pictures they show, what was left out and why, and for each kind of question
    (number, different answers, share of the most frequent one) over all splits."""

    folder: Path
    scenes: dict[str, int]
    pictures: dict[str, int]
    names: dict[str, int]
    skipped: Counter[str] = field(default_factory=Counter)
    priors: dict[str, tuple[int, int, float]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        counts = ", ".join(f"{s} {n:,} of {self.pictures[s]:,} pictures, {self.names[s]:,} names"
                           for s, n in self.scenes.items())  # fmt: skip
        asked = [f"  {kind}: {n:,} questions, {answers} answers, the most frequent one is right for {share:.1%}"
                 for kind, (n, answers, share) in self.priors.items()]  # fmt: skip
        left = [f"  left out: {n:,} {why}" for why, n in self.skipped.most_common()]
        return [f"scenes: {counts}", *asked, *left]


def make_scenes(source: Source, out: str | Path, cells: Sequence[int] = (2,), size: int = 256,
                per_split: float | dict[str, int] = 4.0, seed: int = 0, names: str = "name",
                least: int = 2) -> Made:  # fmt: skip
    """Composes scenes from a source's pictures and writes them as a folder that `open_source` reads.

    A scene shows `cells` pictures (of several numbers each in turn) of different groups and names on a white square of
    `size` pixels, each in a quarter of it. Scenes come as twins: the same pictures with two of them exchanged; the
    caption of one is the `swapped` caption of the other. A scene is of the split of its pictures, and a set of names
    that stands together in one split never does in another.

    `per_split`: scenes for each picture of a split, or a number for each split. `names`: the column with the things'
    names; the source's name column is shortened to its noun. `least`: a held-out picture is used if at least so many
    training pictures have its name.

    Raises UserError for options that make no sense, too few names, and a folder that is there already.
    """
    folder = Path(out).expanduser()
    _check(folder, cells, size, per_split, least)
    skipped: Counter[str] = Counter()
    things = _things(source, names, least, skipped)
    wanted = _wanted(per_split, things)
    has = len({thing.name for thing in things["train"]})
    if has < max(cells):
        raise UserError(f"a scene of {max(cells)} things needs as many names, and the training pictures of "
                        f"{source.name} have {has} (column {names!r}): choose another column with --names, or a larger "
                        "source.")  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (aside / "pictures").mkdir()
        made = _write(source, aside, things, wanted, sorted(set(cells)), size, seed, skipped)
        aside.chmod(0o755)
        if folder.exists():
            folder.rmdir()  # empty, as checked
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    made.folder = folder
    return made


def parse_cells(text: str) -> list[int]:
    """ "2,3" -> [2, 3]. Raises UserError for anything but numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"cells: expected numbers from 2 to 4, such as 2 or 2,3,4; got {text!r}.") from None


def parse_per_split(text: str) -> float | dict[str, int]:
    """ "4" -> 4.0, "train=2000,val=200" -> numbers by split. Raises UserError for anything else."""
    try:
        if "=" not in text:
            return float(text)
        pairs = [part.split("=") for part in text.split(",")]
        return {split.strip(): int(n) for split, n in pairs}
    except ValueError:
        raise UserError(f"per_split: expected scenes per picture, such as 4, or numbers such as "
                        f"train=2000,val=200,test=400; got {text!r}.") from None  # fmt: skip


def _check(folder: Path, cells: Sequence[int], size: int, per_split: float | dict[str, int], least: int) -> None:
    if not cells or any(not 2 <= n <= 4 for n in cells):
        raise UserError(f"cells: expected numbers from 2 to 4, such as 2 or 2,3,4; got {', '.join(map(str, cells))}.")
    if not 32 <= size <= 2048:
        raise UserError(f"size: expected 32 to 2048 pixels, got {size}.")
    if least < 1:
        raise UserError(f"least: expected at least 1 training picture to a held-out name, got {least}.")
    if isinstance(per_split, dict):
        for split, n in per_split.items():
            if split not in SPLITS:
                raise UserError(f"per_split: no split {split!r}; the splits are {', '.join(SPLITS)}."
                                f"{suggest(split, SPLITS)}")  # fmt: skip
            if n < 0 or n % 2:
                raise UserError(f"per_split: {split}={n}: scenes come as twins, so give an even number.")
        if per_split.get("train", 0) < 2:
            raise UserError("per_split: give at least two training scenes, for instance train=2000,val=200,test=400.")
    elif not per_split > 0:
        raise UserError(f"per_split: expected scenes per picture above 0, got {per_split:g}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: choose another folder, or remove it first.")


def _things(source: Source, column: str, least: int, skipped: Counter[str]) -> dict[str, list[Thing]]:
    """The usable rows of each split. Raises UserError for an unknown column."""
    if column != "name" and column not in source.columns:
        known = ["name", *source.columns]
        raise UserError(f"names: {source.name} has no column {column!r}; there are {', '.join(known)}."
                        f"{suggest(column, known)}")  # fmt: skip
    things: dict[str, list[Thing]] = {split: [] for split in SPLITS}
    seen: set[tuple] = set()
    for row in bar(range(len(source)), desc=f"names in {source.name}", unit=" rows", leave=False):
        pair = source.pair(row)
        place = (pair.picture.path, pair.picture.offset)
        given = pair.name if column == "name" else str(pair.attributes.get(column) or "")
        name = noun(given) if column == "name" else " ".join(given.lower().split())
        if place in seen:
            skipped["rows whose picture another row has"] += 1
        elif not name:
            skipped["rows without a name"] += 1
        else:
            things[pair.split].append(Thing(row, name, pair.group))
        seen.add(place)
    trained = Counter(thing.name for thing in things["train"])
    for split in ("val", "test"):
        kept = [thing for thing in things[split] if trained[thing.name] >= least]
        if left := len(things[split]) - len(kept):
            skipped[f"{split} pictures whose name fewer than {least} training pictures have"] += left
        things[split] = kept
    return things


def _wanted(per_split: float | dict[str, int], things: dict[str, list[Thing]]) -> dict[str, int]:
    if isinstance(per_split, dict):
        return {split: int(per_split.get(split, 0)) for split in SPLITS}
    return {split: 2 * round(per_split * len(some) / 2) for split, some in things.items()}


def _write(source: Source, folder: Path, things: dict[str, list[Thing]], wanted: dict[str, int], cells: list[int],
           size: int, seed: int, skipped: Counter[str]) -> Made:  # fmt: skip
    drawn = _compose_all(source, folder, things, wanted, cells, size, seed, skipped)
    _drop_lookalikes(folder, drawn, skipped)
    asked = _ask(drawn, len(cells) > 1, seed, skipped)
    _write_table(source, folder, drawn)
    _write_questions(folder, asked)
    (folder / "LICENCE.txt").write_text(_licence(source), encoding="utf-8")
    shown = {split: [thing for _, scene in some for thing in scene.things] for split, some in drawn.items()}
    return Made(folder, {split: 2 * len(some) for split, some in drawn.items()},
                {split: len({thing.row for thing in some}) for split, some in shown.items()},
                {split: len({thing.name for thing in some}) for split, some in shown.items()},
                skipped, priors([one for _, some in asked for one in some]))  # fmt: skip


def _compose_all(source: Source, folder: Path, things: dict[str, list[Thing]], wanted: dict[str, int],
                 cells: list[int], size: int, seed: int, skipped: Counter[str]) -> Drawn:  # fmt: skip
    side = size // 2 - 2 * (size // 2 // MARGIN)

    @lru_cache(HELD)
    def cell(row: int) -> Image.Image:
        return _fitted(open_picture(source.picture(row), size_hint=side), side)

    drawn: Drawn = {split: [] for split in SPLITS}
    owned: dict[frozenset[str], str] = {}
    with bar(total=sum(wanted.values()), desc="composing", unit=" scenes") as progress:
        for split in reversed(SPLITS):  # the small splits choose their sets of names first
            drawer = Drawer(split, things[split], owned, np.random.default_rng([seed, SPLITS.index(split)]))

            def usable(scene: Scene, drawer: Drawer = drawer) -> bool:
                for thing in scene.things:
                    try:
                        cell(thing.row)
                    except BadPicture as bad:
                        skipped[f"pictures that cannot be read ({bad.reason})"] += 1
                        drawer.drop(thing)
                        return False
                return True

            for n in range(wanted[split] // 2):
                progress.update(2)
                scene = drawer.draw(cells[n % len(cells)], usable)
                if scene is None:
                    skipped[f"{split} scenes for which no further set of names was found"] += 2
                    continue
                key = f"{split}-{n:05d}"
                drawn[split].append((key, scene))
                for name, shown in ((f"{key}a", scene), (f"{key}b", scene.twin())):
                    _save(compose(shown, cell, size), folder / "pictures" / f"{name}.jpg")
    return drawn


def _drop_lookalikes(folder: Path, drawn: Drawn, skipped: Counter[str]) -> None:
    """Takes out scenes that a person would call the same picture as an earlier one, or as their twin: two lamps that
    look alike in one place, four alike icons. Test scenes come first, so that none of them is left in training."""
    keys = [(split, key, name) for split in reversed(SPLITS) for key, _ in drawn[split] for name in "ab"]
    hashes, thumbs = np.zeros(len(keys), np.uint64), np.zeros((len(keys), THUMB), np.uint8)
    for n, (_, key, name) in enumerate(bar(keys, desc="comparing", unit=" scenes", leave=False)):
        picture = open_picture(folder / "pictures" / f"{key}{name}.jpg", size_hint=64)  # as `data check` opens it
        hashes[n], thumbs[n] = perceptual_hash(picture), thumbnail(picture)
    gone: set[int] = set()
    for first, second in near_pairs(hashes, thumbs).tolist():  # in the order of the first, and first < second
        if first // 2 not in gone:
            gone.add(second // 2)
    for twin in gone:
        split, key, _ = keys[2 * twin]
        skipped[f"{split} scenes that look like another"] += 2
        for name in "ab":
            (folder / "pictures" / f"{key}{name}.jpg").unlink()
    left = {keys[2 * n][1] for n in range(len(keys) // 2)} - {keys[2 * twin][1] for twin in gone}
    for split, some in drawn.items():
        drawn[split] = [(key, scene) for key, scene in some if key in left]


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """The whole picture within (side, side), its shape kept."""
    scale = side / max(picture.size)
    wide, high = (max(1, round(x * scale)) for x in picture.size)
    return picture.resize((wide, high), Image.Resampling.BICUBIC, reducing_gap=2.0)


def compose(scene: Scene, cell: Callable[[int], Image.Image], size: int) -> Image.Image:
    """The scene as (size, size), each thing in the middle of its quarter; `cell(row)` gives its fitted picture."""
    canvas = Image.new("RGB", (size, size), "white")
    for thing, place in zip(scene.things, scene.places):
        picture, (row, column) = cell(thing.row), divmod(place, 2)
        left = column * (size // 2) + (size // 2 - picture.width) // 2
        top = row * (size // 2) + (size // 2 - picture.height) // 2
        canvas.paste(picture, (left, top))
    return canvas


def _save(picture: Image.Image, file: Path) -> None:
    picture.save(file, "JPEG", quality=95, subsampling=0)
    os.utime(file, (EPOCH, EPOCH))  # made twice, a folder has the same fingerprint


def _ask(drawn: Drawn, count: bool, seed: int, skipped: Counter[str]) -> list[tuple[str, list[Asked]]]:
    """(id, questions) of every scene. A held-out question is asked if its answer is one of training's."""
    out: list[tuple[str, list[Asked]]] = []
    known: set[str] = set()
    for number, (split, some) in enumerate(drawn.items()):
        rng = np.random.default_rng([seed, number, 1])
        for (key, _), both in zip(some, ask(some, count, rng)):
            if split == "train":
                known |= {one.answer for asked in both for one in asked}
            # both of a twin's or neither: else one answer would be more frequent
            fits = [all(b.answer in known for b in pair) for pair in zip(*both)]
            if not all(fits):
                skipped["held-out questions whose answer training never gives"] += 2 * fits.count(False)
            for name, asked in zip("ab", both):
                out.append((key + name, [one for one, fit in zip(asked, fits) if fit]))
    return out


def _write_table(source: Source, folder: Path, drawn: Drawn) -> None:
    kept = [name for name in ("creator", "author", "photographer", "licence", "license") if name in source.columns]
    header = ["id", "image", "caption", "name", "group", "split", "swapped", "twin", "cells", "swap", "shows", *kept]
    with open(folder / "pairs.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(header)
        for split, some in drawn.items():
            for key, scene in some:
                rows = [source.pair(thing.row) for thing in scene.things]
                said = ["; ".join(dict.fromkeys(str(r.attributes[c]) for r in rows if r.attributes[c])) for c in kept]
                for a, b, shown in (("a", "b", scene), ("b", "a", scene.twin())):
                    table.writerow([
                        key + a, f"pictures/{key}{a}.jpg", caption(shown), " / ".join(t.name for t in shown.things),
                        "+".join(sorted(scene.names)), split, caption(shown.twin()), key + b, len(scene.things),
                        scene.swap_kind, " ".join(source.pair(t.row).id for t in shown.things), *said])  # fmt: skip


def _write_questions(folder: Path, asked: list[tuple[str, list[Asked]]]) -> None:
    with open(folder / "questions.jsonl", "w", encoding="utf-8") as file:
        for key, some in asked:
            numbers: Counter[str] = Counter()
            for one in some:
                numbers[one.kind] += 1
                line = {"id": f"{key}:{one.kind}:{numbers[one.kind]}", "pair_id": key, "question": one.question,
                        "answers": [[one.answer, 1.0]], "kind": one.kind}  # fmt: skip
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _licence(source: Source) -> str:
    return (f"Scenes composed from pictures of {source.name}; the column `shows` of pairs.csv names the rows that each "
            "scene is made of. They are works made of those pictures, and the licences below hold for them. Changed "
            "here: pictures are scaled down and set side by side; captions and questions are made from their names.\n\n"
            f"{source.licence or 'The source states no licence.'}\n")  # fmt: skip
