"""The figure says what the layers do and what they cost."""

import xml.etree.ElementTree as xml
from functools import cache

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from interlace import draw
from interlace.captioner import CaptionModel
from interlace.cli import main
from interlace.config import VLConfig
from interlace.draw_svg import svg
from interlace.embed.patches import Patches
from interlace.embed.regions import RegionEmbedder, Regions
from interlace.embed.vl_bert import VLBERTRegions
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.layers import BOTH, CO, EACH, IMAGE, JOINT, NORM, READ, TEXT, Kind, Width, co
from interlace.model import VLModel
from interlace.presets import PRESETS, names, vilbert, vilt, vision_encoder_decoder, vl_bert

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
    assert [g.flops for g in drawn.groups] == [2 * 3 * (own[0] + ffn[0]), 2 * (own[1] + ffn[1]),
                                               2 * (crossed + sum(ffn)), 2 * (own[0] + read + ffn[0])]  # fmt: skip
    assert drawn.image.flops == 2 * 3 * 8 * 8 * 48 * (cells - 1) and drawn.text.flops == 0
    assert draw.figure(config, "mine").cells == 10 and drawn.depth == 4


MEASURED = {*PRESETS, "blip_caption", "blip_vqa", "mlim_grid3"} - {"vilt", "vision_encoder_decoder"}


@cache
def drawn(name):
    return draw.figure(*draw.find(name))


def blank(config):
    """The model without numbers."""
    with torch.device("meta"):
        return VLModel(config) if isinstance(config, VLConfig) else CaptionModel(config)


def picture_for(config, cells):
    spec = config.image
    if not isinstance(spec, RegionEmbedder):
        return torch.empty(1, 3, spec.size, spec.size, device="meta")
    n = cells - isinstance(spec, VLBERTRegions)  # its first cell is no region
    return Regions(*(torch.empty(1, n, size, device="meta") if size else None for size in (spec.features, spec.boxes)))


@pytest.mark.parametrize("name", names())
def test_every_preset_is_drawn(name):
    figure = drawn(name)
    whole = draw.count(blank(draw.find(name)[0]))
    parts = [figure.text.parameters, figure.image.parameters, *(g.parameters for g in figure.groups + figure.writes)]
    assert sum(parts) + sum(figure.ends.values()) == figure.parameters == whole
    page = svg(figure)
    said = [node.text for node in xml.fromstring(page).iter("{http://www.w3.org/2000/svg}text")]
    assert figure.title in said and figure.meet in said and figure.groups[0].title in said
    width, height = (float(n) for n in xml.fromstring(page).get("viewBox").split()[2:])
    for box in xml.fromstring(page).iter("{http://www.w3.org/2000/svg}rect"):
        assert float(box.get("x", 0)) + float(box.get("width")) <= width
        assert float(box.get("y", 0)) + float(box.get("height")) <= height
    used = {shape.get("class") for shape in xml.fromstring(page).iter() if shape.get("class")}
    light, dark = page[page.index("<style>") : page.index("</style>")].split("@media (prefers-color-scheme:dark)")
    assert all(f".{name}{{" in light and f".{name}{{" in dark for name in used)


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in names() if n in MEASURED])
def test_the_flops_are_those_that_torch_counts_over_the_whole_model(name):
    """Without heads, poolers and the decoder's next word, which the figure leaves out."""
    figure, config = drawn(name), draw.find(name)[0]
    config.heads = {}
    model = blank(config).eval()
    ids = torch.zeros(1, figure.words, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        out = model.fuse(model.half_text(ids), model.half_image(picture_for(config, figure.cells)))
        if model.decoder is not None:
            model.decoder(ids, getattr(out, config.writes.context))
    spent = counter.get_flop_counts()
    beside = sum(sum(spent.get(part, {}).values()) for part in ("Pooler", "TextDecoder.head"))
    assert figure.flops == counter.get_total_flops() - beside


@torch.no_grad()
def test_the_flops_of_vilt_and_of_transformers_captioners():
    """The first looks at its pixels, so there must be some, and attention is written out, since torch does not count
    its fused one on a CPU; of the others the word head is left out."""
    config = vilt.tiny(heads={})
    model, pixels = VLModel(config).eval(), torch.rand(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 16, dtype=torch.long), pixels)
    pooler = sum(counter.get_flop_counts()["VLModel.poolers.text"].values())
    assert draw.figure(config, "tiny").flops == counter.get_total_flops() - pooler
    config = vision_encoder_decoder.tiny()
    captioner = CaptionModel(config).eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        captioner(pixels, decoder_input_ids=torch.ones(1, 16, dtype=torch.long))
    assert draw.figure(config, "tiny").flops == counter.get_total_flops() - 2 * 16 * 32 * 99


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
    assert drawn.text.flops and drawn.flops > drawn.text.flops  # the tower's own are counted


@pytest.mark.parametrize("system, cells", [("uniter", 9), ("vilbert", 10), ("vl_bert", 11), ("vilt", 37)])
def test_a_recipe_of_a_system(system, cells, shapes, text_tower, image_tower, tmp_path):
    """3 x 3 grid cells; ViLBERT's and VL-BERT's first region is the whole picture, VL-BERT has [END]. ViLT: 6 x 6 and a
    class token."""
    from tests.conftest import toy_settings

    settings = toy_settings(shapes, text_tower, tmp_path / "run")
    settings.model.system, settings.model.image = system, "patches" if system == "vilt" else str(image_tower)
    settings.save(tmp_path / "mine.yaml")
    drawn = draw.draw(str(tmp_path / "mine.yaml"), console=Console(quiet=True))
    assert drawn.cells == cells and drawn.image.flops and not drawn.ends.keys() - {"poolers"}


def test_the_first_cell_that_is_no_region():
    spec = vl_bert.tiny()
    assert draw.figure(spec, "tiny").cells == 37
    assert draw.figure(spec, "tiny").image.flops == 2 * 36 * 32 * (4 * 8 + 20)


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
