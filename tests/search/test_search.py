"""Searching: what is asked for comes first, filters hold, and nothing found is said plainly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from squares import COLOURS, ColourEncoder, ListSource, MatchingEncoder, square

from interlace.errors import UserError
from interlace.search import Index, build_index, print_hits, search, to_dicts
from interlace.search.filters import matches, parse


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """80 squares in an index, read only."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "pictures").mkdir()
    run = ColourEncoder(folder / "run")
    pairs = [square(folder / "pictures", i) for i in range(80)]
    build_index(run, ListSource(pairs), progress=False)
    return Index.open(run.folder / "index", run), run, {p.id: p for p in pairs}


def test_text_finds_the_colour(world):
    index, run, _ = world
    result = search(index, run, text="something purple", k=5)
    assert len(result) == 5 and all("purple" in hit.caption for hit in result)
    assert [h.score for h in result] == sorted((h.score for h in result), reverse=True)
    assert result[0].match is None and result.note == "" and not result.hopeless and result.seconds > 0
    assert Path(result[0].picture.path).exists() and result[0].attributes.keys() == index.columns.keys()


def test_scores_are_cosines_in_exact_order(world):
    index, run, pairs = world
    everything = search(index, run, text="red", k=100)
    vectors = {i: run.encode_pictures([Image.open(p.picture.path)])[0] for i, p in pairs.items()}
    cosines = {i: float(v @ run.encode_texts(["red"])[0]) for i, v in vectors.items()}
    assert {h.id for h in everything} == set(pairs)
    np.testing.assert_allclose([h.score for h in everything], sorted(cosines.values(), reverse=True), atol=1e-5)
    assert all(abs(h.score - cosines[h.id]) < 1e-5 for h in everything)


def test_picture_file_and_weight(world):
    index, run, pairs = world
    image = Image.open(pairs["item 10"].picture.path)
    assert search(index, run, picture=image, k=1)[0].score == pytest.approx(1, abs=1e-5)
    assert search(index, run, picture=pairs["item 10"].picture.path, k=1)[0].score == pytest.approx(1, abs=1e-5)
    blue = Image.new("RGB", (16, 16), COLOURS["blue"])
    only_text = [h.id for h in search(index, run, text="red", k=5)]
    only_picture = [h.id for h in search(index, run, picture=blue, k=5)]
    assert [h.id for h in search(index, run, text="red", picture=blue, weight=0.0, k=5)] == only_text
    assert [h.id for h in search(index, run, text="red", picture=blue, weight=1.0, k=5)] == only_picture
    both = search(index, run, text="red", picture=blue, k=80)
    first = np.mean([h.score for h in both if h.caption.split()[1] in ("red", "blue")])
    assert first > np.mean([h.score for h in both if h.caption.split()[1] not in ("red", "blue")])


def test_like_an_item_without_itself(world):
    index, run, _ = world
    result = search(index, run, like="item 3", k=10)
    assert len(result) == 10 and "item 3" not in [h.id for h in result]
    assert "yellow" in result[0].caption
    with pytest.raises(UserError, match="No item 'item 999'"):
        search(index, run, like="item 999")


@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
def test_filters_hold_in_every_mode(world, mode):
    index, run, pairs = world
    where = "room = Living room and (width_cm < 50 or foldable = no) and not caption contains 'NUMBER4 '"
    tree = parse(where, index.filter_columns)
    allowed = {i for i, p in pairs.items() if matches(tree, {**p.attributes, "caption": p.caption})}
    found = {h.id for h in search(index, run, text="a red square", where=where, k=100, mode=mode)}
    assert found and found <= allowed
    if mode != "text":
        assert found == allowed


def test_words_and_hybrid(world):
    index, run, _ = world
    by_words = search(index, run, text="number17", mode="text")
    assert [h.id for h in by_words] == ["item 17"] and by_words[0].words > 0
    cosine = float(index.vector("item 17") @ run.encode_texts(["number17"])[0])
    assert by_words[0].score == pytest.approx(cosine, abs=1e-5)
    lists = [[h.id for h in search(index, run, text="blue number17", mode=mode, k=80)] for mode in ("vector", "text")]
    fused = [h.id for h in search(index, run, text="blue number17", mode="hybrid", k=80)]
    share = {i: sum(1 / (61 + ids.index(i)) for ids in lists if i in ids) for i in lists[0]}  # reciprocal rank fusion
    np.testing.assert_allclose([share[i] for i in fused], sorted(share.values(), reverse=True))
    assert lists[1][0] == "item 17" and fused.index("item 17") < lists[0].index("item 17")  # green: words lifted it
    for odd in ('"', "'", "AND OR NOT", "+-*~^:()[]{}", 'say "blue', "\\", "🪑", "the"):  # nothing is a query language
        search(index, run, text=odd, mode="text")
        search(index, run, text=odd, mode="hybrid")


def test_reranking_orders_by_probability(world, tmp_path):
    index, plain, _ = world
    run = MatchingEncoder(plain.folder)

    class Contrary(MatchingEncoder):  # a head of another opinion: the darker the better
        def match(self, text, pictures):
            return np.array([1 - np.asarray(p.convert("L")).mean() / 255 for p in pictures])

    result = search(index, run, text="orange", k=5)
    assert all(h.match is not None for h in result)
    contrary = search(index, Contrary(plain.folder), text="orange", k=80)
    assert len(contrary) == 80 and [h.match for h in contrary] == sorted((h.match for h in contrary), reverse=True)
    assert "black" in contrary[0].caption and "orange" not in contrary[0].caption
    assert all(h.match is None for h in search(index, run, text="orange", rerank=False))
    assert all(h.match is None for h in search(index, run, picture=Image.new("RGB", (9, 9))))
    with pytest.raises(UserError, match="no matching head"):
        search(index, plain, text="orange", rerank=True)
    with pytest.raises(UserError, match="there is no text"):
        search(index, run, picture=Image.new("RGB", (9, 9)), rerank=True)


def test_reranking_uses_the_thumbnail_when_the_original_is_gone(squares, tmp_path):
    run = MatchingEncoder(tmp_path / "run")
    pairs = squares(6)
    build_index(run, ListSource(pairs), progress=False)
    for pair in pairs:
        Path(pair.picture.path).unlink()
    result = search(Index.open(run.folder / "index", run), run, text="green", k=6)
    assert all(h.match is not None for h in result) and "green" in result[0].caption
    build_index(run, ListSource(squares(6)), thumbnail=0, rebuild=True, progress=False)
    Path(squares(6)[1].picture.path).unlink()
    result = search(Index.open(run.folder / "index", run), run, text="green", k=6)
    assert result[-1].id == "item 1" and result[-1].match is None


def test_nothing_similar_is_said(world):
    index, run, _ = world
    assert search(index, run, text="a black square").note == ""
    result = search(index, run, text="qwzx vbnm plok")
    assert result.hopeless and "Nothing similar" in result.note and len(result) == 20  # still the nearest, to judge by
    static = Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert search(index, run, picture=static).hopeless
    sure = MatchingEncoder(run.folder)
    sure.match = lambda text, pictures: np.full(len(pictures), 0.01)  # the head of a run says no to everything
    result = search(index, sure, text="black")
    assert result.hopeless and "1%" in result.note


def test_nothing_found_is_explained(world):
    index, run, _ = world

    def note(**query):
        result = search(index, run, **{"text": "red", **query})
        assert result.hopeless and not result
        return result.note

    assert "Did you mean 'Kitchen'?" in note(where="room = kitchen")
    assert "because of: room = 'Livingroom'. Did you mean 'Living room'?" in note(
        where="width_cm > 3 and room = Livingroom"
    )
    assert "for example: " in note(where="room = Ballroom xyz")
    assert "Each part alone" in note(where="width_cm > 40 and width_cm < 20")
    assert "any of these words" in note(text="zebra", mode="text")
    assert "nothing else" in note(text=None, like="item 3", where="id = 'item 3'")


def test_an_empty_index_says_so(run, tmp_path):
    index = Index.create(tmp_path / "index", run, {"room": "text"})
    result = search(index, run, text="red")
    assert not result and result.hopeless and "empty" in result.note
    assert len(index) == 0 and index.values("room") == {}


@pytest.mark.parametrize(
    "query, says",
    [
        ({}, "Nothing to search for"),
        ({"text": " \n\t "}, "Nothing to search for"),
        ({"text": "word " * 10_000}, "at most 2,000"),
        ({"text": "x", "k": 0}, "from 1 to 1,000"),
        ({"text": "x", "k": 100_000}, "from 1 to 1,000"),
        ({"text": "x", "k": 2.5}, "whole number"),
        ({"text": "x", "weight": 1.5}, "from 0 to 1"),
        ({"text": "x", "weight": float("nan")}, "from 0 to 1"),
        ({"text": "x", "mode": "hybird"}, "Did you mean 'hybrid'?"),
        ({"like": "item 3", "mode": "text"}, "there is no text"),
        ({"like": "item 3", "picture": Image.new("RGB", (4, 4))}, "got both"),
        ({"picture": "/nowhere.jpg"}, "missing file"),
        ({"text": "x", "where": "width_cm < wide"}, "width_cm is a number"),
        ({"text": "x", "where": "colour = red"}, "no column 'colour'"),
    ],
)
def test_what_cannot_be_searched_is_refused(world, query, says):
    index, run, _ = world
    with pytest.raises(UserError, match=says):
        search(index, run, **query)


def test_another_run_is_refused(world):
    index, run, _ = world
    with pytest.raises(UserError, match="another run"):
        search(index, ColourEncoder(run.folder, seed=3), text="red")


def test_results_are_printed_and_written(world):
    index, run, _ = world
    result = search(index, run, text="red [bold]square[/nothing]", k=3, mode="hybrid")
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_hits(result, console)
    shown = console.export_text()
    assert "3 hits" in shown and result[0].picture.path in shown and result[0].name in shown
    again = json.loads(json.dumps(to_dicts(result), allow_nan=False))
    assert [h["id"] for h in again["hits"]] == [h.id for h in result]
    assert again["hits"][0]["picture"]["path"] == result[0].picture.path
    print_hits(search(index, run, text="red", where="room = kitchen"), console)
    assert "Did you mean" in console.export_text()


def test_matching_that_did_not_help_on_validation_has_no_say_unless_asked(world):
    index, plain, _ = world

    class Untrusted(MatchingEncoder):
        match_weight = 0.0

    run = Untrusted(plain.folder)
    assert all(hit.match is None for hit in search(index, run, text="red", k=5))
    assert all(hit.match is not None for hit in search(index, run, text="red", k=5, rerank=True))


@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
def test_matching_without_a_weight_orders_alone_when_asked(world, mode):
    index, plain, _ = world

    class Contrary(MatchingEncoder):  # the opposite of the cosine, and of the words
        match_weight = 0.0

        def match(self, text, pictures):
            return 1 - super().match(text, pictures)

    matches = [hit.match for hit in search(index, Contrary(plain.folder), text="red", k=20, mode=mode, rerank=True)]
    assert len(set(matches)) > 1 and matches == sorted(matches, reverse=True)
