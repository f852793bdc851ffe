"""Words with a token that says which task is asked. Lu et al. 2020 (12-in-1, arXiv:1912.02315), section 3.2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from interlace.embed.words import WordEmbedding, Words
from interlace.errors import UserError


@dataclass
class TaskWords(Words):
    """Ids from `vocabulary` on are tasks: `vocabulary + n` is task n of `tasks`. `with_task` puts one after [CLS]."""

    tasks: int = 20
    name = "task_words"

    def build(self) -> nn.Module:
        return TaskWordEmbedding(self)

    def with_task(self, input_ids: Tensor, task: Tensor) -> Tensor:
        """Ids (B, T), tasks (B,) -> (B, T+1), the task after the first token. Masks grow by `insert`."""
        return insert(input_ids, self.vocabulary + task)


def insert(rows: Tensor, value: Tensor | int) -> Tensor:
    """(B, T) -> (B, T+1) with `value` (B,) or one number at position 1: masks 1, types 0, labels -100."""
    new = torch.as_tensor(value, dtype=rows.dtype, device=rows.device).expand(len(rows)).unsqueeze(1)
    return torch.cat([rows[:, :1], new, rows[:, 1:]], 1)


class TaskWordEmbedding(WordEmbedding):
    """Of the ids it is given only words have positions, see `counted`."""

    def __init__(self, spec: TaskWords):
        super().__init__(spec)
        self.tasks = nn.Embedding(spec.tasks, spec.width.size)

    def counted(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T) bool: which take a position."""
        return input_ids < self.words.num_embeddings

    def forward(self, input_ids: Tensor, mask: Tensor | None = None, type_ids: Tensor | None = None,
                start: int | Tensor = 0) -> Tensor:  # fmt: skip
        """ids (B, T), tasks among them -> (B, T, D). A task has neither position nor type, and words are counted as if
        it were not there, `start` of them before these. Raises UserError when the text is longer than the positions."""
        vocabulary, limit = self.words.num_embeddings, self.positions.num_embeddings - self.first
        task = input_ids >= vocabulary  # (B, T)
        at = (start + (~task).long().cumsum(1).sub(1).clamp(min=0)).clamp(min=0)  # (B, T)
        long = isinstance(start, int) and start + input_ids.shape[1] > limit
        if long and (words := int(at.max()) + 1) > limit:
            raise UserError(f"a text of {words} tokens, but the model has {limit} positions: lower the maximum length "
                            "or truncate.")  # fmt: skip
        x = self.words(input_ids.masked_fill(task, 0)) + self.positions(self.first + at)  # (B, T, D)
        if self.types is not None:
            x = x + (self.types.weight[0] if type_ids is None else self.types(type_ids))
        x = torch.where(task.unsqueeze(-1), self.tasks((input_ids - vocabulary).clamp(min=0)), x)
        return self.dropout(self.norm(x))
