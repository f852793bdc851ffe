"""Small real things shared by the tests: towers with random weights, a table of drawn shapes, a run trained on it."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # tiny models: a second thread only waits, and spins while it does

COLOURS = {"red": "#d62728", "green": "#2ca02c", "blue": "#1f3fb4", "yellow": "#e8c500", "black": "#111111",
           "pink": "#ff7fc8"}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "bar")
WORDS = [*COLOURS, *SHAPES, "a", "an", "is", "it", "what", "shape", "colour", "picture", "of", "which", "the", "round",
         "yes", "no", "?", ",", ".", "small", "large", "which", "does", "have"]  # fmt: skip


def draw_shape(colour: str, shape: str, variant: int, size: int = 48) -> Image.Image:
    """A shape on white; `variant` moves and scales it, so that no two pictures are equal."""
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    r = 9 + variant % 7
    x, y = size // 2 - 4 + 3 * (variant % 4), size // 2 - 4 + 2 * (variant % 5)
    fill = COLOURS[colour]
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    else:
        pen.rectangle((x - r, y - 3, x + r, y + 3), fill=fill)
    return image


def write_shapes(folder: Path, variants: int = 8) -> Path:
    """6 colours x 4 shapes x `variants` pictures; captions, attributes of every type, questions."""
    (folder / "pictures").mkdir(parents=True)
    rows, questions = [], []
    for colour in COLOURS:
        for shape in SHAPES:
            for v in range(variants):
                name = f"{colour}-{shape}-{v}"
                draw_shape(colour, shape, v).save(folder / "pictures" / f"{name}.png")
                # the split goes by variant, so every colour and shape is known and every picture new
                split = {0: "test", 1: "val"}.get(v, "train")
                rows.append({"id": name, "image": f"pictures/{name}.png", "caption": f"a {colour} {shape}",
                             "name": f"{colour} {shape} {v}", "group": f"{colour}-{shape}", "split": split,
                             "colour": colour, "shape": shape, "size_px": 2 * (9 + v % 7),
                             "round": shape == "circle"})  # fmt: skip
                asked = [("colour", "what colour is it?", colour), ("shape", "what shape is it?", shape),
                         ("round", "is it round?", "yes" if shape == "circle" else "no")]  # fmt: skip
                for kind, question, answer in asked:
                    questions.append({"question_id": f"{name}-{kind}", "image": f"pictures/{name}.png",
                                      "question": question, "answer": [answer], "kind": kind,
                                      "pair_id": name})  # fmt: skip
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(q) for q in questions) + "\n")
    (folder / "LICENCE.txt").write_text("drawn for the tests\n")
    return folder


def write_text_tower(folder: Path, width: int = 32) -> Path:
    """A tiny BERT with random weights and a word-level tokenizer over WORDS."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {w: n for n, w in enumerate(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                        sep_token="[SEP]", mask_token="[MASK]", model_max_length=32)  # fmt: skip
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=width, num_hidden_layers=1, num_attention_heads=4,
                        intermediate_size=2 * width, max_position_embeddings=32)  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def write_image_tower(folder: Path, size: int = 48) -> Path:
    """A tiny ResNet with random weights: what a shape is, a convolution learns from far fewer pictures than attention
    over patches, which has to learn first that a place does not matter."""
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 48], depths=[1, 1, 1], layer_type="basic")
    config.image_size = size
    ResNetModel(config).save_pretrained(folder)
    pixels = {"size": {"height": size, "width": size}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def toy_settings(shapes: Path, tower: Path, out: Path, **train):
    """Settings that run in seconds and learn the colours: patches of raw pixels, a tiny tower for words."""
    from interlace.compose import Composition
    from interlace.data.processor import Augment
    from interlace.settings import DataSettings, Settings, TrainSettings

    return Settings(
        data=DataSettings(source=str(shapes)),
        model=Composition(text=str(tower), image="patches", patch=8, size=48, layers=2, width=32, heads=4,
                          max_length=16, dropout=0.0),
        augment=Augment(smallest_crop=0.9, flip=True, colour=0.05),
        objectives={"itc": {"size": 32}, "itm": {"negatives": "both"}, "vqa": {"questions": 3}},
        train=TrainSettings(**{"out": str(out), "steps": 160, "batch": 40, "lr": 3e-3, "text_lr": 3e-3, "log_every": 10,
                               "checkpoint_every": 1000, **train}),
    )  # fmt: skip


def learning_settings(shapes: Path, text: Path, image: Path, out: Path, **train):
    """Settings that learn colours and shapes in less than a minute, on pictures they have not seen."""
    settings = toy_settings(shapes, text, out, **{"steps": 200, "image_lr": 3e-3, **train})
    settings.model.image, settings.augment.smallest_crop = str(image), 0.8
    return settings


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "table")


@pytest.fixture(scope="session")
def text_tower(tmp_path_factory) -> Path:
    return write_text_tower(tmp_path_factory.mktemp("towers") / "bert")


@pytest.fixture(scope="session")
def image_tower(tmp_path_factory) -> Path:
    return write_image_tower(tmp_path_factory.mktemp("towers") / "resnet")


@pytest.fixture(scope="session")
def run_folder(shapes, text_tower, image_tower, tmp_path_factory) -> Path:
    """A finished run folder that really learnt the shapes."""
    from interlace.train import train

    return train(learning_settings(shapes, text_tower, image_tower, tmp_path_factory.mktemp("runs") / "shapes"))


@pytest.fixture(scope="session")
def tiny_run(run_folder):
    from interlace.run import Run

    return Run.load(run_folder)
