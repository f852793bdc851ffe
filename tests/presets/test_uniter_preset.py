"""UNITER: losses at random weights and at their edges, and transport."""

import pytest
import torch

from interlace.embed.regions import Regions
from interlace.model import VLModel
from interlace.objectives import mlm, mvm, wra
from interlace.presets import uniter
from tests.boxes import ordered


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    regions = Regions(torch.randn(3, 5, 20, generator=g), ordered(torch.rand(3, 5, 7, generator=g)))
    return torch.randint(1, 99, (3, 7), generator=g), regions


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VLModel(uniter.tiny()).eval()


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


def test_distances_are_float32_under_autocast_too():
    torch.manual_seed(0)
    alike = torch.randn(1, 1, 64)
    words, cells = (alike + 0.02 * torch.randn(6, n, 64) for n in (8, 10))  # states that hardly differ, as late ones do
    masks = torch.ones(6, 8), torch.ones(6, 10)
    exact = wra.transport_distance(words, cells, *masks)
    with torch.autocast("cpu", torch.bfloat16):
        given = wra.transport_distance(words.bfloat16().float(), cells.bfloat16().float(), *masks)
        same = wra.transport_distance(words, cells, *masks)
    assert torch.equal(same, exact) and given.dtype == torch.float32
