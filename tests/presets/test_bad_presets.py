"""What a user may get wrong with a preset: one clear error each, before anything has been computed or loaded. Boxes in
files are checked where those are read (tests/regions/test_arrays.py), unknown names of presets in test_table.py."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from properties.systems import CAPTIONS, EVERY_PAIRED, PAIRED
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from interlace.captioner import CaptionModel
from interlace.convert import convert
from interlace.embed.regions import Regions
from interlace.errors import UserError
from interlace.model import VLModel
from interlace.presets import uniter, vilbert
from interlace.weights import load_foreign, save_foreign

REGIONS = [system for system in PAIRED.values() if system.regions]
PIXELS = [system for system in PAIRED.values() if not system.regions]
EVERY_READER_OF_REGIONS = pytest.mark.parametrize("system", REGIONS, ids=lambda system: system.name)
EVERY_READER_OF_PIXELS = pytest.mark.parametrize("system", PIXELS, ids=lambda system: system.name)


# ------------------------------------------------------------------------------------------------------------- inputs


@EVERY_PAIRED
def test_a_text_longer_than_the_positions(system):
    model, ids = system.model(), torch.full((1, 40), 7)
    with pytest.raises(UserError, match=r"a text of (40|42) tokens, but the model has (16|24|32) positions"):
        model.fuse(model.half_text(ids), None)


def test_a_caption_longer_than_the_positions():
    model, batch = CAPTIONS.model(), CAPTIONS.batch(1, words=40)
    with pytest.raises(UserError, match="Labels of 40 tokens, but the text tower has positions for 24"):
        CAPTIONS.run(model, batch)


@EVERY_READER_OF_REGIONS
@pytest.mark.parametrize("wrong,words", [
    (lambda r: r._replace(features=r.features[..., :-1]), "reads 20 features and . box numbers per region, got 19"),
    (lambda r: r._replace(features=r.features[0]), r"expected features \(pictures, regions, 20\), got \(5, 20\)"),
    (lambda r: Regions(r.features[:, :0], None if r.boxes is None else r.boxes[:, :0]), "a picture without regions"),
    (lambda r: r._replace(hidden=torch.ones(3, 4, dtype=torch.bool)), r"but hidden of \(3, 4\): .* the same regions"),
    (lambda r: r._replace(boxes=torch.rand(3, 4, 4)), r"boxes of \(3, 4\): they must be the same regions"),
    (lambda r: r._replace(boxes=torch.rand(3, 5, 6)), "box numbers per region, got 20 and 6"),
    (lambda r: torch.rand(3, 3, 32, 32), "reads regions of a detector.* got a Tensor"),
], ids=["width", "no batch", "none", "hidden", "other regions", "box numbers", "pixels"])  # fmt: skip
def test_regions(system, wrong, words):
    with pytest.raises(UserError, match=words):
        system.model().half_image(wrong(system.batch().image))


@pytest.mark.parametrize("system", [system for system in REGIONS if system.config().image.boxes],
                         ids=lambda system: system.name)  # fmt: skip
@pytest.mark.parametrize("box,words", [
    ((0.1, 0.1, 1.5, 0.4), r"box 2 of picture 1 \(0.1, 0.1, 1.5, 0.4\) lies outside the picture"),
    ((-0.1, 0.1, 0.5, 0.4), "lies outside the picture"),
    ((32.0, 20.0, 64.0, 48.0), "lies outside the picture, which is 0 to 1: divide pixels by its width and height"),
    ((float("nan"), 0.1, 0.5, 0.4), "lies outside the picture"),
    ((0.5, 0.1, 0.2, 0.4), r"box 2 of picture 1 .* corners in the wrong order: expected x1, y1, x2, y2"),
], ids=["wide", "negative", "pixels", "no number", "unordered"])  # fmt: skip
def test_boxes_that_are_none(system, box, words):
    model, batch = system.model(), system.batch()
    boxes = batch.image.boxes.clone()
    boxes[1, 2, :4] = torch.tensor(box)
    with pytest.raises(UserError, match=words):
        model(batch.ids, batch.image._replace(boxes=boxes), batch.mask, batch.cells)


@EVERY_READER_OF_PIXELS
@pytest.mark.parametrize("wrong,words", [
    (torch.rand(1, 3, 4, 32), r"32x4 pixels is smaller than one patch|pictures of 32x32 pixels, got 32x4"),
    (torch.rand(1, 3, 36, 50), "50x36 pixels does not divide into patches of 8: resize it, to 48x(32|40)"
                               "|pictures of 32x32 pixels, got 50x36"),
    (torch.rand(3, 32, 32), r"expected pictures \(B, 3, height, width\), got \(3, 32, 32\)"),
    (torch.rand(1, 1, 32, 32), r"expected pictures .* got \(1, 1, 32, 32\).* grey"),
    (Regions(torch.rand(1, 5, 20), None), r"reads pictures, .* got Regions"),
], ids=["smaller than a patch", "no multiple", "no batch", "grey", "regions"])  # fmt: skip
def test_pictures(system, wrong, words):
    with pytest.raises(UserError, match=words):
        system.model().half_image(wrong)


@pytest.mark.parametrize("wrong,words", [
    (torch.rand(1, 3, 4, 32), "32x4 pixels is smaller than one patch"),
    (torch.rand(1, 3, 36, 50), "50x36 pixels does not divide into patches of 8"),
    (torch.rand(1, 3, 40, 40), r"40x40 pixels, but the image tower was made for 32x32.*interpolate_pos_encoding"),
    (torch.rand(3, 32, 32), r"expected pictures \(B, 3, height, width\), got \(3, 32, 32\)"),
    (torch.rand(1, 1, 32, 32), r"expected pictures .* got \(1, 1, 32, 32\).* grey"),
    (torch.ones(1, 3, 32, 32, dtype=torch.uint8), "reads normalised floats"),
], ids=["smaller than a patch", "no multiple", "another size", "no batch", "grey", "bytes"])  # fmt: skip
def test_pictures_of_a_captioner(wrong, words):
    model = CAPTIONS.model()
    with pytest.raises(UserError, match=words):
        model(pixel_values=wrong, labels=torch.tensor([[5, 98]]))
    with pytest.raises(UserError, match=words):
        model.generate(wrong)
    with pytest.raises(UserError, match=words):
        model.generate(pixel_values=wrong)
    larger = torch.rand(1, 3, 40, 40)
    assert model.generate(larger, interpolate_pos_encoding=True, max_length=4).shape == (1, 4)


@pytest.mark.parametrize("options", [{"max_length": 25}, {"max_new_tokens": 24}])
def test_a_captioner_does_not_write_beyond_its_positions(options):
    with pytest.raises(UserError, match="A text of 25 tokens, but the text tower has positions for 24"):
        CAPTIONS.model().generate(CAPTIONS.batch(1).image, **options)


def test_a_mask_of_patches_where_pixels_are_meant():
    model = PAIRED["vilt"].model()
    with pytest.raises(UserError, match=r"expected a mask of pixels \(1, 32, 32\), got \(1, 4, 4\)"):
        model.half_image(torch.rand(1, 3, 32, 32), torch.ones(1, 4, 4))


# ------------------------------------------------------------------------------------------------------------ releases


def keys_of(system):
    """The preset's table of names, at its tiny size."""
    return vilbert.keys(system.config().segments) if system.name == "vilbert" else system.line.module.KEYS


def fresh_of(system):
    """What no file has: of MLIM, which has no release and starts from a BERT."""
    return getattr(system.line.module, "FRESH", ())


def release(system):
    """A file of the release's names for the tiny size."""
    model = system.build()
    for part, *name in (start.split(".") for start in fresh_of(system)):
        if part == "heads":
            model.heads.pop(name[0]) if name[0] in model.heads else None
        else:
            setattr(model, part, torch.nn.Identity())
    return {name: tensor.clone() for name, tensor in save_foreign(model, keys_of(system)).items()}


def load(system, tensors):
    model = system.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        return load_foreign(model, tensors, keys_of(system), fresh=fresh_of(system)), model
    except UserError:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        raise


@EVERY_PAIRED
def test_the_release_of_another_system_is_named(system):
    other = "uniter" if system.name != "uniter" else "vilt"
    with pytest.raises(UserError, match=f"look like the release of {other!r}"):
        load(system, release(PAIRED[other]))


@EVERY_PAIRED
def test_a_release_of_another_size_is_told_so(system):
    narrow = {name: t[:, :-1] if t.dim() == 2 else t for name, t in release(system).items()}
    with pytest.raises(UserError, match=r"expected .* got .*Other shapes mean another size"):
        load(system, narrow)


@EVERY_PAIRED
def test_names_too_many_and_too_few_are_told_together(system):
    tensors = release(system)
    mapped = load(system, tensors)[0].mapped
    filled = Counter(ours for names in mapped.values() for ours in names)  # a tied tensor has two names
    lost = next(name for name, ours in mapped.items() if len(ours) == 1 and filled[ours[0]] == 1)
    tensors["surprise.weight"] = tensors.pop(lost)
    with pytest.raises(UserError) as told:
        load(system, tensors)
    message = str(told.value)
    assert "Unknown names in the file (1 of" in message and "surprise.weight" in message
    assert "Not in the file (1 tensors of the model)" in message


@EVERY_PAIRED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_become_float32_and_it_is_said(system, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in release(system).items()}
    report, model = load(system, tensors)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    name = str(dtype).removeprefix("torch.")
    assert report.types == {name} and f"converted from {name}" in str(report)
    back = {name: t.to(dtype) for name, t in model.state_dict().items()}
    assert torch.equal(back["text.words.weight"], model.text.words.weight.detach().to(dtype))
    assert load(system, release(system))[0].types == set()


def test_quantised_weights_are_refused():
    tensors = release(PAIRED["uniter"])
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    tensors[name] = tensors[name].to(torch.int8)
    with pytest.raises(UserError, match=f"{re.escape(name)} holds int8, not weights"):
        load(PAIRED["uniter"], tensors)


def test_convert_says_what_became_of_the_numbers(tmp_path, capsys):
    tensors = {name: tensor.bfloat16() for name, tensor in release(PAIRED["uniter"]).items()}
    save_file(tensors, tmp_path / "uniter.safetensors")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    done = convert(tmp_path / "uniter.safetensors", tmp_path / "ours", "uniter", Console(width=200))
    assert "bfloat16 became float32" in capsys.readouterr().out
    assert done.model.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------- own folders


@pytest.fixture
def folder(tmp_path):
    PAIRED["uniter"].build().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_with_names_too_many_and_too_few(folder):
    rewrite(folder, lambda t: t.update({"surprise": t.pop("text.words.weight"), "text.norm.bias": torch.ones(7)}))
    with pytest.raises(UserError) as told:
        VLModel.from_pretrained(folder)
    for words in ("Missing (1): text.words.weight", "Unknown (1): surprise", "Of another shape (1): text.norm.bias",
                  "Copy the folder again"):  # fmt: skip
        assert words in str(told.value)


def test_a_folder_of_another_model(folder, tmp_path):
    BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
                         vocab_size=50)).save_pretrained(tmp_path / "bert")  # fmt: skip
    with pytest.raises(UserError, match=r"another model's folder\? `interlace convert`"):
        VLModel.from_pretrained(tmp_path / "bert")


@pytest.mark.parametrize("name,content,words", [
    ("model.safetensors", b"half a fi", "cannot be loaded: .*header"),
    ("model.safetensors", None, "cannot be loaded: .*no file named model.safetensors"),
    ("config.json", b"{", "cannot be loaded: .*not a valid JSON"),
], ids=["damaged", "no weights", "config"])  # fmt: skip
def test_a_folder_that_is_not_whole(folder, name, content, words):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        VLModel.from_pretrained(folder)


def test_a_folder_that_is_not_there(tmp_path):
    for model in (VLModel, CaptionModel):
        with pytest.raises(UserError, match=r"no folder .*gone"):
            model.from_pretrained(tmp_path / "gone")


def test_a_config_of_another_size(folder):
    words = replace(uniter.tiny().text, vocabulary=120)
    with pytest.raises(UserError, match=r"Of another shape \(1\): text\.words\.weight"):
        VLModel.from_pretrained(folder, config=uniter.tiny(text=words, heads={}))


def test_new_heads_may_start_anew_when_a_config_asks_for_them(folder, capsys):
    config = uniter.tiny(heads={"answers": uniter.answers(5, 32)})
    model = VLModel.from_pretrained(folder, config=config)
    assert "has no heads.answers: at their initial values" in capsys.readouterr().err
    assert torch.equal(model.text.words.weight, load_file(folder / "model.safetensors")["text.words.weight"])


def test_a_folder_in_half_precision_is_float32_unless_asked(folder):
    rewrite(folder, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    assert {p.dtype for p in VLModel.from_pretrained(folder).parameters()} == {torch.float32}
    half = VLModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_captioner_s_folder_with_names_too_few(tmp_path):
    CAPTIONS.build().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.pop("decoder.transformer.ln_f.weight"))
    with pytest.raises(UserError, match=r"Missing \(1\): decoder\.transformer\.ln_f\.weight"):
        CaptionModel.from_pretrained(tmp_path)
