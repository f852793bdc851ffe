"""Scenes: the same every time, no picture on two sides, captions and questions that say what the pixels show, and
nothing to be guessed from the words alone."""

import csv
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from makers import drawing
from PIL.Image import Resampling

from interlace.data.check import check
from interlace.data.pictures import open_picture
from interlace.data.scenes import PLACES, Thing, make_scenes, parse_cells, parse_per_split
from interlace.data.scenes.draw import Drawer
from interlace.data.scenes.words import noun, phrase
from interlace.data.sources import open_source
from interlace.errors import UserError

NAMES = ("chair", "armchair", "lamp", "shelves", "rice", "table", "oven", "glass")
SIZE = 96
BICUBIC = Resampling.BICUBIC


def write_things(folder, broken: bool = False):
    """8 names x 8 pictures, of which one is test and one val; plus a test picture whose name training lacks."""
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for n, name in enumerate(NAMES):
        for v in range(8):
            file = f"{name}-{v}.png"
            drawing(100 * n + v, side=40 + 3 * v).save(folder / "pictures" / file)
            rows.append({"id": f"{name}-{v}", "image": f"pictures/{file}", "caption": f"Old {name} number {v}",
                         "name": f"Old {name.title()} {v}", "group": f"{name}-{v}",
                         "split": {0: "test", 1: "val"}.get(v, "train"),
                         "creator": f"Painter {v % 2}", "kind": name.upper()})  # fmt: skip
    drawing(999).save(folder / "pictures" / "zebra.png")
    rows.append(dict(rows[0], id="zebra", image="pictures/zebra.png", caption="a zebra", name="Zebra", group="zebra"))
    if broken:
        (folder / "pictures" / "chair-2.png").write_bytes(b"<html>not here</html>")
    with open(folder / "pairs.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    (folder / "LICENCE.txt").write_text("drawn by hand, free for all\n")
    return folder


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    return open_source(write_things(tmp_path_factory.mktemp("things") / "things"))


@pytest.fixture(scope="module")
def made(things, tmp_path_factory):
    return make_scenes(things, tmp_path_factory.mktemp("scenes") / "scenes", cells=(2, 3, 4), size=SIZE,
                       per_split={"train": 60, "val": 12, "test": 12}, seed=3)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(made):
    return open_source(made.folder)


def said(caption: str) -> dict[str, str]:
    """Place -> name, read off the words alone."""
    found = re.findall(r"(?:an? )?(\w+) at the (top left|top right|bottom left|bottom right)", caption)
    return {place: name for name, place in found}


def test_made_twice_it_is_the_same_and_another_seed_is_not(things, made, tmp_path):
    options = {"cells": (2, 3, 4), "size": SIZE, "per_split": {"train": 60, "val": 12, "test": 12}}
    again = make_scenes(things, tmp_path / "scenes", seed=3, **options)
    files = sorted(f.relative_to(made.folder) for f in made.folder.rglob("*") if f.is_file())
    assert files == sorted(f.relative_to(again.folder) for f in again.folder.rglob("*") if f.is_file())
    assert all((made.folder / f).read_bytes() == (again.folder / f).read_bytes() for f in files)
    assert open_source(again.folder).fingerprint == open_source(made.folder).fingerprint
    other = make_scenes(things, tmp_path / "other", seed=4, **options)
    assert (other.folder / "pairs.csv").read_text() != (made.folder / "pairs.csv").read_text()


def test_no_picture_and_no_set_of_names_crosses_splits(things, scenes):
    of = {things.pair(i).id: things.pair(i) for i in range(len(things))}
    sets = defaultdict(set)
    for pair in scenes.pairs():
        shown = [of[key] for key in str(pair.attributes["shows"]).split(" ")]
        assert {one.split for one in shown} == {pair.split}
        assert len({one.group for one in shown}) == len({noun(one.name) for one in shown}) == len(shown)
        assert {"zebra"}.isdisjoint(noun(one.name) for one in shown)
        sets[pair.group].add(pair.split)
    assert all(len(splits) == 1 for splits in sets.values())


def test_the_swapped_caption_is_the_twins_and_has_the_same_words(scenes):
    by_id = {pair.id: pair for pair in scenes.pairs()}
    for pair in by_id.values():
        twin, swapped = by_id[str(pair.attributes["twin"])], str(pair.attributes["swapped"])
        assert swapped == twin.caption != pair.caption and twin.attributes["twin"] == pair.id
        assert Counter(re.findall(r"\w+", swapped)) == Counter(re.findall(r"\w+", pair.caption))
        a, b = said(pair.caption), said(swapped)
        moved = [place for place in a if a[place] != b[place]]
        assert a.keys() == b.keys() and len(a) == pair.attributes["cells"] and len(moved) == 2
        rows, columns = ({PLACES.index(place) // 2 for place in moved}, {PLACES.index(place) % 2 for place in moved})
        kind = "left-right" if len(rows) == 1 else "above-below" if len(columns) == 1 else "diagonal"
        assert pair.attributes["swap"] == kind


def test_the_pixels_show_what_the_caption_says(things, scenes):
    of = {things.pair(i).id: things.pair(i) for i in range(len(things))}
    half = SIZE // 2
    for pair in list(scenes.pairs())[::7]:
        canvas = np.asarray(open_picture(pair.picture)).astype(float)
        assert canvas.shape == (SIZE, SIZE, 3)
        where = said(pair.caption)
        by_name = {noun(of[key].name): of[key] for key in str(pair.attributes["shows"]).split(" ")}
        for n, place in enumerate(PLACES):
            top, left = divmod(n, 2)
            quarter = canvas[top * half : (top + 1) * half, left * half : (left + 1) * half]
            if place not in where:
                assert quarter.min() > 245  # white, but for JPEG's noise
                continue
            side = half - 2 * (half // 16)
            shown = quarter[half // 16 : half // 16 + side, half // 16 : half // 16 + side]
            errors = {name: np.abs(np.asarray(open_picture(thing.picture).resize((side, side), BICUBIC), float) - shown)
                      .mean() for name, thing in by_name.items()}  # fmt: skip
            assert errors[where[place]] == min(errors.values()) < 8, (place, errors)


def derived(question: str, kind: str, where: dict[str, str]) -> str:
    """The answer to a question from what stands where."""
    at = {name: place for place, name in where.items()}
    known = [name for name in re.findall(r"\w+", question) if name in NAMES]
    if kind == "count":
        return str(len(where))
    if kind == "exists":
        return "yes" if known[0] in at else "no"
    if kind == "where":
        return at[known[0]]
    if kind == "what":
        return where[next(place for place in PLACES if place in question)]
    x, y = (PLACES.index(at[name]) for name in known)
    return "yes" if (x % 2 < y % 2 if kind == "left of" else x // 2 < y // 2) else "no"


def test_every_answer_follows_from_the_caption(scenes):
    captions = {pair.id: pair.caption for pair in scenes.pairs()}
    kinds = Counter()
    for q in scenes.questions():
        kinds[q.kind] += 1
        assert q.answers == [(derived(q.question, q.kind, said(captions[q.pair_id])), 1.0)], (q, captions[q.pair_id])
    assert set(kinds) == {"where", "what", "exists", "left of", "above", "count"}


def test_the_words_of_a_question_give_nothing_away(made, scenes):
    for split in ("train", "val", "test"):
        answers = defaultdict(Counter)  # of one wording of one kind, names filled in
        for q in scenes.questions(split):
            words = re.sub(r"Does the picture show |Do you see ", "", q.question) if q.kind == "exists" else q.question
            answers[q.kind, words][q.answers[0][0]] += 1
        for (kind, words), counts in answers.items():
            if kind in ("exists", "left of", "above"):  # of every name, and every pair of names, exactly half
                assert counts["yes"] == counts["no"], (split, kind, words, counts)
            elif kind == "where":
                assert max(counts.values()) <= counts.total() / 2, (words, counts)
    for kind in ("exists", "left of", "above"):
        assert made.priors[kind][2] == 0.5
    assert made.priors["count"][2] < 0.4 and made.priors["where"][2] < 0.4 and made.priors["what"][2] < 0.3


def test_data_check_finds_nothing(scenes, capsys):
    report = check(scenes)
    assert [f for f in report.findings if f.level != "note"] == []


def test_licences_travel(made, scenes):
    assert "drawn by hand, free for all" in scenes.licence and "composed" in scenes.licence
    for pair in scenes.pairs("test"):
        assert set(str(pair.attributes["creator"]).split("; ")) <= {"Painter 0", "Painter 1"}


def test_what_cannot_be_used_is_counted(tmp_path):
    source = open_source(write_things(tmp_path / "things", broken=True))
    made = make_scenes(source, tmp_path / "out", size=64, per_split={"train": 60, "test": 4}, seed=2)
    assert made.skipped["pictures that cannot be read (not a picture (HTML))"] == 1
    assert made.skipped["test pictures whose name fewer than 2 training pictures have"] == 1
    assert made.scenes["val"] == 0 and len(list((tmp_path / "out" / "pictures").iterdir())) == sum(made.scenes.values())
    shows = {row for p in open_source(tmp_path / "out").pairs() for row in str(p.attributes["shows"]).split(" ")}
    assert "chair-2" not in shows


def test_a_split_without_further_scenes_says_so():
    things = [Thing(n, name, name) for n, name in enumerate(("chair", "lamp"))]
    owned: dict = {}
    drawer = Drawer("test", things, owned, np.random.default_rng(0))
    scenes = [drawer.draw(2, lambda scene: True) for _ in range(7)]
    # two things stand in 4 x 3 ways, twins counted once
    assert None not in scenes[:6] and scenes[6] is None
    assert len({frozenset(zip(s.things, s.places)) for some in scenes[:6] for s in (some, some.twin())}) == 12
    assert Drawer("train", things, owned, np.random.default_rng(0)).draw(2, lambda scene: True) is None


@pytest.mark.parametrize("options, words", [
    ({"cells": (5,)}, "2 to 4"), ({"size": 8}, "32 to 2048"), ({"per_split": {"trian": 4}}, "Did you mean 'train'"),
    ({"per_split": {"train": 3}}, "even number"), ({"per_split": 0.0}, "above 0"), ({"least": 0}, "at least 1"),
    ({"names": "knid"}, "Did you mean 'kind'"), ({"names": "creator", "cells": (3,)}, "another column")])  # fmt: skip
def test_options_that_make_no_sense(things, tmp_path, options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make_scenes(things, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(things, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        make_scenes(things, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_a_column_can_give_the_names(things, tmp_path):
    made = make_scenes(things, tmp_path / "out", size=64, per_split={"train": 8}, names="kind")
    assert {name for p in open_source(made.folder).pairs() for name in p.name.split(" / ")} <= set(NAMES)


@pytest.mark.parametrize("text, value", [("4", 4.0), ("0.5", 0.5), ("train=10, val=2", {"train": 10, "val": 2})])
def test_per_split_is_a_factor_or_numbers(text, value):
    assert parse_per_split(text) == value
    with pytest.raises(UserError, match="scenes per picture"):
        parse_per_split(text + "x")


def test_cells_are_numbers():
    assert parse_cells("2") == [2] and parse_cells("2, 4") == [2, 4]
    for text in ("x", "2,x", ""):
        with pytest.raises(UserError, match=f"numbers from 2 to 4, such as 2 or 2,3,4; got '{text}'"):
            parse_cells(text)


@pytest.mark.parametrize("name, short", [
    ("Oak chair with cushion", "chair"), ("Rice, raw, brown", "rice"), ("Chair 2", "chair"), ("mp3 player", "player"),
    ("Window (double)", "window"), ("Sofa 90x200", "sofa"), ("1200", ""), ("with", "with"), ("Crème brûlée", "brûlée"),
    ("T-shirt", "t-shirt")])  # fmt: skip
def test_the_noun_of_a_name(name, short):
    assert noun(name) == short


@pytest.mark.parametrize("name, words", [
    ("chair", "a chair"), ("armchair", "an armchair"), ("shelves", "shelves"), ("glass", "a glass"), ("rice", "rice"),
    ("unit", "a unit"), ("umbrella", "an umbrella")])  # fmt: skip
def test_articles(name, words):
    assert phrase(name) == words
