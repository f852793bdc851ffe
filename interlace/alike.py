"""Attentions between the streams that begin by likeness: a word reads the cells that look like it, a cell its words.

What looks like what is known before the first step: the cells were mapped into the space of the words
(warm_start.py). Random queries and keys throw that away, and find it again slowly: small LXMERT tells 79.9% of the
validation pairs right after 480 steps from random ones, 83.6% from these (one seed; docs/training.md).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from interlace.layers import Attend, Co, Read


@torch.no_grad()
def start_alike(model: nn.Module, started: Collection[str] = ()) -> int:
    """Every attention in which one stream reads the other. `started`: names of parameters that came trained; they read
    what they learnt to. Returns how many there are."""
    found = {name: attend for name, attend in meeting(model).items() if f"{name}.query.weight" not in started}
    for attend in found.values():
        read_alike(attend)
    return len(found)


@torch.no_grad()
def read_alike(attend: Attend) -> None:
    """Query and key start as one map, where both streams are as wide as the attention."""
    if attend.query.weight.shape[0] == attend.query.weight.shape[1] == attend.key.weight.shape[1]:
        same = torch.eye(len(attend.query.weight), device=attend.query.weight.device)
        attend.query.weight += same
        attend.key.weight += same


def meeting(model: nn.Module) -> dict[str, Attend]:
    """The attentions of a model's layers in which one stream reads the other, and only the other, by name. One that a
    decoder shares is there once."""
    found: dict[str, Attend] = {}
    for name, layer in model.named_modules():
        parts: tuple[str, ...] = ()
        if isinstance(layer, Read):
            parts = ("attend_image",)
        elif isinstance(layer, Co):
            parts = ("attend",) if layer.tied else ("text_attend", "image_attend")
        for part in parts:
            if not any(getattr(layer, part) is known for known in found.values()):
                found[f"{name}.{part}"] = getattr(layer, part)
    return found
