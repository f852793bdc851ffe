"""Any transformers tower before the schedule: ViT, BEiT, DeiT, a CNN; BERT, RoBERTa, GPT-2, MiniLM.

The tower's configuration travels in ours, its weights in our file: a saved model needs nothing else to load.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from interlace import towers
from interlace.embed.base import Embedder
from interlace.errors import UserError


@dataclass
class TextStem(Embedder):
    """`tower`: the configuration (`to_dict()`) of a transformers text model. `places`: how many tokens have a position
    of their own here, added after the projection; 0: what the tower knows of their order has to do."""

    tower: dict[str, Any] = field(default_factory=dict)
    places: int = 0
    name = "text_stem"
    stream = "text"

    def build(self) -> nn.Module:
        return TextTower(self)


@dataclass
class ImageStem(Embedder):
    """`tower`: the configuration of a transformers vision model. `cells`: how many grid cells it gives at `size`
    pixels, after `prefix` tokens that are none (class token, registers). `hide`: it has a vector to put in the place of
    a cell that is to be guessed; a convolutional tower's neighbouring cells still know something of that one. `grid`:
    cells a side that the tower's own are averaged to; 0: as they are."""

    tower: dict[str, Any] = field(default_factory=dict)
    size: int = 224  # pixels
    cells: int = 49
    prefix: int = 0
    channels: int = 1280
    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    hide: bool = False
    grid: int = 0
    name = "image_stem"
    stream = "image"

    def build(self) -> nn.Module:
        return ImageTower(self)


def empty_tower(config: dict[str, Any]) -> PreTrainedModel:
    """The tower with random weights, from its configuration alone."""
    config = dict(config)
    model_type = config.pop("model_type", None)
    if model_type is None:
        raise UserError("a tower's configuration has no model_type; save it with transformers' save_pretrained.")
    return towers.build_tower(AutoConfig.for_model(model_type, **config))


def check_square(pixels: Tensor, size: int) -> None:
    """Raises UserError unless these are pictures (B, 3, size, size), the size the tower's places were made for."""
    if not isinstance(pixels, Tensor):
        raise UserError(f"the model reads pictures, a tensor (B, 3, {size}, {size}), got {type(pixels).__name__}.")
    if pixels.dim() != 4 or pixels.shape[1:] != (3, size, size):
        raise UserError(f"the image tower reads pictures (B, 3, {size}, {size}), got {tuple(pixels.shape)}: "
                        "resize them to the size it was trained with, grey ones as three equal colours.")  # fmt: skip


def _start_as_identity(linear: nn.Linear) -> None:
    # the tower's own geometry (a sentence encoder's distances) is worth more than a random rotation of it
    nn.init.eye_(linear.weight) if linear.in_features == linear.out_features else nn.init.orthogonal_(linear.weight)
    nn.init.zeros_(linear.bias)


class TextTower(nn.Module):
    def __init__(self, spec: TextStem):
        super().__init__()
        self.tower = empty_tower(spec.tower)
        self.longest = towers.longest_text(self.tower)
        self.project = nn.Linear(self.tower.config.hidden_size, spec.width.size)
        self.positions = nn.Parameter(torch.zeros(1, spec.places, spec.width.size)) if spec.places else None

    def start(self) -> None:
        _start_as_identity(self.project)

    def forward(self, input_ids: Tensor | None, mask: Tensor | None = None, type_ids: Tensor | None = None,
                states: Tensor | None = None) -> Tensor:  # fmt: skip
        """ids (B, T), mask (B, T) -> (B, T, D). `states` (B, T, C): what the tower said of them, kept from before."""
        if states is not None:
            return self.placed(self.project(states))
        assert input_ids is not None
        limit = self.longest
        if limit is not None and input_ids.shape[1] > limit:
            raise UserError(f"a text of {input_ids.shape[1]} tokens, but the tower has {limit} positions: "
                            "lower the maximum length.")  # fmt: skip
        return self.placed(self.project(self.tower(input_ids=input_ids, attention_mask=mask).last_hidden_state))

    def placed(self, words: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D). Raises UserError for more tokens than have positions."""
        if self.positions is None:
            return words
        if words.shape[1] > self.positions.shape[1]:
            raise UserError(f"a text of {words.shape[1]} tokens, but the text part has {self.positions.shape[1]} "
                            "positions: lower the maximum length.")  # fmt: skip
        return words + self.positions[:, : words.shape[1]]


class ImageTower(nn.Module):
    def __init__(self, spec: ImageStem):
        super().__init__()
        self.tower = empty_tower(spec.tower)
        self.keywords = towers.resize_positions(self.tower, spec.size)
        self.prefix, self.grid, self.size = spec.prefix, spec.grid, spec.size
        self.project = nn.Linear(spec.channels, spec.width.size)
        # a CNN's cells do not know where they are
        self.positions = nn.Parameter(torch.zeros(1, spec.cells, spec.width.size))
        self.hides = spec.hide
        if spec.hide:
            self.hidden = nn.Parameter(torch.zeros(1, 1, spec.width.size))

    def start(self) -> None:
        _start_as_identity(self.project)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def states(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S), normalised -> (B, I, C): the grid's cells, row by row, as the tower says them; a class token is
        left out, since only the cells have places."""
        check_square(pixels, self.size)
        cells = towers.grid_tokens(self.tower(pixel_values=pixels, **self.keywords).last_hidden_state, self.prefix)
        return towers.averaged(cells, self.grid) if self.grid else cells

    def forward(self, pixels: Tensor | None, states: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """(B, 3, S, S), normalised -> (B, I, D). `states` (B, I, C): what the tower said of them, kept from before.
        `hidden` (B, I) bool: cells that become the one vector for what is to be guessed."""
        states = self.states(pixels) if states is None else states  # type: ignore[arg-type]
        if states.shape[1] != self.positions.shape[1]:
            raise UserError(f"the tower gave {states.shape[1]} cells for a picture, "
                            f"the model was made for {self.positions.shape[1]}: "
                            "use the size it was trained with.")  # fmt: skip
        cells = self.project(states)
        if hidden is not None:
            cells = torch.where(hidden.unsqueeze(-1), self.hidden, cells)
        return cells + self.positions
