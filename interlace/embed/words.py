"""Words as in BERT: word + position + type, norm, dropout. Devlin et al. 2019, section 3."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from interlace.embed.base import Embedder
from interlace.errors import UserError


@dataclass
class Words(Embedder):
    """`types` 0: no segment table (BLIP). `first_position`: RoBERTa counts from pad + 1 = 2."""

    vocabulary: int = 30522
    positions: int = 512
    types: int = 2
    pad: int = 0
    first_position: int = 0
    name = "words"
    stream = "text"

    def build(self) -> nn.Module:
        return WordEmbedding(self)


class WordEmbedding(nn.Module):
    def __init__(self, spec: Words):
        super().__init__()
        size = spec.width.size
        self.words = nn.Embedding(spec.vocabulary, size, padding_idx=spec.pad)
        self.positions = nn.Embedding(spec.positions, size)
        self.types = nn.Embedding(spec.types, size) if spec.types else None
        self.norm = nn.LayerNorm(size, eps=spec.width.eps)
        self.dropout = nn.Dropout(spec.width.dropout)
        self.first = spec.first_position

    def forward(self, input_ids: Tensor, mask: Tensor | None = None, type_ids: Tensor | None = None,
                start: int | Tensor = 0) -> Tensor:  # fmt: skip
        """ids (B, T) -> (B, T, D). `start`: words that came before these; (B, 1) where each row has its own number,
        negative for padding on the left. Raises UserError when the text is longer than the positions."""
        length = input_ids.shape[1] + (start if isinstance(start, int) else 0)
        if length + self.first > self.positions.num_embeddings:
            limit = self.positions.num_embeddings - self.first
            raise UserError(f"a text of {length} tokens, but the model has {limit} positions: "
                            "lower the maximum length or truncate.")  # fmt: skip
        at = torch.arange(input_ids.shape[1], device=input_ids.device) + start  # (T,) or (B, T)
        at = self.first + (at if isinstance(start, int) else at.clamp(min=0))
        x = self.words(input_ids) + self.positions(at)  # (B, T, D)
        if self.types is not None:
            x = x + (self.types.weight[0] if type_ids is None else self.types(type_ids))
        return self.dropout(self.norm(x))
