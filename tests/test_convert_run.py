"""Converted weights as a run that other commands take, and the check against transformers' own class."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    LxmertConfig,
    LxmertForPreTraining,
    ViltConfig,
    ViltForMaskedLM,
    VisualBertConfig,
    VisualBertForPreTraining,
)

from interlace.cli import main
from interlace.compose import Composition
from interlace.convert import convert
from interlace.convert_run import difference
from interlace.errors import UserError
from interlace.model import VLModel
from interlace.objectives import ITM
from interlace.regions.arrays import RegionArrays
from interlace.regions.open import open_regions
from interlace.regions.store import Stamp, Writer
from interlace.run import Run
from interlace.systems import build_from_run
from interlace.towers import load_tokenizer
from tests.test_convert import hf_clip, release

QUIET = Console(quiet=True)
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}


def blip_folder(folder):
    text = {**TEXT, "max_position_embeddings": 32, "encoder_hidden_size": 32}
    vision = {**TEXT, "image_size": 32, "patch_size": 8}
    BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16)
                              ).save_pretrained(folder)  # fmt: skip


def lxmert_folder(folder):
    sizes = {k: v for k, v in TEXT.items() if k != "num_hidden_layers"}
    LxmertForPreTraining(LxmertConfig(**sizes, l_layers=2, r_layers=1, x_layers=2, visual_feat_dim=20,
                                      max_position_embeddings=24, num_object_labels=7, num_attr_labels=5,
                                      num_qa_labels=11)).save_pretrained(folder)  # fmt: skip


def visual_bert_folder(folder):
    VisualBertForPreTraining(VisualBertConfig(**TEXT, max_position_embeddings=24, visual_embedding_dim=20)
                             ).save_pretrained(folder)  # fmt: skip


def vilt_folder(folder):
    ViltForMaskedLM(ViltConfig(**TEXT, image_size=32, patch_size=8, max_position_embeddings=16)).save_pretrained(folder)


FOLDERS = {"clip": hf_clip, "blip_retrieval": blip_folder, "lxmert": lxmert_folder, "visual_bert": visual_bert_folder,
           "vilt": vilt_folder}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_the_difference_from_transformers_is_rounding(name, tmp_path):
    torch.manual_seed(0)
    FOLDERS[name](tmp_path / "theirs")
    model = convert(tmp_path / "theirs", tmp_path / "ours", name, QUIET).model
    apart = difference(tmp_path / "theirs", model)
    assert apart is not None and apart < 2e-5
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("schedule.") and p.ndim > 1:
                p += 0.1 * torch.randn_like(p)
    assert difference(tmp_path / "theirs", model) > 1e-2  # and it can be larger


def test_a_folder_with_its_tokenizer_becomes_a_run(text_tower, tmp_path, capsys):
    """CLIP's weights at a toy size, with words of which it has as many."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(text_tower))
    hf_clip(tmp_path / "theirs", vocabulary=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--preset", "clip"]) == 0
    assert "largest difference from transformers on a random batch" in capsys.readouterr().out
    run = Run.load(tmp_path / "ours")
    assert run.dim == 24 and run.processor.size == 32 and run.processor.fit == "crop" and run.facts["system"] == "clip"
    vectors = run.encode_pictures([Image.new("RGB", (40, 50), "red"), Image.new("RGB", (32, 32), "blue")])
    assert vectors.shape == (2, 24) and run.encode_texts(["a red circle"]).shape == (1, 24)


def test_it_is_indexed_and_searched_like_a_trained_one(text_tower, shapes, tmp_path, capsys):
    torch.manual_seed(0)
    hf_clip(tmp_path / "theirs", vocabulary=len(load_tokenizer(str(text_tower))))
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--preset", "clip", "--tokenizer",
                 str(text_tower)]) == 0  # fmt: skip
    assert main(["index", str(tmp_path / "ours"), str(shapes)]) == 0
    capsys.readouterr()
    assert main(["search", str(tmp_path / "ours"), "a red circle", "-k", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["hits"]) == 3


def test_without_words_it_is_a_model_and_says_what_is_missing(tmp_path, capsys):
    hf_clip(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--preset", "clip"]) == 0
    assert "--tokenizer" in " ".join(capsys.readouterr().out.split())
    assert VLModel.from_pretrained(tmp_path / "ours").config.text.eos == 98
    with pytest.raises(UserError, match="not a run folder"):
        Run.load(tmp_path / "ours")


def test_a_region_model_says_that_its_detector_is_not_here(text_tower, tmp_path):
    lxmert_folder(tmp_path / "theirs")
    with pytest.raises(UserError, match="another model's"):
        convert(tmp_path / "theirs", tmp_path / "ours", "lxmert", QUIET, tokenizer="minilm")
    torch.manual_seed(0)
    TEXT_OF_TOWER = {**TEXT, "vocab_size": len(load_tokenizer(str(text_tower)))}
    VisualBertForPreTraining(VisualBertConfig(**TEXT_OF_TOWER, max_position_embeddings=24, visual_embedding_dim=20)
                             ).save_pretrained(tmp_path / "more")  # fmt: skip
    convert(tmp_path / "more", tmp_path / "ours", "visual_bert", QUIET, tokenizer=str(text_tower))
    with pytest.raises(UserError, match="made elsewhere"):
        Run.load(tmp_path / "ours").half_image([Image.new("RGB", (9, 9))])
    for size in (20, 21):  # and it goes on from features of its size
        (tmp_path / str(size)).mkdir()
        writer = Writer(tmp_path / str(size), {"kind": "given", "name": "drawn"}, size, 0)
        boxes = np.array([[0, 0, 1, 1]] * 2, np.float32)
        writer.add(["a"], Stamp(0, 0), RegionArrays(np.zeros((2, size), np.float32), boxes))
        writer.commit()
    what, itm = Composition(start=str(tmp_path / "ours")), [ITM("drawn")]
    _, processor = build_from_run(what, itm, regions=open_regions(tmp_path / "20"))
    assert processor.regions["extractor"]["kind"] == "given"
    with pytest.raises(UserError, match="20 features per region"):
        build_from_run(what, itm, regions=open_regions(tmp_path / "21"))


def test_an_answer_list_must_fit_its_head(text_tower, tmp_path):
    file, _ = release(tmp_path, "lxmert")
    (tmp_path / "short.json").write_text(json.dumps(["yes", "no"]))
    with pytest.raises(UserError, match="2 answers, the model's head"):
        convert(file, tmp_path / "ours", "lxmert", QUIET, answers=tmp_path / "short.json")
    (tmp_path / "none.json").write_text("yes, no")
    with pytest.raises(UserError, match="no answer list"):
        convert(file, tmp_path / "ours", "lxmert", QUIET, answers=tmp_path / "none.json")
    hf_clip(tmp_path / "theirs")
    with pytest.raises(UserError, match="no answer head"):
        convert(tmp_path / "theirs", tmp_path / "ours", "clip", QUIET, answers=tmp_path / "short.json")
    assert not (tmp_path / "ours").exists()
