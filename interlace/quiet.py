"""Residual branches that begin by adding nothing (Zhang et al. 2019, arXiv:1901.09321)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from interlace.layers import Attend, FeedForward


@torch.no_grad()
def quiet_branches(module: nn.Module, started: Collection[str] = ()) -> None:
    """The last linear of every attention and feed-forward is zero, so that the first forward is what the rest of the
    model was made to say. `started`: names of parameters that came trained; their branches speak as they learnt to."""
    for name, part in module.named_modules():
        at = "out" if isinstance(part, Attend) else "down" if isinstance(part, FeedForward) else ""
        if at and f"{name}.{at}.weight" not in started:
            last = getattr(part, at)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
