"""What a model learns by. An objective is one small class: which columns, what is hidden, who sees whom, which head.

Its data side (`prepare`) runs in the loader's workers and draws all its randomness from the generator it is given; its
model side (`loss`) is deterministic given the batch, dropout aside.
"""

from __future__ import annotations

import inspect
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from interlace.errors import UserError, suggest
from interlace.model import Half, VLModel

if TYPE_CHECKING:
    from interlace.data.batches import Drawer
    from interlace.data.rows import Pair

Batch = dict[str, Any]


class Views:
    """The halves of one batch, each computed once however many objectives ask: the image is encoded once per step."""

    def __init__(self, model: VLModel, batch: Batch):
        self.model, self.batch = model, batch
        self._halves: dict[str, Half] = {}
        self._vectors: dict[str, Tensor] = {}
        self.others: Others | None = None  # the rest of the batch under gradient accumulation, see itc.py

    @property
    def size(self) -> int:
        return len(self.batch["group"])

    def image(self) -> Half:
        if "image" not in self._halves:
            kept = self.batch.get("image_states")
            self._halves["image"] = (self.model.half_image(self.batch["pixel_values"]) if kept is None
                                     else self.model.half_from("image", kept))  # fmt: skip
        return self._halves["image"]

    def text(self, name: str) -> Half:
        """`name`: "caption", "question", "other" -> the half of the words in `{name}_ids`, `{name}_mask`."""
        if name not in self._halves:
            kept, mask = self.batch.get(f"{name}_states"), self.batch.get(f"{name}_mask")
            self._halves[name] = (self.model.half_text(self.batch[f"{name}_ids"], mask) if kept is None
                                  else self.model.half_from("text", kept, mask))  # fmt: skip
        return self._halves[name]

    def vector(self, name: str) -> Tensor:
        """"image" or the name of a text -> (B, P), L2-normalised, in the contrast space."""
        if name not in self._vectors:
            half = self.image() if name == "image" else self.text(name)
            self._vectors[name] = self.model.alone(half, "image" if name == "image" else "text")
        return self._vectors[name]


@dataclass
class Others:
    """Vectors of the batch's other micro-batches, as constants."""

    text: Tensor  # (R, P)
    image: Tensor  # (R, P)
    group: Tensor  # (R,)
    real: Tensor  # (R,) bool, False = a row without caption
    parts: int = 1  # micro-batches per optimiser step, this one included


@dataclass
class Scored:
    """A loss and what is logged beside it, by name."""

    loss: Tensor  # scalar
    logs: dict[str, Tensor] = field(default_factory=dict)  # scalars


class Objective:
    """Subclasses set `name` and `head` and write `prepare` and `loss`."""

    name: ClassVar[str] = ""
    head: ClassVar[str] = ""  # which of heads.HEADS it reads
    known: ClassVar[dict[str, type[Objective]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            Objective.known[cls.name] = cls

    def head_options(self) -> dict[str, Any]:
        """Options of its head in `VLConfig.heads`."""
        return {}

    def check(self, model: VLModel) -> None:
        """Raises UserError when the model lacks a part this objective needs."""
        if self.head and self.head not in model.heads:
            raise UserError(f"{self.name} needs the {self.head!r} head, and this model has {sorted(model.heads)}.")

    def prepare(self, sample: dict[str, Any], row: Pair, index: int, draw: Drawer, rng: np.random.Generator) -> None:
        """Data side: adds what this objective wants to `sample` (texts under `texts[name]`, tensors under their name).
        `row` is the source's pair at `index`."""

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        raise TypeError(f"{type(self).__name__} has to write its loss()")


def build_objective(name: str, options: dict[str, Any]) -> Objective:
    """The objective of that name. Raises UserError for an unknown name or option, or one of a wrong type."""
    check_options(name, options)
    try:
        return Objective.known[name](**options)
    except TypeError as error:
        raise UserError(f"objective {name}: {error}") from None


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raises UserError for an unknown objective, an option it does not have, or a plain type it does not take."""
    if name not in Objective.known:
        known = ", ".join(sorted(Objective.known))
        raise UserError(f"no objective is called {name!r} (known: {known}).{suggest(name, Objective.known)}")
    cls = Objective.known[name]
    parameters = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for option in options:
            if option not in parameters:
                has = [*parameters, "weight"]  # the weight is taken out by whoever sums the losses
                raise UserError(f"objective {name} has no option {option!r}; it has {', '.join(has)}."
                                f"{suggest(str(option), has)}")  # fmt: skip
    try:
        hints = typing.get_type_hints(cls.__init__)
    except NameError:  # a hint that is imported for type checkers only
        hints = {}
    for option, value in options.items():
        check_type(f"objectives.{name}.{option}", value, hints.get(option))


def check_type(key: str, value: Any, hint: Any) -> None:
    """Raises UserError for a text where a number is expected and the like; other types are the objective's to check."""
    fits: dict[Any, Any] = {int: int, float: (int, float), str: str, bool: bool}
    if hint in fits and (not isinstance(value, fits[hint]) or isinstance(value, bool) != (hint is bool)):
        words = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}
        raise UserError(f"{key}: expected {words[hint]}, got {value!r}.")


def mean(values: Tensor, real: Tensor) -> Tensor:
    """Mean of `values` (B,) where `real` (B,): for logs. Zero when nothing is real."""
    return (values * real).sum() / real.sum().clamp(min=1)


def cross_entropy_soft(logits: Tensor, target: Tensor) -> Tensor:
    """(B, C) logits, (B, C) target whose rows sum to 1 or 0 -> (B,)."""
    return -(target * torch.log_softmax(logits, -1)).sum(-1)
