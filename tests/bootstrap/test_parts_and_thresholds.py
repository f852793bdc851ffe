"""Lines that survive a kill; thresholds against counting by hand."""

import json

import numpy as np
import pytest

from interlace.bootstrap.parts import Parts
from interlace.bootstrap.threshold import Decision, area, best, curve, held_out, labelled
from interlace.data.sources import open_source
from interlace.errors import UserError


@pytest.mark.parametrize("cut,left", [(0, 8), (1, 4), (25, 4), (10_000, 0)])
def test_a_torn_batch_is_cut_off_whole(tmp_path, cut, left):
    file = tmp_path / "lines.jsonl"
    parts = Parts(file, rows=10, batch=4)
    parts.append([{"row": n, "text": "ö"} for n in range(4)])
    parts.append([{"row": n, "text": "ö"} for n in range(4, 8)])
    whole = file.read_bytes()
    file.write_bytes(whole[: max(0, len(whole) - cut)])
    again = Parts(file, rows=10, batch=4)
    assert again.done == left and [line["row"] for line in again] == list(range(left))
    again.append([{"row": n} for n in range(left, min(left + 4, 10))])
    assert [line["row"] for line in again] == list(range(min(left + 4, 10)))


def test_the_last_batch_may_be_smaller_and_is_not_done_twice(tmp_path):
    parts = Parts(tmp_path / "lines.jsonl", rows=3, batch=2)
    parts.append([{"row": 0}, {"row": 1}])
    parts.append([{"row": 2}])
    assert Parts(parts.file, rows=3, batch=2).done == 3


def test_zeros_where_a_line_should_be_are_no_line(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_bytes(json.dumps({"row": 0}).encode() + b"\n" + b"\x00" * 20 + b"\n")
    assert Parts(file, rows=4, batch=1).done == 1


@pytest.mark.parametrize("seed", range(6))
def test_a_threshold_is_what_counting_says(seed):
    rng = np.random.default_rng(seed)
    values = np.round(rng.random(60), 1 if seed % 2 else 6)  # with ties, and without
    true = rng.random(60) < 0.3 + 0.5 * values
    for threshold, precision, recall, balanced in curve(values, true):
        passing = values >= threshold
        assert precision == pytest.approx(true[passing].mean())
        assert recall == pytest.approx(passing[true].mean())
        assert balanced == pytest.approx((passing[true].mean() + (~passing)[~true].mean()) / 2)
    grid = np.unique(values)
    every = [((values >= t)[true].mean() + (values < t)[~true].mean()) / 2 for t in grid]
    assert best(values, true)["balanced_accuracy"] == pytest.approx(max(every))
    wanted = 0.8
    reach = [t for t in grid if true[values >= t].mean() >= wanted]
    found = best(values, true, wanted)
    assert (found is None) == (not reach)
    if found:
        assert set(values[values >= found["threshold"]]) == set(values[values >= min(reach)])
    pairs = [(a > b) + 0.5 * (a == b) for a in values[true] for b in values[~true]]
    assert area(values, true) == pytest.approx(np.mean(pairs))


def test_held_out_pairs_come_from_validation_and_swap_groups(noisy):
    val = set(noisy.indices("val").tolist())
    groups = {noisy.pair(i).caption: noisy.group(i) for i in val}
    pairs = held_out(noisy)
    assert {row for row, _, _ in pairs} == val
    for row, (own, other), marks in pairs:
        assert marks == [True, False] and own == noisy.pair(row).caption
        assert groups[other] != noisy.group(row)


def test_labels_say_which_captions_are_right(noisy):
    pairs = labelled(noisy, "corrupted=no")
    assert len(pairs) == len(noisy)
    assert all(marks == [not noisy.pair(row).attributes["corrupted"]] for row, _, marks in pairs)
    turned = labelled(noisy, "corrupted")
    assert [m for _, _, (m,) in turned] == [not m for _, _, (m,) in pairs]


@pytest.mark.parametrize("column,says", [("corupted", "Did you mean 'corrupted'"), ("colour", "colour=VALUE"),
                                         ("corrupted=perhaps", "0 captions right")])  # fmt: skip
def test_labels_that_say_nothing(noisy, column, says):
    with pytest.raises(UserError, match=says):
        labelled(noisy, column)


def test_no_validation_rows_no_threshold(noisy_folder):
    with pytest.raises(UserError, match="--threshold, or --labels"):
        held_out(open_source(noisy_folder, split="train"))


@pytest.mark.parametrize("decision,says", [
    (Decision(by="cosin"), "Did you mean 'cosine'"),
    (Decision(precision=95), "from 0 to 1"),
    (Decision(threshold=0.5, precision=0.9), "not fitted"),
    (Decision(sheet=-1), "0 for none"),
])  # fmt: skip
def test_decisions_that_make_no_sense(decision, says):
    with pytest.raises(UserError, match=says):
        decision.check()


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
def test_the_share_of_wrong_texts_is_estimated_and_decides_the_threshold(share):
    rng = np.random.default_rng(0)
    true, wrong = rng.normal(1, 1, 4000), rng.normal(-1, 1, 4000)
    values, said = np.r_[true, wrong], np.r_[np.ones(4000, bool), np.zeros(4000, bool)]
    n = round(share * 4000)
    web, right = np.r_[rng.normal(1, 1, 4000 - n), rng.normal(-1, 1, n)], np.arange(4000) < 4000 - n
    fitted, halves = best(values, said, web=web), best(values, said)
    assert fitted["wrong"] == pytest.approx(share, abs=0.03)
    accuracy = [((web >= found["threshold"]) == right).mean() for found in (fitted, halves)]
    assert accuracy[0] >= accuracy[1] - 0.002
    if share == 0.05:  # one made for halves throws away what is right
        assert accuracy[0] > accuracy[1] + 0.05 and fitted["threshold"] < halves["threshold"] - 0.5
