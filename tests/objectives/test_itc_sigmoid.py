"""Contrast a pair at a time: the formula, its positives, its start."""

import math

import pytest
import torch
from torch.nn import functional as F

from interlace.objectives import SigmoidITC
from interlace.objectives.base import Views
from tests.objectives.test_whole import batch, learner


def test_the_loss_is_that_of_the_paper():
    """Algorithm 1: -sum(log_sigmoid(labels * (t * img @ txt.T + b))) / n, labels 2 * eye - 1."""
    model, full = learner("itc_sigmoid"), batch([0, 1, 2, 3])
    full["caption_real"][:] = True
    views = Views(model, full)
    scored = model.objectives[0][0].loss(model, full, views)
    logits = views.vector("image") @ views.vector("caption").T * 10 - 10
    torch.testing.assert_close(scored.loss, -F.logsigmoid((2 * torch.eye(4) - 1) * logits).sum() / 4)


def test_scale_and_bias_start_where_the_paper_says_and_learn():
    model = learner("itc_sigmoid")
    assert model.contrast.logit_scale.item() == pytest.approx(math.log(10)) and model.contrast.bias.item() == -10
    model(**batch())["loss"].backward()
    assert model.contrast.logit_scale.grad.abs() > 0 and model.contrast.bias.grad.abs() > 0


def test_all_pairs_of_a_group_are_positives_and_rows_without_caption_are_in_none():
    model, full = learner("itc_sigmoid"), batch([0, 0, 1, 2, 3, 3])  # the fifth has no caption
    objective = model.objectives[0][0]
    views = Views(model, full)
    scored = objective.loss(model, full, views)
    logits = views.vector("image") @ views.vector("caption").T * 10 - 10
    sign = torch.tensor([[1, 1, -1, -1, -1], [1, 1, -1, -1, -1], [-1, -1, 1, -1, -1], [-1, -1, -1, 1, -1],
                         [-1, -1, -1, -1, 1.0]])  # fmt: skip
    kept = [0, 1, 2, 3, 5]
    torch.testing.assert_close(scored.loss, -F.logsigmoid(sign * logits[kept][:, kept]).sum() / 5)
    share = torch.tensor(7 / 25)
    torch.testing.assert_close(scored.logs["itc_sigmoid_chance"], F.binary_cross_entropy(share, share) * 5)


def test_it_learns_eight_pairs_by_heart():
    model, full = learner("itc_sigmoid"), batch([0, 1, 2, 3, 5, 6, 7, 8])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        scored = model(**full)
        optimiser.zero_grad()
        scored["loss"].backward()
        optimiser.step()
    assert scored["losses"]["itc_sigmoid_accuracy"] == 1
    assert scored["loss"] < 0.5 * scored["losses"]["itc_sigmoid_chance"]


def test_the_head_is_saved_with_its_bias(tmp_path):
    from interlace.model import VLModel

    model = learner("itc_sigmoid")
    with torch.no_grad():
        model.contrast.bias.fill_(-7.5)
    model.save_pretrained(tmp_path)
    assert VLModel.from_pretrained(tmp_path).contrast.bias.item() == -7.5
    assert SigmoidITC(bias=-3.0).head_options()["bias"] == -3.0
