"""VL-BERT: sizes of the paper, and what must hold whatever the weights."""

import pytest
import torch

from interlace.embed.regions import Regions
from interlace.errors import UserError
from interlace.model import VLModel
from interlace.presets import vl_bert


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    regions = Regions(torch.randn(3, 5, 20, generator=g), torch.rand(3, 5, 4, generator=g))
    return torch.randint(1, 99, (3, 7), generator=g), regions


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = VLModel(vl_bert.tiny()).eval()
    for norm in (model.image.norm, model.schedule.meet[0].norm_picture):  # they start at zero, which hides mistakes
        torch.nn.init.normal_(norm.weight)
    return model


@pytest.mark.parametrize("make,parameters", [(vl_bert.vl_bert, 114_491_515), (vl_bert.vl_bert_large, 342_071_675)])
def test_parameters_as_in_the_release(make, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in VLModel(make()).parameters()) == parameters


def test_at_the_start_words_see_no_picture_in_the_first_layer():
    torch.manual_seed(0)
    fresh = VLModel(vl_bert.tiny()).eval()
    assert not fresh.image.norm.weight.any() and not fresh.schedule.meet[0].norm_picture.weight.any()


@torch.no_grad()
def test_a_row_does_not_depend_on_its_padding(model):
    ids, regions = batch()
    text_mask, image_mask = torch.ones(3, 7), torch.ones(3, 5)
    text_mask[0, 4:], image_mask[0, 3:] = 0, 0
    out = model(ids, regions, text_mask, image_mask)
    alone = model(ids[:1, :4], Regions(regions.features[:1, :3], regions.boxes[:1, :3]))
    torch.testing.assert_close(out.text[:1, :4], alone.text, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.image[:1, :4], alone.image, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_joined_halves_keep_their_picture(model):
    ids, regions = batch()
    text, image = model.half_text(ids), model.half_image(regions)
    short = model.half_image(Regions(regions.features[:, :3], regions.boxes[:, :3]))
    both = model.fuse(text.join(text), image.join(short))
    torch.testing.assert_close(both.text[:3], model.fuse(text, image).text, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both.text[3:], model.fuse(text, short).text, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_hidden_feature_does_not_leak(model):
    ids, regions = batch()
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[:, 2] = True
    changed = regions.features.clone()
    changed[:, 2] += 1
    a, b = model(ids, regions._replace(hidden=hidden)), model(ids, Regions(changed, regions.boxes, hidden))
    torch.testing.assert_close(a.text, b.text)
    assert (model(ids, regions).text - a.text).abs().max() > 1e-4


@torch.no_grad()
def test_save_and_load_change_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = VLModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(*batch()).text, model(*batch()).text)


def test_gradient_reaches_every_parameter(model):
    model = VLModel(vl_bert.tiny())
    torch.nn.init.normal_(model.image.norm.weight), torch.nn.init.normal_(model.schedule.meet[0].norm_picture.weight)
    ids, regions = batch()
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[:, 2] = True
    out = model(ids, regions._replace(hidden=hidden))
    alone = model.fuse(model.half_text(ids), None)
    words = model.heads["mlm"](torch.cat([out.text, alone.text]), model.text.words.weight)
    (words.square().mean() + model.heads["mvrc"](out.image).square().mean()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [n for n in silent if not n.endswith("key.bias")] == []


def test_a_text_without_room_for_the_regions_position_is_explained(model):
    with pytest.raises(UserError, match="24 positions"):
        model(torch.ones(1, 23, dtype=torch.long), Regions(torch.zeros(1, 1, 20), torch.zeros(1, 1, 4)))
