"""ViLT: sizes of the paper, and what must hold whatever the weights."""

import pytest
import torch

from interlace.errors import UserError
from interlace.model import VLModel
from interlace.presets import vilt

IDS = torch.tensor([[2, 5, 6, 7, 8, 3], [2, 9, 10, 3, 0, 0]])
MASK = (IDS != 0).long()


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


def test_parameters_as_in_the_release():
    with torch.device("meta"):
        whole, trunk = VLModel(vilt.vilt()), VLModel(vilt.vilt(heads={}))
    assert sum(p.numel() for p in whole.parameters()) == 135_660_092
    assert sum(p.numel() for p in trunk.parameters()) == 111_595_008


def test_a_padded_row_equals_the_row_alone(model):
    pixels, mask = torch.randn(2, 3, 32, 48), boxes((32, 48), (16, 24))
    with torch.no_grad():
        batch = model(IDS, pixels, MASK, mask)
        alone = model(IDS[1:, :4], pixels[1:, :, :16, :24])
    torch.testing.assert_close(batch.text[1:, :4], alone.text, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.image[1:, :7], alone.image, atol=1e-5, rtol=1e-5)


def test_padded_pixels_are_not_seen(model):
    pixels, mask = torch.randn(2, 3, 32, 48), boxes((32, 40), (16, 24))
    other = torch.where(mask[:, None].bool(), pixels, torch.randn_like(pixels))
    with torch.no_grad():
        a, b = model(IDS, pixels, MASK, mask), model(IDS, other, MASK, mask)
    torch.testing.assert_close(a.pooled_text, b.pooled_text)


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


def test_gradient_reaches_everything():
    model = VLModel(vilt.tiny())
    out = model(IDS, torch.randn(2, 3, 32, 48), MASK, boxes((32, 48), (16, 24)))
    loss = model.heads["mlm"](out.text).square().sum() + model.heads["match"](out.pooled_text).sum() + out.image.sum()
    loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [n for n in silent if not n.endswith("key.bias")] == []


def test_save_and_load_change_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        a, b = model(IDS, pixels, MASK), VLModel.from_pretrained(tmp_path).eval()(IDS, pixels, MASK)
    torch.testing.assert_close(a.pooled_text, b.pooled_text)


def test_a_mask_that_is_no_rectangle_is_explained(model):
    mask = boxes((32, 48), (16, 24))
    mask[1, :16, :8] = 0
    with pytest.raises(UserError, match="top left corner"):
        model.half_image(torch.randn(2, 3, 32, 48), mask)
