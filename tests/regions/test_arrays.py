"""What is demanded of regions, and the tensors made of them."""

import numpy as np
import pytest
import torch

from interlace.data.pictures import BadPicture
from interlace.errors import UserError
from interlace.regions import BadRegions, RegionArrays, check_regions, collate_regions, to_regions, with_whole
from tests.regions.makers import full_regions, some_regions


def changed(**arrays) -> RegionArrays:
    return RegionArrays(**{**full_regions().given(), **arrays})


def boxed(*box: float) -> RegionArrays:
    boxes = full_regions().boxes.copy()
    boxes[1] = box
    return changed(boxes=boxes)


BAD = {
    "zero regions": RegionArrays(np.zeros((0, 8)), np.zeros((0, 4))),
    r"features \(I, F\) and boxes \(I, 4\)": changed(boxes=np.zeros((3, 7))),
    "3 regions, but objects of shape": changed(objects=np.zeros(2, np.int64)),
    "features with NaN": changed(features=np.full((3, 8), np.nan)),
    "boxes with NaN": boxed(0, 0, np.nan, 1),
    "beliefs with NaN or infinity": changed(beliefs=np.full((3, 5), np.inf)),
    "12 features per region, expected 8": changed(features=np.zeros((3, 12))),
    "expected 5 classes": changed(beliefs=np.zeros((3, 4))),
    r"box 1 of 3 \(0.5, 0, 0.2, 1\) with its corners in the wrong order": boxed(0.5, 0, 0.2, 1),
    r"box 1 of 3 \(0, 0, 1.2, 1\) outside the picture": boxed(0, 0, 1.2, 1),
    "pixels.*width and height": boxed(0, 0, 320, 200),
    r"box 1 of 3 \(-0.1": boxed(-0.1, 0, 1, 1),
    r"box 0 of 3 .*, and 2 more outside": changed(boxes=np.tile([0, 0, 3, 3], (3, 1))),
    "type <U1": changed(objects=np.array(["a", "b", "c"])),
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD)
def test_what_cannot_be_used_is_refused_with_its_reason(reason):
    with pytest.raises(BadRegions, match=reason):
        check_regions(BAD[reason], features=8, beliefs=5)


@pytest.mark.parametrize("made, reason", [
    (RegionArrays(np.zeros((0, 8)), np.zeros((0, 4))), "zero regions"),
    (boxed(0.5, 0, 0.2, 1), r"box 1 of 3 \(0.5, 0, 0.2, 1\) with its corners in the wrong order"),
    (boxed(0, 0, 320, 200), r"box 1 of 3 .* outside the picture, which is 0 to 1 \(pixels\?"),
], ids=["none", "unordered", "outside"])  # fmt: skip
def test_what_a_program_made_is_looked_at_when_it_becomes_a_batch(made, reason):
    with pytest.raises(UserError, match=rf"picture 1 of 2: {reason}"):
        collate_regions([changed(), made])


def test_a_loader_that_skips_bad_pictures_skips_bad_regions():
    assert issubclass(BadRegions, BadPicture)


def test_rounded_boxes_are_moved_into_the_picture():
    assert (check_regions(boxed(-0.0005, 0, 1.0005, 1)).boxes[1] == [0, 0, 1, 1]).all()
    check_regions(boxed(0.5, 0.5, 0.5, 0.5))  # a point is still ordered


@pytest.mark.parametrize("boxes", [0, 4, 5, 7])
def test_a_batch(boxes):
    rows = [full_regions(2, seed=1), full_regions(4, seed=2)]
    batch = collate_regions(rows, boxes=boxes)
    assert batch["region_features"].shape == (2, 4, 8) and batch["region_features"].dtype == torch.float32
    assert batch["region_mask"].tolist() == [[True, True, False, False], [True] * 4]
    assert torch.equal(batch["region_cells"], batch["region_mask"]) and batch["region_beliefs"].shape == (2, 4, 5)
    assert batch["region_objects"][0].tolist() == [*rows[0].objects.tolist(), -1, -1]
    assert batch["region_attributes"].dtype == torch.int64 and batch["region_attributes"][0, 2:].tolist() == [-1, -1]
    assert batch["region_objects_confidence"][0].tolist() == [0.5, 0.5, 0, 0]
    for n, row in enumerate(rows):
        assert np.array_equal(batch["region_features"][n, : len(row)].numpy(), row.features)
    assert (batch["region_features"][0, 2:] == 0).all()
    if not boxes:
        assert "region_boxes" not in batch
        return
    numbers = batch["region_boxes"]
    assert numbers.shape == (2, 4, boxes) and (numbers[0, 2:] == 0).all()
    x1, y1, x2, y2 = rows[1].boxes.T
    more = {4: [], 5: [(x2 - x1) * (y2 - y1)], 7: [x2 - x1, y2 - y1, (x2 - x1) * (y2 - y1)]}[boxes]
    assert np.allclose(numbers[1].numpy(), np.stack([x1, y1, x2, y2, *more], 1))


def test_the_whole_picture_comes_first():
    row = full_regions(3)
    whole = with_whole(row)
    assert len(whole) == 4 and np.allclose(whole.features[0], row.features.mean(0), atol=1e-6)
    assert whole.objects[0] == -1 and whole.beliefs[0].sum() == 0 and whole.objects_confidence[0] == 0
    assert np.array_equal(whole.features[1:], row.features)
    batch = collate_regions([row, some_like(row, 1)], boxes=5, whole=True)
    assert batch["region_boxes"][:, 0].tolist() == [[0, 0, 1, 1, 1]] * 2  # as in ViLBERT's release
    assert batch["region_mask"].sum(1).tolist() == [4, 2]
    assert batch["region_cells"].tolist() == [[False, True, True, True], [False, True, False, False]]


def some_like(row: RegionArrays, count: int) -> RegionArrays:
    return row.take(slice(count))


def test_half_precision_is_averaged_without_overflow():
    row = RegionArrays(np.full((36, 2), 40_000, np.float16), np.tile([0, 0, 1, 1], (36, 1)))
    assert with_whole(row).features[0].tolist() == pytest.approx([40_000, 40_000])


def test_a_batch_of_two_extractors_is_refused():
    with pytest.raises(UserError, match="different extractors"):
        collate_regions([some_regions(features=8), some_regions(features=9)])
    with pytest.raises(UserError, match="different extractors"):
        collate_regions([some_regions(), full_regions()])
    with pytest.raises(UserError, match="4, 5 or 7"):
        collate_regions([some_regions()], boxes=6)


@pytest.mark.parametrize("name", ["lxmert", "uniter", "vilbert", "visual_bert", "vl_bert"])
def test_every_preset_that_reads_regions_reads_the_batch(name):
    import interlace.presets
    from interlace.model import VLModel

    torch.manual_seed(0)
    model = VLModel(getattr(interlace.presets, name).tiny()).eval()
    spec = model.config.image
    whole = name in ("vilbert", "vl_bert")
    rows = [some_regions(2, spec.features), some_regions(5, spec.features, seed=1)]
    batch = collate_regions(rows, boxes=spec.boxes, whole=whole)
    regions, mask = to_regions(batch)
    ids = torch.tensor([[2, 7, 8, 3], [2, 9, 8, 3]])
    out = model(ids, regions, image_mask=mask).text
    alone, own = to_regions(collate_regions([some_regions(2, spec.features)], spec.boxes, whole))
    assert torch.allclose(model(ids[:1], alone, image_mask=own).text, out[:1], atol=1e-5)  # padding does not matter
