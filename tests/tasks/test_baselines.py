"""Baselines: they find structure that is there, nothing where there is none, and never look at the test answers."""

from dataclasses import dataclass

import numpy as np
import pytest

from interlace.errors import UserError
from interlace.tasks import baselines as b
from interlace.tasks import metrics as m


@dataclass
class Asked:
    question: str
    kind: str
    answers: list
    group: str = ""


def towers(n=400, hidden=8, noise=0.1, seed=0):
    """Pictures and texts that show the same hidden thing through two unrelated linear views."""
    rng = np.random.default_rng(seed)
    thing = rng.normal(size=(n, hidden))
    see, say = rng.normal(size=(hidden, 24)), rng.normal(size=(hidden, 16))
    return (
        (thing @ see + noise * rng.normal(size=(n, 24)) + 3).astype(np.float32),
        (thing @ say + noise * rng.normal(size=(n, 16)) - 2).astype(np.float32),
    )


def recall(result, n):
    return m.text_image_recall(result.similarities, np.arange(n), np.arange(n)).text_to_image.at[1]


def test_ridge_finds_a_linear_relation_and_chance_when_there_is_none():
    x, y = towers()
    found = b.ridge_alignment(x[:300], y[:300], x[300:], y[300:])
    assert found.similarities.shape == (100, 100)
    assert recall(found, 100) > 0.8
    shuffled = np.random.default_rng(1).permutation(300)
    assert recall(b.ridge_alignment(x[:300], y[:300][shuffled], x[300:], y[300:]), 100) < 0.1


def test_ridge_is_the_closed_form():
    x, y = towers(n=60)
    result = b.ridge_alignment(x[:50], y[:50], x[50:], y[50:], lambdas=[0.3])
    a, c = m.unit(x[:50]).astype(np.float64), m.unit(y[:50]).astype(np.float64)
    a0, c0 = a - a.mean(0), c - c.mean(0)
    scale = np.trace(a0.T @ a0) / 24
    weights = np.linalg.solve(a0.T @ a0 + 0.3 * scale * np.eye(24), a0.T @ c0)
    np.testing.assert_allclose(result.pictures, (m.unit(x[50:]) - a.mean(0)) @ weights, atol=1e-5)
    np.testing.assert_allclose(result.texts, m.unit(y[50:]) - c.mean(0), atol=1e-6)


def test_ridge_in_blocks_equals_ridge_at_once(monkeypatch):
    x, y = towers(n=120)
    once = b.ridge_alignment(x[:100], y[:100], x[100:], y[100:])
    monkeypatch.setattr(m, "BLOCK_NUMBERS", 300)
    blocks = b.ridge_alignment(x[:100], y[:100], x[100:], y[100:])
    assert blocks.chosen == once.chosen
    np.testing.assert_allclose(np.asarray(blocks.similarities), np.asarray(once.similarities), atol=1e-4)


def test_the_chosen_strength_beats_one_that_memorises():
    # more dimensions of pure noise than rows: a weak ridge fits the training pairs exactly and fails on new ones
    rng = np.random.default_rng(0)
    x, y = towers(n=260, noise=0.05)
    x = np.concatenate([x - 3, 2.0 * rng.normal(size=(260, 200))], axis=1)
    careful = b.ridge_alignment(x[:160], y[:160], x[160:], y[160:])
    memorised = b.ridge_alignment(x[:160], y[:160], x[160:], y[160:], lambdas=[1e-9])
    again = b.ridge_alignment(x[:160], y[:160], x[:160], y[:160], lambdas=[1e-9])
    assert recall(again, 160) == 1.0
    assert careful.held_out[careful.chosen] == max(careful.held_out.values())
    assert careful.held_out[careful.chosen] > memorised.held_out[1e-9]
    assert recall(careful, 100) > recall(memorised, 100) + 0.05


def test_the_choice_never_splits_a_group():
    groups = [f"g{i // 4}" for i in range(40)]
    fold = b.fold_of_groups(groups, 5)
    for g in set(groups):
        assert len({fold[i] for i in range(40) if groups[i] == g}) == 1
    assert sorted(np.bincount(fold)) == [8] * 5
    with pytest.raises(UserError, match="at least 5 groups"):
        b.fold_of_groups(["a"] * 100, 5)
    # with copies of one pair on both sides of the split, the held-out score is a promise nobody can keep
    x, y = towers(n=30, noise=3.0)
    copies = np.repeat(np.arange(30), 6)
    honest = b.ridge_alignment(x[copies], y[copies], x, y, groups=copies)
    fooled = b.ridge_alignment(x[copies], y[copies], x, y, groups=[f"{c}-{i}" for i, c in enumerate(copies)])
    assert honest.chosen > fooled.chosen


def colour_questions(n, seed):
    """Pictures whose first feature is their colour. Two questions each: about the colour, and one it cannot answer."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(0, 2, n)
    features = np.stack([colour * 4.0 - 2, rng.normal(size=n) * 0.3, np.ones(n)], axis=1)
    asked, rows = [], []
    for i, c in enumerate(colour):
        price = "high" if rng.random() < 0.3 else "low"
        asked.append(Asked("What colour is it?", "colour", [(["red", "blue"][c], 1.0)], group=f"{seed}-{i}"))
        asked.append(Asked("What does it cost?", "price", [(price, 1.0)], group=f"{seed}-{i}"))
        rows += [i, i]
    return features, asked, rows


def test_neighbours_answer_what_features_show_and_stay_within_the_kind():
    features, train, rows = colour_questions(60, 0)
    seen, test, at = colour_questions(20, 1)
    result = b.nearest_neighbour_answers(features, train, seen, test, train_rows=rows, test_rows=at)
    score = m.listed_accuracy(result.predictions, [q.answers for q in test], [q.kind for q in test])
    assert score.by_kind["colour"] == 1.0
    assert score.by_kind["price"] < 1.0
    assert {p for p, q in zip(result.predictions, test) if q.kind == "price"} <= {"low", "high"}
    assert set(result.held_out) == {1, 3, 5, 10, 20, 50}
    assert result.held_out[result.chosen] == max(result.held_out.values())


def test_neighbours_in_blocks_equal_neighbours_at_once_and_the_slow_count(monkeypatch):
    features, train, rows = colour_questions(40, 0)
    seen, test, at = colour_questions(15, 1)
    once = b.nearest_neighbour_answers(features, train, seen, test, ks=[3], train_rows=rows, test_rows=at)
    monkeypatch.setattr(m, "BLOCK_NUMBERS", 50)
    blocks = b.nearest_neighbour_answers(features, train, seen, test, ks=[3], train_rows=rows, test_rows=at)
    assert once.predictions == blocks.predictions and once.held_out == {}
    for q, said in zip(range(len(test)), once.predictions):
        likeness = [
            (float(m.unit(features)[rows[t]] @ m.unit(seen)[at[q]]), t)
            for t in range(len(train)) if train[t].kind == test[q].kind
        ]  # fmt: skip
        votes = {}
        for cosine, t in sorted(likeness, reverse=True)[:3]:
            answer = train[t].answers[0][0]
            votes[answer] = votes.get(answer, 0) + (1 + cosine) / 2
        assert said == max(votes, key=votes.get)


def test_neighbours_never_read_the_test_answers():
    features, train, rows = colour_questions(40, 0)
    seen, test, at = colour_questions(10, 1)
    honest = b.nearest_neighbour_answers(features, train, seen, test, train_rows=rows, test_rows=at).predictions
    for q in test:
        q.answers = [("leak", 1.0)]
    assert b.nearest_neighbour_answers(features, train, seen, test, train_rows=rows, test_rows=at).predictions == honest
    assert "leak" not in b.question_only_prior(train, test)


def test_the_number_of_neighbours_is_chosen_on_questions_the_neighbours_do_not_hold():
    # answers at random, each picture twice in its group: only a picture's own copy could tell, and it is held out too
    rng = np.random.default_rng(0)
    features = np.repeat(rng.normal(size=(100, 6)), 2, axis=0)
    answers = np.repeat(rng.random(100) < 0.3, 2)
    train = [Asked("?", "k", [("high" if a else "low", 1.0)], group=str(i // 2)) for i, a in enumerate(answers)]
    result = b.nearest_neighbour_answers(features, train, features, train)
    assert result.held_out[1] < 0.8 and result.chosen > 1


def test_an_unseen_kind_gets_the_training_majority():
    features, train, rows = colour_questions(40, 0)
    new = [Asked("How heavy is it?", "weight", [("1 kg", 1.0)])]
    said = b.nearest_neighbour_answers(features, train, features[:1], new, ks=[5], train_rows=rows).predictions
    assert said == [m.majority_answer([q.answers for q in train])]


def test_the_blind_answer_backs_off_from_words_to_kind_to_all():
    train = [
        Asked("Is it  red?", "yes/no", [("no", 1.0)]),
        Asked("is it red?", "yes/no", [("no", 0.6), ("yes", 0.3)]),
        Asked("Is it new?", "yes/no", [("yes", 1.0)]),
        Asked("Is it old?", "yes/no", [("yes", 1.0)]),
        Asked("Which room?", "room", [("kitchen", 1.0)]),
        Asked("Unanswered?", "empty", []),
    ]
    new = [("IS IT RED?", "yes/no"), ("Is it big?", "yes/no"), ("Why?", "why"), ("Unanswered?", "empty")]
    said = b.question_only_prior(train, [Asked(question, kind, []) for question, kind in new])
    assert said == ["no", "yes", "yes", "yes"]
    with pytest.raises(UserError, match="training questions with answers"):
        b.question_only_prior([], train)
