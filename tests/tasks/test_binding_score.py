"""Scores of what stands where: who learnt it, who guesses, who sees only the words; pictures that cannot be read."""

import csv
import re
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image

from interlace.cli import main
from interlace.config import VLConfig
from interlace.data.processor import Processor
from interlace.data.sources import open_source
from interlace.embed.patches import Patches
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.layers import Width
from interlace.learner import Learner
from interlace.objectives import Binding
from interlace.objectives.base import Views
from interlace.run import Run, save_run
from interlace.tasks.binding import better, binding, print_binding, twins

COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COLOURS, "left", "right"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Every two of three colours at the left and the right: 6 rows, which are 3 twins."""
    folder = tmp_path_factory.mktemp("colours")
    rows = []
    for a, b in permutations(COLOURS, 2):
        picture = Image.new("RGB", (8, 8), COLOURS[a])
        picture.paste(COLOURS[b], (4, 0, 8, 8))
        picture.save(folder / f"{a}-{b}.png")
        rows.append([f"{a}-{b}", f"{a}-{b}.png", f"{a} left {b} right", "+".join(sorted((a, b))), "train",
                     f"{b} left {a} right", f"{b}-{a}", 2, "left-right"])  # fmt: skip
    with open(folder / "pairs.csv", "w", newline="") as file:
        header = ["id", "image", "caption", "group", "split", "swapped", "twin", "cells", "swap"]
        csv.writer(file).writerows([header, *rows])
    return open_source(folder)


def make_run(folder, fusion="early", layers=2, norm="pre", pool="first", heads=("match",)):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                        sep_token="[SEP]", mask_token="[MASK]", model_max_length=24)  # fmt: skip
    torch.manual_seed(0)
    width = Width(32, heads=4, norm=norm, dropout=0.0, attention_dropout=0.0)
    config = VLConfig(Words(width, pool=pool, vocabulary=len(VOCABULARY), positions=24),
                      Patches(width, pool=pool, size=8, patch=4), fusion=fusion, streams="single", layers=layers,
                      heads={name: {} for name in heads})  # fmt: skip
    model = Learner(config)
    for weight in (model.text.words.weight, model.text.positions.weight, model.image.positions):
        torch.nn.init.normal_(weight)  # strong from the start: see the test of the objective
    torch.nn.init.normal_(model.image.project.weight, std=0.3)
    return Run(folder, model, Processor(tokenizer, size=8), [], 1.0, {"fingerprint": ""})


def teach(run, source, steps=150):
    from interlace.data.pictures import open_picture

    rows = list(source.pairs("train"))
    pixels = run._pixels([open_picture(row.picture) for row in rows])
    true, swapped = run._words([r.caption for r in rows]), run._words([str(r.attributes["swapped"]) for r in rows])
    real = torch.ones(len(rows), dtype=torch.bool)
    model, objective = run.model.train(), Binding()
    for weight in model.schedule.parameters():
        weight.data *= 4 if weight.ndim == 2 else 1
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = {"group": torch.arange(len(rows)), "pixel_values": pixels, "caption_real": real, "swapped_real": real,
                 "caption_ids": true[0], "caption_mask": true[1], "swapped_ids": swapped[0],
                 "swapped_mask": swapped[1]}  # fmt: skip
        scored = objective.loss(model, batch, Views(model, batch))
        if scored.loss < 0.02:
            break
        optimiser.zero_grad()
        scored.loss.backward()
        optimiser.step()
    model.eval()
    return run


def test_who_learnt_it_scores_above_chance_and_only_with_its_picture(scenes, tmp_path, capsys):
    result = binding(teach(make_run(tmp_path), scenes), scenes, "train")
    assert result["rows"] == 6 and result["unreadable"] == 0
    assert result["text"]["value"] == result["image"]["value"] == result["both"]["value"] == 1
    assert result["text"]["chance"] == result["image"]["chance"] == 0.5 and result["both"]["chance"] == 1 / 6
    assert result["text"]["blind"] < 1
    assert {name: kind["queries"] for name, kind in result["by_kind"].items()} == {"2 things": 6,
                                                                                   "exchanged left-right": 6}
    print_binding(result)
    assert "which caption" in capsys.readouterr().out


def test_bags_of_words_and_cells_tie_everywhere(scenes, tmp_path):
    run = make_run(tmp_path, "late", layers=0, norm="post", pool="mean")
    torch.nn.init.zeros_(run.model.text.positions.weight)
    result = binding(run, scenes, "train")
    words, mask = run._words(["red left blue right", "blue left red right"])
    one, two = run.model.half_text(words, mask).states.mean(1)
    torch.testing.assert_close(one, two)
    # ties, but for the last digit of a sum: never all four comparisons of a twin
    assert 0 < result["text"]["value"] < 1 and result["both"]["value"] == 0


def test_a_picture_that_cannot_be_read_is_counted(scenes, tmp_path):
    import shutil

    copy = shutil.copytree(scenes.picture(0).path.rsplit("/", 1)[0], tmp_path / "scenes")
    (copy / "red-green.png").write_bytes(b"no picture")
    result = binding(make_run(tmp_path), open_source(copy), "train", blind=False)
    assert result["unreadable"] == 1 and result["rows"] == 5
    assert result["image"]["queries"] == 4 and "blind" not in result["text"]


def test_what_it_needs(scenes, shapes, tmp_path):
    with pytest.raises(UserError, match="no match head"):
        binding(make_run(tmp_path, heads=()), scenes, "train")
    with pytest.raises(UserError, match="interlace data scenes"):
        binding(make_run(tmp_path), open_source(shapes), "train")
    with pytest.raises(UserError, match="'test' split"):
        binding(make_run(tmp_path), scenes, "test")


def test_a_tie_is_a_half_and_twins_are_couples(scenes):
    assert better(np.array([1.0, 2, 3]), np.array([2.0, 2, 2])).tolist() == [0, 0.5, 1]
    a, b = twins(list(scenes.pairs())[:5])  # red-green, red-blue, green-red, green-blue, blue-red
    assert a.tolist() == [0, 1] and b.tolist() == [2, 4]


def test_the_command(scenes, tmp_path, capsys):
    run = make_run(tmp_path)
    save_run(tmp_path / "run", run.model, run.processor)
    folder = scenes.picture(0).path.rsplit("/", 1)[0]
    assert main(["binding", str(tmp_path / "run"), folder, "--split", "train", "--out", str(tmp_path / "b.json")]) == 0
    assert re.search(r"which picture\s+│\s+\d", capsys.readouterr().out) and (tmp_path / "b.json").is_file()
