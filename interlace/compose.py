"""Any image part with any text part, fused as one line says, with the parts' pre-trained weights inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from interlace import towers
from interlace.config import VLConfig
from interlace.data.processor import Augment, Processor
from interlace.decoder import Decoder
from interlace.embed.base import Embedder
from interlace.embed.patches import Patches
from interlace.embed.stem import ImageStem, ImageTower, TextStem, TextTower
from interlace.errors import UserError
from interlace.heads.pair import start_answers
from interlace.layers import Width
from interlace.model import VLModel
from interlace.objectives.base import Objective
from interlace.objectives.mlm import word_table
from interlace.places import start_places
from interlace.quiet import quiet_branches


@dataclass
class Composition:
    """What to build. `text`, `image`: a shipped tower's name, a local transformers folder, or a hub name; `image` also
    "patches": no tower, the schedule itself reads the pixels (ViLT). `system`: a preset by name, at the size that
    `layers` and `width` say; it says itself where the streams meet. `start`: a finished run to go on from; its own
    parts and sizes hold."""

    system: str = ""
    start: str = ""
    text: str = "minilm"
    image: str = "efficientnet-lite0"
    fusion: str = "mid"  # late | mid | early: where the streams first meet
    streams: str = "dual"  # single | dual: one set of weights or two
    layers: int = 4  # of the schedule, after the towers; 0: a system at its paper's own sizes
    width: int = 384  # hidden size of both streams
    heads: int = 6
    dropout: float = 0.1
    size: int = 160  # side of the picture in pixels
    grid: int = 0  # cells a side that the image tower's are averaged to; 0: as many as it gives
    patch: int = 16  # for image="patches"
    align: bool = True  # frozen towers: start the projections from the best linear map between them
    text_layers: int = -1  # of the text tower, from below; 0: its word vectors alone; -1: all
    places: bool = False  # start with loud positions, and let like read like: for what stands where (docs/binding.md)
    fit: str = "pad"  # pad | squash | crop: how a picture becomes a square
    max_length: int = 40  # tokens


def compose(what: Composition, objectives: list[Objective], augment: Augment | None = None,
            model_class: type[VLModel] = VLModel) -> tuple[VLModel, Processor]:  # fmt: skip
    """The model with pre-trained towers, and its processor. Raises UserError for towers or sizes that do not fit."""
    tokenizer = towers.load_tokenizer(what.text)
    config, image, text = configure(what, objectives)
    model = model_class(config)
    words = cast(TextTower, model.text)
    words.tower.load_state_dict(text.model.state_dict())  # of the layers that are left
    words.start()
    if image is not None:
        cells = cast(ImageTower, model.image)
        cells.tower.load_state_dict(image.model.state_dict())
        cells.start()
        if what.places:
            start_places(model)
        else:  # what two towers know already is worth more than a random mixture of it
            quiet_branches(model.schedule)
    if image is not None and "contrast" in model.heads and model.contrast.text.out_features == what.width:
        nn.init.eye_(model.contrast.text.weight)
        nn.init.eye_(model.contrast.image.weight)
    if "answers" in model.heads:
        start_answers(model.heads["answers"])
    if model.decoder is not None:
        model.decoder.start(word_table(model))
    return model, _processor(what, config, tokenizer, augment or Augment())


def configure(what: Composition, objectives: list[Objective]) -> tuple[VLConfig, towers.Tower | None, towers.Tower]:
    """The configuration that `compose` builds, and the towers whose weights go into it: image (None for patches) and
    text. Raises UserError as `compose` does."""
    if what.width % what.heads:
        raise UserError(f"model.width {what.width} does not divide into model.heads {what.heads}.")
    # pre-norm: the residual stream carries the towers' own features to the end from the first step on
    width = Width(what.width, heads=what.heads, norm="pre", eps=1e-6, dropout=what.dropout,
                  attention_dropout=what.dropout)  # fmt: skip
    text = towers.load_tower(what.text, "text", what.text_layers)
    if (longest := text.extras.max_tokens) is not None and what.max_length > longest:
        raise UserError(f"model.max_length is {what.max_length}, but {what.text} takes at most {longest} tokens.")
    words = TextStem(width, pool="mean", tower=text.model.config.to_dict(),
                     places=what.max_length if what.places else 0)  # fmt: skip
    image = None
    pixels: Patches | ImageStem
    if what.image == "patches":
        check_no_grid(what)
        pixels = Patches(width, pool="mean", size=what.size, patch=what.patch)
    else:
        image = towers.load_tower(what.image, "image")
        spec = towers.pixel_spec(what.image)
        h, w = grid_of(what, image)
        pixels = ImageStem(width, pool="mean", tower=image.model.config.to_dict(), size=what.size, cells=h * w,
                           grid=what.grid, prefix=image.extras.prefix, channels=image.hidden_size,
                           mean=list(spec.mean), std=list(spec.std))  # fmt: skip
    if any(o.hides_cells for o in objectives):
        pixels.hide = True
    heads: dict[str, dict] = {}
    for objective in objectives:
        if objective.head:  # two may share one: what either asks of it holds, whichever comes first
            heads.setdefault(objective.head, {}).update(objective.head_for(words, pixels))
    config = VLConfig(words, pixels, fusion=what.fusion, streams=what.streams, layers=what.layers, heads=heads,
                      writes=decoder_asked_for(what, objectives, words))  # fmt: skip
    return config, image, text


def grid_of(what: Composition, image: towers.Tower) -> tuple[int, int]:
    """Rows and columns of cells that the model sees. Raises UserError for a grid that the tower's does not hold."""
    h, w = towers.grid_size(image.model, what.size)
    if not what.grid:
        return h, w
    if not (h == w >= what.grid):
        raise UserError(f"model.grid is {what.grid}, but {what.image} gives {h} x {w} cells of {what.size} pixels: "
                        "choose a smaller grid or a larger model.size.")  # fmt: skip
    return what.grid, what.grid


def check_no_grid(what: Composition) -> None:
    """Of patches, which are as many as they are. Raises UserError where fewer are asked for."""
    if what.grid:
        raise UserError(f"model.grid is {what.grid}, and averages the cells of an image tower; model.image is patches: "
                        "set model.grid=0, and model.patch to the pixels a side of a patch.")  # fmt: skip


def decoder_asked_for(what: Composition, objectives: list[Objective], text: Embedder) -> Decoder | None:
    """A decoder for objectives that write, if any does."""
    from interlace.objectives.lm import wanted_decoder  # which knows the models that this file makes

    if not any(hasattr(objective, "decoder_for") for objective in objectives):
        return None
    return wanted_decoder(objectives, text, towers.load_tokenizer(what.text))


def _processor(what: Composition, config: VLConfig, tokenizer: PreTrainedTokenizerBase, augment: Augment) -> Processor:
    limit = getattr(tokenizer, "model_max_length", 512)
    if what.max_length > limit:
        raise UserError(f"model.max_length is {what.max_length}, but {what.text} takes at most {limit} tokens.")
    pixels = cast(Patches | ImageStem, config.image)
    return Processor(tokenizer, pixels.size, list(pixels.mean), list(pixels.std), what.fit, what.max_length, augment)
