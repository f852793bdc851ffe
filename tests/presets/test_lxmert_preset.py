"""LXMERT: what nothing to score costs, what a hidden region looks like, and a text judged by two pictures."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from interlace.convert import convert
from interlace.embed.regions import Regions
from interlace.errors import UserError
from interlace.model import VLModel
from interlace.objectives.region_labels import feature_loss, label_loss
from interlace.presets import lxmert
from interlace.weights import save_foreign
from tests.boxes import ordered

GOLDEN = Path(__file__).parents[1] / "parity/golden"


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


# ------------------------------------------------------------------------------------------------------------- NLVR2


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return VLModel(lxmert.tiny(heads={"nlvr2": lxmert.NLVR2})).eval()


def two_texts(model, order=(0, 1, 2, 3)):
    """Two texts, the first one padded, and four pictures, both of the first text before both of the second."""
    g = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(1, 99, (2, 7), generator=g), torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    features, boxes = torch.randn(4, 5, 20, generator=g), ordered(torch.rand(4, 5, 4, generator=g))
    regions = Regions(features[list(order)], boxes[list(order)])
    return ids, mask, regions, model.half_text(ids, mask), model.half_image(regions)


def test_two_pictures_are_judged_by_the_formula(judge):
    """A pass for each picture, h0 and h1 pooled; W1 norm(gelu(W0 [h0; h1] + b0)) + b1."""
    ids, mask, regions, text, pictures = two_texts(judge)
    said, w = lxmert.compare(judge, text, pictures), judge.heads["nlvr2"].state_dict()
    assert said.shape == (2, 2)
    for n in range(2):
        pooled = [judge(ids[[n]], Regions(regions.features[[m]], regions.boxes[[m]]), mask[[n]]).pooled_text[0]
                  for m in (2 * n, 2 * n + 1)]  # fmt: skip
        x = w["dense.weight"] @ torch.cat(pooled) + w["dense.bias"]
        x = x * (1 + torch.erf(x / 2**0.5)) / 2
        x = (x - x.mean()) / (x.var(correction=0) + 1e-12).sqrt() * w["norm.weight"] + w["norm.bias"]
        torch.testing.assert_close(said[n], w["out.weight"] @ x + w["out.bias"], atol=1e-5, rtol=1e-4)


def test_which_picture_is_the_first_one_matters(judge):
    said = lxmert.compare(judge, *two_texts(judge)[3:])
    turned = lxmert.compare(judge, *two_texts(judge, order=(1, 0, 2, 3))[3:])
    assert (said[0] - turned[0]).abs().max() > 1e-3
    torch.testing.assert_close(said[1], turned[1])


def test_the_gradient_of_two_pictures_reaches_every_weight_and_both_pictures(judge):
    ids, mask, regions, _, _ = two_texts(judge)
    features = regions.features.clone().requires_grad_()
    pictures = judge.half_image(regions._replace(features=features))
    judge.zero_grad()
    said = lxmert.compare(judge, judge.half_text(ids, mask), pictures)
    F.cross_entropy(said, torch.tensor([1, 0])).backward()
    assert features.grad.flatten(1).norm(dim=1).min() > 0
    # nobody reads the regions of the last layer
    still = {name for name, p in judge.named_parameters() if p.grad is None or not p.grad.any()}
    assert all(name.startswith("schedule.cross.3.image.") for name in still), still


def released_nlvr2():
    """A fine-tuned file: names and body recorded from the release at a small size, the classifier's twice as wide."""
    tensors = load_file(GOLDEN / "lxmert-a.safetensors")
    body = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/bert.")}
    wide, g = 2 * len(body["bert.pooler.dense.bias"]), torch.Generator().manual_seed(2)
    shapes = {"0.weight": (wide, wide), "0.bias": (wide,), "2.weight": (wide,), "2.bias": (wide,),
              "3.weight": (2, wide), "3.bias": (2,)}  # fmt: skip
    classifier = {f"logit_fc.{name}": torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return {f"lxrt_encoder.model.{k}": v for k, v in body.items()} | classifier


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_release_fine_tuned_on_two_pictures(prefix, tmp_path):
    released = released_nlvr2()
    save_file({prefix + name: t for name, t in released.items()}, tmp_path / "BEST.safetensors")
    config = json.loads((GOLDEN / "lxmert-a.json").read_text())["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = convert(tmp_path / "BEST.safetensors", tmp_path / "ours", "lxmert_nlvr2", Console(quiet=True))
    assert len(done.report.mapped) == len(released) and not done.report.dropped and not done.report.fresh
    assert list(done.model.heads) == ["nlvr2"] and done.prefix == prefix
    back = save_foreign(done.model, lxmert.NLVR2_KEYS)
    assert back.keys() == released.keys() and all(torch.equal(back[name], t) for name, t in released.items())


def test_a_saved_judge_says_the_same(judge, tmp_path):
    judge.save_pretrained(tmp_path)
    again = VLModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(lxmert.compare(again, *two_texts(again)[3:]), lxmert.compare(judge, *two_texts(judge)[3:]))


def test_another_number_of_pictures_is_explained(judge, model):
    text, pictures = two_texts(judge)[3:]
    with pytest.raises(UserError, match=r"expected two pictures for each text, 4 for 2, and got 3: give both"):
        lxmert.compare(judge, text, pictures.rows(torch.tensor([0, 1, 2])))
    with pytest.raises(UserError, match=r"expected pairs of rows.* got 3 rows: is a picture missing"):
        judge.heads["nlvr2"](torch.randn(3, 32))
    with pytest.raises(UserError, match=r"a head 'nlvr2', and this one has mlm, .*build it with lxmert_nlvr2\(\)"):
        lxmert.compare(model, text, pictures)
