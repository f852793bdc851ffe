"""Ranking by a margin: fine-tuning for retrieval, where a true pair stands beside wrong ones."""

from __future__ import annotations

from torch import Tensor


def margin_losses(scores: Tensor, margin: float = 0.2) -> Tensor:
    """Scores (B, 1 + negatives), the true pair first -> (B, negatives): how far each wrong pair is from staying
    `margin` below, after a sigmoid. UNITER (arXiv:1909.11740), section 4.1."""
    scores = scores.sigmoid()
    return (margin + scores[:, 1:] - scores[:, :1]).clamp(min=0)
