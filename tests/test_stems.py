"""Towers before a schedule: any pair fused by one line of a config, frozen, partly frozen or at a rate of its own, by
folder or by the hub's name."""

import shutil
import socket
from itertools import cycle

import pytest
import torch
from safetensors.torch import load_file

from interlace import towers
from interlace.compose import Composition, compose
from interlace.data.sources import open_source
from interlace.data.states import frozen_states
from interlace.errors import UserError
from interlace.layers import Co, Joint
from interlace.model import VLModel
from interlace.objectives import ITC, ITM
from interlace.train import train
from interlace.warm_start import align_stems
from tests.conftest import learning_settings
from tests.test_towers import IMAGE_TOWERS, TEXT_TOWERS

LINES = [(fusion, streams) for fusion in ("late", "mid", "early") for streams in ("single", "dual")]
PAIRS = list(zip(IMAGE_TOWERS, cycle(TEXT_TOWERS)))  # each of either at least once
SIZES = {"resnet": 64, "efficientnet-lite": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text_tower):
    """Every kind of tower as a folder with random weights; those of text with a tokenizer."""
    root = tmp_path_factory.mktemp("stems")
    torch.manual_seed(0)
    for name, (build, *_) in IMAGE_TOWERS.items():
        build().save_pretrained(root / "image" / name)
    for name, (build, _) in TEXT_TOWERS.items():
        build().save_pretrained(root / "text" / name)
        for file in text_tower.glob("tokenizer*"):
            shutil.copy(file, root / "text" / name)
    return root


@pytest.mark.parametrize("image,text", PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_one_line_fuses_any_pair_of_towers(image, text, folders, tmp_path):
    size = SIZES.get(image, 32)
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    sizes = {}
    for fusion, streams in LINES:
        what = Composition(text=str(folders / "text" / text), image=str(folders / "image" / image), fusion=fusion,
                           streams=streams, layers=2, width=24, heads=4, size=size, max_length=16)  # fmt: skip
        torch.manual_seed(0)
        model, processor = compose(what, [ITC(size=8), ITM()])
        model.eval()
        with torch.no_grad():  # over towers the layers start by adding nothing
            for parameter in model.schedule.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
        layers = model.schedule.layers()
        meets = {"late": len(layers), "mid": 1, "early": 0}[fusion]
        assert model.fusion_depth == meets
        crossing = set() if fusion == "late" else {Joint if streams == "single" else Co}
        assert {type(layer) for layer in layers if layer.crosses} == crossing
        sizes[fusion, streams] = sum(p.numel() for p in model.schedule.parameters())
        ids, mask = processor.texts(["a red circle", "a bar"])
        out = model(ids, pixels, mask)
        alone = model.encode_text(ids, mask) @ model.encode_image(pixels).T
        (model.heads["match"](out.pooled_text, out.pooled_image).square().sum() + alone.square().sum()).backward()
        for part in (model.text.tower, model.image.tower):  # the losses reach the towers
            assert any(p.grad is not None and p.grad.any() for p in part.parameters())
        with torch.no_grad():  # a word's end depends on the picture exactly where the streams meet
            other = model(ids, 255 - pixels, mask).text
        assert torch.equal(other, out.text) == (fusion == "late")
    assert all(sizes[fusion, "single"] < sizes[fusion, "dual"] for fusion, _ in LINES)
    model.save_pretrained(tmp_path)  # the last one; nothing but its own folder is read again
    again = VLModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ours, theirs = (one(ids, pixels, mask) for one in (again, model))
    assert torch.equal(ours.text, theirs.text) and torch.equal(ours.image, theirs.image)


def moved(run, tower, kind):
    """name -> by how much a tower's parameters differ from those it came with, at the most."""
    tensors, before = load_file(run / "model.safetensors"), towers.load_tower(tower, kind).model
    return {name: (tensors[f"{kind}.tower.{name}"] - p).abs().max().item() for name, p in before.named_parameters()}


@pytest.fixture
def step(shapes, text_tower, image_tower, tmp_path):
    """One step of AdamW, which moves what has a gradient by its rate, whatever the gradient's size."""

    def made(**changes):
        settings = learning_settings(shapes, text_tower, image_tower, tmp_path / "run", **{
            "steps": 1, "batch": 16, "warmup": 0.0, "schedule": "constant", "weight_decay": 0.0, "clip": 0.0,
            "eps": 1e-12, "evaluate": False, **changes})  # fmt: skip
        run = train(settings)
        return moved(run, text_tower, "text"), moved(run, image_tower, "image")

    return made


def test_each_tower_learns_at_a_rate_of_its_own(step):
    text, image = step(lr=1e-2, text_lr=1e-3, image_lr=1e-4)
    assert max(text.values()) == pytest.approx(1e-3, rel=0.05) and max(image.values()) == pytest.approx(1e-4, rel=0.05)


@pytest.mark.parametrize("rates,still", [({"text_lr": 0.0, "image_lr": 1e-3}, "text"),
                                         ({"text_lr": 1e-3, "image_lr": 0.0}, "image")])  # fmt: skip
def test_a_tower_without_a_rate_is_frozen(step, rates, still):
    text, image = step(**rates)
    frozen, learns = (text, image) if still == "text" else (image, text)
    assert not any(frozen.values()) and any(learns.values())


def test_a_tower_may_be_frozen_in_part(step):
    text, image = step(text_lr=1e-3, image_lr=1e-3,
                       freeze=[r"^text\.tower\.embeddings", r"^image\.tower\.encoder\.stages\.0"])  # fmt: skip
    for still, found in (("embeddings.", text), ("encoder.stages.0.", image)):
        assert not any(by for name, by in found.items() if name.startswith(still))
        assert all(by for name, by in found.items() if not name.startswith(still) and name.endswith("weight")), found


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache on this machine, and no way to the hub."""

    def refuse(*_):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def downloaded(name, folder):
        at = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, at / "snapshots" / ("0" * 40))
        (at / "refs").mkdir()
        (at / "refs" / "main").write_text("0" * 40)

    return downloaded


def test_towers_by_their_names_on_the_hub_without_a_network(hub, text_tower, image_tower):
    hub("someone/words", text_tower)
    hub("someone/cells", image_tower)
    what = {"fusion": "mid", "layers": 2, "width": 24, "heads": 4, "size": 64, "max_length": 16}
    made = []
    for text, image in (("someone/words", "someone/cells"), (str(text_tower), str(image_tower))):
        torch.manual_seed(0)
        made.append(compose(Composition(text=text, image=image, **what), [ITM()])[0])
    named, local = (model.state_dict() for model in made)
    assert named.keys() == local.keys() and all(torch.equal(named[name], local[name]) for name in named)
    with pytest.raises(UserError, match="Could not get the tower 'someone/else' from the hub"):
        compose(Composition(text="someone/else", image=str(image_tower), **what), [ITM()])


@pytest.mark.parametrize("image", ["vit", "siglip", "swin", "resnet", "convnext"])
def test_pictures_that_the_tower_cannot_take(image, folders):
    size = SIZES.get(image, 32)
    model, _ = compose(Composition(text=str(folders / "text/bert"), image=str(folders / "image" / image), layers=2,
                                   width=24, heads=4, size=size, max_length=16), [ITM()])  # fmt: skip
    for shape in ((1, 3, 4, 4), (1, 3, 48, 48), (1, 3, size, 50), (3, size, size), (1, 1, size, size)):
        with pytest.raises(UserError, match=rf"reads pictures \(B, 3, {size}, {size}\), got .*: resize"):
            model.half_image(torch.rand(shape))


@pytest.mark.parametrize("text", TEXT_TOWERS)
def test_a_text_longer_than_the_tower_s_positions(text, folders, tmp_path):
    """RoBERTa's table is longer than its texts."""
    model, _ = compose(Composition(text=str(folders / "text" / text), image="patches", patch=8, layers=2, width=24,
                                   heads=4, size=32, max_length=16), [ITM()])  # fmt: skip
    longest = TEXT_TOWERS[text][1]
    assert model.half_text(torch.full((1, longest), 5)).states.shape == (1, longest, 24)
    with pytest.raises(UserError, match=f"a text of {longest + 1} tokens, but the tower has {longest} positions"):
        model.half_text(torch.full((1, longest + 1), 5))
    tokenizer = towers.load_tokenizer(folders / "text" / text)
    tokenizer.model_max_length = int(1e30)  # as where a tokenizer does not say
    tokenizer.save_pretrained(tmp_path)
    towers.load_tower(folders / "text" / text, "text").model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"max_length is {longest + 1}, but .* takes at most {longest} tokens"):
        compose(Composition(text=str(tmp_path), image="patches", patch=8, layers=2, width=24, heads=4, size=32,
                            max_length=longest + 1), [ITM()])  # fmt: skip


def test_stems_are_aligned_wherever_the_model_lies(shapes, text_tower, image_tower, monkeypatch, tmp_path):
    monkeypatch.setenv("INTERLACE_CACHE", str(tmp_path))
    source = open_source(shapes)
    what = Composition(text=str(text_tower), image=str(image_tower), layers=2, width=24, heads=4, size=48,
                       max_length=16)  # fmt: skip
    model, processor = compose(what, [ITC(size=8)])
    model.freeze("text", "image")
    states = frozen_states(model, processor, source, "train", 1, 1e9)
    here = align_stems(model, states, source, processor)
    weights = [stem.project.weight.clone() for stem in (model.text, model.image)]
    assert here and all(weight.abs().sum() > 0 for weight in weights)
    for stem in (model.text, model.image):  # a device whose tensors no CPU tensor may be mixed with, nor be read back
        stem.project.to("meta")
    assert align_stems(model, states, source, processor) == here
