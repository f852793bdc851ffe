"""ViLT: patches of pictures of unequal sizes."""

import pytest
import torch

from interlace.errors import UserError
from interlace.model import VLModel
from interlace.presets import vilt


def boxes(*sizes, height=32, width=48):
    mask = torch.zeros(len(sizes), height, width)
    for row, (h, w) in enumerate(sizes):
        mask[row, :h, :w] = 1
    return mask


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = VLModel(vilt.tiny()).eval()
    with torch.no_grad():
        model.image.positions.normal_()
    return model


def test_patches_stand_row_by_row_and_only_as_many_as_the_largest_picture_has(model):
    _, kept, places = model.image.embed(torch.randn(2, 3, 32, 48), boxes((16, 24), (24, 16)))
    assert kept.sum(1).tolist() == [7, 7] and places.shape == (2, 6, 2)
    assert places[0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert places[1].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]


def test_training_draws_a_part_of_the_patches_and_evaluation_sees_all():
    image = vilt.tiny().image
    image.most = 5
    module = image.build().train()
    pixels, mask = torch.randn(2, 3, 32, 48), boxes((32, 48), (8, 24))
    torch.manual_seed(0)
    _, kept, places = module.embed(pixels, mask)
    assert kept.sum(1).tolist() == [6, 4] and places.shape[1] == 5
    order = places[..., 0] * 6 + places[..., 1]
    assert order[0].tolist() == sorted(set(order[0].tolist())) and order[1, :3].tolist() == [0, 1, 2]
    assert module.eval().embed(pixels, mask)[1].shape[1] == 25


def test_a_mask_that_is_no_rectangle_is_explained(model):
    mask = boxes((32, 48), (16, 24))
    mask[1, :16, :8] = 0
    with pytest.raises(UserError, match="top left corner"):
        model.half_image(torch.randn(2, 3, 32, 48), mask)
