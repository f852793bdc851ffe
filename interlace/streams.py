"""The nouns every other file speaks: two streams of states, and who may look at whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Streams(NamedTuple):
    """What a layer takes and returns. A stream that is not there is None."""

    text: Tensor | None  # (B, T, D_text)
    image: Tensor | None  # (B, I, D_image)


class Asked(NamedTuple):
    """Which states at the end of a schedule somebody reads: their positions in each stream, (B or 1, n), in any order;
    None = all of them. `pooled`: the streams whose pooled vectors are read as well. What nobody reads, the last layer
    need not compute."""

    text: Tensor | None = None
    image: Tensor | None = None
    pooled: tuple[str, ...] = ("text", "image")

    def joint(self, words: int, cells: int, device: torch.device) -> Tensor | None:
        """The positions in one sequence of that many words and cells; None = all."""
        if self.text is None and self.image is None:
            return None
        every = [torch.arange(count, device=device).unsqueeze(0) for count in (words, cells)]
        text, image = (whole if at is None else at for at, whole in zip((self.text, self.image), every))
        rows = max(len(text), len(image))
        return torch.cat([text.expand(rows, -1), image.expand(rows, -1) + words], 1)


ALL = Asked()
POOLED = Asked(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long))  # no state, only their pools


def take(states: Tensor, at: Tensor | None) -> Tensor:
    """(B, L, D), positions (B or 1, n) -> (B, n, D); None = all."""
    if at is None:
        return states
    if len(at) == 1:
        return states[:, at[0]]
    return states.gather(1, at.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def positions_of(which: Tensor) -> Tensor:
    """Which states (B, L) bool -> their positions (B, n), in order; n: the most of any row, the others' filled up with
    positions that nobody asked for."""
    most = int(which.sum(1).max()) if which.numel() else 0
    return which.logical_not().long().argsort(dim=1, stable=True)[:, :most]


class Sight(NamedTuple):
    """One block of visibility, ready for attention: None means everything may be seen.

    A query that may see nothing would be NaN in a softmax, or an average over padding; it must read zero. So such rows
    are opened for the softmax and `alive` wipes what they read.
    """

    mask: Tensor  # (B or 1, 1, Q or 1, K) bool, True = may be seen; no row without a True
    alive: Tensor  # (B or 1, 1, Q or 1, 1) bool, False = this query may see nothing
    memory: Callable | None = None  # (attention, states) -> keys, values, of earlier steps too (decoder.py)

    def of(self, at: Tensor | None) -> Sight:
        """The same for some of the queries, their positions (B or 1, n)."""
        if at is None or self.mask.shape[2] == 1:
            return self
        mask, alive = (_rows_at(block, at) for block in (self.mask, self.alive))
        return self._replace(mask=mask, alive=alive)


def _rows_at(block: Tensor, at: Tensor) -> Tensor:
    """(B or 1, 1, Q, K), positions (B or 1, n) -> (B or 1, 1, n, K)."""
    return take(block.squeeze(1).expand(max(len(block), len(at)), -1, -1), at).unsqueeze(1)


def sight(mask: Tensor | None) -> Sight | None:
    """`mask` (B or 1, Q or 1, K) bool -> Sight."""
    if mask is None:
        return None
    alive = mask.any(-1, keepdim=True)
    return Sight((mask | ~alive).unsqueeze(1), alive.unsqueeze(1))


@dataclass
class Visibility:
    """Who may look: four blocks (query, key) of bool masks (B or 1, Q or 1, K); None = everyone sees everything.

    The schedule says which streams meet; the visibility says who may look. `tt` text at text, `ti` text at image,
    `it` image at text, `ii` image at image.
    """

    tt: Tensor | None = None
    ti: Tensor | None = None
    it: Tensor | None = None
    ii: Tensor | None = None
    _ready: dict = field(default_factory=dict, repr=False, compare=False)

    def sight(self, block: str) -> Sight | None:
        """The named block for attention; made once however many layers ask."""
        if block not in self._ready:
            self._ready[block] = sight(getattr(self, block))
        return self._ready[block]

    def joint(self, words: int, cells: int) -> Sight | None:
        """The four blocks as one (B, T+I, T+I) mask, for layers in which both streams are one sequence."""
        key = ("joint", words, cells)
        if key not in self._ready:
            blocks = [self.tt, self.ti, self.it, self.ii]
            given = next((b for b in blocks if b is not None), None)
            if given is None:
                self._ready[key] = None
            elif (
                self.tt is self.it
                and self.ii is self.ti
                and all(block is None or block.shape[1] == 1 for block in (self.tt, self.ii))
            ):  # padding alone: the same keys for every query, so the mask stays one row
                shown = [torch.ones(len(given), 1, count, dtype=torch.bool, device=given.device)
                         if block is None else block
                         for block, count in ((self.tt, words), (self.ii, cells))]  # fmt: skip
                self._ready[key] = sight(torch.cat(shown, -1))
            else:
                batch = max(b.shape[0] for b in blocks if b is not None)
                size = {"tt": (words, words), "ti": (words, cells), "it": (cells, words), "ii": (cells, cells)}
                full = {
                    name: torch.ones(batch, *qk, dtype=torch.bool, device=given.device)
                    if block is None
                    else block.expand(batch, *qk)
                    for (name, qk), block in zip(size.items(), blocks)
                }
                top, bottom = torch.cat([full["tt"], full["ti"]], -1), torch.cat([full["it"], full["ii"]], -1)
                self._ready[key] = sight(torch.cat([top, bottom], -2))
        return self._ready[key]


def _keys(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool().unsqueeze(1)  # (B, 1, K)


def everyone(text_mask: Tensor | None, image_mask: Tensor | None) -> Visibility:
    """Everyone sees everyone but padding. Masks (B, T) and (B, I): 1 or True = real; None = nothing is padded."""
    words, cells = _keys(text_mask), _keys(image_mask)
    if (words is None) != (cells is None) and words is not None:
        return Visibility(tt=words, it=words)
    return Visibility(tt=words, ti=cells, it=words, ii=cells)


def causal(text_mask: Tensor | None, image_mask: Tensor | None, length: int, device=None) -> Visibility:
    """A word sees the words up to itself and the whole image; the image sees only itself.

    The image must not look at words: in two layers a later word would leak back through it.
    """
    return prefix(text_mask, image_mask, torch.zeros(1, length, dtype=torch.bool, device=device))


def first_words(count: Tensor, length: int) -> Tensor:
    """How many words of each row are given, (B,) -> which, (B, `length`) bool."""
    return torch.arange(length, device=count.device) < count.unsqueeze(1)


def prefix(text_mask: Tensor | None, image_mask: Tensor | None, given: Tensor) -> Visibility:
    """PrefixLM: words of the prefix (`given` (B or 1, T) True) are seen by all words and see only each other; the rest
    are seen by themselves and by later ones. The image sees only itself. Wang et al. 2021 (SimVLM, arXiv:2108.10904).

    Each row has its own prefix, which may stand anywhere in it: a given word after a written one still does not see it.
    """
    length = given.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=given.device).tril().unsqueeze(0)
    words = given.unsqueeze(1) | (past & ~given.unsqueeze(2))  # (B or 1, T, T)
    if text_mask is not None:
        words = words & text_mask.bool().unsqueeze(1)
    nothing = torch.zeros(1, 1, length, dtype=torch.bool, device=given.device)
    return Visibility(tt=words, ti=_keys(image_mask), it=nothing, ii=_keys(image_mask))
