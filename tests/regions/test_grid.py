"""Cells of towers: their boxes are parts of the original picture, whatever was done to make it square."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from interlace.data.processor import Processor
from interlace.errors import UserError
from interlace.regions import extractor_of
from interlace.regions.detector import DetectorExtractor
from interlace.regions.grid import GridExtractor, cells
from interlace.towers import grid_tokens, load_tower, pixel_spec
from tests.regions.makers import photograph, write_vit, write_yolos

SIZES = [(96, 48), (48, 96), (64, 64), (301, 70), (70, 301), (37, 41)]


@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
@pytest.mark.parametrize("size", SIZES)
def test_a_cell_shows_what_its_box_says(fit, size):
    """The colours under a box of the original are those under its cell of the square the tower sees."""
    picture, side, grid = photograph(*size), 64, (4, 4)
    square = np.asarray(Processor(None, side, fit=fit).square(picture), float)
    keep, boxes = cells(*size, side, fit, grid)
    assert keep.sum() == len(boxes) and (boxes[:, 2:] > boxes[:, :2]).all()
    assert boxes.min() >= 0 and boxes.max() <= 1
    seen = square.reshape(4, 16, 4, 16, 3).transpose(0, 2, 1, 3, 4).reshape(16, 256, 3)[keep]
    w, h = size
    for cell, (x1, y1, x2, y2) in zip(seen, boxes):
        part = picture.resize((16, 16), Image.Resampling.BOX, box=(x1 * w, y1 * h, x2 * w, y2 * h))
        # white of the padding, where a cell has any, is left out
        inside = cell[(cell < 254.5).any(1)] if fit == "pad" else cell
        assert np.abs(np.asarray(part, float).mean((0, 1)) - inside.mean(0)).max() < 14


def test_padding_is_no_region():
    keep, boxes = cells(100, 50, 64, "pad", (4, 4))  # the picture fills the two rows in the middle
    assert keep.reshape(4, 4).tolist() == [[False] * 4, [True] * 4, [True] * 4, [False] * 4]
    assert boxes[0].tolist() == [0, 0, 0.25, 0.5] and boxes[-1].tolist() == [0.75, 0.5, 1, 1]


def test_a_cell_that_is_mostly_padding_is_no_region():
    keep, boxes = cells(100, 60, 64, "pad", (4, 4))  # 38 of 64 rows: 3 pixels of each outer cell
    assert keep.reshape(4, 4).all(1).tolist() == [False, True, True, False]
    keep, boxes = cells(100, 75, 64, "pad", (4, 4))  # 48 of 64 rows: half of each outer cell
    assert keep.all() and np.allclose(boxes[0], [0, 0, 0.25, 1 / 6]) and np.allclose(boxes[-1], [0.75, 5 / 6, 1, 1])


def test_a_crop_has_its_cells_within_the_picture():
    keep, boxes = cells(200, 100, 64, "crop", (4, 4))
    assert keep.all() and boxes[:, 0].min() == 0.25 and boxes[:, 2].max() == 0.75
    assert boxes[:, 1].min() == 0 and boxes[:, 3].max() == 1


@pytest.mark.parametrize("grid", [(4, 4), (7, 7), (14, 14), (1, 1)])
@pytest.mark.parametrize("size", [(1000, 1), (1, 1000), (3, 2000), (1, 1)])
def test_no_picture_is_too_narrow_for_a_region(size, grid):
    keep, boxes = cells(*size, 224, "pad", grid)
    assert keep.any() and np.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()


def test_features_are_the_towers_cells(vit):
    extractor = GridExtractor(vit, fit="pad")
    wide, square = photograph(96, 48), photograph(40, 40, seed=1)
    first, second = extractor([wide, square])
    assert len(first) == 8 and len(second) == 16 and extractor.features_size == 16
    tower = load_tower(vit, "image")
    spec = pixel_spec(vit)
    pixels = Processor(None, spec.size).pictures([square]) / 255
    pixels = (pixels - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(3, 1, 1)
    with torch.no_grad():
        states = tower.model(pixel_values=pixels).last_hidden_state
    assert torch.allclose(torch.from_numpy(second.features), grid_tokens(states, tower.extras.prefix)[0], atol=1e-5)
    assert torch.allclose(torch.from_numpy(extractor([wide])[0].features), torch.from_numpy(first.features), atol=1e-5)


def test_another_size_gives_other_cells(vit):
    assert len(GridExtractor(vit, 48)([photograph(50, 50)])[0]) == 36
    with pytest.raises(UserError, match="at least 1 pixel"):
        GridExtractor(vit, 0)
    with pytest.raises(UserError, match="pad, squash or crop"):
        GridExtractor(vit, fit="stretch")


def test_the_fingerprint_is_of_all_that_decides_the_numbers(vit, tmp_path):
    same = GridExtractor(vit).fingerprint
    copy = write_vit(tmp_path / "elsewhere")  # equal weights under another name
    assert GridExtractor(copy).fingerprint == same == GridExtractor(vit, 32).fingerprint
    other = load_tower(copy, "image").model
    with torch.no_grad():
        other.layernorm.bias += 1e-3
    other.save_pretrained(tmp_path / "trained")
    others = [GridExtractor(vit, 48), GridExtractor(vit, fit="crop"), GridExtractor(tmp_path / "trained")]
    assert len({same, *(one.fingerprint for one in others)}) == 4


def test_an_extractor_is_made_again_from_its_facts(vit, tmp_path):
    made = GridExtractor(vit, 48, "crop")
    again = extractor_of(json.loads(json.dumps(made.facts)))
    picture = photograph(70, 40)
    assert again.fingerprint == made.fingerprint
    assert np.array_equal(again([picture])[0].features, made([picture])[0].features)
    yolos = DetectorExtractor(write_yolos(tmp_path / "yolos"), 4, size=48)
    assert np.array_equal(extractor_of(yolos.facts)([picture])[0].boxes, yolos([picture])[0].boxes)
    with pytest.raises(UserError, match="is not what it was"):
        extractor_of(made.facts | {"weights": "others"})
    with pytest.raises(UserError, match="made elsewhere"):
        extractor_of({"kind": "given"})
