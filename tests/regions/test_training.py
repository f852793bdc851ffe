"""A region model trained on stored regions: it learns from the store, and finds the regions of new pictures itself."""

import json
import shutil

import numpy as np
import pytest
import torch

from interlace.cli import main
from interlace.compose import Composition
from interlace.data.pictures import open_picture
from interlace.data.sources import open_source
from interlace.errors import UserError
from interlace.regions import extract
from interlace.regions.grid import GridExtractor
from interlace.run import Run
from interlace.settings import Settings
from interlace.train import train


@pytest.fixture(scope="module")
def store(shapes, image_tower, tmp_path_factory):
    out = tmp_path_factory.mktemp("regions") / "shapes"
    extract(open_source(shapes), GridExtractor(image_tower, size=64), out, progress=False)
    return out


def settings(shapes, text_tower, store, out, system="uniter", **passes):
    made = Settings()
    made.data.source, made.data.regions, made.train.out = str(shapes), str(store), str(out)
    made.model = Composition(system=system, text=str(text_tower), width=32, heads=4, layers=2, max_length=16)
    made.objectives = passes or {"itc": {"size": 16}, "itm": {}, "vqa": {}, "mlm": {}, "mrfr": {}}
    made.train.steps, made.train.batch, made.train.evaluate = 3, 8, False
    return made


@pytest.fixture(scope="module")
def folder(shapes, text_tower, store, tmp_path_factory):
    return train(settings(shapes, text_tower, store, tmp_path_factory.mktemp("runs") / "uniter"))


def test_a_new_picture_s_regions_are_those_that_training_saw(folder, shapes, store):
    run, pair = Run.load(folder), next(iter(open_source(shapes).pairs("test")))
    picture = open_picture(pair.picture)
    vector = run.encode_pictures([picture])
    from interlace.regions import collate_regions, open_regions, to_regions

    regions, mask = to_regions(collate_regions([open_regions(store).of(pair)], boxes=7))
    with torch.no_grad():
        expected = run.model.alone(run.model.half_image(regions, mask), "image").numpy()
    np.testing.assert_allclose(vector, expected, atol=2e-3)  # the store keeps half precision
    assert 0 <= run.match("a red circle", [picture])[0] <= 1
    assert sum(p for _, p in run.answer(picture, "what shape is it?")) == pytest.approx(1, abs=1e-5)


def test_the_extractor_has_to_be_there_and_the_same(folder, shapes, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(folder, moved)
    file = moved / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"size": 64', '"size": 48'))
    picture = open_picture(next(iter(open_source(shapes).pairs("test"))).picture)
    with pytest.raises(UserError):
        Run.load(moved).encode_pictures([picture])


@pytest.mark.parametrize("system", ["lxmert", "vilbert", "visual_bert", "vl_bert"])
def test_every_system_that_reads_regions_trains_on_a_store(system, shapes, text_tower, store, tmp_path):
    more = {"region_labels": {}} if system == "lxmert" else {}
    run = Run.load(train(settings(shapes, text_tower, store, tmp_path / system, system, mlm={}, itm={}, **more)))
    picture = open_picture(next(iter(open_source(shapes).pairs("test"))).picture)
    assert 0 <= run.match("a red circle", [picture])[0] <= 1


@pytest.fixture(scope="module")
def made_elsewhere(shapes, tmp_path_factory):
    """Features nobody here can make: the mean colour of a few places, one .npz per picture."""
    out, rng = tmp_path_factory.mktemp("elsewhere"), np.random.default_rng(0)
    boxes = np.sort(rng.random((5, 2, 2), np.float32), 1).reshape(5, 4)
    for pair in open_source(shapes).pairs():
        colour = np.asarray(open_picture(pair.picture), np.float32).mean((0, 1)) / 255
        np.savez(out / f"{pair.id}.npz", features=np.tile(colour, (5, 2)), boxes=boxes)
    return out


def test_features_made_elsewhere_train_and_are_scored_to_the_end(shapes, text_tower, made_elsewhere, store, tmp_path,
                                                                 capsys):  # fmt: skip
    made = settings(shapes, text_tower, made_elsewhere, tmp_path / "run")
    made.train.evaluate = True
    out = train(made)
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"retrieval", "match", "vqa", "hidden_words"} <= set(metrics)
    assert "shuffled" in metrics["vqa"]["accuracy"] and "blank" not in metrics["vqa"]["accuracy"]

    assert main(["evaluate", str(out), str(shapes), "--split", "val"]) == 2
    assert "interlace evaluate --regions FOLDER" in capsys.readouterr().err
    given = ["evaluate", str(out), str(shapes), "--split", "val", "--out", str(tmp_path / "again.json"), "--regions"]
    assert main([*given, str(made_elsewhere)]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["vqa"]["accuracy"] == metrics["vqa"]["accuracy"] and again["match"] == metrics["match"]
    assert main([*given, str(store)]) == 2
    assert "features per region" in capsys.readouterr().err  # of another extractor


def test_a_run_is_scored_on_the_regions_it_was_trained_on(folder, shapes, store):
    from interlace.evaluate import evaluate
    from interlace.regions import open_regions

    source, looking, given = open_source(shapes), Run.load(folder), Run.load(folder)
    given.use_regions(open_regions(store))
    given.__dict__["extractor"] = None  # nothing is looked at
    found = evaluate(given, source, "val", blind=False)
    asked = evaluate(looking, source, "val", blind=False)
    assert abs(found["match"]["value"] - asked["match"]["value"]) < 0.05
    assert abs(found["vqa"]["accuracy"]["value"] - asked["vqa"]["accuracy"]["value"]) < 0.05


def test_going_on_wants_regions_of_the_same_extractor(folder, shapes, text_tower, store, image_tower, tmp_path):
    later = settings(shapes, text_tower, "", tmp_path / "later", itm={})
    later.model = Composition(start=str(folder))
    with pytest.raises(UserError, match="was trained on stored regions"):
        train(later)
    other = tmp_path / "other"
    extract(open_source(shapes), GridExtractor(image_tower, size=48), other, progress=False)
    later.data.regions = str(other)
    with pytest.raises(UserError, match="another extractor"):
        train(later)
    later.data.regions = str(store)
    assert Run.load(train(later)).can_match


def test_what_does_not_fit_regions_is_refused(shapes, text_tower, store, tmp_path):
    with pytest.raises(UserError, match="reads pictures and no regions"):
        train(settings(shapes, text_tower, store, tmp_path / "a", "vilt", mlm={}))
    composed = settings(shapes, text_tower, store, tmp_path / "b", "", itm={})
    with pytest.raises(UserError, match="systems that read regions"):
        train(composed)
    with pytest.raises(UserError, match="no regions at"):
        train(settings(shapes, text_tower, tmp_path / "nothing", tmp_path / "c", itm={}))
    beliefs = settings(shapes, text_tower, store, tmp_path / "d", mrc_kl={})
    with pytest.raises(UserError, match="without beliefs"):
        train(beliefs)


def test_a_store_of_other_rows_is_refused(shapes, text_tower, image_tower, tmp_path):
    extract(open_source(shapes), GridExtractor(image_tower, size=48), tmp_path / "few", split="test", progress=False)
    with pytest.raises(UserError, match=r"training rows have no regions in .*interlace extract"):
        train(settings(shapes, text_tower, tmp_path / "few", tmp_path / "run", itm={}))


def test_regions_start_where_the_words_of_their_captions_are(shapes, text_tower, image_tower):
    from interlace.learner import Learner
    from interlace.systems import build_system
    from interlace.warm_start import align_regions

    source = open_source(shapes)
    what = Composition(system="visual_bert", text=str(text_tower), image=str(image_tower), width=32, heads=4, layers=1,
                       size=64, max_length=16)  # fmt: skip
    torch.manual_seed(0)
    model, processor = build_system(what, [], None, Learner)
    rows = source.indices("train")
    pairs = [source.pair(int(row)) for row in rows]
    with torch.no_grad():
        pixels = torch.cat([processor.pictures([open_picture(p.picture)]) for p in pairs])
        means = model.image.states(model.normalise(pixels)).mean(1)  # (N, F)
        told = processor.tokens([p.caption for p in pairs])
        plain = (told["text_words"] >= 0).unsqueeze(-1)
        words = (model.text.words(told["text_ids"]) * plain).sum(1) / plain.sum(1)

    def apart():
        mapped = torch.nn.functional.linear(means, *linear)
        return (mapped - words).square().sum().item() / (words - words.mean(0)).square().sum().item()

    linear = model.image.regions.features.weight, model.image.regions.features.bias
    before = apart()
    assert align_regions(model, means.numpy(), list(range(len(rows))), source, processor) is not None
    assert apart() < min(before, 1.0)
