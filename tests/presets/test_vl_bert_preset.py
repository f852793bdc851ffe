"""VL-BERT: how it starts, and the place of its regions."""

import pytest
import torch

from interlace.embed.regions import Regions
from interlace.errors import UserError
from interlace.model import VLModel
from interlace.presets import vl_bert


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = VLModel(vl_bert.tiny()).eval()
    for norm in (model.image.norm, model.schedule.meet[0].norm_picture):  # they start at zero, which hides mistakes
        torch.nn.init.normal_(norm.weight)
    return model


def test_at_the_start_words_see_no_picture_in_the_first_layer():
    torch.manual_seed(0)
    fresh = VLModel(vl_bert.tiny()).eval()
    assert not fresh.image.norm.weight.any() and not fresh.schedule.meet[0].norm_picture.weight.any()


def test_a_text_without_room_for_the_regions_position_is_explained(model):
    with pytest.raises(UserError, match="24 positions"):
        model(torch.ones(1, 23, dtype=torch.long), Regions(torch.zeros(1, 1, 20), torch.zeros(1, 1, 4)))
