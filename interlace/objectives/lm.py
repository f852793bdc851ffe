"""The next word. BLIP (Li et al. 2022, arXiv:2201.12086), section 3.2: cross-entropy with label smoothing 0.1."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SMOOTHING = 0.1  # of the release, wherever it scores words: training, captions, answers, ranking


def written(input_ids: Tensor, pad: int = 0, prompt: int = 0) -> Tensor:
    """(B, T) -> labels (B, T): the words themselves, -100 at padding and in the first `prompt` places."""
    labels = input_ids.masked_fill(input_ids == pad, -100)
    labels[:, :prompt] = -100
    return labels


def next_word(logits: Tensor, labels: Tensor, smoothing: float = SMOOTHING) -> Tensor:
    """(B, T, V), labels (B, T) with -100 = not scored -> scalar, the mean over scored words. Each state predicts the
    label after it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing)


def text_losses(logits: Tensor, labels: Tensor, smoothing: float = SMOOTHING) -> Tensor:
    """(B, T, V), (B, T) -> (B,): the sum over each text's scored words; how probable the whole text is."""
    loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", label_smoothing=smoothing)
    return loss.sum(1)


def answers_loss(logits: Tensor, labels: Tensor, weight: Tensor, questions: int) -> Tensor:
    """All answers of a batch (N, A, V), (N, A), the weight of each (N,), and the number of questions -> scalar.
    A question's answers are weighed by how many people gave them (BLIP, section 5.3)."""
    return torch.dot(weight, text_losses(logits, labels)) / questions
