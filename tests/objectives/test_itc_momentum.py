"""Contrast against a queue by a slow copy: its targets, what it keeps, and that the saved model has none of it."""

import math

import pytest
import torch
from safetensors.torch import load_file

from interlace.heads import Contrast
from interlace.model import VLModel
from interlace.objectives import MomentumITC
from interlace.objectives.base import Views
from interlace.objectives.momentum import soft_contrast
from tests.objectives.test_whole import batch, learner


def loss_of(model, full):
    objective = model.objectives[0][0]
    return objective.loss(model, full, Views(model, full)).loss


def test_rows_of_their_own_groups_have_the_loss_of_the_release():
    model, full = learner("itc_momentum"), batch([10, 11, 12, 13])
    full["caption_real"][:] = True
    (slow,) = model.beside.values()
    slow.real[:] = True
    slow.alpha = 0.4
    views, slowly = Views(model, full), Views(slow.model, full)
    with torch.no_grad():
        expected, _, _ = soft_contrast(views.vector("caption"), views.vector("image"), slowly.vector("caption"),
                                       slowly.vector("image"), slow.text, slow.image, model.contrast.scale)
    torch.testing.assert_close(loss_of(model, full).detach(), expected)


def test_rows_of_a_group_are_positives_wherever_they_are_and_absent_captions_are_nobodys():
    model, full = learner("itc_momentum"), batch([0, 0, 1, 3, 9])  # the fifth has no caption; the queue has 3, 1, 9, 9
    (slow,) = model.beside.values()
    slow.alpha = 0.0
    views, slowly = Views(model, full), Views(slow.model, full)
    loss = 0.0
    kept = [n for n in range(5 + 16) if n not in (4, 5 + 5)]  # without the row and the place that have no caption
    positives = [[0, 1], [0, 1], [2, 5 + 1], [3, 5 + 0]]
    for asked, found, queue in (("caption", "image", slow.image), ("image", "caption", slow.text)):
        candidates = torch.cat([slowly.vector(found), queue.T])[kept]
        logits = (model.contrast.scale * views.vector(asked)[:4] @ candidates.T).log_softmax(1)
        for row, those in enumerate(positives):
            loss = loss - logits[row, [kept.index(n) for n in those]].mean() / (2 * 4)
    torch.testing.assert_close(loss_of(model, full), loss)


def test_the_copy_follows_and_the_queue_turns_once_a_step_whatever_the_micro_batches():
    from tests.objectives.test_whole import cut, step

    full = batch()
    for pieces in (1, 4):
        model = learner("itc_momentum")
        (slow,) = model.beside.values()
        before, fast = slow.model.image.project.weight.clone(), model.image.project.weight.detach()
        step(model, [cut(full, slice(n, n + 8 // pieces)) for n in range(0, 8, 8 // pieces)], full)
        torch.testing.assert_close(slow.model.image.project.weight, 0.9 * before + 0.1 * fast)
        assert int(slow.at) == 8 and slow.group[:8].equal(full["group"]) and slow.real[:8].equal(full["caption_real"])
        torch.testing.assert_close(slow.text[:, :8].T, Views(slow.model, full).vector("caption"))


def test_the_soft_target_comes_in_over_the_first_epochs():
    model = learner("itc_momentum")
    objective, (slow,) = model.objectives[0][0], model.beside.values()
    objective.ramp = 2.0
    for epoch, alpha in ((0.0, 0.0), (1.0, 0.2), (2.0, 0.4), (5.0, 0.4)):
        objective.before_step(model, epoch)
        assert slow.alpha == pytest.approx(alpha)


def test_the_saved_model_has_none_of_it(tmp_path):
    model = learner("itc_momentum")
    assert not any("slow" in name or "queue" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    VLModel.from_pretrained(tmp_path)
    assert len(list(model.parameters())) == len(list(learner("itc").parameters()))


def test_what_is_kept_comes_back_bit_for_bit():
    first, second = learner("itc_momentum"), learner("itc_momentum")
    (slow,) = first.beside.values()
    with torch.no_grad():
        slow.push(torch.rand(8, 8), torch.rand(8, 8), torch.arange(8), torch.rand(8) < 0.5)
        first.contrast.text.weight.add_(1)
    slow.follow(first)
    kept = {name: x.clone() for name, x in first.beside_tensors().items()}
    assert {"0.itc_momentum.group", "0.itc_momentum.at"} < kept.keys()
    second.load_beside(kept)
    assert all(x.equal(kept[name]) for name, x in second.beside_tensors().items())
    with pytest.raises(KeyError):
        second.load_beside({})


def test_what_is_frozen_is_kept_once_and_running_statistics_follow(image_tower, text_tower):
    from interlace.compose import Composition, compose
    from interlace.learner import Learner

    objective = MomentumITC(queue=16)
    what = Composition(text=str(text_tower), image=str(image_tower), width=32, heads=4, layers=2, size=48,
                       max_length=16)  # fmt: skip
    model, _ = compose(what, [objective], None, Learner)
    model.freeze("text")
    model.learn_by([(objective, 1.0)]).attach(batch=8, rows=16)
    (slow,) = model.beside.values()
    words = model.text.tower.embeddings.word_embeddings.weight
    assert slow.model.text.tower.embeddings.word_embeddings.weight.data_ptr() == words.data_ptr()
    kept = model.beside_tensors()
    assert not any(".text.tower.embeddings" in name for name in kept)
    assert any(".image.tower." in name for name in kept)
    norm, copied = (next(m for m in x.image.tower.modules() if isinstance(m, torch.nn.BatchNorm2d))
                    for x in (model, slow.model))  # fmt: skip
    norm.running_mean.add_(3)
    model.train()
    model.before_step(0.0)
    assert copied.running_mean.equal(norm.running_mean) and not copied.training


def test_a_queue_of_its_own_choice_divides_and_holds_no_row_twice():
    model = learner("itc")
    for batch_rows, rows, expected in ((8, 50, 48), (64, 10**6, 57600), (100, 10**6, 57600), (8, 8, 8)):
        assert MomentumITC().attach(model, batch_rows, rows).size == expected // batch_rows * batch_rows


def test_the_trainers_steps_are_the_same_however_they_are_cut(shapes, text_tower, tmp_path, monkeypatch):
    """From pictures to the log: the slow copy, the queue, and hard negatives of the whole batch, read again."""
    import json

    from interlace import train as module
    from tests.conftest import toy_settings

    def without_dropout(*given):
        made, processor = make_learner(*given)
        for part in made.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        return made, processor

    make_learner, logs = module.make_learner, []
    for pieces in (1, 8):
        out = tmp_path / str(pieces)
        settings = toy_settings(shapes, text_tower, out, steps=3, batch=16, accumulate=pieces, evaluate=False,
                                log_every=1)  # fmt: skip
        settings.objectives = {"itc_momentum": {"size": 32, "queue": 32, "ramp": 0.2},
                               "itm": {"negatives": "hard", "among": "batch"}}  # fmt: skip
        module.train(settings, make=without_dropout)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if '"loss"' in line]
        logs.append([{key: line[key] for key in line if key.startswith(("it", "loss", "grad"))} for line in lines])
    assert len(logs[0]) == 3 and logs[0][0]["itc_momentum_chance"] == pytest.approx(3.8712, abs=1e-4)  # ln(16 + 32)
    for whole, cut_up in zip(*logs):
        assert cut_up == pytest.approx(whole, rel=1e-3)


def test_a_scale_at_its_bound_comes_back():
    head = Contrast(8, 8, size=4)
    with torch.no_grad():
        head.logit_scale.fill_(math.log(100) + 0.01)  # one step too far
    assert head.scale.item() == pytest.approx(100)
    head.scale.backward()
    assert head.logit_scale.grad.item() == pytest.approx(100)
