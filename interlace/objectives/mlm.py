"""Masked words. Devlin et al. 2019, section 3.1; with a picture beside them, all single-stream papers."""

from __future__ import annotations

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
