"""A start for what stands where: cells and words say loudly where they are, and what is alike reads each other.

Matching "a chair at the top left" takes three steps: the word finds the cells that look like it, reads where they are,
and compares that with what its neighbours say. From small random weights each is a product of the others' zeros, and
hundreds of steps on real pictures find none of them. So every step is given something to begin with:

    words   sinusoids over the order of the tokens (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)
    cells   a random vector for the row plus one for the column: cells of a row, and of a column, are alike in that
    cross   query and key start as one map, so a word attends to the cells that look like it (stems start aligned)
    joint   in one sequence what a word looks most like is itself: words and cells say loudly which they are, and every
            second layer, as many as a model of two streams has, begins by looking for the other kind
    match   its head starts as torch starts a linear layer, two or three times as loud as 0.02
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from interlace.alike import meeting, read_alike
from interlace.embed.stem import ImageTower, TextTower
from interlace.layers import Joint

if TYPE_CHECKING:
    from interlace.model import VLModel

WORDS, CELLS = 0.3, 0.7  # root mean square of the positions, beside aligned states of 1
KIND, OTHER = 0.5, 4.0  # the same of what says word or cell; how much likeness a key of the other kind has ahead


@torch.no_grad()
def start_places(model: VLModel) -> None:
    """Positions of both stems, and the attentions in which the streams meet. Leaves all else as it is."""
    words, cells = cast(TextTower, model.text), cast(ImageTower, model.image)
    if words.positions is not None:
        words.positions.copy_(WORDS * math.sqrt(2) * sinusoids(*words.positions.shape[1:]))
    if isinstance(cells, ImageTower):
        count, width = cells.positions.shape[1:]
        side = math.isqrt(count)
        if side * side == count:
            rows, columns = torch.randn(side, 1, width), torch.randn(1, side, width)
            cells.positions.copy_(CELLS / math.sqrt(2) * (rows + columns).reshape(1, count, width))
    joint = [layer for layer in model.schedule.layers() if isinstance(layer, Joint)]
    if joint and words.positions is not None and isinstance(cells, ImageTower):
        kind = torch.randn(words.positions.shape[-1]).sign().to(words.positions.device)  # of equal size in every head
        words.positions.add_(kind, alpha=KIND)
        cells.positions.sub_(kind, alpha=KIND)
        for one in joint[::2]:
            read_alike(one.attend)
            one.attend.key.weight.sub_(torch.outer(kind, kind), alpha=OTHER / len(kind))
    for attend in meeting(model.schedule).values():
        read_alike(attend)
    for part in model.heads["match"].modules() if "match" in model.heads else ():
        if isinstance(part, nn.Linear):  # what depends on three things at once is quiet enough
            part.reset_parameters()


def sinusoids(length: int, width: int, longest: float = 1000.0) -> torch.Tensor:
    """(L, D), root mean square 1 / sqrt 2."""
    angle = torch.arange(length).unsqueeze(1) * longest ** (-torch.arange(0, width, 2) / width)  # (L, D/2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]
