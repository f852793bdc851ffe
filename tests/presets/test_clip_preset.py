"""CLIP: what its text encoder may see."""

import pytest
import torch

from interlace.model import VLModel
from interlace.presets import clip

IDS = torch.tensor([[97, 5, 6, 7, 8, 98], [97, 5, 9, 10, 98, 0]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VLModel(clip.tiny()).eval()


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
