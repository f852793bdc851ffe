"""A match head of products that begins with what captions and pictures agree on."""

import pytest
import torch

from interlace.compose import Composition
from interlace.data.batches import Collate, Samples
from interlace.data.sources import open_source
from interlace.learner import Learner
from interlace.objectives import ITM, Pass
from interlace.objectives.base import Views
from interlace.product_start import align_product
from interlace.systems import build_system


@pytest.fixture(scope="module")
def made(text_tower, image_tower, shapes):
    source = open_source(shapes)

    def make(system="vilbert", objective=None, width=32):
        what = Composition(system=system, text=str(text_tower), image=str(image_tower), width=width, heads=4, layers=2,
                           size=64, dropout=0.0, max_length=16)  # fmt: skip
        torch.manual_seed(0)
        objective = objective or ITM("drawn")
        model, processor = build_system(what, [objective], None, Learner)
        model.learn_by([Pass([(objective, 1.0)])])
        samples = Samples(source, "train", processor, model.passes, seed=0, augment=False)
        return model, samples, Collate(processor, None, model.passes, model.cells_to_hide())

    return make


@torch.no_grad()
def told_right(model, samples, collate) -> float:
    batch = collate([samples[(1, n)] for n in range(len(samples))])
    training, scored = model.training, model.eval().objectives[0][0].loss(model, batch, Views(model, batch))
    model.train(training)
    return float(scored.logs["itm_accuracy"])


@pytest.mark.parametrize("flipped", [False, True])
def test_pairs_are_told_apart_before_anything_is_learnt(made, flipped):
    model, samples, collate = made()
    head = model.heads["match"]
    head.flipped = flipped
    was = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert told_right(model, samples, collate) < 0.55
    model.train()
    right = align_product(model, samples, collate, batch=32)
    assert model.training and right > 0.65
    assert told_right(model, samples, collate) > 0.65
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, was[name])}
    assert changed == {f"{part}.{kind}" for kind in ("weight", "bias")
                       for part in ("poolers.text.dense", "poolers.image.dense", "heads.match.out")}  # fmt: skip
    if flipped:
        straight, *rest = made()
        align_product(straight, *rest, batch=32)
        states = torch.rand(3, 32), torch.rand(3, 32)
        torch.testing.assert_close(head.eval()(*states), straight.heads["match"].eval()(*states))


def unchanged(model, samples, collate) -> bool:
    was = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = align_product(model, samples, collate, batch=32)
    return found is None and all(torch.equal(p, was[name]) for name, p in model.named_parameters())


def test_other_heads_are_left_alone(made):
    assert unchanged(*made("lxmert"))


def test_pictures_that_all_look_alike_are_left_alone(made):
    model, samples, collate = made()
    with torch.no_grad():
        for part in model.image.parameters():
            part.zero_()
    assert unchanged(model, samples, collate)
