"""CLIP: sizes of the paper, and what must hold whatever the weights."""

import pytest
import torch

from interlace.model import VLModel
from interlace.presets import clip

IDS = torch.tensor([[97, 5, 6, 7, 8, 98], [97, 5, 9, 10, 98, 0]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VLModel(clip.tiny()).eval()


@pytest.mark.parametrize("make,parameters", [(clip.clip, 151_277_313), (clip.clip_large, 427_616_513)])
def test_parameters_as_in_the_release(make, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in VLModel(make()).parameters()) == parameters


def test_a_later_word_changes_nothing_before_it(model):
    changed = IDS.clone()
    changed[:, 3] = 50
    with torch.no_grad():
        a, b = model.half_text(IDS).states, model.half_text(changed).states
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert (a[:, 3:] - b[:, 3:]).abs().amax(-1).gt(1e-4).all()


def test_what_follows_the_end_changes_nothing(model):
    longer = torch.cat([IDS, torch.tensor([[98, 4], [7, 98]])], 1)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(longer), model.encode_text(IDS))


def test_gradient_reaches_both_towers():
    model = VLModel(clip.tiny())
    text, image = model.encode_text(IDS), model.encode_image(torch.randn(2, 3, 32, 32))
    (model.heads["contrast"].scale * text @ image.T).sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [n for n in silent if not n.endswith("key.bias")] == []


def test_save_and_load_change_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(VLModel.from_pretrained(tmp_path).eval().encode_text(IDS), model.encode_text(IDS))
