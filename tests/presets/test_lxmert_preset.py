"""LXMERT: sizes of the paper, and what must hold whatever the weights."""

import pytest
import torch

from interlace.embed.regions import Regions
from interlace.errors import UserError
from interlace.model import VLModel
from interlace.objectives.mlm import masked_words
from interlace.objectives.region_labels import feature_loss, label_loss
from interlace.presets import lxmert


def count(module):
    return sum(p.numel() for p in module.parameters())


def inputs(words=7, regions=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    boxes = torch.rand(2, regions, 4, generator=g)
    return torch.randint(1, 99, (2, words), generator=g), Regions(torch.randn(2, regions, 20, generator=g), boxes)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VLModel(lxmert.tiny()).eval()


def test_parameters_as_in_the_release():
    with torch.device("meta"):
        model = VLModel(lxmert.lxmert())
    assert count(model) == 228_051_752
    assert count(model) - count(model.heads) == 207_936_768
    parts = model.schedule.language, model.schedule.objects, model.schedule.cross
    assert [round(count(part) / 1e6, 2) for part in parts] == [63.79, 35.44, 82.70]
    assert model.fusion_depth == 14


def test_padding_of_either_stream_changes_nothing(model):
    ids, regions = inputs()
    more, extra = inputs(words=3, regions=2, seed=1)
    long = Regions(torch.cat([regions.features, extra.features], 1), torch.cat([regions.boxes, extra.boxes], 1))
    text_mask, image_mask = torch.ones(2, 10), torch.ones(2, 7)
    text_mask[:, 7:], image_mask[:, 5:] = 0, 0
    with torch.no_grad():
        a, b = model(ids, regions), model(torch.cat([ids, more], 1), long, text_mask, image_mask)
    torch.testing.assert_close(a.text, b.text[:, :7], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(a.image, b.image[:, :5], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(a.pooled_text, b.pooled_text, atol=1e-6, rtol=1e-5)


def test_the_order_of_regions_changes_nothing_but_their_order(model):
    ids, regions = inputs()
    turned = Regions(regions.features.flip(1), regions.boxes.flip(1))
    with torch.no_grad():
        a, b = model(ids, regions), model(ids, turned)
    torch.testing.assert_close(a.image, b.image.flip(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(a.text, b.text, atol=1e-6, rtol=1e-5)


def test_gradient_reaches_every_parameter():
    model = VLModel(lxmert.tiny())
    ids, regions = inputs()
    out, heads = model(ids, regions), model.heads
    guessed = heads["regions"](out.image)
    labels, sure = torch.zeros(2, 5, dtype=torch.long), torch.rand(2, 5)
    loss = masked_words(heads["mlm"](out.text, model.text.words.weight), ids)
    loss = loss + feature_loss(guessed["features"], regions.features, sure)
    loss = loss + label_loss(guessed["objects"], labels, sure) + label_loss(guessed["attributes"], labels, sure)
    pooled = [heads[name](out.pooled_text).square().sum() for name in ("match", "answers")]
    (loss + sum(pooled)).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [n for n in silent if not n.endswith("attend.key.bias")] == []  # the softmax is blind to it


def test_save_and_load_change_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)
    again, (ids, regions) = VLModel.from_pretrained(tmp_path).eval(), inputs()
    with torch.no_grad():
        a, b = model(ids, regions), again(ids, regions)
        torch.testing.assert_close(model.heads["regions"](a.image), again.heads["regions"](b.image))
        torch.testing.assert_close(model.heads["answers"](a.pooled_text), again.heads["answers"](b.pooled_text))


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


def test_regions_of_another_detector_are_explained(model):
    ids, regions = inputs()
    with pytest.raises(UserError, match="reads 20 features and 4 box numbers per region, got 20 and 5"):
        model(ids, Regions(regions.features, torch.rand(2, 5, 5)))
