"""Masked words. Devlin et al. 2019, section 3.1; with a picture beside them, all single-stream papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.embed.base import Embedder
from interlace.embed.stem import TextStem
from interlace.errors import UserError
from interlace.heads import Tied
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Scored, Views


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


def word_table(model: VLModel) -> Tensor:
    """(V, D): the vectors of the words, to which the last linear of a word head may be tied."""
    tower = getattr(model.text, "tower", None)
    table: nn.Module = model.text.words if tower is None else tower.get_input_embeddings()  # type: ignore[assignment]
    return table.weight  # type: ignore[return-value]


def word_logits(model: VLModel, states: Tensor, head: str = "mlm") -> Tensor:
    """States (..., D) of the positions that are asked about -> (..., V)."""
    module = model.heads[head]
    return (module(states, word_table(model)) if isinstance(module, Tied) else module(states)).float()


def word_head(text: Embedder) -> dict[str, Any]:
    """Options of a head over the words of this text part, tied to their table."""
    if isinstance(text, TextStem):
        return {"kind": "tied", "labels": text.tower["vocab_size"], "size": text.tower["hidden_size"]}
    return {"kind": "tied", "labels": text.vocabulary}  # type: ignore[attr-defined]


class MLM(Objective):
    """Guess hidden words from the rest of the sentence and from the picture.

    Columns: caption (and image). Hides: `mask` of the words; of these 80% become [MASK], 10% another word, 10% stay.
    Sees: everyone sees everyone. Head: mlm, at hidden positions alone. Logs: mlm, mlm_accuracy.

    `whole_words`: all pieces of a word are hidden together (ViLT, VL-BERT). `at_least_one`: where the lot fell on none,
    the first is hidden (UNITER; not VisualBERT, LXMERT). `mismatched` False: a sentence that ITM swapped is not scored,
    since its picture cannot help. Only one of both streams is hidden where the masked picture parts are another pass's
    (UNITER's conditional masking); in one pass with them both are (LXMERT, VL-BERT).
    """

    name = "mlm"
    head = "mlm"
    fused = True

    def __init__(self, mask: float = 0.15, whole_words: bool = False, at_least_one: bool = True,
                 mismatched: bool = True):  # fmt: skip
        if not 0 < mask < 1:
            raise UserError("mlm.mask is the share of words to hide, above 0 (nothing to guess) and below 1 (nothing "
                            f"to guess from); got {mask}.")  # fmt: skip
        self.mask, self.whole_words, self.at_least_one, self.mismatched = mask, whole_words, at_least_one, mismatched

    def head_for(self, text, image) -> dict:
        return word_head(text)

    def corrupt(self, part: Batch, rngs: list[np.random.Generator], processor) -> None:
        mask_id, known = processor.mask_id, processor.plain_ids
        ids, labels = part["text_ids"].clone(), torch.full_like(part["text_ids"], -100)
        for row, rng in enumerate(rngs):
            words = part["text_words"][row].numpy()
            units = words if self.whole_words else np.where(words >= 0, np.arange(len(words)), -1)
            own = np.unique(units[units >= 0])
            lots = rng.random(len(own))
            chosen = own[lots < self.mask]
            if not len(chosen) and self.at_least_one:
                chosen = own[:1]
            places = np.flatnonzero(np.isin(units, chosen))
            kinds, others = rng.random(len(places)), rng.integers(0, len(known), len(places))
            # a caption of none or of many words takes another number of draws, which is why each row has its own lot
            if not self.mismatched and "matched" in part and not part["matched"][row]:
                continue
            labels[row, places] = ids[row, places]
            ids[row, places[kinds < 0.8]] = mask_id
            swapped = (kinds >= 0.8) & (kinds < 0.9)
            ids[row, places[swapped]] = torch.from_numpy(known[others[swapped]]).to(ids.dtype)
        part["text_ids"], part["word_labels"] = ids, labels

    def count(self, part: Batch, batch: Batch) -> Tensor:
        return (part["word_labels"] >= 0).sum()

    def asks(self, part: Batch) -> tuple[bool | Tensor, bool | Tensor]:
        return part["word_labels"] >= 0, False

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        labels = views.part["word_labels"]
        asked = labels >= 0
        logits = word_logits(model, views.words_where(asked))  # (n, V): the hidden positions alone
        target = labels[asked]
        loss = F.cross_entropy(logits, target, reduction="sum") / views.total(self)
        right = (logits.argmax(-1) == target).float().sum() / max(len(target), 1)
        return Scored(loss, {"mlm": loss.detach(), "mlm_accuracy": right})
