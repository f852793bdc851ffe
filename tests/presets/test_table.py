"""The table of presets says what the presets are."""

import pytest
import torch
from transformers import VisionEncoderDecoderConfig

from interlace.captioner import CaptionModel
from interlace.cli import main
from interlace.embed.conv import Blocks
from interlace.embed.patches import Patches
from interlace.embed.regions import RegionEmbedder
from interlace.errors import UserError
from interlace.model import VLModel
from interlace.presets import PRESETS, names, objectives, preset


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"vision_encoder_decoder"}))
def test_a_line_is_true(name):
    line = PRESETS[name]
    with torch.device("meta"):
        model = VLModel(line.make())
    assert sum(p.numel() for p in model.parameters()) == line.parameters
    assert (model.fusion_depth, len(model.schedule.layers())) == line.depth
    assert objectives(line.module.PRETRAIN) == line.objectives
    assert f"({line.year}" in line.module.__doc__ or f" {line.year}" in line.module.__doc__
    spec = model.config.image
    cells = "blocks" if isinstance(spec, Blocks) else "patches"
    sees = "regions" if isinstance(spec, RegionEmbedder) else f"{cells} of {spec.patch}"
    assert sees == line.sees and isinstance(spec, RegionEmbedder | Patches | Blocks)
    joint = {kind.name for kinds in model.config.segments.values() for kind in kinds} & {"joint", "each"}
    assert (line.streams == "single") == bool(joint)


def test_the_line_of_transformers_own_class_is_true():
    line = PRESETS["vision_encoder_decoder"]
    config = line.make()
    with torch.device("meta"):
        model = CaptionModel(config)
    assert sum(p.numel() for p in model.parameters()) == line.parameters
    alone = config.encoder.num_hidden_layers
    assert line.depth == (alone, alone + config.decoder.num_hidden_layers)
    assert line.sees == f"patches of {config.encoder.patch_size}"
    assert objectives(line.module.PRETRAIN) == line.objectives
    assert line.system == "ViT + GPT-2" and (config.encoder.model_type, config.decoder.model_type) == ("vit", "gpt2")


def test_every_system_has_a_line():
    import importlib
    import pkgutil

    import interlace.presets as package

    files = [importlib.import_module(f"{package.__name__}.{f.name}") for f in pkgutil.iter_modules(package.__path__)]
    assert {f.__name__.split(".")[-1] for f in files} == set(PRESETS)
    assert all(line.module.tiny() for line in PRESETS.values())


def test_other_sizes_and_spellings():
    assert preset("VL-BERT-large")[1]().text.width.size == 1024
    assert preset("visualbert")[0] is PRESETS["visual_bert"]
    for name in names():
        config = preset(name)[1]()
        assert isinstance(config, VisionEncoderDecoderConfig) or config.segments


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'lxmert'"):
        preset("lxmart")


def test_the_command_prints_all(capsys):
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in PRESETS) and "239 M" in said
    heads = ["preset", "system", "year", "streams", "fusion depth", "vision input", "objectives", "parameters"]
    assert [word.strip() for word in said.splitlines()[0].split("  ") if word] == heads
