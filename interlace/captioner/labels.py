"""Captions as what a captioner learns from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
)

from interlace.captioner.model import HIDDEN, Ids
from interlace.errors import UserError


def caption_labels(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int = 40) -> Tensor:
    """Captions -> (B, T), T <= max_length: their words, the end, then -100. No start: the model puts it in front. A
    caption that is too long loses words, not its end. Raises UserError as `Ids.of`.

    >>> caption_labels(tokenizer, ["a red circle", "a bar"])     # [SEP] = 3
    tensor([[17,  5, 11,  3], [17, 14,  3, -100]])
    """
    if isinstance(texts, str):
        raise UserError("Expected a list of captions, got one text: put it in a list.")
    ids = Ids.of(tokenizer)
    return _labels(tokenizer(list(texts), add_special_tokens=False)["input_ids"], ids, max_length)


def labels_of(input_ids: Tensor, attention_mask: Tensor, ids: Ids, max_length: int = 40) -> Tensor:
    """The same for captions a tokenizer has made tensors of, (B, T) each, padded on either side, with or without its
    special tokens: start and end are taken off, then as `caption_labels`. Raises UserError for unequal shapes."""
    if input_ids.shape != attention_mask.shape or input_ids.dim() != 2:
        raise UserError(f"Expected ids and mask of one shape (B, T), got {tuple(input_ids.shape)} and"
                        f" {tuple(attention_mask.shape)}.")  # fmt: skip
    rows = []
    for row, mask in zip(input_ids, attention_mask):
        words = row[mask.bool()].tolist()
        if words and words[0] == ids.start: words = words[1:]
        if words and words[-1] == ids.end: words = words[:-1]
        rows.append(words)
    return _labels(rows, ids, max_length).to(input_ids.device)


def _labels(rows: list[list[int]], ids: Ids, max_length: int) -> Tensor:
    ended = [torch.tensor([*row[: max_length - 1], ids.end]) for row in rows]
    return nn.utils.rnn.pad_sequence(ended, batch_first=True, padding_value=HIDDEN)
