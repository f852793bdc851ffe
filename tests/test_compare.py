"""The statistics of a comparison where the truth is known, and scores that are kept, found again and renewed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from interlace.compare import Comparison, compare, differences, load_kept, paired, save_kept, what_differs
from interlace.errors import UserError
from interlace.held import Kept, shuffled
from interlace.tasks.uncertainty import bootstrap_interval, holm, paired_difference

QUERIES, GROUPS = 120, 60


def kept(values, groups=None, ids=None) -> Kept:
    ids = np.arange(len(values)) if ids is None else ids
    groups = [f"g{i % GROUPS}" for i in ids] if groups is None else groups
    return Kept(np.asarray(values, float), np.asarray(ids), np.array(groups, dtype=np.str_))


def hits(rng, share: float, hard: np.ndarray) -> np.ndarray:
    """(QUERIES,) of 0 and 1: the queries of a group are alike in how hard they are."""
    return (rng.random(QUERIES) < np.clip(share + hard[np.arange(QUERIES) % GROUPS], 0, 1)).astype(float)


def test_two_equal_models_are_told_apart_as_rarely_as_promised():
    """Ties: both variants answer with the same chance. The 95% interval holds 0 in about 95% of the worlds, p < 0.05
    comes in about 5%, and after Holm's correction for 6 measures a false alarm comes in at most 5% of the worlds."""
    rng, covered, small, alarms, worlds = np.random.default_rng(0), [], [], [], 100
    for _ in range(worlds):
        p = []
        for _ in range(6):
            hard = rng.normal(0, 0.25, GROUPS)
            difference, _ = paired([(kept(hits(rng, 0.5, hard)), kept(hits(rng, 0.5, hard)))], flips=1000)
            covered.append(difference.low <= 0 <= difference.high)
            p.append(difference.p)
        small += [value < 0.05 for value in p]
        alarms.append(min(holm(p)) < 0.05)
    # 600 tests: three standard errors of 5% are 2.7%
    assert 0.92 < np.mean(covered) < 0.98
    assert 0.02 < np.mean(small) < 0.08
    assert np.mean(alarms) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / worlds)


def test_the_interval_is_as_wide_as_groups_make_it():
    """Queries that repeat within a group say the same thing again: the interval by query is too narrow, by group it
    covers the truth."""
    rng, covered = np.random.default_rng(1), {"groups": [], "queries": []}
    for _ in range(300):
        values = np.repeat(rng.random(30) < 0.4, 6).astype(float)  # (180,) 30 groups of 6 equal queries
        groups = np.repeat(np.arange(30), 6).tolist()
        for name, given in (("groups", groups), ("queries", None)):
            interval = bootstrap_interval(values, n=400, groups=given)
            covered[name].append(interval.low <= 0.4 <= interval.high)
    assert np.mean(covered["groups"]) > 0.9 and np.mean(covered["queries"]) < 0.75


def test_a_real_difference_is_found_among_many_ties_and_its_size_is_right():
    rng, scores = np.random.default_rng(2), {}
    for seed in (0, 1, 2):
        for variant, gain in (("late", 0.0), ("mid", 0.25)):
            hard = np.random.default_rng(99).normal(0, 0.2, GROUPS)
            measures = {("shop", f"measure {m}"): kept(hits(rng, 0.4, hard)) for m in range(20)}
            measures[("shop", "answers")] = kept(hits(rng, 0.4 + gain, hard))
            scores[("dual", variant), seed] = measures
    tests = differences(scores)
    assert len(tests) == 21
    (found,) = [t for t in tests if t.p_holm < 0.05]
    assert found.measure == "answers" and found.low < -0.25 < found.high < 0 and len(found.by_seed) == 3
    assert np.mean(found.by_seed) == pytest.approx(found.mean)
    said = what_differs(tests)
    assert said.startswith("21 paired tests") and "after Holm's correction for the 21: 1." in said
    assert said.count("| shop |") == sum(t.p < 0.05 for t in tests)


def test_seeds_are_averaged_so_that_their_noise_shrinks():
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 0.1, GROUPS)
    pairs = [(kept(hits(rng, 0.5, hard)), kept(hits(rng, 0.5, hard))) for _ in range(9)]
    one, nine = paired(pairs[:1])[0], paired(pairs)[0]
    assert nine.high - nine.low < 0.45 * (one.high - one.low)  # a third, were the seeds independent


def test_queries_are_matched_by_what_they_are_of():
    rng = np.random.default_rng(4)
    first, second = rng.random(50), rng.random(50)
    order = rng.permutation(50)
    expected, _ = paired([(kept(first), kept(second))])
    turned, _ = paired([(kept(first), kept(second[order], ids=order))])
    assert turned == expected
    holes = first.copy()
    holes[3] = np.nan  # nothing to find for this query
    found, _ = paired([(kept(holes), kept(np.delete(second, 7), ids=np.delete(np.arange(50), 7)))])
    keep = np.delete(np.arange(50), [3, 7])
    assert found.values == 48 and found.mean == pytest.approx((first - second)[keep].mean())
    assert paired([(kept(first), kept(second, ids=np.arange(50) + 100))])[0] is None


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # never falls: 0.04 * 1 < 0.03 * 2
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_the_smallest_p_can_survive_the_correction():
    """150 measures: with 1,000 flips p could not be less than 0.001, nor corrected less than 0.15."""
    rng = np.random.default_rng(5)
    sure = {("shop", "sure"): kept(np.ones(QUERIES))}, {("shop", "sure"): kept(np.zeros(QUERIES))}
    noise = [{("shop", f"{m}"): kept(rng.integers(0, 2, QUERIES)) for m in range(150)} for _ in range(2)]
    tests = differences({(("dual", v), 0): s | n for v, s, n in zip(("late", "mid"), sure, noise)})
    assert [t.measure for t in tests if t.p_holm < 0.05] == ["sure"]


def test_a_comparison_of_one_variant_says_so():
    assert "nothing to test" in what_differs(differences({(("dual", "late"), 0): {("shop", "m"): kept([0.0, 1.0])}}))


def test_kept_scores_come_back_as_they_were(tmp_path):
    given = {("a/b.csv", "text to image R@1"): kept([1, np.nan, 0], groups=["é", "b", "b"]),
             ("food", "answers: x/y"): kept([0.3])}  # fmt: skip
    save_kept(tmp_path / "test.npz", given)
    found = load_kept(tmp_path / "test.npz")
    assert list(found) == list(given)
    for name in given:
        for part in ("values", "ids", "groups"):
            np.testing.assert_array_equal(getattr(found[name], part), getattr(given[name], part))
    save_kept(tmp_path / "test.npz", {})
    assert load_kept(tmp_path / "test.npz") == {}


@pytest.mark.parametrize("sizes", [[1] * 9, [3, 3, 3], [4, 1, 2, 1], [1, 1]])
def test_blind_pictures_are_of_another_group(sizes):
    groups = [f"g{n}" for n, size in enumerate(sizes) for _ in range(size)]
    groups = [groups[i] for i in np.random.default_rng(0).permutation(len(groups))]
    other = shuffled(groups)
    assert sorted(other) == list(range(len(groups)))  # each picture once
    assert all(groups[o] != g for o, g in zip(other, groups))
    assert (shuffled(["a"] * 5) != np.arange(5)).all() and (shuffled(["a"] * 5 + ["b"]) != np.arange(6)).all()


def called(config="demo", overrides=(), fusions=("late", "mid"), streams=("dual",), seeds=(0,)):
    return compare(config, list(overrides), list(fusions), list(streams), list(seeds), Path("nothing-is-written"))


@pytest.mark.parametrize("given, said", [
    ({"config": "uniter-small"}, "compare varies model.fusion and model.streams, which model.system=uniter fixes: take "
                                 "a composed recipe such as demo."),
    ({"overrides": ["model.start=runs/one"]}, "which model.start=runs/one fixes"),
    ({"seeds": (0, 1, 0)}, "--seeds has 0 more than once"),
    ({"fusions": ("late", "late")}, "--fusion has late more than once"),
    ({"streams": ("dual", "dual")}, "--streams has dual more than once"),
    ({"seeds": (-1,)}, "each of --seeds is from 0 to 4294967295; got -1"),
    ({"seeds": ()}, "at least one seed"),
    ({"overrides": ["train.seed=3"]}, "train.seed=3 would have no effect: compare sets train.seed for each run. Say it "
                                      "with --seeds."),
    ({"overrides": ["train.out=runs/x"]}, "Say it with --out"),
    ({"overrides": ["model.fusion=late"]}, "Say it with --fusion"),
])  # fmt: skip
def test_runs_that_would_be_the_same_are_not_compared(given, said):
    with pytest.raises(UserError) as error:
        called(**given)
    assert said in str(error.value)


# ------------------------------------------------------------------------------------------------------- real runs


@pytest.fixture
def two(run_folder, tmp_path) -> tuple[Path, Path]:
    """(config, out): a comparison whose two runs are finished: one run, once more under the name of another fusion."""
    out = tmp_path / "compare"
    for fusion in ("mid", "late"):
        folder = out / f"dual-{fusion}-0"
        shutil.copytree(run_folder, folder)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["model"]["fusion"], config["train"]["evaluate"] = fusion, False
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    config["train"]["out"] = "unused"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "config.yaml", out


def again(two, capsys) -> tuple[dict, str]:
    found = compare(str(two[0]), [], ["late", "mid"], ["dual"], [0], two[1])
    return found, capsys.readouterr().out


def test_finished_runs_are_scored_once_tested_and_renewed_when_the_version_changes(two, capsys):
    found, said = again(two, capsys)
    assert "finished already" in said and "What differs" in (two[1] / "comparison.md").read_text()
    tests = [Comparison(**t) for t in found["differences"]]
    measures = {t.measure for t in tests}
    assert measures >= {"text to image R@1", "image to text R@10 re-ranked top 20", "image to image mAP by shape",
                        "answers, accuracy", "answers: colour"}  # fmt: skip
    assert all(t.p == 1 and t.mean == 0 for t in tests)  # it is one run
    assert f"{len(tests)} paired tests" in said and "for the " in said and "none." in said
    for line in said.splitlines():
        if line.startswith("|") and ("image" in line or "answers" in line):
            assert line.count(" / ") == 2, line  # both variants have a blind figure
    written = json.loads((two[1] / "comparison.json").read_text())
    assert len(written["results"]) == 2 and len(written["differences"]) == len(tests)

    folder = two[1] / "dual-mid-0"
    stamp = (folder / "test.npz").stat().st_mtime_ns
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    again(two, capsys)
    assert (folder / "test.npz").stat().st_mtime_ns == stamp  # found again
    content = json.loads((folder / "test.json").read_text())
    for old in (content["scores"], {**content, "version": 1}, {**content, "data": {}}, {**content, "run": "another"}):
        (folder / "test.json").write_text(json.dumps(old))
        (folder / "test.npz").write_bytes(b"old")
        assert again(two, capsys)[0] == found
        assert json.loads((folder / "test.json").read_text()) == content
    (folder / "test.npz").unlink()
    assert again(two, capsys)[0] == found
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights  # never trained again


def test_a_pair_of_scores_gives_the_same_as_the_test_itself():
    rng = np.random.default_rng(6)
    a, b = rng.random(QUERIES), rng.random(QUERIES)
    groups = [f"g{i % GROUPS}" for i in range(QUERIES)]
    assert paired([(kept(a), kept(b))])[0] == paired_difference(a, b, groups=groups)
