"""UNITER: sizes of the paper, and what must hold whatever the weights."""

import pytest
import torch

from interlace.embed.regions import Regions
from interlace.model import VLModel
from interlace.objectives import mlm, mvm, wra
from interlace.presets import uniter


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    regions = Regions(torch.randn(3, 5, 20, generator=g), torch.rand(3, 5, 7, generator=g))
    return torch.randint(1, 99, (3, 7), generator=g), regions


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VLModel(uniter.tiny()).eval()


def count(config):
    with torch.device("meta"):
        return sum(p.numel() for p in VLModel(config).parameters())


def test_parameters_as_in_the_release():
    assert count(uniter.uniter()) == 112_938_887
    assert count(uniter.uniter(heads={})) == 109_898_752
    assert 330_000_000 < count(uniter.uniter_large(heads={})) < 336_000_000


def test_words_and_regions_meet_in_the_first_layer(model):
    assert model.fusion_depth == 0


@torch.no_grad()
def test_a_row_does_not_depend_on_its_padding(model):
    ids, regions = batch()
    text_mask, image_mask = torch.ones(3, 7), torch.ones(3, 5)
    text_mask[0, 4:], image_mask[0, 3:] = 0, 0
    out = model(ids, regions, text_mask, image_mask)
    alone = model(ids[:1, :4], Regions(regions.features[:1, :3], regions.boxes[:1, :3]))
    torch.testing.assert_close(out.text[:1, :4], alone.text, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.image[:1, :3], alone.image, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_hidden_feature_does_not_leak(model):
    ids, regions = batch()
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[:, 2] = True
    changed = regions.features.clone()
    changed[:, 2] += 1
    a, b = model(ids, regions._replace(hidden=hidden)), model(ids, Regions(changed, regions.boxes, hidden))
    torch.testing.assert_close(a.image, b.image)
    assert (model(ids, regions).text - a.text).abs().max() > 1e-4


@torch.no_grad()
def test_save_and_load_change_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = VLModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(*batch()).pooled_text, model(*batch()).pooled_text)


def test_gradient_of_the_four_tasks_reaches_every_parameter():
    torch.manual_seed(0)
    model = VLModel(uniter.tiny())
    ids, regions = batch()
    hidden = torch.ones(3, 5, dtype=torch.bool)
    hidden[:, 0] = False
    out = model(ids, regions._replace(hidden=hidden))
    words = mlm.masked_words(model.heads["mlm"](out.text, model.text.words.weight), ids)
    features = model.heads["mrfr"](out.image[hidden], model.image.features.weight.t())
    beliefs = torch.rand(int(hidden.sum()), 11).softmax(-1)
    distance = wra.transport_distance(out.text, out.image, torch.ones(3, 7), torch.ones(3, 5))
    loss = words + mvm.feature_losses(features, regions.features[hidden]).mean()
    loss = loss + mvm.belief_losses(model.heads["mrc"](out.image[hidden]), beliefs).mean()
    loss = loss + wra.alignment_loss(distance, torch.tensor([1, 0, 1]))
    loss = loss + model.heads["match"](out.pooled_text)[:, 1].mean()
    loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [n for n in silent if not n.endswith("key.bias")] == []


def test_losses_at_random_weights_are_near_the_log_of_their_choices(model):
    ids, regions = batch()
    with torch.no_grad():
        out = model(ids, regions)
        words = mlm.masked_words(model.heads["mlm"](out.text, model.text.words.weight), ids)
        classes = mvm.spread_cross_entropy(model.heads["mrc"](out.image), torch.full((3, 5, 11), 1 / 11))
    assert abs(words - torch.tensor(99.0).log()) < 0.2
    assert abs(classes - torch.tensor(11.0).log()) < 0.2


def test_the_background_is_never_the_class_to_guess():
    beliefs, logits = torch.tensor([[0.8, 0.05, 0.15]]), torch.tensor([[0.0, 0.0, 9.0]])
    assert mvm.class_losses(logits, beliefs) < 0.01


def test_nothing_to_score_is_zero_not_nan():
    assert mlm.masked_words(torch.randn(2, 3, 9), torch.full((2, 3), -1)) == 0
    assert mvm.spread_cross_entropy(torch.randn(2, 3, 9), torch.zeros(2, 3, 9)) == 0


def test_an_equal_pair_is_nearer_than_a_random_one_and_the_plan_has_its_margins():
    torch.manual_seed(0)
    words, mask = torch.randn(2, 4, 16), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    same = wra.transport_distance(words, words, mask, mask)
    other = wra.transport_distance(words, words.flip(0), mask, mask.flip(0))
    assert (same < other).all()
    plan = wra.transport_plan(wra.cosine_cost(words, words, mask, mask), mask, mask)
    torch.testing.assert_close(plan[1].sum(0), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(plan[1].sum(1), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]), atol=1e-3, rtol=0)
