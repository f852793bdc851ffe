"""The published systems, one file each: the paper's figure as segments, the names of its release, a tiny size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from interlace.errors import UserError, suggest
from interlace.presets import (
    blip,
    clip,
    lxmert,
    mlim,
    uniter,
    vilbert,
    vilt,
    vision_encoder_decoder,
    visual_bert,
    vl_bert,
)

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Preset:
    """A line of the table. `depth`: index of the first layer in which the streams meet, of how many. `parameters`: at
    base size, with the heads of pre-training. `make` gives a VLConfig; that of vision_encoder_decoder, whose model is
    transformers' own class, a VisionEncoderDecoderConfig. `others`: further sizes and tasks, by name."""

    system: str
    year: int
    streams: str
    depth: tuple[int, int]
    sees: str
    objectives: str
    parameters: int
    module: ModuleType
    make: Callable[..., Any]
    others: dict[str, Callable[..., Any]] = field(default_factory=dict)


# fmt: off
PRESETS = {
    #                     system       year  streams   depth     sees             learns by
    "vilbert":     Preset("ViLBERT",    2019, "dual",   (6, 18),  "regions",        "mlm, mrc_kl, itm",
                          239_023_229, vilbert, vilbert.vilbert, {"twelve_in_one": vilbert.twelve_in_one}),
    "lxmert":      Preset("LXMERT",     2019, "dual",   (14, 24), "regions",        "mlm, region_labels, itm, answers",
                          228_051_752, lxmert, lxmert.lxmert,
                          {"lxmert_vqa": lxmert.lxmert_vqa, "lxmert_nlvr2": lxmert.lxmert_nlvr2}),
    "visual_bert": Preset("VisualBERT", 2019, "single", (0, 12),  "regions",        "mlm, itm",
                          112_074_812, visual_bert, visual_bert.visual_bert),
    "vl_bert":     Preset("VL-BERT",    2020, "single", (0, 13),  "regions",        "mlm, mvrc, text_mlm",
                          114_491_515, vl_bert, vl_bert.vl_bert,
                          {"vl_bert_large": vl_bert.vl_bert_large, "vl_bert_refcoco": vl_bert.vl_bert_refcoco,
                           "vl_bert_vcr": vl_bert.vl_bert_vcr}),
    "uniter":      Preset("UNITER",     2020, "single", (0, 12),  "regions",        "mlm, itm, wra, mrfr, mrc_kl",
                          112_938_887, uniter, uniter.uniter, {"uniter_large": uniter.uniter_large}),
    "vilt":        Preset("ViLT",       2021, "single", (0, 13),  "patches of 32", "mlm, itm, wpa",
                          135_660_092, vilt, vilt.vilt),
    "clip":        Preset("CLIP",       2021, "dual",   (25, 25), "patches of 32", "itc",
                          151_277_313, clip, clip.clip, {"clip_large": clip.clip_large}),
    "mlim":        Preset("MLIM",       2021, "single", (0, 24),  "blocks of 32",  "mam, recon",
                          339_380_365, mlim, mlim.mlim,
                          {"mlim_base": mlim.mlim_base, "mlim_grid3": mlim.mlim_grid3}),
    "blip":        Preset("BLIP",       2022, "dual",   (13, 25), "patches of 16", "itc_momentum, itm, lm",
                          252_441_919, blip, blip.blip,
                          {"blip_large": partial(blip.blip, **blip.large()), "blip_retrieval": blip.blip_retrieval,
                           "blip_caption": blip.blip_caption, "blip_vqa": blip.blip_vqa,
                           "blip_nlvr2": blip.blip_nlvr2}),
    "vision_encoder_decoder":
                   Preset("ViT + GPT-2", 2021, "dual",  (12, 24), "patches of 16", "lm",
                          238_605_312, vision_encoder_decoder, vision_encoder_decoder.vit_gpt2),
}
# fmt: on


def names() -> list[str]:
    """Every name that `preset` knows."""
    return [*PRESETS, *(other for line in PRESETS.values() for other in line.others)]


def preset(name: str) -> tuple[Preset, Callable[..., Any]]:
    """The line of the table and the function that makes the configuration, of a system or one of its other sizes.
    Raises UserError for an unknown name, with the nearest."""
    plain = name.strip().lower().replace("-", "_")
    for first, line in PRESETS.items():
        if plain in (first, first.replace("_", "")):
            return line, line.make
        if plain in line.others:
            return line, line.others[plain]
    raise UserError(f"no preset is called {name!r} (there are: {', '.join(names())}).{suggest(plain, names())}")


def objectives(recipe: list[dict[str, Any]]) -> str:
    """The losses that a `PRETRAIN` names, once each."""
    plain = ("share", "image", "name")
    named = [f"{one['name']}_{key}" if "name" in one else key for one in recipe for key in one if key not in plain]
    return ", ".join(dict.fromkeys(named))


def met(depth: tuple[int, int]) -> str:
    at, layers = depth
    return "never" if at == layers else f"layer {at} of {layers}"


def print_table(console: Console | None = None) -> None:
    """What `interlace list` prints."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    if not console.is_terminal:  # a file or a pipe has no edge to wrap at
        console = Console(file=console.file, width=150)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("preset", "system", "year", "streams", "fusion depth", "vision input"):
        table.add_column(head, no_wrap=True)
    table.add_column("objectives")
    table.add_column("parameters", justify="right", no_wrap=True)
    for name, line in PRESETS.items():
        table.add_row(f"[bold]{name}[/bold]", line.system, str(line.year), line.streams, met(line.depth), line.sees,
                      line.objectives, f"{line.parameters / 1e6:.0f} M")  # fmt: skip
    console.print(table)
    console.print("\nalso: " + ", ".join(other for line in PRESETS.values() for other in line.others))
    console.print("[dim]fusion depth: the first layer in which the streams meet, counted from 0. parameters: at base "
                  "size, with the heads of pre-training. The figure of each: interlace draw NAME[/dim]")  # fmt: skip
