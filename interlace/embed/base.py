"""What stands before the schedule: one class per way of turning words or pixels into states.

An embedder has a specification (a small dataclass, what goes into config.json) and a module. Quirks of a paper's
input live in its embedder, never in a layer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from interlace.errors import UserError, suggest
from interlace.layers import Width


@dataclass
class Embedder:
    """A specification. `width`: the stream it feeds. `pool`: how it becomes one vector: "first", "last", "mean", or a
    trained `Pooler`, "tanh" as in BERT or "relu". `pool_size`: of a trained pooler's vector; 0 means the stream's."""

    width: Width
    pool: str = "first"
    pool_size: int = 0

    name: ClassVar[str] = ""
    stream: ClassVar[str] = ""  # "text" or "image"
    known: ClassVar[dict[str, type[Embedder]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            Embedder.known[cls.name] = cls

    def build(self) -> nn.Module:
        raise TypeError(f"{type(self).__name__} has to build its module")

    def to_dict(self) -> dict[str, Any]:
        return {"embed": self.name, **asdict(self)}


def embedder_from_dict(given: dict[str, Any]) -> Embedder:
    """The specification that `to_dict` wrote. Raises UserError for an unknown kind or field."""
    given = dict(given)
    name = given.pop("embed", None)
    if name not in Embedder.known:
        import interlace.presets  # noqa: F401  a preset's own embedder is known once its file is imported
    if name not in Embedder.known:
        raise UserError(f"unknown embedder {name!r} (known: {', '.join(Embedder.known)})."
                        + suggest(str(name), Embedder.known))  # fmt: skip
    cls = Embedder.known[name]
    unknown = set(given) - {f.name for f in fields(cls)}
    if unknown:
        raise UserError(f"{name}: unknown fields {sorted(unknown)}; expected {[f.name for f in fields(cls)]}.")
    return cls(**{**given, "width": Width(**given["width"])})


class Pooler(nn.Module):
    """The state of position 0 through a linear and an activation. Devlin et al. 2019: BERT's pooler."""

    def __init__(self, width: Width, activation: str, size: int = 0):
        super().__init__()
        self.dense = nn.Linear(width.size, size or width.size)
        self.activation = {"tanh": torch.tanh, "relu": torch.relu}[activation]

    def forward(self, states: Tensor) -> Tensor:  # (B, L, D) -> (B, size)
        return self.activation(self.dense(states[:, 0]))


def pool(states: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """(B, L, D), mask (B, L) or None -> (B, D). "first": position 0. "last": the last real one. "mean": of the real."""
    if how == "first":
        return states[:, 0]
    if how == "last":
        return states[:, -1] if mask is None else states[torch.arange(len(states)), mask.long().sum(1).clamp(min=1) - 1]
    if mask is None:
        return states.mean(1)
    weight = mask.to(states.dtype).unsqueeze(-1)  # (B, L, 1)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1e-6)
