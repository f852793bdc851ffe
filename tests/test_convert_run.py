"""Converted weights as a run that other commands take, and the check against transformers' own class."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    LxmertConfig,
    LxmertForPreTraining,
    LxmertModel,
    ViltConfig,
    ViltForImagesAndTextClassification,
    ViltForMaskedLM,
    ViltModel,
    VisualBertConfig,
    VisualBertForPreTraining,
    VisualBertModel,
)

from interlace.cli import main
from interlace.compose import Composition
from interlace.convert import convert
from interlace.convert_run import difference
from interlace.errors import UserError
from interlace.model import Half, VLModel
from interlace.objectives import ITM
from interlace.presets import vilt
from interlace.regions.arrays import RegionArrays
from interlace.regions.open import open_regions
from interlace.regions.store import Stamp, Writer
from interlace.run import Run
from interlace.systems import build_from_run
from interlace.towers import load_tokenizer
from tests.test_convert import hf_clip, release

QUIET = Console(quiet=True)
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}


def blip_folder(folder, class_=BlipForImageTextRetrieval):
    text = {**TEXT, "max_position_embeddings": 32, "encoder_hidden_size": 32, "bos_token_id": 90, "sep_token_id": 7}
    vision = {**TEXT, "image_size": 32, "patch_size": 8}
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16)
    class_(config).save_pretrained(folder)


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


@pytest.mark.parametrize("name, class_, ours", [
    ("blip_retrieval", BlipForImageTextRetrieval, "schedule.fuse.0.ffn.up.bias"),
    ("blip_caption", BlipForConditionalGeneration, "decoder.head.bias"),
    ("blip_vqa", BlipForQuestionAnswering, "schedule.fuse.0.ffn.up.bias")])  # fmt: skip
def test_what_blip_reads_and_writes_is_compared_too(name, class_, ours, tmp_path):
    blip_folder(tmp_path / "theirs", class_)
    model = convert(tmp_path / "theirs", tmp_path / "ours", name, QUIET).model
    if model.config.writes is not None:
        assert (model.config.writes.start, model.config.writes.end) == (90, 7)  # of its configuration
        assert "(the decoder; it reads" in model.config.describe()
    assert difference(tmp_path / "theirs", model) < 2e-5
    with torch.no_grad():
        model.state_dict()[ours] += 0.5
    assert difference(tmp_path / "theirs", model) > 1e-3


@pytest.mark.parametrize("name", ["lxmert", "visual_bert", "vilt"])
def test_a_bare_model_of_transformers(name, tmp_path):
    sizes = {k: v for k, v in TEXT.items() if k != "num_hidden_layers"}
    bare = {"lxmert": lambda: LxmertModel(LxmertConfig(**sizes, l_layers=2, r_layers=1, x_layers=2)),
            "visual_bert": lambda: VisualBertModel(VisualBertConfig(**TEXT)),
            "vilt": lambda: ViltModel(ViltConfig(**TEXT, image_size=32, patch_size=8))}  # fmt: skip
    bare[name]().save_pretrained(tmp_path / "theirs")
    done = convert(tmp_path / "theirs", tmp_path / "ours", name, QUIET)
    assert not done.model.heads and not done.report.dropped and not done.report.fresh
    assert difference(tmp_path / "theirs", done.model) < 2e-5


def test_vilt_over_two_pictures(tmp_path):
    config = ViltConfig(**TEXT, image_size=32, patch_size=8, num_images=2, modality_type_vocab_size=3)
    theirs = ViltForImagesAndTextClassification(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = convert(tmp_path / "theirs", tmp_path / "ours", "vilt", QUIET).model.eval()
    ids, pixels = torch.randint(5, 99, (2, 7)), torch.rand(2, 2, 3, 32, 32)
    mask = torch.ones(2, 2, 32, 32, dtype=torch.long)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels, pixel_mask=mask).logits
        text = model.half_text(ids)
        first, second = (Half(*model.image(pixels[:, n], mask[:, n], n)) for n in (0, 1))
        ours = vilt.compare(model, text, first, second)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


def test_a_model_with_an_answer_head_and_no_list_says_so(text_tower, tmp_path):
    words = len(load_tokenizer(str(text_tower)))
    config = LxmertConfig(**{**{k: v for k, v in TEXT.items() if k != "num_hidden_layers"}, "vocab_size": words},
                          l_layers=1, r_layers=1, x_layers=1, visual_feat_dim=20, num_qa_labels=11)  # fmt: skip
    LxmertForPreTraining(config).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", "lxmert", QUIET, tokenizer=str(text_tower))
    with pytest.raises(UserError, match="no list of its answers: convert the weights again with --answers"):
        Run.load(tmp_path / "ours").answer(Image.new("RGB", (32, 32)), "what is it?")


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


def test_a_file_of_the_release_says_that_nothing_was_compared(tmp_path, capsys):
    file, _ = release(tmp_path, "lxmert")
    assert main(["convert", str(file), str(tmp_path / "ours"), "--preset", "lxmert"]) == 0
    said = capsys.readouterr().out
    assert "not compared with transformers" in said and "largest difference" not in said


def test_without_words_it_is_a_model_and_says_what_is_missing(tmp_path, capsys):
    hf_clip(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--preset", "clip"]) == 0
    assert "--tokenizer" in " ".join(capsys.readouterr().out.split())
    assert VLModel.from_pretrained(tmp_path / "ours").config.text.eos == 98
    with pytest.raises(UserError, match="not a run folder"):
        Run.load(tmp_path / "ours")


def test_a_tokenizer_that_lost_its_vocabulary_is_not_taken(text_tower, tmp_path):
    tokenizer = load_tokenizer(str(text_tower))
    hf_clip(tmp_path / "theirs", vocabulary=len(tokenizer))
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    with pytest.raises(UserError, match=r"has no vocabulary beside it .*: name another one with --tokenizer"):
        convert(tmp_path / "theirs", tmp_path / "ours", "clip", QUIET)
    convert(tmp_path / "theirs", tmp_path / "ours", "clip", QUIET, tokenizer=str(text_tower))
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / "ours" / name).unlink(missing_ok=True)
    assert (tmp_path / "ours" / "tokenizer_config.json").is_file()
    with pytest.raises(UserError, match=r"ours has no tokenizer\.json: copy the run again"):
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
