"""Masked words. Devlin et al. 2019, section 3.1; with a picture beside them, all single-stream papers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def word_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(..., V), (...) with labels below 0 not scored -> (n,): cross-entropy of each scored word, in reading order."""
    scored = labels >= 0
    return F.cross_entropy(logits[scored], labels[scored], reduction="none")


def masked_words(logits: Tensor, labels: Tensor) -> Tensor:
    """(..., V), (...) -> the mean over scored words; 0 when there is none."""
    losses = word_losses(logits, labels)
    return losses.sum() / max(len(losses), 1)


def hide_words(input_ids: Tensor, may: Tensor, mask: int, known: tuple[int, int], draw: torch.Generator,
               share: float = 0.15, at_least_one: bool = True) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ids (B, T), may (B, T) True = may be hidden (no padding, no special token) -> ids with hidden words, labels
    (B, T) with -100 = not scored. Of the hidden, 80% become `mask`, 10% a random id of `known` (first, last), 10% stay.

    `at_least_one`: a row in which none was drawn hides the first it may, as in UNITER; VisualBERT and LXMERT do not.
    """
    chance, kind = torch.rand((2, *input_ids.shape), generator=draw)  # each (B, T)
    hidden = (chance < share) & may
    if at_least_one:
        first = may & (may.cumsum(1) == 1)
        hidden = hidden | (first & ~hidden.any(1, keepdim=True))
    random = torch.randint(known[0], known[1] + 1, input_ids.shape, generator=draw)
    changed = torch.where(kind < 0.8, mask, torch.where(kind < 0.9, random, input_ids))
    return torch.where(hidden, changed, input_ids), input_ids.masked_fill(~hidden, -100)
