"""Every shipped recipe: it parses, its objectives exist, its system has their parts; a full-size one is its paper's."""

from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from bench.recipes import draw_data, draw_regions, first_steps, reads_regions, reduced
from interlace import towers
from interlace.compose import configure
from interlace.data.sources import open_source
from interlace.errors import UserError
from interlace.learner import Learner
from interlace.presets import PRESETS
from interlace.regions.open import open_regions
from interlace.settings import load_settings
from interlace.systems import configure_system
from interlace.train import SCHEDULES, build_passes, train

RECIPES = sorted((Path(__file__).parent.parent / "interlace/recipes").glob("*.yaml"))
FULL = sorted(PRESETS)


@pytest.fixture(scope="module", autouse=True)
def towers_once():
    """The shipped towers are read once, not for each recipe: none of these tests trains one."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_tower", "load_tokenizer", "grid_size"):
            patch.setattr(towers, name, cache(getattr(towers, name)))
        yield


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Rows with captions and questions, and regions of the published sizes for them."""
    folder = tmp_path_factory.mktemp("drawn")
    source = draw_data(folder, 4)
    return source, draw_regions(folder / "regions", source, regions=3)


def configured(name: str, source, regions=None):
    settings = load_settings(name)
    passes = build_passes(settings, source)
    objectives = [o for one in passes for o, _ in one.objectives]
    if not settings.model.system:
        return configure(settings.model, objectives)[0], passes
    return configure_system(settings.model, objectives, regions)[0], passes


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_a_recipe_builds_what_its_objectives_need(file, shapes):
    config, passes = configured(file.stem, open_source(shapes))
    with torch.device("meta"):
        model = Learner(config).learn_by(passes)  # each objective looks for its parts
    assert model.objectives and load_settings(file).train.schedule in SCHEDULES


def test_every_system_has_a_recipe_of_each_size():
    names = {file.stem for file in RECIPES}
    assert set(FULL) <= names and {f"{name}-small" for name in FULL} <= names


@pytest.mark.parametrize("name", FULL)
def test_the_recipe_s_passes_are_the_preset_s(name):
    settings = load_settings(name)
    assert settings.passes == PRESETS[name].module.PRETRAIN
    assert settings.model.system == name and settings.model.layers == 0


# its words here are those of BERT, uncased: how many more the release has, and how wide they are
MORE_WORDS = {"uniter": (28996, 768 + 1), "clip": (49408, 512), "blip": (30524, 768 + 1)}


@pytest.mark.parametrize("name", sorted(set(FULL) - {"vision_encoder_decoder"}))
def test_at_full_size_it_is_the_published_model(name, drawn):
    """As many parameters as the table says, once the vocabulary is the release's. LXMERT's answers are the data's."""
    source, store = drawn
    regions = open_regions(store) if reads_regions(name) else None
    config, _ = configured(name, source, regions)
    if name == "lxmert":
        config.heads["answers"]["labels"] = 9500
    with torch.device("meta"):
        count = sum(p.numel() for p in Learner(config).parameters())
    words, wide = MORE_WORDS.get(name, (30522, 0))
    assert count + (words - 30522) * wide == PRESETS[name].parameters


def test_every_number_of_the_optimiser_is_written_down():
    """A full-size recipe does not rest on our defaults for what its paper decided."""
    wanted = {"lr", "schedule", "warmup", "weight_decay", "betas", "eps", "clip", "batch", "accumulate"}
    for name in FULL:
        given = yaml.safe_load(next(f for f in RECIPES if f.stem == name).read_text())
        assert wanted <= given["train"].keys(), name
        assert {"steps", "epochs"} & given["train"].keys(), name
        assert given["train"]["batch"] % given["train"]["accumulate"] == 0, name


def test_a_recipe_takes_its_first_steps(tmp_path, text_tower, drawn):
    """The bench of full-size recipes, at a toy size."""
    source, store = drawn
    toy = [f"model.text={text_tower}", "model.layers=1", "model.width=32", "model.heads=4", "model.max_length=16"]
    settings = reduced("visual_bert", store.parent, store, 2, 2, *toy)
    figures = first_steps("visual_bert", settings, source, tmp_path)
    assert figures["rows"] == 2 and figures["first loss"] > 0 and not list(tmp_path.glob("checkpoint-*"))


def test_a_system_without_a_small_form_says_how_it_is_built(shapes):
    settings = load_settings("clip", ["model.layers=4", f"data.source={shapes}"])
    with pytest.raises(UserError, match=r"clip has no small form.*model.layers=0"):
        configure_system(settings.model, [])


def test_data_must_be_named(tmp_path):
    with pytest.raises(UserError, match=r"No data given: .*data.source="):
        train(load_settings("vilt", [f"train.out={tmp_path}"]))
