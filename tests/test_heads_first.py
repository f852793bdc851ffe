"""Heads that learn alone before the rest moves."""

import copy
from dataclasses import fields

import pytest
import torch
from torch import nn

from interlace.compose import Composition
from interlace.data.batches import Collate, Samples
from interlace.data.sources import open_source
from interlace.heads_first import fit_heads, gather_pairs, whiten
from interlace.learner import Learner
from interlace.objectives import ITC, ITM, MLM, VQA, MomentumITC, Pass
from interlace.objectives.base import Pairs, Views
from interlace.systems import build_system
from interlace.train import answer_list, train
from tests.conftest import toy_settings


@pytest.fixture(scope="module")
def source(shapes):
    return open_source(shapes)


@pytest.fixture
def made(text_tower, image_tower, source):
    def make(system, *objectives):
        what = Composition(system=system, text=str(text_tower), image=str(image_tower), width=32, heads=4, layers=2,
                           size=64, dropout=0.0, max_length=16)  # fmt: skip
        torch.manual_seed(0)
        model, processor = build_system(what, list(objectives), None, Learner)
        model.learn_by([Pass([(o, 1.0) for o in objectives])])
        samples = Samples(source, "train", processor, model.passes, seed=0, augment=False)
        return model, samples, Collate(processor, None, model.passes, model.cells_to_hide())

    return make


def losses(model, samples, collate):
    batch = collate([samples[(0, n)] for n in range(len(samples))])
    model.eval()
    with torch.no_grad():
        return {o.name: float(o.loss(model, batch, Views(model, batch, part, plan)).loss)
                for plan, part in zip(model.passes, batch["parts"]) for o, _ in plan.objectives}  # fmt: skip


@pytest.mark.parametrize("system", ["uniter", "lxmert", "vilbert", "vl_bert", "vilt", "visual_bert"])
def test_heads_learn_and_nothing_else_moves(system, made, source):
    model, samples, collate = made(system, ITM("drawn"), VQA(answer_list(source), questions=2))
    before = losses(model, samples, collate)
    was = {n: p.detach().clone() for n, p in model.state_dict().items() if not n.startswith("heads.")}
    model.train()
    found = fit_heads(model, samples, collate, batch=32)
    assert set(found) == {"itm", "vqa"} and model.training
    assert all(torch.equal(value, was[n]) for n, value in model.state_dict().items() if n in was)
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
    after = losses(model, samples, collate)
    assert found["vqa"].after < 0.9 * found["vqa"].before and after["vqa"] < 0.9 * before["vqa"]
    assert found["itm"].after <= found["itm"].before


def test_pairs_and_score_are_the_objectives_loss(made, source):
    model, samples, collate = made("uniter", ITM("drawn"), VQA(answer_list(source), questions=2))
    batch = collate([samples[(0, n)] for n in range(16)])
    model.eval()
    for objective, _ in model.objectives:
        with torch.no_grad():
            views = Views(model, batch)
            pairs = objective.pairs(model, batch, views)
            logits = model.heads[objective.head](pairs.text, pairs.image)
            again = objective.score(logits, pairs.target, pairs.weight).loss
            torch.testing.assert_close(again, objective.loss(model, batch, Views(model, batch)).loss)
            if objective.name == "itm":  # half of it by the true pairs, half by the others
                each = torch.nn.functional.cross_entropy(logits, pairs.target, reduction="none")
                expected = (each[:16].mean() + each[16:].mean()) / 2
                assert pairs.target.tolist() == [1] * 16 + [0] * 16
            else:
                p = logits.sigmoid()
                expected = -(pairs.target * p.log() + (1 - pairs.target) * (1 - p).log()).sum(-1).mean()
            torch.testing.assert_close(again, expected)
        assert pairs.row.tolist() == [*range(16)] * 2


def test_hard_negatives_by_a_slow_copy_that_is_not_made_yet(made):
    """Heads come first, the copy is made of what the model then is: until there is one, the model is its own copy."""
    model, samples, collate = made("uniter", MomentumITC(), ITM("hard", alike="momentum"))
    now = gather_pairs(model, samples, collate, 1, 16, False, 0)
    model.attach(16, len(samples))
    then = gather_pairs(model, samples, collate, 1, 16, False, 0)
    (pairs, _), (same, _) = now[model.objectives[1][0]], then[model.objectives[1][0]]
    torch.testing.assert_close(pairs.text, same.text)
    torch.testing.assert_close(pairs.image, same.image)


def test_pairs_are_those_of_the_rows_they_name(made, source):
    model, samples, collate = made("uniter", VQA(answer_list(source)))
    objective = model.objectives[0][0]
    pairs, group = gather_pairs(model, samples, collate, 1, 10, False, 0)[objective]
    one, its = gather_pairs(model, samples, collate, 1, 1, False, 0)[objective]  # another batch size, the same pairs
    assert torch.equal(group, its)
    for field in fields(Pairs):
        if field.name != "row":
            torch.testing.assert_close(getattr(pairs, field.name), getattr(one, field.name), atol=1e-5, rtol=1e-4)


def test_a_head_that_cannot_get_better_stays_as_it_is(made):
    model, samples, collate = made("uniter", ITM("drawn"))
    fit_heads(model, samples, collate, batch=32, epochs=200, patience=200)
    stands = copy.deepcopy(model.heads["match"].state_dict())
    found = fit_heads(model, samples, collate, batch=32, lr=10.0, epochs=2)  # steps that can only do harm
    assert found["itm"].after == found["itm"].before
    assert all(torch.equal(value, stands[n]) for n, value in model.heads["match"].state_dict().items())


def test_objectives_without_pairs_and_too_few_groups_fit_nothing(made, monkeypatch):
    model, samples, collate = made("uniter", MLM(), ITM("swap"))
    was = copy.deepcopy(model.heads.state_dict())
    assert fit_heads(model, samples, collate) == {}
    assert all(torch.equal(value, was[n]) for n, value in model.heads.state_dict().items())
    model, samples, collate = made("uniter", ITM("drawn"))
    monkeypatch.setattr("interlace.heads_first.LEAST", 10_000)
    assert fit_heads(model, samples, collate) == {}


class Two(nn.Module):
    """A head whose first linears read both vectors."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(6, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, text, image):
        return self.out(torch.tanh(self.left(text) * self.right(image)))


def test_whitening_changes_what_is_read_and_not_what_is_said():
    torch.manual_seed(0)
    text = torch.randn(200, 6) @ torch.diag(torch.tensor([10.0, 3, 1, 0.3, 0.1, 0.03])) + 5
    image = torch.randn(200, 4) @ torch.randn(4, 4)
    head, rows = Two(), torch.arange(200)
    said = head(text, image)
    undo = whiten(head, Pairs(text, image, rows, torch.ones(200), rows))
    torch.testing.assert_close(head(text, image), said, atol=1e-4, rtol=1e-4)
    seen = []
    hook = head.left.register_forward_pre_hook(lambda part, given: seen.append(given[0]))
    head(text, image)
    hook.remove()
    spread = seen[0].std(0)
    assert spread.max() / spread.min() < 5 < text.std(0).max() / text.std(0).min()
    with torch.no_grad():  # what is learnt meanwhile is kept
        head.left.weight += 0.1 * torch.randn_like(head.left.weight)
    learnt = head(text, image)
    undo()
    torch.testing.assert_close(head(text, image), learnt, atol=1e-4, rtol=1e-4)
    assert not head.left._forward_pre_hooks


def test_a_recipe_asks_for_it(shapes, text_tower, tmp_path, capsys):
    def weights(out, **more):
        settings = toy_settings(shapes, text_tower, tmp_path / out, steps=3, batch=16, evaluate=False, **more)
        train(settings)
        return (tmp_path / out / "model.safetensors").read_bytes()

    once = weights("once", heads_first=True)
    assert "heads first, loss on held-out groups: itm " in capsys.readouterr().out
    assert once == weights("again", heads_first=True) != weights("without")


def test_contrast_alone_has_no_head_to_fit(made):
    model, samples, collate = made("uniter", ITC(size=16))
    assert fit_heads(model, samples, collate) == {}
