"""The pages of the published systems: their commands and their Python run, on releases at tiny sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from interlace.cli import main
from interlace.draw import draw
from interlace.model import VLModel
from interlace.presets import PRESETS, clip, met, mlim
from interlace.weights import save_foreign
from tests.test_docs import ROOT, blocks, table

SYSTEMS = ROOT / "docs/systems"
PAGES = sorted(page for page in SYSTEMS.glob("*.md") if page.stem != "README")
GOLDEN = ROOT / "tests/parity/golden"


# ------------------------------------------------------------------------------- the files that the pages speak of


def recorded(system: str) -> Callable[[str], dict[str, torch.Tensor]]:
    """A release's tensors by group; its configuration goes beside them."""
    tensors = load_file(GOLDEN / f"{system}-a.safetensors")
    config = json.loads((GOLDEN / f"{system}-a.json").read_text())["config"]
    Path("weights/config.json").write_text(json.dumps(config))

    def group(name: str) -> dict[str, torch.Tensor]:
        return {k.split("/", 1)[1]: v for k, v in tensors.items() if k.split("/")[0] == name}

    return group


def save(tensors: dict[str, torch.Tensor], name: str, prefix: str = "", entry: str = "") -> None:
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    torch.save({entry: named, "epoch": 3} if entry else named, f"weights/{name}")


def starting(tensors: dict[str, torch.Tensor], *starts: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(starts)}


def lxmert_files() -> None:
    from transformers import LxmertConfig, LxmertForPreTraining

    from tests.parity.test_lxmert import HF

    group = recorded("lxmert")
    save(group("weights"), "model_LXRT.pth", prefix="module.")
    body = {f"lxrt_encoder.model.{name}": t for name, t in starting(group("weights"), "bert.").items()}
    save(body | group("weights.vqa"), "vqa.pth")
    wide = 2 * len(body["lxrt_encoder.model.bert.pooler.dense.bias"])
    shapes = {"0.weight": (wide, wide), "0.bias": (wide,), "2.weight": (wide,), "2.bias": (wide,),
              "3.weight": (2, wide), "3.bias": (2,)}  # fmt: skip
    save(body | {f"logit_fc.{name}": torch.randn(shape) for name, shape in shapes.items()}, "nlvr2.pth")
    LxmertForPreTraining(LxmertConfig(**HF)).save_pretrained("weights/hf")


def uniter_files() -> None:
    group = recorded("uniter")
    save(group("weights"), "uniter-base.pt")
    save(starting(group("weights"), "uniter.") | group("weights.vqa"), "uniter-vqa.pt")


def vilbert_files() -> None:
    group = recorded("vilbert")
    save(group("weights"), "pretrained_model.bin")
    save(group("weights") | group("weights.tasks"), "multi_task_model.bin", prefix="module.")


def visual_bert_files() -> None:
    from transformers import VisualBertConfig, VisualBertForPreTraining

    save(recorded("visualbert")("weights"), "vqa_coco_pre_trained.th", prefix="bert.")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
             "vocab_size": 99, "max_position_embeddings": 24, "visual_embedding_dim": 20}  # fmt: skip
    VisualBertForPreTraining(VisualBertConfig(**sizes)).save_pretrained("weights/hf")


def vl_bert_files() -> None:
    from tests.presets.test_vl_bert_tasks import released as vl_bert_released

    group = recorded("vlbert")
    save(group("weights"), "vl-bert-base-prec.model", prefix="module.", entry="state_dict")
    body = {name: tensor for name, tensor in group("weights").items() if "_head" not in name}
    save(body | group("weights.vqa"), "vqa.model", prefix="module.", entry="state_dict")
    for task in ("refcoco", "vcr"):
        body, resnet = vl_bert_released(task)
        save(body | resnet, f"{task}.model", prefix="module.", entry="state_dict")


def vilt_files() -> None:
    from transformers import ViltConfig, ViltForQuestionAnswering

    save(recorded("vilt")("weights"), "vilt_200k_mlm_itm.ckpt", entry="state_dict")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
             "vocab_size": 99, "image_size": 32, "patch_size": 8, "max_position_embeddings": 16}  # fmt: skip
    theirs = ViltForQuestionAnswering(ViltConfig(**sizes, num_labels=7))
    theirs.save_pretrained("weights/vilt-b32-finetuned-vqa")


def blip_files() -> None:
    from transformers import BlipConfig, BlipForImageTextRetrieval

    from tests.parity.test_blip_transformers import TINY
    from tests.presets.test_blip_nlvr2 import released as blip_released

    group = recorded("blip")
    save(group("weights"), "model_base.pth", entry="model")
    seen = starting(group("weights"), "visual_encoder.")
    save(seen | starting(group("weights"), "text_decoder."), "model_base_caption.pth", entry="model")
    save(seen | starting(group("weights"), "text_encoder.") | group("weights.vqa"), "model_base_vqa.pth", entry="model")
    save(blip_released(), "model_base_nlvr.pth", entry="model")
    text = {**TINY, "vocab_size": 99, "max_position_embeddings": 32, "bos_token_id": 97, "sep_token_id": 3,
            "pad_token_id": 0, "eos_token_id": 3, "projection_dim": 24}  # fmt: skip
    vision = {**TINY, "hidden_size": 48, "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=24)
    BlipForImageTextRetrieval(config).save_pretrained("weights/hf")


def clip_files() -> None:
    from interlace.convert import load
    from tests.test_convert import hf_clip

    hf_clip("weights/hf")
    released = save_foreign(load("weights/hf", "clip").model, clip.KEYS)
    save_file(released, "weights/ViT-B-32.safetensors")
    heads = {"text_config": {"num_attention_heads": 4, "eos_token_id": 98},
             "vision_config": {"num_attention_heads": 4}}  # fmt: skip
    Path("weights/config.json").write_text(json.dumps(heads))


def mlim_files() -> None:
    model, keys = VLModel(mlim.tiny()), {**mlim.KEYS, "image": "image", "heads.pixels": "heads.pixels"}
    named = {name: t.clone() for name, t in starting(save_foreign(model, keys), "bert.", "cls.").items()}
    save_file({**named, "cls.seq_relationship.weight": torch.zeros(2, 32)}, "weights/bert.safetensors")


def captioner_files() -> None:
    from PIL import Image
    from transformers import VisionEncoderDecoderModel, ViTImageProcessorPil

    from interlace.presets.vision_encoder_decoder import tiny
    from tests.presets.test_vision_encoder_decoder import TEXT, VISION, text_config, tokenizer_of, vision_config

    VISION["vit"][1](vision_config("vit")).save_pretrained("towers/vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained("towers/vit")
    TEXT["gpt2"][1](text_config("gpt2")).save_pretrained("towers/gpt2")
    tokenizer_of("gpt2").save_pretrained("towers/gpt2")
    Image.new("RGB", (60, 40), "red").save("photo.png")
    VisionEncoderDecoderModel(tiny()).save_pretrained("theirs")
    old = {f"decoder.transformer.h.0.{part}": torch.ones(1) for part in ("attn.bias", "crossattention.masked_bias")}
    file = "theirs/model.safetensors"
    assert any(name.startswith("encoder.pooler.") for name in load_file(file))
    save_file(load_file(file) | old, file, metadata={"format": "pt"})


FILES = {"lxmert": lxmert_files, "uniter": uniter_files, "vilbert": vilbert_files, "visual_bert": visual_bert_files,
         "vl_bert": vl_bert_files, "vilt": vilt_files, "blip": blip_files, "clip": clip_files, "mlim": mlim_files,
         "vision_encoder_decoder": captioner_files}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ pages


def test_every_system_has_a_page_and_a_figure():
    assert {page.stem for page in PAGES} == set(PRESETS) == set(FILES)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_what_a_page_shows_runs_and_prints_what_is_shown(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    torch.manual_seed(0)
    FILES[page.stem]()
    shown, names = blocks(page), {"__name__": page.stem}
    assert sum(what == "python" for what, _ in shown) >= 3
    for n, (what, text) in enumerate(shown):
        capsys.readouterr()
        if what == "python":
            exec(compile(text, page.name, "exec"), names)
            if n + 1 < len(shown) and shown[n + 1][0] == "text":
                assert capsys.readouterr().out == shown[n + 1][1]
        for line in text.splitlines() if not what else []:
            if line.startswith((f"interlace train {page.stem}-small", "interlace train finetune")):
                continue  # minutes; that the recipe builds and steps is test_recipes' and test_passes' to say
            assert line.startswith(("interlace convert ", "interlace caption ")) and main(line.split()[1:]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_pages_are_built_alike_and_name_tests_that_exist(page):
    text, line = page.read_text(), PRESETS[page.stem]
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    first = ["When to choose it", "The idea", "Its neighbours", "What goes in", "Pre-training", "Fine-tuning",
             "Original weights", "Traps"]  # fmt: skip
    assert titles[:8] == first or [t for t in titles if t != "A run on the sample pictures"] == first
    assert len(text.splitlines()) <= 150 and re.search(rf"!\[[^\]]{{40,}}\]\(../images/systems/{page.stem}.svg\)", text)
    known = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) >= 4
    for name in named:
        assert f"def {name}(" in known, name
    assert [row[0] for row in table(page, "objective")] == line.objectives.split(", ")


@pytest.mark.parametrize("name", PRESETS)
def test_the_figure_is_the_one_that_draw_makes(name, tmp_path):
    draw(name, tmp_path / "figure.svg")
    kept = ROOT / f"docs/images/systems/{name}.svg"
    assert kept.read_text() == (tmp_path / "figure.svg").read_text(), f"interlace draw {name} --out {kept}"
    assert kept.stat().st_size < 10_000


def test_the_index_says_what_the_presets_are():
    rows = {re.findall(r"\((\w+)\.md\)", row[-1])[0]: row for row in table(SYSTEMS / "README.md", "system")}
    assert set(rows) == set(PRESETS)
    for name, row in rows.items():
        line = PRESETS[name]
        assert row[0] == line.system and row[2] == str(line.year) and row[3] == line.streams
        assert row[4] == met(line.depth) and row[5] == line.sees and row[6] == line.objectives
        assert row[7] == f"{line.parameters / 1e6:.0f} M"
