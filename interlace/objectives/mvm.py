"""Masked regions: guess their features, their class, or how a detector's belief is spread over the classes.

UNITER (Chen et al. 2020, arXiv:1909.11740), section 3.2, names them MRFR, MRC and MRC-KL. Its equations sum over
features and classes; its release averages over them, and so do the means of what these functions return.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BACKGROUND = 0  # the detector's class for no object


def feature_losses(predicted: Tensor, features: Tensor) -> Tensor:
    """(n, F), (n, F) -> squared errors (n, F)."""
    return F.mse_loss(predicted, features, reduction="none")


def class_losses(logits: Tensor, beliefs: Tensor) -> Tensor:
    """(n, C), (n, C) -> (n,): cross-entropy with the class the detector believes most, the background left out."""
    return F.cross_entropy(logits, beliefs[:, BACKGROUND + 1 :].argmax(-1) + BACKGROUND + 1, reduction="none")


def belief_losses(logits: Tensor, beliefs: Tensor) -> Tensor:
    """(n, C), (n, C) -> the terms (n, C) of KL(detector || model)."""
    return F.kl_div(F.log_softmax(logits, -1), beliefs, reduction="none")


def spread_cross_entropy(logits: Tensor, beliefs: Tensor) -> Tensor:
    """(..., C), (..., C) -> cross-entropy with the whole distribution, summed over classes, mean over the regions that
    have one (their beliefs sum to 1, the others' to 0); 0 when none has. VL-BERT's (arXiv:1908.08530) release."""
    scored = (beliefs.sum(-1) - 1).abs() < 0.1
    losses = -(beliefs[scored] * F.log_softmax(logits[scored], -1)).sum(-1)
    return losses.sum() / max(len(losses), 1)


def hide_regions(may: Tensor, draw: torch.Generator, share: float = 0.15, at_least_one: bool = True) -> Tensor:
    """may (B, I) True = a region that may be hidden (no padding, not the whole picture) -> hidden (B, I).
    `at_least_one`: a row in which none was drawn hides the first it may, as in UNITER."""
    may = may.bool()
    hidden = (torch.rand(may.shape, generator=draw) < share) & may
    if at_least_one:
        hidden = hidden | (may & (may.cumsum(1) == 1) & ~hidden.any(1, keepdim=True))
    return hidden
