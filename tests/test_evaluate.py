"""Every score has its blind figure, intervals go by group, and a run is scored on what it can do and told what it
cannot."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from interlace.cli import main
from interlace.data.pictures import open_picture
from interlace.data.sources import open_source
from interlace.evaluate import (
    best,
    evaluate,
    fit_match,
    markdown,
    match_logits,
    match_signs,
    notes,
    odds,
    platt,
    reranked,
    rows_of,
    two_way,
)
from interlace.held import hold, scored, shuffled
from interlace.model import Half
from interlace.run import Run, save_run
from interlace.tasks.metrics import Cosine


@pytest.fixture(scope="module")
def source(shapes):
    return open_source(shapes)


@pytest.fixture(scope="module")
def metrics(tiny_run, source):
    return evaluate(tiny_run, source, "test")


def test_every_score_has_an_interval_a_chance_and_a_blind_figure(metrics):
    rows = dict(rows_of(metrics))
    assert {"text to image R@1", "image to text R@10 re-ranked top 20", "image to image mAP by colour",
            "answers: shape"} <= set(rows)  # fmt: skip
    for name, score in rows.items():
        assert score["low"] <= score["value"] <= score["high"], name
        assert 0 <= score["blind"] <= 1 and 0 < score["chance"] < 1, name
    for name in ("text to image R@1 re-ranked top 20", "image to image mAP by colour", "answers: colour"):
        assert rows[name]["blind"] < 0.6 < rows[name]["value"], name
    assert json.loads(json.dumps(metrics)) == metrics  # plain numbers
    for line in markdown(metrics).splitlines()[2:]:
        assert all(cell.strip() for cell in line.strip("|").split("|")), line


def test_the_blind_re_ranking_is_what_shuffled_pictures_give_through_the_match_head(tiny_run, source, metrics):
    held = hold(tiny_run, source, "test")
    other, rows = shuffled(held.groups), np.arange(len(held.pairs))
    halves = held.halves.rows(torch.from_numpy(other))
    dark = copy.copy(held)
    dark.images, dark.halves = held.images[other], Half(halves.states, halves.mask)
    cosine = np.asarray(Cosine(dark.texts, dark.images))
    mixed = reranked(cosine, match_logits(tiny_run, dark, rows, best(cosine)), tiny_run.match_weight)
    found = two_way(mixed, held.groups)
    for way in ("t2i", "i2t"):
        for k in ("R@1", "R@5", "R@10"):
            assert found[way][k]["value"] == pytest.approx(metrics["retrieval"]["reranked"][way][k]["blind"])


def test_rows_that_repeat_in_a_group_make_no_interval_narrower():
    values = np.random.default_rng(0).random(20)
    once = scored(values, [f"g{i}" for i in range(20)])
    often = scored(np.repeat(values, 7), [f"g{i}" for i in range(20) for _ in range(7)])
    assert (often["low"], often["high"]) == pytest.approx((once["low"], once["high"]))
    assert often["queries"] == 140


def test_each_query_is_kept_with_its_row_and_group(metrics, source):
    scores = dict(rows_of(metrics))
    kept = scores["image to text R@1"].kept
    assert kept.values.mean() == pytest.approx(scores["image to text R@1"]["value"])
    assert kept.ids.tolist() == source.indices("test").tolist()
    assert kept.groups.tolist() == [source.pair(int(i)).group for i in kept.ids]
    asked = scores["answers: shape"].kept
    assert [source.question(int(i)).kind for i in asked.ids] == ["shape"] * len(asked.ids)


def without(run: Run, *heads: str) -> Run:
    model = copy.deepcopy(run.model)
    for head in heads:
        del model.heads[head], model.config.heads[head]
    answers = [] if "answers" in heads else run.answers
    return Run(run.folder, model, run.processor, answers, run.temperature, run.facts)


def test_a_run_without_contrast_is_searched_by_matching(tiny_run, source):
    found = evaluate(without(tiny_run, "contrast"), source, "test")
    assert "retrieval" not in found and "image_to_image" not in found
    score = dict(rows_of(found))["text to image R@5 by matching"]
    assert score["value"] > 0.5 > score["blind"] + 0.1
    assert any("no contrast head" in note and "by matching" in note for note in notes(found))


def test_a_run_without_matching_or_answers_is_scored_on_the_rest(tiny_run, source, metrics):
    found = evaluate(without(tiny_run, "match", "answers"), source, "test")
    assert "vqa" not in found and "reranked" not in found["retrieval"]
    assert found["retrieval"]["t2i"] == metrics["retrieval"]["t2i"]
    told = " ".join(notes(found))
    assert "itm objective" in told and "vqa objective" in told and "itc objective" not in told


def test_a_run_that_can_nothing_of_it_says_so_and_is_no_error(tiny_run, source, shapes, tmp_path, capsys):
    bare = without(tiny_run, "contrast", "match", "answers")
    found = evaluate(bare, source, "test")
    assert rows_of(found) == [] and markdown(found) == "" and found["rows"] == 24
    save_run(tmp_path / "bare", bare.model, bare.processor)
    assert main(["evaluate", str(tmp_path / "bare"), str(shapes), "--out", str(tmp_path / "test.json")]) == 0
    said = capsys.readouterr().out
    assert "cannot search by vectors: no contrast head" in said and "cannot answer questions" in said
    assert json.loads((tmp_path / "test.json").read_text())["cannot"] == found["cannot"]


def said(run: Run, **facts) -> Run:
    return Run(run.folder, run.model, run.processor, run.answers, run.temperature, run.facts | facts)


RAW = {"match_fit": (1.0, 0.0), "match_head_fit": (1.0, 0.0)}


def headed(run: Run, change) -> Run:
    """The run with another match head, and nothing fitted."""
    model = copy.deepcopy(run.model)
    with torch.no_grad():
        change(model.heads["match"].out)
    return said(Run(run.folder, model, run.processor, [], 1.0, run.facts), **RAW)


def test_a_match_head_that_is_too_sure_and_says_no_too_often_is_set_right_on_validation(tiny_run, source):
    raw = without(said(tiny_run, **RAW), "contrast")
    plain, held = fit_match(raw, source)["match_fit"], hold(raw, source, "val")
    own = np.arange(len(held.pairs))
    middle = float(np.median(match_signs(raw, held, own, own, own)[:, 0]))

    def change(out):  # logit' = 3 * (logit - middle): half of the own pairs are told wrong
        out.weight.mul_(3)
        out.bias.copy_(3 * (out.bias + torch.tensor([middle, -middle]) / 2))

    sure = headed(raw, change)
    scale, offset, cosine = fit_match(sure, source)["match_fit"]
    assert scale == pytest.approx(plain[0] / 3, rel=0.1) and cosine == 0
    assert offset == pytest.approx(plain[1] + plain[0] * middle, rel=0.1)

    def right(run: Run) -> float:
        return evaluate(run, source, "test", blind=False)["match"]["value"]

    assert right(sure) < right(said(sure, **fit_match(sure, source)))


def test_what_is_fitted_is_what_the_run_says_and_survives_the_folder(tiny_run, source):
    assert tiny_run.facts["match_fit"] != [1.0, 0.0, 0.0]  # of a finished training, loaded from its folder
    scale, offset, weight = tiny_run.match_fit
    assert fit_match(said(tiny_run, **RAW), source)["match_fit"] == (scale, offset, weight) and weight > 0
    pictures = [open_picture(source.picture(row)) for row in source.indices("test")[:3]]
    plain = said(tiny_run, **RAW).match("a red square", pictures)
    cosine = tiny_run.encode_pictures(pictures) @ tiny_run.encode_texts(["a red square"])[0]
    odds = scale * np.log(plain / (1 - plain)) + offset + weight * cosine
    assert tiny_run.match("a red square", pictures) == pytest.approx(1 / (1 + np.exp(-odds)), abs=1e-4)


def test_every_way_to_a_verdict_says_the_same(tiny_run, source):
    held = hold(tiny_run, source, "test")
    rows = np.arange(len(held.pairs))[:6]
    every = match_logits(tiny_run, held, rows, np.ones((6, 6), bool))
    for text in range(6):
        signs = match_signs(tiny_run, held, rows, np.full(6, text), np.arange(6))
        assert odds(signs, tiny_run.match_fit) == pytest.approx(every[text], abs=1e-3)
    pictures = [tiny_run.see(held.pairs[r].id, held.pairs[r].picture) for r in rows]
    told = tiny_run.match(held.pairs[rows[2]].caption, pictures)
    assert np.log(told / (1 - told)) == pytest.approx(every[2], abs=1e-2)
    half, words = tiny_run.half_image(pictures), tiny_run._words([held.pairs[r].caption for r in rows])
    with torch.no_grad():
        computed = tiny_run.match_logits(tiny_run.model.half_text(*words), half).numpy()  # the cosine was not given
    assert computed == pytest.approx(np.diag(every), abs=1e-3)


def test_a_witness_that_says_the_same_of_all_or_the_contrary_weighs_nothing(tiny_run, source):
    silent = headed(tiny_run, lambda out: torch.nn.init.zeros_(out.weight))
    held = hold(silent, source, "val")
    rows = np.arange(len(held.pairs))
    assert np.ptp(match_signs(silent, held, rows, rows, rows)[:, 0]) == 0
    assert fit_match(silent, source)["match_head_fit"] == (1.0, 0.0)
    scale, _, weight = fit_match(silent, source)["match_fit"]
    assert scale == 0 and weight > 0
    assert fit_match(without(silent, "contrast"), source)["match_fit"] == (1.0, 0.0, 0.0)
    turned = headed(tiny_run, lambda out: out.weight.neg_())
    scale, _, weight = fit_match(turned, source)["match_fit"]
    assert scale == 0 and weight > 0


def test_two_witnesses_judge_better_than_either():
    rng = np.random.default_rng(0)
    true = torch.arange(4000) < 1000
    signs = torch.from_numpy(rng.normal(size=(4000, 2)) * [40, 0.1]) + true[:, None] * torch.tensor([40, 0.1])

    def right(signs) -> float:
        *weights, offset = platt(signs, true)
        yes = signs @ torch.tensor(weights, dtype=torch.double) + offset > 0
        return float((yes[true].double().mean() + (~yes[~true]).double().mean()) / 2)

    one, other = (signs * torch.tensor(which) for which in ([1.0, 0.0], [0.0, 1.0]))
    assert right(one) == pytest.approx(0.69, abs=0.03) and right(other) == pytest.approx(0.69, abs=0.03)
    assert right(signs) == pytest.approx(0.76, abs=0.03)  # d' of 1 and of sqrt(2)


def test_the_match_head_is_scored_alone_too_where_the_cosine_has_a_say(metrics, tiny_run, source):
    names = [name for name, _ in rows_of(metrics)]
    assert "match or not, by the match head alone" in names
    bare = evaluate(without(tiny_run, "contrast"), source, "test", blind=False)
    assert "match" in bare and "match_head" not in bare


def test_a_text_is_judged_beside_its_picture_and_eight_texts_of_others_are(metrics, tiny_run, source):
    held = hold(tiny_run, source, "test")
    rows = np.array([n for n, pair in enumerate(held.pairs) if pair.caption.strip()])
    groups = [held.groups[r] for r in rows]
    yes = match_logits(tiny_run, held, rows, np.ones((len(rows), len(rows)), bool)) > 0  # (texts, pictures)
    wrong = [shuffled(groups, seed) for seed in range(8)]
    assert all(groups[a] != groups[b] for texts in wrong for a, b in enumerate(texts))
    assert len({tuple(texts) for texts in wrong}) == 8
    own, picture = np.diag(yes).mean(), np.arange(len(rows))
    others = np.mean([~yes[texts, picture] for texts in wrong])
    assert metrics["match"]["value"] == pytest.approx((own + others) / 2, abs=1e-3)
    third = shuffled(groups, seed=8)
    dark = yes[picture, third].mean() + np.mean([~yes[texts, third] for texts in wrong])
    assert metrics["match"]["blind"] == pytest.approx(dark / 2, abs=1e-3)


class ByRule(Run):
    """Writes what it sees of the colour: a captioner without weights."""

    can_caption = True

    def caption(self, pictures: list[Image.Image]) -> list[str]:
        from tests.conftest import COLOURS

        said = []
        for picture in pictures:
            pixels = np.asarray(picture, float).reshape(-1, 3)
            ink = pixels[pixels.min(1) < 250]
            near = {name: np.abs(ink.mean(0) - [int(code[i : i + 2], 16) for i in (1, 3, 5)]).sum()
                    for name, code in COLOURS.items()} if len(ink) else {"white": 0}  # fmt: skip
            said.append(f"a {min(near, key=near.__getitem__)} circle")
        return said


def test_captions_are_scored_beside_those_of_other_pictures(tiny_run, source):
    bare = without(tiny_run, "contrast", "match", "answers")
    run = ByRule(bare.folder, bare.model, bare.processor, [], 1.0, bare.facts)
    found = evaluate(run, source, "test")
    scores = dict(rows_of(found))
    assert list(scores) == ["captions, CIDEr", "captions, ROUGE-L", "captions, BLEU-4"]
    for name in ("captions, CIDEr", "captions, ROUGE-L"):
        assert scores[name]["low"] > scores[name]["blind"]
    assert scores["captions, ROUGE-L"]["value"] == pytest.approx(0.25 + 0.75 * 2 / 3)  # one shape of four is a circle
    assert found["captions_written"][0]["written"].endswith("circle")
    assert not any("captions" in note for note in found["cannot"])


def test_a_run_that_only_learnt_hidden_words_is_scored_on_them(shapes, text_tower, source, tmp_path, capsys):
    from interlace.train import train
    from tests.conftest import toy_settings

    settings = toy_settings(shapes, text_tower, tmp_path / "run", steps=40, evaluate=True)
    settings.objectives = {"mlm": {"mask": 0.4}}
    folder = train(settings)
    found = evaluate(Run.load(folder), source, "test")
    ((name, score),) = rows_of(found)
    assert name == "hidden words guessed" and score["chance"] == pytest.approx(1 / 3)  # a, of "a red circle"
    assert 1 / 3 - 1e-9 <= score["value"] <= 1 and 1 / 3 - 1e-9 <= score["blind"] <= 1  # it learnt the article at least
    card = (folder / "README.md").read_text()
    assert "hidden words guessed" in card and "trained, by mlm" in card
    assert "This run cannot answer questions" in card and "interlace search" not in card
    with Image.open(folder / "loss.png") as plot:
        assert plot.width > 500  # the loss, and mlm's own
    capsys.readouterr()
    assert main(["evaluate", str(folder), str(shapes)]) == 0
    assert "hidden words guessed" in capsys.readouterr().out


def test_a_picture_that_several_questions_ask_about_is_encoded_once(tiny_run, source, monkeypatch):
    asked = [source.question(int(i)) for i in source.question_indices("test")[:6]]
    pictures = [open_picture(question.picture, size_hint=tiny_run.processor.size) for question in asked[:2]]
    shown, words = [pictures[n % 2] for n in range(6)], [question.question for question in asked]
    alone = torch.cat([tiny_run.answer_logits([picture], [said]) for picture, said in zip(shown, words)])
    encoded = []
    half_image = Run.half_image
    monkeypatch.setattr(Run, "half_image", lambda run, seen: (encoded.append(len(seen)), half_image(run, seen))[1])
    torch.testing.assert_close(tiny_run.answer_logits(shown, words), alone, atol=1e-4, rtol=1e-4)
    assert encoded == [2]


def test_a_shuffled_picture_is_shown_to_all_its_questions_in_a_row(tiny_run, source):
    from interlace.evaluate_words import another_group, asked_of

    questions = [source.question(int(i)) for i in source.question_indices("test")]
    seen: list = []
    asked, places, said = asked_of(tiny_run, source, "test", 10_000, "shuffled",
                                   lambda pictures, texts: (seen.extend(pictures), texts)[1])  # fmt: skip
    assert sorted(places.tolist()) == sorted(source.question_indices("test"))  # all of them, once
    assert [question.question for question in asked] == said
    changes = sum(one is not next_one for one, next_one in pairwise(seen)) + 1
    assert changes == len({questions[of].pair_id for of in another_group(questions)})
