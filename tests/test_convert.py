"""Releases as their files are named, brought over: our folder holds the same numbers under our names."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, ViltConfig, ViltForMaskedLM

from interlace.cli import main
from interlace.convert import convert
from interlace.errors import UserError
from interlace.layers import JOINT, Width
from interlace.model import VLModel
from interlace.presets import clip, preset, uniter, vilbert, vilt
from interlace.weights import save_foreign

GOLDEN = Path(__file__).parent / "parity/golden"
QUIET = Console(quiet=True)
FILES = {  # preset, fixture, groups of weights, what the release calls its file, the wrapper's prefix
    "uniter": ("uniter", ("weights",), "uniter-base.pt", ""),
    "lxmert": ("lxmert", ("weights",), "Epoch20_LXRT.pth", "module."),
    "vilbert": ("vilbert", ("weights",), "pretrained_model.bin", ""),
    "visual_bert": ("visualbert", ("weights",), "vqa_coco_pre_trained.th", "bert."),
    "vl_bert": ("vlbert", ("weights",), "vl-bert-base-e2e.model", "module."),
    "vilt": ("vilt", ("weights",), "vilt_200k_mlm_itm.ckpt", ""),
    "blip": ("blip", ("weights",), "model_base.pth", ""),
    "blip_retrieval": ("blip", ("weights",), "model_base_retrieval.pth", ""),
}


def release(folder, name, entry=None):
    """The fixture as the release's file, with the configuration beside it."""
    system, groups, file, prefix = FILES[name]
    tensors = load_file(GOLDEN / f"{system}-a.safetensors")
    given = {prefix + k.split("/", 1)[1]: v for k, v in tensors.items() if k.split("/")[0] in groups}
    (folder / "config.json").write_text(json.dumps(json.loads((GOLDEN / f"{system}-a.json").read_text())["config"]))
    torch.save({entry: given, "epoch": 3} if entry else given, folder / file)
    return folder / file, {k.removeprefix(prefix): v for k, v in given.items()}


@pytest.mark.parametrize("name", FILES)
def test_a_release(name, tmp_path):
    entry = {"vilt": "state_dict", "blip": "model"}.get(name)
    file, tensors = release(tmp_path, name, entry)
    done = convert(file, tmp_path / "ours", name, QUIET)
    model = VLModel.from_pretrained(tmp_path / "ours")
    module = preset(name)[0].module
    keys = module.RETRIEVAL_KEYS if name == "blip_retrieval" else module.KEYS
    keys = vilbert.keys(model.config.segments) if name == "vilbert" else keys
    back = save_foreign(model, keys)
    assert set(back) == set(tensors) - {n.removeprefix(done.prefix) for n in done.report.dropped}
    for theirs, value in back.items():
        assert torch.equal(value, tensors[theirs]), theirs
    assert model.config.text.width.heads == 4  # said by the configuration alone


def test_fine_tuned_heads(tmp_path):
    tensors = load_file(GOLDEN / "uniter-a.safetensors")
    body = {k[8:]: v for k, v in tensors.items() if k.startswith("weights/uniter.")}
    body |= {k.split("/")[1]: v for k, v in tensors.items() if k.startswith("weights.vqa/")}
    config = json.loads((GOLDEN / "uniter-a.json").read_text())["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({k: v.clone() for k, v in body.items()}, tmp_path / "uniter-vqa.safetensors")
    done = convert(tmp_path / "uniter-vqa.safetensors", tmp_path / "ours", "uniter", QUIET)
    assert list(done.model.heads) == ["answers"] and not done.report.dropped
    assert done.model.heads["answers"].out.out_features == config["num_answer"]


def hf_clip(folder, vocabulary=99):
    text = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3,
            "vocab_size": vocabulary, "max_position_embeddings": 16, "eos_token_id": vocabulary - 1, "bos_token_id": 97,
            "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 4, "num_hidden_layers": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    theirs.save_pretrained(folder)
    return theirs


def test_a_folder_of_transformers_gives_its_outputs(tmp_path, capsys):
    torch.manual_seed(0)
    theirs = hf_clip(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--preset", "clip"]) == 0
    assert "transformers' names" in capsys.readouterr().out
    ours = VLModel.from_pretrained(tmp_path / "ours").eval()
    assert ours.config.text.eos == 98
    ids, pixels = torch.tensor([[97, 5, 6, 98]]), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels)
        torch.testing.assert_close(ours.encode_text(ids), expected.text_embeds, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(ours.encode_image(pixels), expected.image_embeds, atol=2e-5, rtol=2e-5)
    assert set(save_foreign(ours, clip.HF_KEYS)) == set(theirs.state_dict())


def test_transformers_one_epsilon_is_taken(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
             "vocab_size": 99, "image_size": 32, "patch_size": 8, "max_position_embeddings": 16}  # fmt: skip
    theirs = ViltForMaskedLM(ViltConfig(**sizes, layer_norm_eps=1e-3)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = convert(tmp_path / "theirs", tmp_path / "ours", "vilt", QUIET).model.eval()
    ids, pixels = torch.tensor([[2, 5, 6, 3]]), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels, pixel_mask=torch.ones(1, 32, 32)).logits
        got = ours.heads["mlm"](ours(ids, pixels).text)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    assert ours.config.heads.keys() == {"mlm"} and vilt.HF_KEYS


def test_heads_that_nothing_tells(tmp_path):
    file, _ = release(tmp_path, "uniter")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"how many heads.*config\.json"):
        convert(file, tmp_path / "ours", "uniter", QUIET)
    assert not (tmp_path / "ours").exists()


def test_a_configuration_of_another_size_is_not_believed(tmp_path):
    """Else its number of heads would be taken, and all outputs be wrong without a word."""
    file, _ = release(tmp_path, "uniter")
    given = json.loads((tmp_path / "config.json").read_text())
    wide = given["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps({**given, "hidden_size": 2 * wide, "num_attention_heads": 2}))
    with pytest.raises(UserError, match=f"the text is {wide} wide, .* whose text is {2 * wide} wide"):
        convert(file, tmp_path / "ours", "uniter", QUIET)
    assert not (tmp_path / "ours").exists()


def test_another_system_s_file_is_recognised(tmp_path):
    file, _ = release(tmp_path, "vilt")
    with pytest.raises(UserError, match="look like the release of 'vilt'"):
        convert(file, tmp_path / "ours", "uniter", QUIET)


def test_another_system_s_file_is_recognised_behind_a_prefix(tmp_path):
    tensors = save_foreign(VLModel(uniter.tiny()), uniter.KEYS, prefix="module.")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"the release of 'uniter' \(.* known there behind the prefix 'module\.'\)"):
        convert(tmp_path / "model.safetensors", tmp_path / "ours", "vilt", QUIET)


def test_what_is_refused(tmp_path, recwarn):
    file, _ = release(tmp_path, "uniter")
    with pytest.raises(UserError, match="not empty"):
        convert(file, tmp_path, "uniter", QUIET)
    with pytest.raises(UserError, match="Did you mean 'uniter'"):
        convert(file, tmp_path / "ours", "unitter", QUIET)
    with pytest.raises(UserError, match="nothing at"):
        convert(tmp_path / "gone.pt", tmp_path / "ours", "uniter", QUIET)
    torch.save({"weights": Path("runs code")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="may run code"):
        convert(tmp_path / "evil.pt", tmp_path / "ours", "uniter", QUIET)
    with open(tmp_path / "plain.pt", "wb") as pickled:
        pickle.dump({"weights": Path("runs code")}, pickled)
    with pytest.raises(UserError, match="may run code"):
        convert(tmp_path / "plain.pt", tmp_path / "ours", "uniter", QUIET)
    assert not [str(w.message) for w in recwarn if "ickle" in str(w.message)]  # the error says it all
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="one file of weights"):
        convert(tmp_path / "empty", tmp_path / "ours", "uniter", QUIET)


def test_without_a_configuration_heads_are_64_wide(tmp_path):
    width = Width(128, heads=2, ffn=96)
    regions = uniter.UNITERRegions(width, features=20)
    words = uniter.Words(width, pool="tanh", vocabulary=99, positions=24)
    model = VLModel(uniter.tiny(text=words, image=regions, segments={"joint": [JOINT] * 3}))
    release = {name: tensor.clone() for name, tensor in save_foreign(model, uniter.KEYS).items()}
    save_file(release, tmp_path / "uniter.safetensors")
    config = convert(tmp_path / "uniter.safetensors", tmp_path / "ours", "uniter", QUIET).model.config
    assert config.text.width == config.image.width == width and config.image.features == 20
    assert len(config.segments["joint"]) == 3 and config.heads == model.config.heads | {
        "mrc": {**model.config.heads["mrc"], "hidden": 128}}  # fmt: skip


def test_transformers_own_class_needs_no_converting(tmp_path):
    with pytest.raises(UserError, match="nothing to convert"):
        convert(tmp_path, tmp_path / "ours", "vision_encoder_decoder", QUIET)
