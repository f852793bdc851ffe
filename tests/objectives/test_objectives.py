"""Objectives on random models: groups, empty captions, collapse, accumulation, ranks."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from interlace.config import VLConfig
from interlace.embed.patches import Patches
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.layers import Width
from interlace.learner import Learner
from interlace.objectives import ITC, ITM, VQA, AnswerQuestions
from interlace.objectives.base import Views
from interlace.objectives.itc import contrast
from interlace.objectives.whole import look_ahead
from interlace.trainer import CollapseAlarm


def learner(objectives, fusion="mid", streams="dual", seed=0):
    torch.manual_seed(seed)
    width = Width(16, heads=4, norm="pre", dropout=0.0, attention_dropout=0.0)
    heads = {o.head: o.head_options() for o in objectives}
    config = VLConfig(Words(width, vocabulary=50, positions=12), Patches(width, size=16, patch=8), fusion=fusion,
                      streams=streams, layers=2, heads=heads)  # fmt: skip
    model = Learner(config).learn_by([(o, 1.0) for o in objectives])
    for head in model.heads.values():  # no dropout anywhere: runs must be comparable to the last digit
        for module in head.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return model


def batch(rows=8, seed=1, groups=None, answers=4):
    g = torch.Generator().manual_seed(seed)
    ids = {f"{n}_ids": torch.randint(5, 50, (rows, 6), generator=g) for n in ("caption", "other", "question")}
    masks = {f"{n}_mask": torch.ones(rows, 6, dtype=torch.long) for n in ("caption", "other", "question")}
    real = {f"{n}_real": torch.ones(rows, dtype=torch.bool) for n in ("caption", "other", "question")}
    scores = torch.nn.functional.one_hot(torch.randint(0, answers, (rows,), generator=g), answers).float()
    pixels = torch.randint(0, 256, (rows, 3, 16, 16), generator=g, dtype=torch.uint8)
    return {**ids, **masks, **real, "group": torch.arange(rows) if groups is None else torch.tensor(groups),
            "pixel_values": pixels, "answer_scores": scores}  # fmt: skip


def part(whole, rows):
    return {k: v[rows] for k, v in whole.items()}


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["itc", "itm", "vqa"])
def test_the_loss_of_a_random_model_is_that_of_knowing_nothing(name):
    # temperature 1: at the usual 0.07 even random vectors spread the logits
    objective = {"itc": ITC(size=8, temperature=1.0), "itm": ITM("drawn"), "vqa": VQA(["a", "b", "c", "d"])}[name]
    model = learner([ITC(size=8), objective] if name == "itm" else [objective])
    b = batch()
    scored = objective.loss(model, b, Views(model, b))
    nothing = {"itc": math.log(8), "itm": math.log(2), "vqa": 4 * math.log(2)}[name]
    assert scored.loss.item() == pytest.approx(nothing, rel=0.15)
    assert {name, f"{name}_accuracy"} <= set(scored.logs)


def test_rows_of_a_group_are_positives_of_each_other_and_never_negatives():
    torch.manual_seed(0)
    text, image = (torch.nn.functional.normalize(torch.randn(4, 8), dim=-1) for _ in range(2))
    group, real = torch.tensor([1, 1, 2, 3]), torch.ones(4, dtype=torch.bool)
    loss, _ = contrast(text, image, group, real, torch.tensor(10.0))
    logits = 10 * text @ image.T
    target = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    by_hand = -((target * logits.log_softmax(1)).sum() + (target * logits.T.log_softmax(1)).sum()) / 8
    torch.testing.assert_close(loss, by_hand)
    # two equal products: calling one the other's negative would cost more
    twins = torch.stack([text[0], text[0], text[2], text[3]])
    together, _ = contrast(twins, twins, group, real, torch.tensor(50.0))
    apart, _ = contrast(twins, twins, torch.arange(4), real, torch.tensor(50.0))
    assert together == pytest.approx(apart.item()) == pytest.approx(math.log(2) / 2, abs=1e-3)


def test_a_row_without_caption_changes_nothing_for_the_others():
    torch.manual_seed(0)
    text, image = (torch.nn.functional.normalize(torch.randn(4, 8), dim=-1) for _ in range(2))
    text.requires_grad_()
    real = torch.tensor([True, True, True, False])
    with_empty, _ = contrast(text, image, torch.arange(4), real, torch.tensor(10.0))
    without, _ = contrast(text[:3], image[:3], torch.arange(3), real[:3], torch.tensor(10.0))
    torch.testing.assert_close(with_empty, without)
    with_empty.backward()
    assert torch.isfinite(text.grad).all() and not text.grad[3].any()


def test_hard_negatives_never_come_from_the_own_group():
    itm = ITM("hard")
    model = learner([ITC(size=8), itm])
    groups = [0, 0, 0, 1, 1, 2, 2, 2]
    b = batch(groups=groups)
    for _ in range(30):
        text, image, found = itm.mine(model, b, Views(model, b))
        assert found.all()
        assert (b["group"][text] != b["group"]).all() and (b["group"][image] != b["group"]).all()


def test_a_batch_of_one_group_scores_its_positives_alone():
    itm = ITM("hard")
    model = learner([ITC(size=8), itm])
    b = batch(groups=[5] * 8)
    scored = itm.loss(model, b, Views(model, b))
    scored.loss.backward()
    assert torch.isfinite(scored.loss) and 0 < scored.loss < 0.6  # half of ln 2: the other class has no rows


def test_itm_weighs_both_classes_equally_whatever_the_number_of_negatives():
    model = learner([ITC(size=8), ITM("both")])
    with torch.no_grad():
        model.heads["match"].out.weight.zero_()
        model.heads["match"].out.bias.zero_()
    b = batch()
    for negatives in ("drawn", "hard", "both"):
        assert ITM(negatives).loss(model, b, Views(model, b)).loss.item() == pytest.approx(math.log(2), abs=1e-5)


def test_vqa_counts_only_questions_with_a_listed_answer():
    vqa = VQA(["a", "b", "c", "d"])
    model = learner([vqa])
    b = batch()
    whole = vqa.loss(model, b, Views(model, b)).loss
    b["answer_scores"][:4] = 0
    half = vqa.loss(model, b, Views(model, b)).loss
    rest = part(b, slice(4, 8))
    torch.testing.assert_close(half, vqa.loss(model, rest, Views(model, rest)).loss / 2)
    assert half < whole


def with_a_class_token(model):
    """It starts at zero, where the first norm divides by next to nothing: gradients of 1e5, which round off as much."""
    torch.nn.init.normal_(model.image.first, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("fusion", ["late", "mid", "early"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(fusion):
    objectives = [ITC(size=8), ITM("drawn"), VQA(["a", "b", "c", "d"])]
    b = batch(groups=[0, 0, 1, 2, 3, 4, 5, 1])
    whole, pieces = with_a_class_token(learner(objectives, fusion)), with_a_class_token(learner(objectives, fusion))
    loss = whole(**b)["loss"]
    loss.backward()
    micro = [part(b, slice(n, n + 2)) for n in range(0, 8, 2)]
    total = 0.0
    for m, ahead in zip(micro, look_ahead(pieces, micro, 4)):
        piece = pieces(ahead=ahead, **m)["loss"] / 4  # the trainer's division
        piece.backward()
        total += piece.item()
    assert total == pytest.approx(loss.item(), rel=1e-5)
    expected, got = gradients(whole), gradients(pieces)
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=2e-6, rtol=1e-3, msg=name)


RANK = """
import os, sys, torch
sys.path.insert(0, {tests!r})
import torch.distributed as dist
from test_objectives import ITC, ITM, VQA, batch, gradients, learner, part
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = learner([ITC(size=8), ITM("drawn"), VQA(["a", "b", "c", "d"])])
wrapped = torch.nn.parallel.DistributedDataParallel(model)
mine = part(batch(groups=[0, 0, 1, 2, 3, 4, 5, 1]), slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4))
loss = wrapped(**mine)["loss"]
loss.backward()
dist.all_reduce(loss)
if dist.get_rank() == 0:
    torch.save({{"loss": loss.item() / 2, **gradients(model)}}, {out!r})
dist.barrier()  # a rank that leaves early takes gloo's connections from under the other
dist.destroy_process_group()
"""


def test_two_ranks_give_the_loss_and_gradient_of_one_process_with_the_whole_batch(tmp_path):
    out = tmp_path / "gradients.pt"
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(tests=str(Path(__file__).parent), out=str(out)))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
                           "--standalone", str(script)], capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = torch.load(out, weights_only=True)
    model = learner([ITC(size=8), ITM("drawn"), VQA(["a", "b", "c", "d"])])
    loss = model(**batch(groups=[0, 0, 1, 2, 3, 4, 5, 1]))["loss"]
    loss.backward()
    assert ranks.pop("loss") == pytest.approx(loss.item(), rel=1e-5)
    expected = gradients(model)
    assert ranks.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(ranks[name], expected[name], atol=2e-6, rtol=1e-3, msg=name)


class Step:
    is_world_process_zero = True

    def __init__(self, step):
        self.global_step = step


def test_the_alarm_rings_for_one_class_and_for_knowing_nothing_and_not_for_health(capsys):
    alarm = CollapseAlarm(after=10, patience=3)
    healthy = {"itm_positive": 0.5, "itc": 2.0, "itc_chance": 4.0}
    for step in range(0, 10):  # too early to tell
        alarm.on_log(None, Step(step), None, logs={"itm_positive": 0.0, "itc": 4.0, "itc_chance": 4.0})
    alarm.on_log(None, Step(11), None, logs=dict(healthy))
    assert not alarm.raised
    for step in range(12, 15):
        logs = {"itm_positive": 0.0, "itc": 3.99, "itc_chance": 4.0}
        alarm.on_log(None, Step(step), None, logs=logs)
    assert len(alarm.raised) == 2 and logs["itm_alarm"] == logs["itc_alarm"] == 1
    assert "ln(batch)" in capsys.readouterr().out


def test_the_alarm_knows_every_contrast_and_the_names_of_passes(capsys):
    alarm = CollapseAlarm(after=10, patience=2)
    for step in (11, 12):
        logs = {"itc_momentum": 6.0, "itc_momentum_chance": 6.0, "itc_sigmoid": 5.2, "itc_sigmoid_chance": 5.2,
                "text/itc": 1.0, "text/itc_chance": 4.0, "more/itm_positive": 1.0}  # fmt: skip
        alarm.on_log(None, Step(step), None, logs=logs)
    assert logs["itc_momentum_alarm"] == logs["itc_sigmoid_alarm"] == logs["more/itm_alarm"] == 1
    assert len(alarm.raised) == 3 and "text/itc_alarm" not in logs


def test_of_several_answers_one_is_drawn_as_often_as_people_gave_it():
    class Draw:
        def questions_about(self, index, rng, most):
            answers = [("red", 0.75), ("pink", 0.25), ("unheard of", 5.0), ("no", 0.0)]
            return [SimpleNamespace(question="which colour?", answers=answers)]

    objective, rng, drawn = AnswerQuestions(["no", "pink", "red"], rate=1.0), np.random.default_rng(0), []
    for _ in range(400):
        sample = {"part": {}}
        objective.prepare(sample, None, 0, Draw(), rng)
        drawn.append(int(sample["part"]["answer"]))
    assert sample["part"]["text"] == "which colour?" and set(drawn) == {1, 2}
    assert 0.68 < drawn.count(2) / len(drawn) < 0.82


def test_an_objective_without_its_head_is_refused():
    with pytest.raises(UserError, match="needs the 'answers' head"):
        learner([ITC(size=8)]).learn_by([(VQA(["a"]), 1.0)])
