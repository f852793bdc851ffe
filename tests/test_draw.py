"""The figure says what the layers do and what they cost."""

import xml.etree.ElementTree as xml

import pytest
import torch
from rich.console import Console

from interlace import draw
from interlace.cli import main
from interlace.config import VLConfig
from interlace.draw_svg import svg
from interlace.embed.patches import Patches
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.layers import BOTH, CO, EACH, IMAGE, JOINT, NORM, READ, TEXT, Kind, Width, co
from interlace.model import VLModel
from interlace.presets import names, vilbert, vl_bert

SELF = {"text": ("text",), "image": ("image",)}
CROSS = {"text": ("image",), "image": ("text",)}
READS = {
    TEXT: {"text": ("text",)}, IMAGE: {"image": ("image",)}, BOTH: SELF, EACH: SELF, CO: CROSS,
    co(tied=True, ffn=False): CROSS, JOINT: {"text": ("text", "image"), "image": ("text", "image")},
    READ: {"text": ("text", "image")}, NORM: {"text": (), "image": ()}, Kind("causal"): {"text": ("text",)},
    Kind("norm", (("stream", "image"),)): {"image": ()},
}  # fmt: skip


@pytest.mark.parametrize("kind", READS, ids=str)
def test_who_reads_whom(kind):
    assert draw.ask(kind).reads == READS[kind]


def test_what_a_layer_shares_and_digests():
    assert not draw.ask(CO).tied and draw.ask(CO).digests
    tied = draw.ask(co(tied=True, ffn=False))
    assert tied.tied and not tied.digests
    assert draw.ask(EACH).tied and not draw.ask(BOTH).tied and not draw.ask(NORM).digests


def test_patterns():
    assert draw.fold([CO, BOTH, CO, BOTH, TEXT]) == [([CO, BOTH], 2), ([TEXT], 1)]
    assert draw.fold([TEXT] * 4 + [CO]) == [([TEXT], 4), ([CO], 1)]


def test_costs_by_the_formula():
    text, image, words, cells = Width(32, heads=4), Width(48, heads=4, ffn=100), 7, 10
    config = VLConfig(text=Words(text), image=Patches(image, size=24, patch=8),
                      segments={"a": [TEXT] * 3, "b": [IMAGE], "c": [co(inner=64, heads=4)], "d": [READ]})  # fmt: skip
    drawn = draw.figure(config, "mine", words, cells)
    ffn = [words * 2 * 32 * 128, cells * 2 * 48 * 100]
    own = [words * 4 * 32**2 + 2 * words**2 * 32, cells * 4 * 48**2 + 2 * cells**2 * 48]
    crossed = sum(2 * q * d * 64 + 2 * k * c * 64 + 2 * q * k * 64
                  for q, d, k, c in ((words, 32, cells, 48), (cells, 48, words, 32)))  # fmt: skip
    read = words * 2 * 32 * 32 + cells * 2 * 48 * 32 + 2 * words * cells * 32
    assert [g.adds for g in drawn.groups] == [3 * (own[0] + ffn[0]), own[1] + ffn[1], crossed + sum(ffn),
                                              own[0] + read + ffn[0]]  # fmt: skip
    assert drawn.image.adds == 3 * 8 * 8 * 48 * (cells - 1) and drawn.text.adds == 0
    assert draw.figure(config, "mine").cells == 10 and drawn.depth == 4


@pytest.mark.parametrize("name", names())
def test_every_preset_is_drawn(name):
    drawn = draw.figure(*draw.find(name))
    with torch.device("meta"):
        whole = draw.count(VLModel(draw.find(name)[0]))
    parts = [drawn.text.parameters, drawn.image.parameters, *(g.parameters for g in drawn.groups + drawn.writes)]
    assert sum(parts) + sum(drawn.ends.values()) == drawn.parameters == whole
    page = svg(drawn)
    said = [node.text for node in xml.fromstring(page).iter("{http://www.w3.org/2000/svg}text")]
    assert drawn.title in said and drawn.meet in said and drawn.groups[0].title in said
    width, height = (float(n) for n in xml.fromstring(page).get("viewBox").split()[2:])
    for box in xml.fromstring(page).iter("{http://www.w3.org/2000/svg}rect"):
        assert float(box.get("x", 0)) + float(box.get("width")) <= width
        assert float(box.get("y", 0)) + float(box.get("height")) <= height


def test_in_the_terminal_and_in_a_file(tmp_path, capsys):
    assert main(["draw", "vilbert", "--out", str(tmp_path / "new" / "figure.svg"), "--words", "20"]) == 0
    assert "20 words" in (tmp_path / "new/figure.svg").read_text()
    said = capsys.readouterr().out
    assert "cross × 6" in said and "layer 6 of 18" in said and "239.0 M" in said


def test_a_saved_model(tmp_path):
    VLModel(vilbert.tiny()).save_pretrained(tmp_path / "mine")
    drawn = draw.draw(str(tmp_path / "mine"), console=Console(quiet=True))
    assert drawn.title == "mine" and drawn.depth == 2


def test_a_recipe(shapes, text_tower, tmp_path):
    from tests.conftest import toy_settings

    settings = toy_settings(shapes, text_tower, tmp_path / "run")
    settings.model.fusion, settings.model.layers = "late", 2
    settings.save(tmp_path / "mine.yaml")
    drawn = draw.draw(str(tmp_path / "mine.yaml"), console=Console(quiet=True))
    assert drawn.title == "mine" and drawn.meet == "the streams never meet in a layer" and not drawn.ends
    assert drawn.text.adds and drawn.adds > drawn.text.adds  # the tower's own are counted


def test_the_first_cell_that_is_no_region():
    spec = vl_bert.tiny()
    assert draw.cells_of(spec) == 37
    assert draw.figure(spec, "tiny").image.adds == 36 * 32 * (4 * 8 + 20)


@pytest.mark.parametrize("what, said", [("vilbertt", "Did you mean 'vilbert'"), ("/nowhere", "no preset"),
                                        (".", "no config.json")])  # fmt: skip
def test_no_model(what, said):
    with pytest.raises(UserError, match=said):
        draw.find(what)


def test_another_library_s_folder_and_another_ending(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vilt"}')
    with pytest.raises(UserError, match="interlace convert"):
        draw.find(str(tmp_path))
    with pytest.raises(UserError, match=r"ends with .svg"):
        draw.draw("vilt", tmp_path / "figure.png")
