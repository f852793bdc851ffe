"""LXMERT: what nothing to score costs, and what a hidden region looks like."""

import pytest
import torch

from interlace.embed.regions import Regions
from interlace.model import VLModel
from interlace.objectives.region_labels import feature_loss, label_loss
from interlace.presets import lxmert
from tests.boxes import ordered


def inputs():
    g = torch.Generator().manual_seed(0)
    regions = Regions(torch.randn(2, 5, 20, generator=g), ordered(torch.rand(2, 5, 4, generator=g)))
    return torch.randint(1, 99, (2, 7), generator=g), regions


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VLModel(lxmert.tiny()).eval()


def test_nothing_to_score_is_no_loss():
    logits = torch.randn(2, 5, 7)
    assert label_loss(logits, torch.full((2, 5), -1), torch.ones(2, 5)) == 0
    assert label_loss(logits, torch.full((2, 5), -100), torch.ones(2, 5)) == 0
    assert feature_loss(logits, torch.randn(2, 5, 7), torch.zeros(2, 5)) == 0


def test_a_hidden_region_is_not_seen(model):
    ids, regions = inputs()
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    hidden[:, 1] = True
    zeroed = regions.features.clone()
    zeroed[:, 1] = 0
    with torch.no_grad():
        a, b = model(ids, regions._replace(hidden=hidden)), model(ids, regions._replace(features=zeroed))
    assert torch.equal(a.image, b.image) and torch.equal(a.text, b.text)
