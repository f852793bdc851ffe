"""Metrics against their definitions: hand-counted toys, a slow oracle, the official evaluator's recorded scores."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from interlace.errors import UserError
from interlace.tasks import metrics as m
from interlace.tasks import vqa_score as v

CASES = json.loads((Path(__file__).parent / "vqa_cases.json").read_text())

# Two images, five captions: rows are captions 0..2 of image 0 and 3..4 of image 1.
TOY = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.3, 0.7], [0.6, 0.4]])
TEXTS, IMAGES = ["a", "a", "a", "b", "b"], ["a", "b"]


# ------------------------------------------------------------------------------------------------------------ recall
def test_two_images_five_captions():
    both = m.text_image_recall(TOY, TEXTS, IMAGES, ks=(1, 2, 5))
    # captions 0 and 3 find their image first; 2 ties with the other image and therefore loses
    np.testing.assert_array_equal(both.text_to_image.ranks, [1, 2, 2, 1, 2])
    assert both.text_to_image.at == {1: 0.4, 2: 1.0, 5: 1.0}
    # image 0: its best caption scores .9, above all others; image 1: .8 of a caption of image 0 stands before its .7
    np.testing.assert_array_equal(both.image_to_text.ranks, [1, 2])
    assert both.image_to_text.at == {1: 0.5, 2: 1.0, 5: 1.0}
    assert both.r_sum == pytest.approx(0.4 + 1 + 1 + 0.5 + 1 + 1)
    assert both.r_mean == pytest.approx(both.r_sum / 6)
    assert both.text_to_image.median_rank == 2


def test_one_score_for_everything_is_the_worst_ranking():
    recall = m.recall_at_k(np.zeros((4, 10)), np.arange(4), ks=(1, 5, 10))
    np.testing.assert_array_equal(recall.ranks, [10] * 4)
    assert recall.at == {1: 0.0, 5: 0.0, 10: 1.0}


def test_two_relevant_items_with_one_score_do_not_stand_in_each_others_way():
    scores = np.array([[0.5, 0.5, 0.1]])
    assert m.recall_at_k(scores, np.array([[True, True, False]])).at[1] == 1.0
    assert m.recall_at_k(scores, np.array([[True, False, False]])).at[1] == 0.0


def slow_rank(scores, relevant):
    """The definition, one query: sort with the irrelevant first among equals, count to the first relevant."""
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], relevant[n]))
    return next((place + 1 for place, n in enumerate(order) if relevant[n]), math.nan)


def slow_precision(scores, relevant):
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], relevant[n]))
    hits, total = 0, 0.0
    for place, n in enumerate(order, start=1):
        if relevant[n]:
            hits += 1
            total += hits / place
    return total / hits if hits else math.nan


@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_the_slow_oracle_with_many_ties(seed, monkeypatch):
    monkeypatch.setattr(m, "BLOCK_NUMBERS", 60)  # several blocks, the last one short
    rng = np.random.default_rng(seed)
    scores, relevant = rng.integers(0, 6, (23, 17)).astype(float), rng.random((23, 17)) < 0.15
    recall = m.recall_at_k(scores, relevant)
    expected = [slow_rank(s, r) for s, r in zip(scores, relevant)]
    np.testing.assert_array_equal(recall.ranks, expected)
    assert recall.skipped == int((~relevant.any(axis=1)).sum()) == np.isnan(recall.hits(5)).sum()
    assert recall.at[5] == pytest.approx(np.mean([e <= 5 for e in expected if not math.isnan(e)]))


def test_all_forms_of_the_same_question_agree():
    rng = np.random.default_rng(0)
    texts, images = rng.normal(size=(12, 4)), rng.normal(size=(7, 4))
    text_groups, image_groups = rng.integers(0, 5, 12), rng.integers(0, 5, 7)
    lazy, whole = m.Cosine(texts, images), np.asarray(m.Cosine(texts, images))
    mask = text_groups[:, None] == image_groups[None]
    same = m.SameGroup([str(g) for g in text_groups], [str(g) for g in image_groups])
    reference = m.recall_at_k(whole, mask)
    for scores in (lazy, whole, torch.from_numpy(whole)):
        for relevant in (mask, same, torch.from_numpy(mask)):
            np.testing.assert_array_equal(m.recall_at_k(scores, relevant).ranks, reference.ranks)
    np.testing.assert_array_equal(same.counts(), mask.sum(1))
    column = np.array([3] * 12)
    np.testing.assert_array_equal(
        m.recall_at_k(whole, column).ranks, m.recall_at_k(whole, np.arange(7)[None] == column[:, None]).ranks
    )
    np.testing.assert_allclose(np.asarray(lazy.T), whole.T, atol=1e-6)


def test_the_query_itself_can_be_taken_out():
    features = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    itself = np.eye(4, dtype=bool)
    group = m.SameGroup(["x", "x", "y", "y"], ["x", "x", "y", "y"])
    wrong = m.SameGroup(["x", "y", "x", "y"], ["x", "y", "x", "y"])
    assert m.recall_at_k(m.Cosine(features, features), wrong).at[1] == 1.0  # everyone finds himself
    assert m.recall_at_k(m.Cosine(features, features), wrong, exclude=itself).at[1] == 0.0
    assert m.recall_at_k(m.Cosine(features, features), group, exclude=itself).at[1] == 1.0


def test_none_belongs_to_no_group():
    assert not m.SameGroup([None, "a"], [None, "b"])[0:2].any()
    assert m.SameGroup([None, "a", "zz"], ["a", None, "a"]).counts().tolist() == [0, 2, 0]


def test_small_folds_are_easier_than_the_whole():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(60, 30)) + 2 * (np.repeat(np.arange(30), 2)[:, None] == np.arange(30)[None])
    groups = np.repeat(np.arange(30), 2)
    whole = m.text_image_recall(scores, groups, np.arange(30))
    to_image, to_text = m.recall_over_folds(scores, groups, np.arange(30), size=10)
    inside = [scores[2 * a : 2 * a + 20, a : a + 10] for a in (0, 10, 20)]
    parts = [m.text_image_recall(part, groups[:20], np.arange(10)) for part in inside]
    assert to_image[1] == pytest.approx(np.mean([p.text_to_image.at[1] for p in parts]))
    assert to_text[5] == pytest.approx(np.mean([p.image_to_text.at[5] for p in parts]))
    assert to_image[1] > whole.text_to_image.at[1] and to_text[1] > whole.image_to_text.at[1]
    assert m.recall_over_folds(scores, groups, np.arange(30), size=30)[0] == whole.text_to_image.at
    with pytest.raises(ValueError, match="needs 31 images, got 30"):
        m.recall_over_folds(scores, groups, np.arange(30), size=31)


def test_scores_that_cannot_be_ordered_are_refused():
    with pytest.raises(UserError, match=r"NaN for queries 0\.\.1"):
        m.recall_at_k(np.array([[1.0, np.nan], [1, 2]]), np.array([0, 1]))
    with pytest.raises(UserError, match="NaN"):
        m.mean_average_precision(np.full((2, 2), np.nan), ["a", "a"])
    with pytest.raises(ValueError, match=r"expected \(2, 3\)"):
        m.recall_at_k(np.zeros((2, 3)), np.zeros((3, 2), bool))
    with pytest.raises(ValueError, match="target columns"):
        m.recall_at_k(np.zeros((2, 3)), np.array([0, 3]))


# ------------------------------------------------------------------------------------------------- average precision
def test_average_precision_by_hand():
    # query 0: relevant at ranks 1 and 3 of three others: (1/1 + 2/3) / 2
    scores = np.array([[9, 3, 2, 1], [3, 9, 1, 2], [2, 1, 9, 3], [1, 2, 3, 9]], dtype=float)
    result = m.mean_average_precision(scores, ["x", "x", "y", "x"])
    np.testing.assert_allclose(result.per_query, [(1 + 2 / 3) / 2, 1.0, np.nan, (1 / 2 + 2 / 3) / 2])
    assert result.skipped == 1
    assert result.value == pytest.approx(np.nanmean(result.per_query))
    with_self = m.mean_average_precision(scores, ["x", "x", "y", "x"], exclude_self=False)
    np.testing.assert_allclose(with_self.per_query[2], 1.0)  # alone, but finds itself
    assert with_self.value > result.value


def test_average_precision_agrees_with_torchmetrics():
    """Recorded from torchmetrics 1.9.0 RetrievalMAP on these rows (no ties; empty_target_action="skip").
    All scores are positive, for that implementation takes a relevant item with a score <= 0 as not found."""
    scores, labels = distinct_toy()
    expected = {True: 0.2001813203, False: 0.2236019522}
    for exclude_self, value in expected.items():
        assert m.mean_average_precision(scores, labels, exclude_self).value == pytest.approx(value, abs=1e-6)


def distinct_toy():
    """A 30 x 30 permutation pattern: i, j -> a distinct score, without a random generator whose stream might change."""
    i, j = np.meshgrid(np.arange(30), np.arange(30), indexing="ij")
    return 1.0 + (i * 37 + j * 101 + i * j * 7) % 997 + (i * 30 + j) / 1000, np.arange(30) % 7


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("exclude", ["self", "group", "nothing"])
def test_average_precision_equals_the_slow_oracle(seed, exclude, monkeypatch):
    monkeypatch.setattr(m, "BLOCK_NUMBERS", 100)
    rng = np.random.default_rng(seed)
    n = 25
    scores = rng.choice([-np.inf, -1.0, 0.0, 0.5, 1.0], size=(n, n))  # many ties, some at the very bottom
    labels = [None if x == 5 else f"c{x}" for x in rng.integers(0, 6, n)]
    groups = [None if x == 9 else int(x) for x in rng.integers(0, 10, n)]
    result = m.mean_average_precision(
        scores, labels, exclude_self=exclude == "self", groups=groups if exclude == "group" else None
    )
    for q in range(n):

        def own(i, q=q):
            by_group = exclude == "group" and groups[q] is not None
            return groups[i] == groups[q] if by_group else exclude != "nothing" and i == q

        gallery = [i for i in range(n) if labels[i] is not None and not own(i)]
        right = [labels[i] == labels[q] for i in gallery]
        expected = slow_precision(scores[q, gallery], right) if labels[q] is not None else math.nan
        assert result.per_query[q] == pytest.approx(expected, nan_ok=True)


def test_the_chance_of_a_result_is_that_of_its_own_galleries():
    rng = np.random.default_rng(0)
    labels = [None, "x", "x", "x", "y", "y", "y", "y", "z", "x"]
    groups = [0, 1, 1, 2, 3, 4, 4, 5, 6, 7]
    runs = [m.mean_average_precision(rng.random((10, 10)), labels, groups=groups) for _ in range(1500)]
    assert np.mean([run.value for run in runs]) == pytest.approx(runs[0].chance, abs=0.015)
    without = m.mean_average_precision(rng.random((10, 10)), labels)
    assert without.chance == pytest.approx(m.chance_map([3] * 8, 8)) and runs[0].chance != without.chance


def test_precision_of_features_needs_no_square_matrix(monkeypatch):
    monkeypatch.setattr(m, "BLOCK_NUMBERS", 2000)
    seen = []

    class Watched(m.Cosine):
        def __getitem__(self, rows):
            block = super().__getitem__(rows)
            seen.append(block.size)
            return block

    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(300, 8)), rng.integers(0, 4, 300)
    lazy = m.mean_average_precision(Watched(features, features), labels)
    assert max(seen) <= 2000 < 300 * 300
    monkeypatch.setattr(m, "BLOCK_NUMBERS", 10**6)
    assert lazy.value == pytest.approx(m.mean_average_precision(np.asarray(m.Cosine(features, features)), labels).value)


# ------------------------------------------------------------------------------------------------------------- chance
def test_chance_is_what_random_rankings_score():
    rng = np.random.default_rng(0)
    n, counts = 12, np.array([1, 3, 5, 0])
    mask = np.arange(n)[None] < counts[:, None]
    draws = [m.recall_at_k(rng.random((4, n)), mask, ks=(1, 3, 20)).at for _ in range(3000)]
    expected = m.chance_recall(counts, n, ks=(1, 3, 20))
    for k in (1, 3, 20):
        assert np.mean([d[k] for d in draws]) == pytest.approx(expected[k], abs=0.015)
    assert m.chance_recall([1], 100, ks=(1, 5, 10)) == pytest.approx({1: 0.01, 5: 0.05, 10: 0.1})

    precisions = [np.mean([slow_precision(rng.random(n), row) for row in mask[:3]]) for _ in range(3000)]
    assert np.mean(precisions) == pytest.approx(m.chance_map(counts, n), abs=0.01)
    assert m.chance_map([5], 5) == pytest.approx(1.0)  # nothing wrong to rank
    assert m.chance_map([1], 4) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


# ---------------------------------------------------------------------------------------------------------- intervals
def test_interval_covers_a_known_mean_and_is_reproducible():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = m.bootstrap_interval(rng.random(80) < 0.3, n=400, seed=trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99
    values = rng.random(50)
    assert m.bootstrap_interval(values, seed=3) == m.bootstrap_interval(values, seed=3)
    assert m.bootstrap_interval(values, seed=3).mean == pytest.approx(values.mean())


def test_values_that_repeat_within_a_group_do_not_make_us_surer():
    rng = np.random.default_rng(0)
    one_each = rng.normal(size=40)
    tenfold, group = np.repeat(one_each, 10), np.repeat(np.arange(40), 10)

    def width(interval):
        return interval.high - interval.low

    honest = m.bootstrap_interval(tenfold, groups=group)
    assert width(honest) == pytest.approx(width(m.bootstrap_interval(one_each)), rel=1e-9)
    assert width(m.bootstrap_interval(tenfold)) < 0.5 * width(honest)
    assert (honest.groups, honest.values) == (40, 400)


def test_groups_of_unequal_size_weigh_by_their_queries():
    interval = m.bootstrap_interval([1, 1, 1, 0, np.nan], groups=["a", "a", "a", "b", "c"])
    assert interval.mean == 0.75 and interval.values == 4 and interval.groups == 2
    # one group of 9 zeros, nine groups of a single one: means lie between all zeros and all ones, most near 9/18
    uneven = m.bootstrap_interval([0] * 9 + [1] * 9, groups=[0] * 9 + list(range(1, 10)), n=2000)
    assert uneven.mean == 0.5 and uneven.low == pytest.approx(0.18, abs=0.06) and uneven.high == 1.0
    lonely = m.bootstrap_interval([1, 0], groups=["a", "a"])
    assert lonely.mean == 0.5 and math.isnan(lonely.low)
    with pytest.raises(ValueError, match="at least one value"):
        m.bootstrap_interval([np.nan])


def test_paired_difference_sees_what_two_intervals_cannot():
    rng = np.random.default_rng(0)
    hard = rng.random(150)  # queries differ far more than the models do
    second = hard + rng.normal(scale=0.01, size=150)
    first = second + 0.01
    difference = m.paired_difference(first + rng.normal(scale=0.01, size=150), second)
    assert difference.p < 0.01 and difference.low > 0
    a, b = m.bootstrap_interval(first), m.bootstrap_interval(second)
    assert a.low < b.high  # they overlap widely
    swapped = m.paired_difference(second, first)
    assert swapped.mean == pytest.approx(-m.paired_difference(first, second).mean)
    assert m.paired_difference(second, second).p == 1.0


def test_the_paired_test_is_right_under_no_difference():
    rng = np.random.default_rng(1)
    p = [m.paired_difference(rng.random(30), rng.random(30), n=200, seed=s).p for s in range(200)]
    assert 0.01 <= np.mean(np.array(p) <= 0.05) <= 0.10


def test_the_paired_test_equals_all_sign_flips():
    d = np.array([0.4, 0.1, -0.2, 0.3, 0.25, -0.05, 0.6, 0.15])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1)
    exact = np.mean(np.abs(d @ signs) >= abs(d.sum()) - 1e-12)
    assert m.paired_difference(d, np.zeros(8), n=20000).p == pytest.approx(exact, abs=0.01)


# ------------------------------------------------------------------------------------------------------- VQA accuracy
@pytest.mark.parametrize(("n", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)])
def test_what_n_equal_answers_are_worth(n, score):
    answers = ["cat"] * n + [f"other{i}" for i in range(10 - n)]
    assert m.vqa_accuracy(["cat"], [answers]).overall == pytest.approx(score)
    assert m.soft_score(n) == pytest.approx(score)
    assert m.soft_score_thirds(n) == pytest.approx(min(n / 3, 1))


@pytest.mark.parametrize("rules", ["2016", "2021"])
def test_recorded_scores_of_the_official_evaluator(rules):
    """200 random answer sets with punctuation, digits, articles and contractions; scores recorded from the organisers'
    evaluator before and after March 2021."""
    assert len(CASES) == 200 and sum(c["s2016"] != c["s2021"] for c in CASES) > 50
    said, humans = [c["prediction"] for c in CASES], [c["answers"] for c in CASES]
    score = m.vqa_accuracy(said, humans, rules=getattr(v, f"rules_{rules}"))
    np.testing.assert_allclose(score.per_question, [c[f"s{rules}"] for c in CASES], atol=1e-6)


def test_the_asymmetry_is_kept():
    assert m.vqa_accuracy(["two"], [["two"] * 10]).overall == 0  # the prediction becomes "2", unanimous humans stay raw
    assert m.vqa_accuracy(["two"], [["two"] * 9 + ["2"]]).overall == pytest.approx(0.3)
    assert m.vqa_accuracy(["x-ray"], [["x-ray"] * 10]).overall == 0
    assert m.vqa_accuracy(["x-ray"], [["x-ray"] * 9 + ["bone"]]).overall == 1  # now the humans lose the hyphen as well
    assert m.vqa_accuracy(["two"], [["two"] * 10], rules=v.rules_2021).overall == 1


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("red-ish", "red ish"), ("red- ish", "red ish"), ("1,000", "1000"), ("3.5", "3.5"), ("p.m.", "pm"),
        ("9 a.m", "9 am"), (". 5", " 5"), ("a/b - c", "a b  c"), ("yes!", "yes "), ("a;-b", "a  b"), ("." * 33, "."),
    ],
)  # fmt: skip
def test_punctuation(text, cleaned):
    assert v.strip_punctuation(text) == cleaned


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [("The  Cat", "cat"), ("none", "0"), ("ten an", "10"), ("dont", "don't"), ("couldnt've", "couldn't've"),
     ("couldntve", "couldntve"), ("Im", "im"), ("somebody'd", "somebodyd"), ("twas", "'twas")],
)  # fmt: skip
def test_digits_articles_contractions(text, cleaned):
    assert v.strip_articles(text) == cleaned


def test_means_by_kind_and_leaderboard_rounding():
    score = m.vqa_accuracy(
        ["yes", "no", "3"], [["yes"] * 9 + ["no"], ["yes"] * 9 + ["no"], ["4"] * 9 + ["5"]],
        kinds=["is", "is", "how many"], answer_types=["yes/no", "yes/no", "number"],
    )  # fmt: skip
    assert score.by_kind == pytest.approx({"how many": 0.0, "is": 0.65})
    assert score.by_answer_type == pytest.approx({"number": 0.0, "yes/no": 0.65})
    assert score.percent == 43.33
    with pytest.raises(ValueError, match="question 0 has no human answers"):
        m.vqa_accuracy(["yes"], [[]])


def test_soft_targets_drop_what_is_not_listed():
    ids = {"yes": 0, "no": 1}
    assert m.soft_targets(["yes"] * 2 + ["no"] * 5 + ["maybe"] * 3, ids) == {0: 0.6, 1: 1.0}
    assert m.soft_targets(["maybe"] * 10, ids) == {}
    assert m.soft_targets(["yes"] * 2, ids, m.soft_score_thirds) == pytest.approx({0: 2 / 3})
    score = m.listed_accuracy(["yes", "no", "yes"], [[("yes", 0.6), ("no", 1.0)], [("no", 1.0)], []], ["a", "a", "b"])
    np.testing.assert_allclose(score.per_question, [0.6, 1.0, 0.0])
    assert score.by_kind == {"a": 0.8, "b": 0.0}


def test_chance_of_answers_comes_from_training_only():
    train = [[("red", 1.0)], [("red", 1.0)], [("blue", 1.0)], [("2", 1.0)], [("3", 0.6), ("2", 0.3)]]
    kinds = ["colour"] * 3 + ["count"] * 2
    test = [[("blue", 1.0)], [("red", 1.0)], [("2", 1.0)], [("red", 1.0)]]
    chance = m.chance_vqa(train, kinds, test, ["colour", "colour", "count", "never seen"])
    assert chance.majority.overall == 0.5  # red
    assert chance.majority_by_kind.overall == 0.75  # red, red, 2, red
    prior = [1 / 3, 2 / 3, 1.3 / 1.9, 2 / 4.9]
    np.testing.assert_allclose(chance.prior.per_question, prior)
    flipped = m.chance_vqa(train, kinds, [[("green", 1.0)]] * 4, ["colour"] * 4)
    assert flipped.majority.overall == 0 and flipped.prior.overall == 0  # what only the test says is never learned
    assert m.majority_answer([[("b", 1.0)], [("a", 1.0)]]) == "a"
