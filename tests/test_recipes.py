"""Every shipped recipe: it parses, its objectives exist, its system has their parts; a full-size one is its paper's."""

import json
import math
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
from interlace.objectives import Objective
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


# of each paper or its release (the pages in docs/systems): rate, schedule, warm-up, how long, rows of a step, decay, on
# norms and biases too, betas, eps, clipping. MLIM published none; VisionEncoderDecoder has no paper
PUBLISHED = {
    "uniter": (5e-5, "linear", 10000, 200000, 8192, 0.01, False, [0.9, 0.98], 1e-6, 5),
    "vilbert": (1e-4, "linear", 0.1, 10, 512, 0.01, False, [0.9, 0.98], 1e-8, 0),
    "vl_bert": (2.56e-5, "linear", 16000, 10, 128, 1e-4, True, [0.9, 0.999], 1e-6, 10),
    "lxmert": (1e-4, "linear", 0.05, 20, 256, 0.01, True, [0.9, 0.999], 1e-6, 1),
    "visual_bert": (5e-5, "linear", 0.1, 10, 48, 0.01, False, [0.9, 0.999], 1e-6, 1),
    "vilt": (1e-4, "linear", 0.1, 200000, 4096, 0.01, False, [0.9, 0.98], 1e-8, 0),
    "blip": (3e-4, "epochs", 3000, 20, 2880, 0.05, True, [0.9, 0.999], 1e-8, 0),
    "clip": (5e-4, "cosine", 2000, 32, 32768, 0.2, False, [0.9, 0.98], 1e-6, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_numbers_of_the_optimiser_are_the_papers(name):
    t = load_settings(name).train
    long = t.steps or t.epochs
    assert PUBLISHED[name] == (t.lr, t.schedule, t.warmup, long, t.batch, t.weight_decay, t.decay_all, t.betas, t.eps,
                               t.clip)  # fmt: skip


def test_a_recipe_takes_its_first_steps(tmp_path, text_tower, drawn):
    """The bench of full-size recipes, at a toy size."""
    source, store = drawn
    toy = [f"model.text={text_tower}", "model.layers=1", "model.width=32", "model.heads=4", "model.max_length=16"]
    settings = reduced("visual_bert", store.parent, store, 2, 2, *toy)
    figures = first_steps("visual_bert", settings, source, tmp_path)
    assert figures["rows"] == 2 and figures["first loss"] > 0 and not list(tmp_path.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Eight rows, and regions as a detector of Visual Genome leaves them."""
    folder = tmp_path_factory.mktemp("whole")
    source = draw_data(folder, 8)
    return source, folder, draw_regions(folder / "regions", source)


@pytest.mark.parametrize("name", FULL)
def test_a_full_size_recipe_takes_two_steps(name, whole, tmp_path):
    """The paper's model, every layer of it, by the trainer; the batch alone is small."""
    source, folder, store = whole
    settings = reduced(name, folder, store if reads_regions(name) else None, 2, 2)
    figures = first_steps(name, settings, source, tmp_path)
    assert figures["M parameters"] > 100 and math.isfinite(figures["first loss"] + figures["last loss"])
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    seen = {key.split("/")[-1] for line in logged for key in line}
    asked = [{"mlm" if key == "mam" else key for key in one if key in Objective.known} for one in settings.passes]
    assert len(logged) == 2 and asked
    assert (any if settings.train.mix == "draw" else all)(one <= seen for one in asked)


def test_a_system_without_a_small_form_says_how_it_is_built(shapes):
    settings = load_settings("clip", ["model.layers=4", f"data.source={shapes}"])
    with pytest.raises(UserError, match=r"clip has no small form.*model.layers=0"):
        configure_system(settings.model, [])


def test_data_must_be_named(tmp_path):
    with pytest.raises(UserError, match=r"No data given: .*data.source="):
        train(load_settings("vilt", [f"train.out={tmp_path}"]))
