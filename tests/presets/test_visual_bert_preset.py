"""VisualBERT: sizes of the paper, and what must hold whatever the weights."""

import pytest
import torch

from interlace.embed.regions import Regions
from interlace.errors import UserError
from interlace.model import VLModel
from interlace.presets import visual_bert


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 99, (3, 7), generator=g)
    return ids, Regions(torch.randn(3, 5, 20, generator=g), None, words=torch.randint(-1, 7, (3, 5, 2), generator=g))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VLModel(visual_bert.tiny()).eval()


@pytest.mark.parametrize("heads,parameters", [({}, 111_450_624), (visual_bert.heads(30522), 112_074_812)])
def test_parameters_as_in_the_release(heads, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in VLModel(visual_bert.visual_bert(heads=heads)).parameters()) == parameters


def test_words_and_regions_meet_in_the_first_layer(model):
    assert model.fusion_depth == 0


@torch.no_grad()
def test_a_row_does_not_depend_on_its_padding(model):
    ids, regions = batch()
    regions = regions._replace(words=regions.words.clamp(max=3))
    text_mask, image_mask = torch.ones(3, 7), torch.ones(3, 5)
    text_mask[0, 4:], image_mask[0, 3:] = 0, 0
    out = model(ids, regions, text_mask, image_mask)
    alone = model(ids[:1, :4], Regions(regions.features[:1, :3], None, words=regions.words[:1, :3]))
    torch.testing.assert_close(out.text[:1, :4], alone.text, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.image[:1, :3], alone.image, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_regions_have_no_order(model):
    ids, regions = batch()
    turned = Regions(regions.features.flip(1), None, words=regions.words.flip(1))
    torch.testing.assert_close(model(ids, turned).text, model(ids, regions).text, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_save_and_load_change_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = VLModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(*batch()).pooled_text, model(*batch()).pooled_text)


def test_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    model = VLModel(visual_bert.tiny())
    out = model(*batch())
    words = model.heads["mlm"](torch.cat([out.text, out.image], 1), model.text.words.weight)
    (words.square().mean() + model.heads["match"](out.pooled_text)[:, 1].mean()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [n for n in silent if not n.endswith("key.bias")] == []


def test_features_of_another_detector_are_explained(model):
    with pytest.raises(UserError, match="20 features"):
        model(batch()[0], Regions(torch.randn(3, 5, 24), None))
