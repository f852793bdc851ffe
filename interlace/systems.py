"""A published system at the size of the parts at hand, or at its paper's: words and layers start from a text tower of
BERT's kind, grid cells of an image tower stand where the paper has regions and none are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from interlace import towers
from interlace.alike import start_alike
from interlace.compose import Composition, check_no_grid, decoder_asked_for, grid_of
from interlace.config import VLConfig
from interlace.data.processor import Augment, Processor
from interlace.embed.base import Embedder
from interlace.embed.grid import GridRegions
from interlace.embed.patches import Patches
from interlace.embed.regions import RegionEmbedder
from interlace.embed.stem import ImageStem
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.heads.pair import start_answers
from interlace.layers import Width
from interlace.model import VLModel
from interlace.objectives.base import Objective
from interlace.objectives.lm import ends
from interlace.quiet import quiet_branches
from interlace.regions.base import RegionSource
from interlace.weights import Keys, fitting_lines


@dataclass
class Parts:
    """What a preset's `small(parts)` and `full(parts)` are made of."""

    whole = False  # it asked for the whole picture as the first region

    what: Composition
    tokenizer: PreTrainedTokenizerBase
    text: towers.Tower
    image: towers.Tower | None
    regions: RegionSource | None = None  # stored ones; None: the image tower's grid cells stand for them

    @property
    def layers(self) -> int:
        return self.what.layers

    @property
    def vocabulary(self) -> int:
        return self.text.model.config.vocab_size

    @property
    def channels(self) -> int:
        """Numbers per region or grid cell."""
        return self.regions.features_size if self.regions is not None else self._tower().hidden_size

    @property
    def classes(self) -> int:
        """Of the detector that the regions came from, with class 0 for nothing there; 1 when none classified them."""
        return max(1, 0 if self.regions is None else self.regions.beliefs_size)

    @property
    def starts(self) -> bool:
        """The text tower's layers fit into this width."""
        config = self.text.model.config
        return config.model_type == "bert" and config.hidden_size == self.what.width

    def fits(self, width: Width) -> bool:
        """The text tower's layers fit into layers of this width."""
        config = self.text.model.config
        heads = config.hidden_size, config.num_attention_heads if config.model_type == "bert" else 0
        return heads == (width.size, width.heads)

    @property
    def ends(self) -> tuple[int, int]:
        """The ids a text begins and ends with."""
        return ends(self.tokenizer)

    def width(self, **changes: Any) -> Width:
        """As the text tower's where the sizes agree, so that its layers fit; post-norm, as BERT."""
        sizes: dict[str, Any] = {"heads": self.what.heads, "dropout": self.what.dropout,
                                 "attention_dropout": self.what.dropout}  # fmt: skip
        if self.starts:
            config = self.text.model.config
            sizes |= {"heads": config.num_attention_heads, "ffn": config.intermediate_size}
        return Width(self.what.width, **{**sizes, **changes})

    def words(self, cls: type[Words] = Words, **changes: Any) -> Words:
        config = self.text.model.config
        width = changes.pop("width", None) or self.width()
        given = {"vocabulary": config.vocab_size, "positions": config.max_position_embeddings,
                 "pad": self.tokenizer.pad_token_id, "pool": "tanh"}  # fmt: skip
        return cls(width, **{**given, **changes})

    def grid(self, cls: type[RegionEmbedder], whole: bool = False, width: Width | None = None,
             **changes: Any) -> GridRegions | RegionEmbedder:  # fmt: skip
        """Stored regions, or cells of the image tower, read by the paper's own embedder. `whole`: the whole picture
        first."""
        self.whole = whole
        width = width or self.width()
        if self.regions is not None:
            return cls(width, features=self.regions.features_size, **changes)
        tower = self._tower()
        spec, (rows, columns) = towers.pixel_spec(self.what.image), grid_of(self.what, tower)
        inner = cls(width, features=tower.hidden_size, **changes)
        return GridRegions(width, pool=inner.pool, pool_size=inner.pool_size, tower=tower.model.config.to_dict(),
                           regions=inner.to_dict(), size=self.what.size, rows=rows, columns=columns,
                           prefix=tower.extras.prefix, channels=tower.hidden_size, whole=whole,
                           grid=self.what.grid, mean=list(spec.mean), std=list(spec.std))  # fmt: skip

    def cells(self, width: Width | None = None, **changes: Any) -> ImageStem:
        """Cells of the image tower, projected, with positions: where the paper has a pre-trained image encoder."""
        width, tower = width or self.width(), self._tower()
        spec, (rows, columns) = towers.pixel_spec(self.what.image), grid_of(self.what, tower)
        given = {"pool": "mean", "tower": tower.model.config.to_dict(), "size": self.what.size, "cells": rows * columns,
                 "grid": self.what.grid, "prefix": tower.extras.prefix, "channels": tower.hidden_size,
                 "mean": list(spec.mean), "std": list(spec.std)}  # fmt: skip
        return ImageStem(width, **{**given, **changes})

    def patches(self, cls: type[Patches] = Patches, **changes: Any) -> Patches:
        width = changes.pop("width", None) or self.width()
        return cls(width, **{"size": self.what.size, "patch": self.what.patch, **changes})

    def _tower(self) -> towers.Tower:
        if self.image is None:
            raise UserError(f"{self.what.system} reads grid cells of an image tower: name one as model.image, for "
                            "instance efficientnet-lite0.")  # fmt: skip
        return self.image


def bert_start(ours: str, after: int = 0, attend: str = "attend") -> dict[str, Any]:
    """Lines that let BERT's layers from `after` on start ours: `ours` is the name of our layer {n}, or of the block in
    it; `attend` that of its self-attention."""
    theirs = f"encoder.layer.{{n+{after}}}" if after else "encoder.layer.{n}"
    return {
        f"{theirs}.attention.self": f"{ours}.{attend}",
        f"{theirs}.attention.output.dense": f"{ours}.{attend}.out",
        f"{theirs}.attention.output.LayerNorm": f"{ours}.{attend}.norm",
        f"{theirs}.intermediate.dense": f"{ours}.ffn.up",
        f"{theirs}.output.dense": f"{ours}.ffn.down",
        f"{theirs}.output.LayerNorm": f"{ours}.ffn.norm",
    }


BERT_WORDS: Keys = {
    "embeddings.word_embeddings": "text.words",
    "embeddings.position_embeddings": "text.positions",
    "embeddings.token_type_embeddings": "text.types",
    "embeddings.LayerNorm": "text.norm",
    "pooler.dense": "poolers.text.dense",
}


@torch.no_grad()
def start_from(model: nn.Module, tensors: Mapping[str, Tensor], keys: Keys) -> list[str]:
    """Copies every tensor that a line of `keys` sends to one of the model's of the same shape; the rest keep their
    initial values. Returns our names."""
    state, filled = model.state_dict(), []
    for name, tensor in tensors.items():
        for line in fitting_lines(name, keys):
            names = line.ours
            if not all(ours in state for ours in names):
                continue
            try:
                parts = line.load(tensor, [state[ours].shape for ours in names])
            except ValueError:
                continue
            for ours, part in zip(names, parts):
                state[ours].copy_(part)
                filled.append(ours)
    return filled


def spread(model: nn.Module, tensors: dict[str, Tensor], keys: Keys) -> dict[str, Tensor]:
    """A tower's tensors, its layers as many as the system starts from it: of more, those spread evenly from the first
    to the last (Sanh et al. 2019, arXiv:1910.01108, section 3). The first ones alone would leave out what makes a
    sentence of words: of MiniLM's six, CLS after the first four finds a picture half as often as after four spread
    ones."""
    state = model.state_dict()

    def number(name: str) -> int:
        return int(name.split("encoder.layer.")[1].split(".")[0])

    layers = {number(name) for name in tensors if "encoder.layer." in name}
    used = {number(name) for name in tensors if "encoder.layer." in name
            and any(ours in state for line in fitting_lines(name, keys) for ours in line.ours)}  # fmt: skip
    if not used or len(used) == len(layers):
        return tensors
    chosen = {round(n * (len(layers) - 1) / max(len(used) - 1, 1)): n for n in range(len(used))}
    return {name if "encoder.layer." not in name else
            name.replace(f"encoder.layer.{number(name)}.", f"encoder.layer.{chosen[number(name)]}."): tensor
            for name, tensor in tensors.items() if "encoder.layer." not in name or number(name) in chosen}  # fmt: skip


def build_system(what: Composition, objectives: list[Objective], augment: Augment | None = None,
                 model_class: type[VLModel] = VLModel,
                 regions: RegionSource | None = None) -> tuple[VLModel, Processor]:  # fmt: skip
    """The preset `what.system` at the size that `what` says (`layers` 0: the paper's), with the heads that the
    objectives ask for, and its processor. `regions`: stored ones that it reads instead of pixels. Raises UserError for
    an unknown system, or parts that do not fit."""
    config, parts, module = configure_system(what, objectives, regions)
    image = parts.image
    model = model_class(config)
    if image is not None and (tower := getattr(model.image, "tower", None)) is not None:
        cast(nn.Module, tower).load_state_dict(image.model.state_dict())
        if isinstance(config.image, ImageStem):
            cast(Any, model.image).start()
    keys = module.start(config) if hasattr(module, "start") and parts.fits(config.text.width) else {}
    started = start_from(model, spread(model, parts.text.model.state_dict(), keys), keys) if keys else []
    if started and not (config.writes is None or config.writes.shares):
        state = model.state_dict()
        for ours, theirs in getattr(module, "ANSWERER_STARTS", ()):  # a decoder that shares nothing starts as a copy
            copies = {ours + name.removeprefix(theirs): name for name in started if name.startswith(theirs)}
            for copy, name in copies.items():
                if copy in state and copy not in started:
                    state[copy].copy_(state[name])
                    started.append(copy)
    if started:
        quiet_branches(model, set(started))
        if what.align:  # which is what makes a cell look like a word
            start_alike(model, set(started))
    if "answers" in model.heads:
        start_answers(model.heads["answers"])
    model.started = tuple(started)
    print(_what_started(what, config, parts, started))
    processor = small_processor(what, config, parts.tokenizer, augment or Augment())
    if regions is not None:
        processor.regions = {"extractor": regions.facts, "boxes": config.image.boxes, "whole": parts.whole}  # type: ignore
    return model, processor


def configure_system(what: Composition, objectives: list[Objective],
                     regions: RegionSource | None = None) -> tuple[VLConfig, Parts, Any]:
    """The configuration that `build_system` builds, the parts it is made of, and the preset's module. Raises UserError
    as `build_system` does."""
    from interlace.presets import preset

    if what.places or what.text_layers >= 0:
        raise UserError("model.places and model.text_layers are of models composed of two towers; "
                        f"{what.system} has its own words and positions: leave them out, or model.system.")  # fmt: skip
    line, _ = preset(what.system)
    form = "small" if what.layers else "full"
    if not hasattr(line.module, form):
        hint = " model.layers=0 builds it at its paper's size." if hasattr(line.module, "full") else ""
        raise UserError(f"{what.system} has no {form} form that these parts could fill.{hint}")
    tokenizer = towers.load_tokenizer(what.text)
    if what.image == "patches" and regions is None:
        check_no_grid(what)
    image = None if regions is not None or what.image == "patches" else towers.load_tower(what.image, "image")
    parts = Parts(what, tokenizer, towers.load_tower(what.text, "text"), image, regions)
    config: VLConfig = getattr(line.module, form)(parts)
    if regions is not None and not isinstance(config.image, RegionEmbedder):
        raise UserError(f"{what.system} reads pictures and no regions: leave data.regions out, or choose a system that "
                        "reads them (interlace list).")  # fmt: skip
    if isinstance(config.image, Patches | ImageStem) and any(o.hides_cells for o in objectives):
        config.image.hide = True
    config.heads = asked_heads(config, objectives, line.module)
    if lacks_answerer(config, objectives) and hasattr(line.module, "answerer"):
        config.writes = line.module.answerer(config)
    config.writes = config.writes or decoder_asked_for(what, objectives, config.text)
    return config, parts, line.module


def lacks_answerer(config: VLConfig, objectives: list[Objective]) -> bool:
    """Whether answers are to be written, and the decoder, if there is one, reads no questions."""
    return any(o.name == "vqa_writes" for o in objectives) and (
        config.writes is None or config.writes.context == "image")  # fmt: skip


def asked_heads(config: VLConfig, objectives: list[Objective], module: Any = None) -> dict[str, dict[str, Any]]:
    """The heads the objectives read: the paper's own where it has one, with the number of answers of this data."""
    heads: dict[str, dict[str, Any]] = {}
    for objective in objectives:
        name = objective.head
        if not name:
            continue
        wanted = objective.head_for(config.text, config.image)
        if name == "contrast":
            # its layers were made to be run through, not to be left half-way, and for words rather than for pictures
            wanted = {**wanted, "whole": True, "features": features_of(config.image)}
        own = config.heads.get(name)
        if own is None and name == "answers" and hasattr(module, "answers"):
            sizes = {"size": config.text.width.size} if "size" in signature(module.answers).parameters else {}
            own = module.answers(wanted["labels"], **sizes)
        if own is not None and name == "answers":
            own = {**own, "labels": wanted["labels"]}
        if own is not None and name == "contrast":
            check_contrast(objective, own)
        heads[name] = {**heads.get(name, {}), **wanted} if own is None else own  # two objectives may share one
    return heads


def check_contrast(objective: Objective, own: dict[str, Any]) -> None:
    """Raises UserError for a size or temperature asked for where the model brings a contrast head with others."""
    usual = signature(type(objective)).parameters
    for key in {"size", "temperature"} & set(usual):
        asked, default = getattr(objective, key), usual[key].default
        if asked not in (default, has := own.get(key, default)):
            raise UserError(f"{objective.name}.{key}={asked}, but the contrast head is the system's own, or the run's, "
                            f"and its {key} is {has}: leave {objective.name}.{key} out.")  # fmt: skip


def features_of(image: Embedder) -> int:
    """How many numbers a tower or detector says of each cell or region; 0 for an image part that has neither."""
    if isinstance(image, GridRegions | RegionEmbedder):
        return image.features
    return image.channels if isinstance(image, ImageStem) else 0


def _what_started(what: Composition, config: VLConfig, parts: Parts, started: list[str]) -> str:
    if not started:
        tower = parts.text.model.config
        return (f"{what.system} starts from random weights: {what.text} is {tower.hidden_size} wide "
                f"({tower.model_type}), the model {config.text.width.size}")  # fmt: skip
    return f"{what.system}: {len(started)} tensors start from {what.text}"


def small_processor(what: Composition, config: VLConfig, tokenizer: Any, augment: Augment) -> Processor:
    limit = getattr(config.text, "positions", None) or tokenizer.model_max_length
    if what.max_length > limit:
        raise UserError(f"model.max_length is {what.max_length}, but {what.system} has {limit} positions here.")
    pixels = cast(Any, config.image)
    return Processor(tokenizer, getattr(pixels, "size", what.size), list(getattr(pixels, "mean", (0.0,) * 3)),
                     list(getattr(pixels, "std", (1.0,) * 3)), what.fit, what.max_length, augment)  # fmt: skip


def build_from_run(what: Composition, objectives: list[Objective], augment: Augment | None = None,
                   model_class: type[VLModel] = VLModel,
                   regions: RegionSource | None = None) -> tuple[VLModel, Processor]:  # fmt: skip
    """The model of a finished run, to go on from: its parts, its processor, and of its heads those that the objectives
    ask for again. Heads it does not have start anew. Raises UserError for a folder that is no run, and for regions of
    another extractor than the run's."""
    from safetensors.torch import load_file

    from interlace.presets import PRESETS
    from interlace.regions.base import fingerprint
    from interlace.run import WEIGHTS, Run

    before = Run.load(Path(what.start), device="cpu")
    config = VLConfig.from_dict(before.model.config.to_dict())
    system = before.facts.get("system", "")
    module = PRESETS[system].module if system in PRESETS else None
    config.heads = asked_heads(config, objectives, module)
    if lacks_answerer(config, objectives):
        own = hasattr(module, "answerer")
        config.writes = module.answerer(config) if own else decoder_asked_for(what, objectives, config.text)  # type: ignore
    model = model_class(config)
    state, stored = model.state_dict(), load_file(before.folder / WEIGHTS)
    for ours, theirs in getattr(module, "ANSWERER_STARTS", ()):  # parts that begin as copies of others
        stored |= {ours + name.removeprefix(theirs): value for name, value in stored.items()
                   if name.startswith(theirs) and ours + name.removeprefix(theirs) not in stored}  # fmt: skip
    kept = {n: value for n, value in stored.items() if n in state and state[n].shape == value.shape}
    model.load_state_dict(kept, strict=False)
    model.started = tuple(kept)
    fresh = sorted({".".join(name.split(".")[:2]) for name in state if name not in kept})
    model.anew = tuple(fresh)
    if "heads.answers" in fresh:
        start_answers(model.heads["answers"])
    print(f"starts from the run {what.start}: {len(kept)} tensors" + (f"; new: {', '.join(fresh)}" if fresh else ""))
    processor = before.processor
    if regions is not None and not processor.regions:
        raise UserError(f"the run {what.start} reads pictures and no regions: leave data.regions out.")
    if processor.regions:
        if regions is None:
            raise UserError(f"the run {what.start} was trained on stored regions: give those of this data as "
                            "data.regions.")  # fmt: skip
        made = processor.regions["extractor"]
        if made.get("kind") == "release":  # converted: its detector is not here, so any features of its size are taken
            regions.require(regions.fingerprint, cast(Any, config.image).features)
            processor.regions = {**processor.regions, "extractor": regions.facts}
        else:
            regions.require(fingerprint(made))
    if augment is not None:
        processor.augment = augment
    return model, processor
