"""Heads over one stream's states or its pooled vector: what predicts words, features, classes.

All take both widths, as every head does, and read the `stream` they are told. Given two pooled vectors they read
theirs, so that they can stand where a pair head stands (`match`, `answers` where the first word has seen everything).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.layers import ACTIVATIONS


class OneStream(nn.Module):
    def __init__(self, text: int, image: int, stream: str = "text"):
        super().__init__()
        self.stream, self.size = stream, text if stream == "text" else image
        self.reads = (stream,)  # of two pooled vectors; the other need not be there

    def choose(self, text: Tensor | None, image: Tensor | None) -> Tensor:
        """The one vector given, or that of this head's stream."""
        given = image if text is None or (self.stream == "image" and image is not None) else text
        assert given is not None
        return given


class Linear(OneStream):
    """One linear. `dropout` before it, as in BERT's classifiers."""

    def __init__(self, text: int, image: int, labels: int, stream: str = "text", dropout: float = 0.0):
        super().__init__(text, image, stream)
        self.dropout, self.out = nn.Dropout(dropout), nn.Linear(self.size, labels)

    def forward(self, text: Tensor | None, image: Tensor | None = None) -> Tensor:  # (..., D) -> (..., labels)
        return self.out(self.dropout(self.choose(text, image)))


class Transformed(OneStream):
    """Linear, activation, norm, linear. `hidden` 0: as wide as the stream."""

    def __init__(self, text: int, image: int, labels: int, hidden: int = 0, stream: str = "text",
                 activation: str = "gelu", eps: float = 1e-12, dropout: float = 0.0):  # fmt: skip
        super().__init__(text, image, stream)
        hidden = hidden or self.size
        self.dense = nn.Linear(self.size, hidden)
        self.activation = ACTIVATIONS[activation]
        self.norm, self.dropout = nn.LayerNorm(hidden, eps=eps), nn.Dropout(dropout)
        self.out = nn.Linear(hidden, labels)

    def forward(self, text: Tensor | None, image: Tensor | None = None) -> Tensor:  # (..., D) -> (..., labels)
        x = self.norm(self.activation(self.dense(self.choose(text, image))))
        return self.out(self.dropout(x))


class Tied(OneStream):
    """Linear, activation, norm, then a table that belongs to another part: the words for masked words (Devlin et al.
    2019), the feature projection backwards for masked features (UNITER). `labels`: rows of that table; `size`: numbers
    in each, where they are not the stream's."""

    def __init__(self, text: int, image: int, labels: int, stream: str = "text", activation: str = "gelu",
                 eps: float = 1e-12, size: int = 0):  # fmt: skip
        super().__init__(text, image, stream)
        self.dense = nn.Linear(self.size, size or self.size)
        self.activation = ACTIVATIONS[activation]
        self.norm = nn.LayerNorm(size or self.size, eps=eps)
        self.bias = nn.Parameter(torch.zeros(labels))

    def forward(self, states: Tensor, table: Tensor) -> Tensor:  # (..., D), (labels, D) -> (..., labels)
        return F.linear(self.norm(self.activation(self.dense(states))), table, self.bias)
