"""Detectors of transformers as sources of regions: softmax with "nothing", sigmoids, queries after patches."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from interlace.errors import UserError
from interlace.regions import BadRegions, check_regions
from interlace.regions.detector import DetectorExtractor
from tests.regions.makers import photograph, write_detr, write_rt_detr, write_vit, write_yolos

MAKERS = {"yolos": write_yolos, "detr": write_detr, "rt_detr": write_rt_detr}


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp("detectors") / name) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_the_surest_regions_with_their_features_and_beliefs(detectors, name):
    extractor = DetectorExtractor(detectors[name], regions=4)
    pictures = [photograph(90, 60), photograph(60, 90, seed=1), photograph(90, 60, seed=2)]
    found = extractor(pictures)
    assert extractor.features_size == 16 and extractor.beliefs_size == 6
    for regions in found:
        check_regions(regions, features=16, beliefs=6)
        assert 1 <= len(regions) <= 4
        assert np.allclose(regions.beliefs.sum(1), 1, atol=1e-5) and (regions.beliefs >= 0).all()
        assert (np.diff(regions.confidence) <= 1e-6).all()  # the surest first
        assert np.array_equal(regions.objects, regions.beliefs[:, 1:].argmax(1))
        assert np.allclose(regions.confidence, regions.beliefs[:, 1:].max(1))
    alone = extractor(pictures[1:2])[0]  # whatever else is in the batch
    assert np.allclose(alone.features, found[1].features, atol=1e-4)
    assert np.allclose(alone.boxes, found[1].boxes, atol=1e-4)


@pytest.mark.parametrize("name", ["yolos", "detr"])
def test_boxes_and_classes_are_those_of_transformers_own_post_processing(detectors, name):
    picture = photograph(90, 60)
    processor = AutoImageProcessor.from_pretrained(detectors[name])
    model = AutoModelForObjectDetection.from_pretrained(detectors[name]).eval()
    with torch.no_grad():
        output = model(pixel_values=processor(images=[picture], return_tensors="pt", do_pad=False)["pixel_values"])
    theirs = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[(60, 90)])[0]
    ours = DetectorExtractor(detectors[name], regions=100)([picture])[0]
    boxes = (theirs["boxes"] / torch.tensor([90, 60, 90, 60])).clamp(0, 1)
    real = (boxes[:, 2:] > boxes[:, :2]).all(1)
    order = theirs["scores"][real].argsort(descending=True)
    assert len(ours) == int(real.sum())
    assert np.allclose(ours.confidence, theirs["scores"][real][order], atol=1e-5)
    assert np.allclose(ours.boxes, boxes[real][order], atol=1e-5)
    assert ours.objects.tolist() == theirs["labels"][real][order].tolist()


def test_features_are_the_states_class_and_box_are_read_from(detectors):
    """The detector's own class head, given the features, says the beliefs."""
    extractor = DetectorExtractor(detectors["yolos"], regions=100)
    regions = extractor([photograph(90, 60)])[0]
    with torch.no_grad():
        logits = extractor.model.class_labels_classifier(torch.from_numpy(regions.features))
    assert np.allclose(logits.softmax(-1).roll(1, -1), regions.beliefs, atol=1e-5)


def test_sigmoids_become_a_distribution(detectors):
    """What the classes leave of 1 is "nothing"; where they sum to more they share it."""
    extractor = DetectorExtractor(detectors["rt_detr"])
    logits = torch.tensor([[[0.0] * 5, [0.0, -50, -50, -50, -50], [-50.0] * 5]])
    want = [[0, 0.2, 0.2, 0.2, 0.2, 0.2], [0.5, 0.5, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert torch.allclose(extractor._beliefs(logits)[0], torch.tensor(want), atol=1e-6)
    with pytest.raises(UserError, match="8 logits for 5 classes"):
        extractor._beliefs(torch.zeros(1, 2, 8))


def test_a_box_wholly_outside_the_picture_is_no_region(detectors):
    extractor = DetectorExtractor(detectors["yolos"], regions=2)
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [1.4, 0.5, 0.2, 0.2], [0.9, 0.5, 0.4, 0.4]]])  # middle, width, height
    logits = torch.zeros(1, 3, 6)
    logits[0, :, 2] = torch.tensor([1.0, 9.0, 3.0])  # the one outside is the surest
    states = torch.arange(3.0).view(1, 3, 1)
    found = extractor._read(SimpleNamespace(logits=logits, pred_boxes=boxes, last_hidden_state=states))[0]
    assert found.features.tolist() == [[2], [0]] and found.objects.tolist() == [2, 2]
    assert np.allclose(found.boxes, [[0.7, 0.3, 1, 0.7], [0.25, 0.25, 0.75, 0.75]])
    nothing = extractor._read(SimpleNamespace(logits=logits, pred_boxes=boxes + 2, last_hidden_state=states))[0]
    with pytest.raises(BadRegions, match="zero regions"):
        check_regions(nothing)


def test_the_fingerprint_knows_size_regions_and_weights(detectors):
    yolos = detectors["yolos"]
    same = DetectorExtractor(yolos, 4).fingerprint
    assert DetectorExtractor(yolos, 4).fingerprint == same
    for folder, regions, size in ((yolos, 5, None), (yolos, 4, 48), (detectors["detr"], 4, None)):
        assert DetectorExtractor(folder, regions, size).fingerprint != same


def test_sizes_of_pictures(detectors):
    small = DetectorExtractor(detectors["detr"], 4, size=64)
    assert small.facts["pixels"]["size"] == {"shortest_edge": 64, "longest_edge": 128} and small.hint == 64
    assert DetectorExtractor(detectors["rt_detr"], 4, size=96).facts["pixels"]["size"] == {"height": 96, "width": 96}


def test_what_is_no_detector(detectors, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        DetectorExtractor(tmp_path)
    with pytest.raises(UserError, match="Could not load an object detector"):
        DetectorExtractor(write_vit(tmp_path / "vit"))
    with pytest.raises(UserError, match="at least 1 region"):
        DetectorExtractor(detectors["yolos"], 0)
    lost = write_yolos(tmp_path / "lost")
    (lost / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        DetectorExtractor(lost)


def test_a_backbone_of_timm_says_what_to_install(tmp_path):
    if find_spec("timm"):
        pytest.skip("timm is installed")
    folder = write_detr(tmp_path / "detr")
    config = json.loads((folder / "config.json").read_text())
    config |= {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [1, 2, 3, 4]},
               "backbone": None, "use_timm_backbone": True}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="timm"):
        DetectorExtractor(folder)
