"""Every tiny size learns eight rows of a table by heart with the very passes its preset names: real pictures or stored
regions, the collator's batch, the objectives' own classes. (VisionEncoderDecoder's one loss is its model's own:
tests/properties/test_learning.py.)"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from interlace import towers
from interlace.data.batches import Collate, Samples
from interlace.data.processor import Augment, Processor
from interlace.data.sources import open_source
from interlace.embed.regions import RegionEmbedder
from interlace.learner import Learner
from interlace.presets import PRESETS
from interlace.regions import open_regions
from interlace.settings import Settings
from interlace.train import build_passes

SYSTEMS = sorted(PRESETS.keys() - {"vision_encoder_decoder"})
ROWS = range(0, 144, 18)  # of eight groups
MOST, RATE, WARM = 240, 2e-3, 20  # steps; it ends with the first that knows all by heart: 44 to 160 over three seeds
LEFT = 0.15  # of each loss's start
# smoothed; each row twice among what is found, the second time in the queue; drawn pixel by pixel
SLOWLY = {("blip", "lm"): 0.3, ("blip", "itc_momentum"): 0.45, ("blip", "itm"): 0.4, ("mlim", "recon"): 0.5}
ALIGNED = ("wra", "wpa")  # below zero once true pairs are nearer than wrong ones
NEVER = {"mlim": {"poolers.text.dense.weight", "poolers.text.dense.bias"}}  # for fine-tuning: no pass reads it
WHOLE = ("vilbert", "vl_bert")  # whose first region is the whole picture


@pytest.fixture(scope="module")
def source(shapes):
    return open_source(shapes)


@pytest.fixture(scope="module")
def regions(source, tmp_path_factory):
    """Of the tiny sizes: 20 features, 11 classes, 7 objects, 5 attributes, drawn for each picture."""
    folder, rng = tmp_path_factory.mktemp("tiny") / "regions", np.random.default_rng(0)
    folder.mkdir()
    sure = np.full(5, 0.5, np.float32)
    for pair in source.pairs("train"):
        np.savez(folder / f"{pair.id}.npz", features=rng.standard_normal((5, 20), np.float32),
                 boxes=np.sort(rng.random((5, 2, 2), np.float32), 1).reshape(5, 4), confidence=sure,
                 beliefs=np.eye(11, dtype=np.float32)[rng.integers(1, 11, 5)],
                 objects=rng.integers(0, 7, 5), objects_confidence=sure,
                 attributes=rng.integers(0, 5, 5), attributes_confidence=sure)  # fmt: skip
    return open_regions(folder)


def tiny(name, tokenizer, answers):
    """The tiny size over these words: CLIP's texts end where the tokenizer ends them, LXMERT has its answers."""
    config = PRESETS[name].module.tiny()
    if name == "clip":
        config.text = replace(config.text, eos=tokenizer.sep_token_id)
    if name == "lxmert":
        config.heads["answers"]["labels"] = answers
    return config


def passes_of(name, source):
    settings = Settings(passes=[dict(one) for one in PRESETS[name].module.PRETRAIN], objectives={})
    if name == "blip":  # a queue of eight rows, and a slow copy that comes along within the steps there are
        momentum = {**settings.passes[0]["itc_momentum"], "queue": 8, "momentum": 0.5}
        settings.passes[0]["itc_momentum"] = momentum
    return build_passes(settings, source)


def learnt(name, named, curve):
    """Is every loss, in the last step, near enough to what a model that knows the rows by heart has?"""
    start, end = curve[0], curve[-1]
    assert all(start[key] > 0 for key in named if key not in ALIGNED)
    return all(end[key] < (min(0, start[key]) if key in ALIGNED else SLOWLY.get((name, key), LEFT) * start[key])
               for key in named)  # fmt: skip


def made(name, source, regions, text_tower):
    """The tiny model with its passes, in evaluation, so without dropout, and one batch of eight rows."""
    passes, tokenizer = passes_of(name, source), towers.load_tokenizer(text_tower)
    answers = [len(o.answers) for one in passes for o, _ in one.objectives if o.name == "answers"]
    config = tiny(name, tokenizer, *(answers or [0]))
    torch.manual_seed(0)
    model, spec = Learner(config).learn_by(passes).eval(), config.image
    stored = isinstance(spec, RegionEmbedder)
    size, mean, std = (32, [0.5] * 3, [0.5] * 3) if stored else (spec.size, list(spec.mean), list(spec.std))
    processor = Processor(tokenizer, size, mean, std, "pad", 16, Augment())
    samples = Samples(source, "train", processor, passes, seed=3, augment=False, regions=regions if stored else None)
    collate = Collate(processor, None, passes, model.cells_to_hide(), (getattr(spec, "boxes", 4), name in WHOLE))
    return model.attach(8, 8), collate([samples[(0, row)] for row in ROWS])


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_is_computed_of_the_last_layer_changes_no_loss(name, source, regions, text_tower, monkeypatch):
    """Objectives say which states they read; with all of them computed it is the same loss and the same gradient."""
    model, batch = made(name, source, regions, text_tower)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a class token of zeros, which a norm divides by next to nothing
                parameter.normal_(std=0.2)
    model.before_step(1.0)
    found = []
    for every in (False, True):
        if every:
            for objective, _ in model.objectives:
                monkeypatch.setattr(objective, "asks", lambda part: (True, True))
                monkeypatch.setattr(objective, "only_vectors", False)
        model.zero_grad()
        out = model(**batch)
        out["loss"].backward()
        found.append((out["losses"], {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    for some, whole in zip(*found):
        torch.testing.assert_close({key: some.get(key, torch.zeros_like(x)) for key, x in whole.items()}, whole,
                                   atol=1e-5, rtol=1e-4)  # fmt: skip


@pytest.mark.parametrize("name", SYSTEMS)
def test_eight_rows_are_learnt_by_heart_with_its_own_passes(name, source, regions, text_tower):
    model, batch = made(name, source, regions, text_tower)
    passes = model.passes
    assert len(set(batch["group"].tolist())) == 8
    named = [f"{one.name}/{o.name}" if one.name else o.name for one in passes for o, _ in one.objectives]
    named = [key.replace("mam", "mlm") for key in named]  # which logs what it hid of the words
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimiser, 1 / WARM, total_iters=WARM)
    curve, silent = [], {name for name, _ in model.named_parameters()}
    while not (curve and learnt(name, named, curve)) and len(curve) < MOST:
        model.before_step(1.0)
        out = model(**batch)
        curve.append({key: loss.item() for key, loss in out["losses"].items()})
        optimiser.zero_grad()
        out["loss"].backward()
        if len(curve) <= 2:  # a part that starts at zero hides what is below it from the first step
            silent -= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        warm.step()
        model.after_step()
    silent = {part for part in silent if not part.endswith("key.bias")}  # a softmax is blind to it
    assert silent == NEVER.get(name, set())
    assert learnt(name, named, curve), (curve[0], curve[-1])
