"""A model's figure: which stream reads which in every layer, where they meet, and what each part costs.

Nothing is declared here: every kind of layer is asked by running it, so a kind of your own is drawn as it is. Who reads
is found from gradients (does the last word's new state depend on the first word's, on a cell's?), floating-point
operations by running the layer on the meta device, where tensors have shapes and no numbers.

FLOPs of one text of T words with one picture of I cells; a multiply-add is two:

    a linear from C to D over L states         2 * L * C * D
    attention of Q states over K, E wide       4 * Q * K * E       scores, then the weighted sum
    a patch of p * p pixels to D               6 * p * p * D

so that a block of BERT costs 24 L D^2 + 4 L^2 D, as in Kaplan et al. 2020 (arXiv:2001.08361), section 2.1. Norms,
biases and activations are left out, and so are heads and poolers, since the task says how many states they read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from interlace.config import VLConfig
from interlace.embed.patches import Patches
from interlace.embed.regions import RegionEmbedder, Regions
from interlace.embed.stem import TextTower
from interlace.errors import UserError
from interlace.layers import IMAGE, READ, FeedForward, Kind, Layer, Width, build_layer
from interlace.model import VLModel
from interlace.schedule import Schedule
from interlace.streams import Streams, everyone

if TYPE_CHECKING:
    from rich.console import Console

STREAMS = ("text", "image")
WORDS, REGIONS = 16, 36  # a caption's length, and the boxes that LXMERT's features have
READ_BY_DECODER = {"image": "image", "text": "question", "both": "both"}


@dataclass(frozen=True)
class Step:
    """One kind of layer. `reads`: for each stream that the layer changes, whose states it attends to."""

    kind: Kind
    reads: dict[str, tuple[str, ...]]
    digests: bool  # a feed-forward follows
    tied: bool  # one set of weights serves both streams

    @property
    def joint(self) -> bool:
        return all(self.reads.get(stream) == STREAMS for stream in STREAMS)

    @property
    def crosses(self) -> bool:
        return any(set(read) - {stream} for stream, read in self.reads.items())

    def says(self, stream: str) -> list[str]:
        """What happens to a stream, line by line; nothing when it passes."""
        if stream not in self.reads:
            return []
        home = Layer.kinds[self.kind.name].__module__
        name = self.kind.name.removeprefix(home.rpartition(".")[2] + "_").replace("_", " ")  # vl_bert.py's vl_bert_meet
        lines = [name] if home != "interlace.layers" or not self.reads[stream] else []
        if self.joint:
            lines.append("joint attention")
        else:
            other = STREAMS[1 - STREAMS.index(stream)]
            lines += ["self-attention"] * (stream in self.reads[stream])
            lines += [f"reads {other}"] * (other in self.reads[stream])
        return lines + ["feed-forward"] * self.digests


@dataclass(frozen=True)
class Group:
    """Layers of one segment that repeat. `first`: the index of the first of them; costs are those of all."""

    segment: str
    steps: list[Step]
    times: int
    first: int
    parameters: int
    flops: int

    @property
    def title(self) -> str:
        return self.segment if self.times == 1 else f"{self.segment} \N{MULTIPLICATION SIGN} {self.times}"

    @property
    def price(self) -> str:
        return priced(self.parameters, self.flops)

    @property
    def lanes(self) -> tuple[str, ...]:
        both = any(step.crosses for step in self.steps)
        return tuple(s for s in STREAMS if both or any(s in step.reads for step in self.steps))


@dataclass(frozen=True)
class Part:
    """An embedder. `flops`: None where they cannot be told."""

    name: str
    width: int
    parameters: int
    flops: int | None

    @property
    def title(self) -> str:
        """Without the preset's name: the figure has it already."""
        last = self.name.rpartition("_")[2]
        return last if last in ("words", "patches", "regions") else self.name.replace("_", " ")


@dataclass(frozen=True)
class Figure:
    title: str
    words: int
    cells: int
    text: Part
    image: Part
    groups: list[Group]
    writes: list[Group]  # the decoder's
    context: str  # what it reads
    ends: dict[str, int]  # heads, poolers and what the decoder has beside its layers -> parameters
    depth: int
    layers: int
    parameters: int

    @property
    def flops(self) -> int:
        parts = [self.text.flops, self.image.flops, *(g.flops for g in self.groups + self.writes)]
        return sum(n for n in parts if n is not None)

    @property
    def meet(self) -> str:
        if self.depth == self.layers:
            return "the streams never meet in a layer"
        return f"the streams meet in layer {self.depth} of {self.layers}"

    @property
    def costs(self) -> str:
        unknown = " without the towers" if None in (self.text.flops, self.image.flops) else ""
        return (f"{millions(self.parameters)} parameters, {billions(self.flops)}FLOPs{unknown} "
                f"for {self.words} words and {self.cells} cells")  # fmt: skip


def millions(n: int) -> str:
    return f"{n / 1e6:.1f} M" if n >= 50_000 else f"{n / 1e3:.1f} k"


def billions(n: int | None) -> str:
    if n is None:
        return "?"
    return "0" if n == 0 else f"{n / 1e9:.2f} G" if n >= 5e6 else f"{n / 1e6:.2f} M"


def priced(parameters: int, flops: int | None) -> str:
    return f"{millions(parameters)}, {billions(flops)}FLOPs" if flops else millions(parameters)


# -------------------------------------------------------------------------------------------------- asking the layers


@cache
def ask(kind: Kind) -> Step:
    """Runs a small layer of this kind on random states, with random weights, so that a gate which starts shut is open,
    and looks at the gradients."""
    width, words, cells = Width(8, heads=2, dropout=0.0, attention_dropout=0.0), 3, 4
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        layer = build_layer(kind, width, width)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        inputs = [torch.randn(1, length, 8, requires_grad=True) for length in (words, cells)]
        given = Streams(*inputs)
        out = layer(given, everyone(None, None))
        reads, touched = {}, []
        for stream in STREAMS:
            state, own = getattr(out, stream), getattr(given, stream)
            if state is own:
                continue
            wanted = [*inputs, *layer.parameters()]
            # the first number of the last state, so that nothing but reading can reach the first one; a sum over a
            # normed state would be constant
            text, image, *weights = torch.autograd.grad(state[0, -1, 0], wanted, allow_unused=True, retain_graph=True)
            found = {"text": text, "image": image}
            reads[stream] = tuple(s for s in STREAMS if found[s] is not None and found[s][0, 0].abs().sum() > 0)
            touched.append({n for n, gradient in enumerate(weights) if gradient is not None})
    tied = len(touched) == 2 and bool(touched[0] & touched[1])
    return Step(kind, reads, any(isinstance(m, FeedForward) for m in layer.modules()), tied)


def fold(kinds: list[Kind]) -> list[tuple[list[Kind], int]]:
    """[a, b, a, b, c] -> [([a, b], 2), ([c], 1)]: the shortest pattern that covers most, again and again."""
    out, at = [], 0
    while at < len(kinds):
        best = 1, 1
        for size in range(1, 1 + (len(kinds) - at) // 2):
            times = 1
            while kinds[at + times * size : at + (times + 1) * size] == kinds[at : at + size]:
                times += 1
            if times > 1 and size * times > best[0] * best[1]:
                best = size, times
        out.append((kinds[at : at + best[0]], best[1]))
        at += best[0] * best[1]
    return out


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def costs(layer: Layer, text: int, image: int, words: int, cells: int) -> int:
    """FLOPs of one layer on the meta device, for widths `text` and `image`."""
    states = [torch.empty(1, n, size, device="meta") for n, size in ((words, text), (cells, image))]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(Streams(*states), everyone(None, None))
    return counter.get_total_flops()


def groups(schedule: Schedule, segments: dict[str, list[Kind]], text: int, image: int, words: int, cells: int,
           first: int = 0) -> list[Group]:  # fmt: skip
    """`first`: layers that ran before."""
    out, at, layers = [], 0, schedule.layers()
    for name, kinds in segments.items():
        for pattern, times in fold(kinds):
            these = layers[at : at + len(pattern) * times]
            flops = times * sum(costs(layer, text, image, words, cells) for layer in these[: len(pattern)])
            steps = [ask(kind) for kind in pattern]
            out.append(Group(name, steps, times, first + at, sum(map(count, these)), flops))
            at += len(these)
    return out


def embedders(model: VLModel, words: int, cells: int) -> tuple[Part, Part, int]:
    """Both embedders, and how many states the image's gives. `cells` 0: as many as it does by itself."""
    text, image = model.config.text, model.config.image
    read: int | None = 0
    if isinstance(model.text, TextTower):
        found = _measured(model.text, torch.zeros(1, words, dtype=torch.long, device="meta"))
        read = found and found[0]
    spent, cells = seen(model, cells)
    return (Part(text.name, text.width.size, count(model.text), read),
            Part(image.name, image.width.size, count(model.image), spent), cells)  # fmt: skip


def seen(model: VLModel, cells: int) -> tuple[int | None, int]:
    """FLOPs of the image's embedder, None where they cannot be told, and its states: of a picture of the configured
    size, or of 36 regions, unless `cells` says otherwise."""
    spec, part = model.config.image, model.image
    lead = getattr(part, "lead", 0)  # cells before those that are patches or regions
    given: Any
    if isinstance(spec, RegionEmbedder):
        size = 1, (cells or REGIONS + lead) - lead
        features = torch.empty(*size, spec.features, device="meta")
        given = Regions(features, torch.empty(*size, spec.boxes, device="meta") if spec.boxes else None)
    else:
        side: int = spec.size  # type: ignore[attr-defined]
        given = torch.empty(1, 3, side, side, device="meta")
    found = _measured(part, given, **({"words": model.text} if getattr(part, "reads_words", False) else {}))
    if found is not None:
        spent, own = found[0], found[1].shape[1]
    elif isinstance(spec, Patches):  # ViLT looks how far each picture goes
        own = lead + (spec.size // spec.patch) ** 2
        spent = 2 * (own - lead) * part.project.weight.numel()  # type: ignore[union-attr, operator]
    else:
        raise UserError(f"what {spec.name!r} costs cannot be told without a picture: measure it with "
                        "torch.utils.flop_counter.")  # fmt: skip
    if not cells or hasattr(part, "tower"):  # a tower sees the whole picture, however many cells are kept
        return spent, cells or own
    return spent * (cells - lead) // (own - lead), cells


def _measured(part: nn.Module, *given: Any, **more: Any) -> tuple[int, torch.Tensor] | None:
    """FLOPs and states; None where the path depends on the numbers themselves, of which meta tensors have none."""
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = part(*given, **more)
    except (RuntimeError, NotImplementedError):
        return None
    return counter.get_total_flops(), out[0] if isinstance(out, tuple) else out


def figure(config: Any, title: str, words: int = WORDS, cells: int = 0) -> Figure:
    """Everything the figure shows, of a VLConfig or a VisionEncoderDecoderConfig. `cells` 0: as the configuration has
    them."""
    if not isinstance(config, VLConfig):
        return captioner_figure(config, title, words)
    with torch.device("meta"):
        model = VLModel(config).eval()
    text, image, cells = embedders(model, words, cells)
    sizes = {"text": config.text.width.size, "image": config.image.width.size}
    body = groups(model.schedule, config.segments, sizes["text"], sizes["image"], words, cells)
    depth, layers = model.fusion_depth, len(model.schedule.layers())
    ends = {name: count(head) for name, head in model.heads.items()}
    if len(model.poolers):
        ends["poolers"] = count(model.poolers)
    writes, context = [], ""
    if model.decoder is not None and config.writes is not None:
        context, schedule = config.writes.context, model.decoder.schedule
        length = {"image": cells, "text": words, "both": words + cells}[context]
        wide = sizes["image" if context == "image" else "text"]
        writes = groups(schedule, dict(config.writes.segments), sizes["text"], wide, words, length, layers)
        rest = count(model.decoder) - count(schedule)
        if context == "image" and not any("text" in step.reads for group in body for step in group.steps):
            # no text but the one that is written: it is the text stream
            body, writes, layers = body + writes, [], layers + len(schedule.layers())
            ends["next word"] = rest
        else:
            ends["decoder's words and head"] = rest
    return Figure(title, words, cells, text, image, body, writes, context, ends, depth, layers,
                  count(model))  # fmt: skip


def captioner_figure(config: Any, title: str, words: int = WORDS) -> Figure:
    """Of a VisionEncoderDecoderConfig of transformers. Its layers are not ours to ask: the encoders it has attend to
    themselves, and CaptionModel refuses a decoder that does not read them."""
    from interlace.captioner import CaptionModel

    with torch.device("meta"):
        model: Any = CaptionModel(config).eval()
    image, text = config.encoder, config.decoder
    # or it would look for padding, and without a cache for packed texts, among words that have no numbers
    model.decoder.config.pad_token_id = None
    pixels = torch.empty(1, 3, image.image_size, image.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ids = torch.zeros(1, words, dtype=torch.long, device="meta")
        states = model(pixels, decoder_input_ids=ids, use_cache=True).encoder_last_hidden_state
    spent = counter.get_flop_counts()

    def flops(module: nn.Module) -> int:
        return sum(spent[f"CaptionModel.{names[module]}"].values())

    names = {module: name for name, module in model.named_modules()}
    stacks = [next(m for m in side.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
              for side, layers in ((model.encoder, image.num_hidden_layers), (model.decoder, text.num_hidden_layers))]
    made, at = [], 0
    for name, kind, stack in (("image", IMAGE, stacks[0]), ("write", READ, stacks[1])):
        made.append(Group(name, [ask(kind)], len(stack), at, count(stack), sum(map(flops, stack))))
        at += len(stack)
    tables = {m: None for n, m in model.decoder.named_modules() if isinstance(m, nn.Embedding)}
    parts = (Part("words", text.hidden_size, sum(map(count, tables)), 0),
             Part("patches", image.hidden_size, count(model.encoder.embeddings), flops(model.encoder.embeddings)))
    whole = count(model)
    rest = whole - sum(part.parameters for part in parts) - sum(group.parameters for group in made)
    return Figure(title, words, states.shape[1], *parts, made, [], "image", {"norms, next word": rest},
                  len(stacks[0]), at, whole)  # fmt: skip


def find(what: str) -> tuple[Any, str]:
    """The configuration of a preset's name, of a folder with a config.json, or of a training recipe: a VLConfig or a
    VisionEncoderDecoderConfig. A recipe is drawn without heads, which its data decide. Raises UserError when it is none
    of them."""
    from interlace.presets import PRESETS, names, preset

    path = Path(what).expanduser()
    if (path / "config.json").is_file():
        return read_config(path), path.name
    if path.is_dir():
        known = ", ".join(names())
        raise UserError(f"{what} has no config.json: give a run folder, a recipe (.yaml) or a preset ({known}).")
    shipped = Path(__file__).parent / "recipes" / f"{what}.yaml"
    preset_too = what in PRESETS  # its full-size recipe has its name, and no heads
    if path.suffix in (".yaml", ".yml") or (shipped.is_file() and not path.is_file() and not preset_too):
        return of_recipe(what), path.stem
    line, make = preset(what)
    name = next((n for n, other in line.others.items() if other is make), None)
    known = next(n for n, other in PRESETS.items() if other is line)
    if name is None:
        return make(), f"{line.system}, {line.year}"
    return make(), f"{line.system}: {name.removeprefix(known + '_').replace('_', ' ')}"


def of_recipe(what: str) -> VLConfig:
    """Raises UserError for a recipe that cannot be built."""
    from interlace.compose import configure
    from interlace.settings import load_settings
    from interlace.systems import configure_system

    model = load_settings(what).model
    if model.start:
        return read_config(Path(model.start).expanduser())
    return configure_system(model, [])[0] if model.system else configure(model, [])[0]


def read_config(folder: Path) -> Any:
    """Raises UserError for another model's config.json."""
    import json

    from transformers import VisionEncoderDecoderConfig

    try:
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    except (ValueError, AttributeError):
        raise UserError(f"{folder}/config.json is not JSON with a model's configuration.") from None
    if model_type == "vision-encoder-decoder":
        return VisionEncoderDecoderConfig.from_pretrained(folder)
    if model_type != "interlace":
        raise UserError(f"{folder} holds a model of type {model_type!r}, not one of ours; if a preset knows its names, "
                        "bring it over with `interlace convert`.")  # fmt: skip
    return VLConfig.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------------- in a terminal

ARROWS = {(True, True): "\N{RIGHTWARDS ARROW OVER LEFTWARDS ARROW}", (True, False): "\N{LEFTWARDS ARROW}",
          (False, True): "\N{RIGHTWARDS ARROW}", (False, False): ""}  # fmt: skip  (text reads, image reads)


def arrow(step: Step) -> str:
    return "=" if step.joint else ARROWS["image" in step.reads.get("text", ()), "text" in step.reads.get("image", ())]


def print_figure(drawn: Figure, console: Console | None = None) -> None:
    """One line per layer of a group, top to bottom as the model runs. Arrows point to who reads."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("part", "text", "", "image"):
        table.add_column(head, no_wrap=not head)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("FLOPs", justify="right", no_wrap=True)

    def embedder(part: Part) -> str:
        return f"[dim]{part.title}, {part.width} wide[/dim]"

    for stream, part in (("text", drawn.text), ("image", drawn.image)):
        at = ("", embedder(part), "", "") if stream == "text" else ("", "", "", embedder(part))
        table.add_row(*at, millions(part.parameters), billions(part.flops))

    def add(group: Group, other: str = "image") -> None:
        for n, step in enumerate(group.steps):
            says = [", ".join(step.says(stream)) for stream in STREAMS]
            own = (f"[bold]{group.title}[/bold]", millions(group.parameters), billions(group.flops))
            own = own if n == 0 else ("", "", "")
            says[0] = says[0].replace("reads image", f"reads {other}")
            table.add_row(own[0], says[0], arrow(step), says[1], *own[1:])

    for group in drawn.groups:
        if group.first <= drawn.depth < group.first + len(group.steps) * group.times:
            table.add_section()
            table.add_row("", f"[green]{drawn.meet}[/green]", "", "", "", "")
        add(group)
    for group in drawn.writes:
        add(group, READ_BY_DECODER[drawn.context])
    for name, parameters in drawn.ends.items():
        table.add_row(f"[dim]{name}[/dim]", "", "", "", millions(parameters), "")
    console.print(f"[bold]{drawn.title}[/bold]")
    console.print(table)
    console.print(f"{drawn.costs}; {drawn.meet}.")


def draw(what: str, out: str | Path | None = None, words: int = WORDS, cells: int = 0,
         console: Console | None = None) -> Figure:  # fmt: skip
    """`interlace draw`: prints the figure and, with `out`, writes it as SVG. Raises UserError for a source that is no
    model and for an `out` that is no .svg."""
    if words < 1 or cells < 0:
        raise UserError(f"a text has at least one word and a picture at least one cell; got {words} and {cells}.")
    if out is not None and Path(out).suffix.lower() != ".svg":
        raise UserError(f"the figure is written as SVG: give --out a name that ends with .svg, not {Path(out).name!r}.")
    drawn = figure(*find(what), words, cells)
    print_figure(drawn, console)
    if out is not None:
        from interlace.draw_svg import svg

        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(svg(drawn), encoding="utf-8")
    return drawn
