"""A known share of wrong captions: the same for a seed, in no group of their own, with the truth beside them."""

from collections import Counter

import numpy as np
import pytest

from interlace.bootstrap.corrupt import clusters, corrupt, exchanged
from interlace.cli import main
from interlace.data.check import check
from interlace.data.sources import open_source
from interlace.errors import UserError


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_table(few, tmp_path):
    source = open_source(few)
    one, same, other = (corrupt(source, tmp_path / name, 0.3, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert files(one.folder) == files(same.folder)
    assert files(one.folder)["pairs.csv"] != files(other.folder)["pairs.csv"]


def test_what_is_wrong_is_wrong_and_all_else_stays(few, noisy):
    source = open_source(few)
    assert len(noisy) == len(source)
    groups = {source.pair(i).caption: source.group(i) for i in range(len(source))}
    train = source.indices("train").tolist()
    wrong = []
    for i in range(len(source)):
        before, after = source.pair(i), noisy.pair(i)
        assert (after.id, after.split, after.name, after.group) == (before.id, before.split, before.name, before.group)
        assert {k: v for k, v in after.attributes.items() if k in before.attributes} == before.attributes
        assert after.picture == before.picture
        assert after.attributes["caption_true"] == before.caption
        assert after.attributes["corrupted"] == (after.caption != before.caption)
        if after.attributes["corrupted"]:
            assert groups[after.caption] != after.group
            wrong.append(i)
    assert len(wrong) == round(0.3 * len(train)) and set(wrong) <= set(train)
    assert Counter(noisy.pair(i).caption for i in train) == Counter(source.pair(i).caption for i in train)
    assert (noisy.indices("val") == source.indices("val")).all()
    asked = [[(q.id, q.pair_id, q.question, q.answers, q.kind) for q in s.questions()] for s in (source, noisy)]
    assert asked[0] == asked[1] and asked[0]


def test_the_table_checks_clean(noisy):
    assert not check(noisy).errors


@pytest.mark.parametrize("seed", range(5))
def test_everybody_gets_anothers_or_nobody_anything(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 6, 40).astype(np.uint64)
    others = exchanged(labels, rng)
    assert sorted(others) == list(range(40)) and (labels[others] != labels).all()
    half = np.array([1] * 4 + [2, 3, 4, 5], np.uint64)
    assert (half[exchanged(half, rng)] != half).all()
    assert exchanged(np.array([1] * 5 + [2, 3, 4], np.uint64), rng) is None


def test_the_same_words_are_no_exchange():
    labels = clusters(np.array([1, 2, 3, 4], np.uint64), ["A lamp.", "a lamp", "", ""])
    assert labels[0] == labels[1] and len(set(labels[1:].tolist())) == 3


@pytest.mark.parametrize("options,says", [
    ({"share": 0}, "more than 0"),
    ({"share": 0.001}, "fewer than 2"),
    ({"seed": -1}, "seed is at least 0; got -1"),
    ({"split": "tran"}, "Did you mean 'train'"),
])  # fmt: skip
def test_bad_input_has_one_clear_sentence(few, tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        corrupt(open_source(few), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_no_folder_is_overwritten(few, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="there already"):
        corrupt(open_source(few), tmp_path)


def test_the_command(few, tmp_path, capsys):
    assert main(["data", "corrupt", str(few), str(tmp_path / "out"), "--share", "0.5"]) == 0
    assert "24 of 48 captions" in capsys.readouterr().out
    assert sum(open_source(tmp_path / "out").attribute("corrupted")) == 24
