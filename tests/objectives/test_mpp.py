"""Masked patches: what is guessed, that a hidden patch shows nothing of itself, and that guessing can be learned."""

import json

import pytest
import torch

from interlace.config import VLConfig
from interlace.data.batches import Samples
from interlace.data.sources import open_source
from interlace.data.states import frozen_states
from interlace.embed.conv import Blocks
from interlace.embed.patches import Patches
from interlace.embed.vilt import ViLTPatches
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.layers import JOINT, Width
from interlace.learner import Learner
from interlace.objectives import MLM, MPP, Pass
from interlace.objectives.mpp import normalised_patches
from interlace.settings import load_settings
from interlace.train import build_passes, make_learner, train
from tests.conftest import toy_settings

WIDTH = Width(16, heads=4, dropout=0.0, attention_dropout=0.0)
PARTS = {
    "patches": Patches(WIDTH, size=16, patch=8, hide=True),
    "vilt_patches": ViLTPatches(WIDTH, size=16, patch=8, hide=True),
    "blocks": Blocks(WIDTH, size=16, channels=[8], strides=[4, 2], kernels=[4, 2], mask=4),
}


def test_each_patch_loses_its_mean_and_deviation_and_stands_row_by_row():
    pixels = torch.rand(2, 3, 8, 12)
    pixels[0, :, :4, :4] = 0.3  # of one colour: nothing to guess
    patches = normalised_patches(pixels, 4)
    assert patches.shape == (2, 6, 48) and (patches[0, 0] == 0).all()
    alone = pixels[1, :, 4:8, 8:12].flatten()  # second row, third column
    torch.testing.assert_close(patches[1, 5], (alone - alone.mean()) / alone.std(), atol=1e-4, rtol=1e-4)
    brighter = normalised_patches(2 * pixels + 1, 4)
    torch.testing.assert_close(brighter, patches, atol=1e-3, rtol=1e-3)


def made(part):
    torch.manual_seed(0)
    objective = MPP(mask=0.4)
    words = Words(WIDTH, vocabulary=50, positions=12)
    config = VLConfig(words, PARTS[part], segments={"joint": [JOINT] * 2},
                      heads={"patches": objective.head_for(words, PARTS[part])})  # fmt: skip
    model = Learner(config).learn_by([Pass([(objective, 1.0)])])
    for name, p in model.named_parameters():
        if name.endswith("positions"):
            torch.nn.init.normal_(p)
    return model


def given(pixels):
    ids, rows = torch.tensor([[2, 7, 8, 3]]), len(pixels)
    part = {"hidden": torch.tensor([[True, False, False, True]] * rows)}
    return {"caption_ids": ids.expand(rows, -1), "caption_mask": torch.ones(rows, 4, dtype=torch.long),
            "caption_real": torch.ones(rows, dtype=torch.bool), "group": torch.arange(rows), "pixel_values": pixels,
            "parts": [part]}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_hidden_patch_shows_nothing_of_itself_and_alone_is_scored(part):
    model = made(part).eval()
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    other = pixels.clone()
    other[:, :, :8, :8] = 255 - other[:, :, :8, :8]  # the first of four, which is hidden
    other[:, :, 8:, 8:] = other[:, :, 8:, 8:].flip(-1)  # the last

    def cells(pixels):
        batch = given(pixels)
        image = model.half_image(pixels, hidden=batch["parts"][0]["hidden"])
        return model.fuse(model.half_text(batch["caption_ids"]), image).image[:, getattr(model.image, "lead", 0) :]

    states = [cells(pixels), cells(other)]
    assert states[0].shape == (2, 4, 16) and torch.equal(*states)
    first, second = (model(**given(x))["losses"]["mpp"] for x in (pixels, other))
    assert abs(first - second) > 1e-3  # and what is to be guessed is another
    shown = pixels.clone()
    shown[:, :, :8, 8:] = 0
    assert not torch.equal(cells(shown), states[0])
    truth = normalised_patches(model.normalise(pixels), 8)[:, [0, 3]]
    said = model.heads["patches"](None, states[0][:, [0, 3]])
    torch.testing.assert_close(first, (said - truth).square().mean())


def test_patches_that_are_left_out_cannot_be_hidden():
    embed = ViLTPatches(WIDTH, size=16, patch=8, hide=True, most=2).build()
    with pytest.raises(UserError, match="`most` to 0"):
        embed(torch.rand(1, 3, 16, 16), hidden=torch.ones(1, 4, dtype=torch.bool))


@pytest.mark.parametrize("system", ["", "vilt"])
def test_it_learns_what_patches_show(system, shapes, text_tower, tmp_path):
    settings = toy_settings(shapes, text_tower, tmp_path / "run", steps=120, evaluate=False)
    settings.objectives, settings.passes = {}, [{"mpp": {"mask": 0.3}}]
    settings.model.system, settings.model.size, settings.model.patch = system, 48, 8
    logs = [json.loads(line) for line in (train(settings) / "log.jsonl").read_text().splitlines()]
    logs = [line for line in logs if "mpp" in line]
    assert logs[0]["mpp_r2"] < 0.1 and logs[-1]["mpp_r2"] > 0.2  # shapes go on where they are hidden
    assert logs[-1]["mpp"] < 0.8 * logs[0]["mpp"]


def test_parts_it_cannot_read_are_named(shapes, text_tower, image_tower, tmp_path):
    def said(*overrides, **changes):
        settings = load_settings("uniter-small", [f"data.source={shapes}", f"train.out={tmp_path / 'no'}", *overrides])
        settings.model.text, settings.model.image = str(text_tower), str(image_tower)
        settings.model.width, settings.model.heads, settings.model.max_length = 32, 4, 16
        for key, value in changes.items():
            setattr(settings.model, key, value)
        with pytest.raises(UserError) as error:
            train(settings)
        return str(error.value)

    assert "are pixels: take mpp" in said(system="vilt", image="patches", size=64, grid=0)


def test_what_a_frozen_tower_said_and_the_pixels_it_saw_come_together(shapes, text_tower, image_tower, tmp_path):
    settings = toy_settings(shapes, text_tower, tmp_path / "run", steps=2, evaluate=False, text_lr=0.0, log_every=1)
    settings.objectives, settings.passes = {}, [{"mpp": {"mask": 0.3}}]
    settings.model.image, settings.model.size, settings.train.image_lr = str(image_tower), 64, 0.0
    passes = build_passes(settings, open_source(settings.data.source))
    learner, processor = make_learner(settings, passes)
    source = open_source(settings.data.source)
    states = frozen_states(learner, processor, source, "train", 3, 1e9)
    samples = Samples(source, "train", processor, passes, seed=0, states=states)
    seen = set()
    for epoch in range(6):
        sample = samples[(epoch, 5)]
        with torch.no_grad():
            said = learner.eval().image.states(learner.normalise(sample["pixel_values"][None]))[0]
        torch.testing.assert_close(said, sample["image_states"], atol=2e-3, rtol=2e-3)  # kept as float16
        seen.add(sample["pixel_values"].numpy().tobytes())
    assert 1 < len(seen) <= 3  # views
    without = Samples(source, "train", processor, [Pass([(MLM(), 1.0)])], seed=0, states=states)
    assert "pixel_values" not in without[(0, 5)] and "image_states" in without[(0, 5)]
    logs = [json.loads(line) for line in (train(settings) / "log.jsonl").read_text().splitlines()]
    assert any("mpp_r2" in line for line in logs)
