"""The next word. BLIP (Li et al. 2022, arXiv:2201.12086), section 3.2: cross-entropy with label smoothing 0.1."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from interlace.decoder import Decoder, TextDecoder
from interlace.embed.base import Embedder
from interlace.embed.stem import TextStem
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.layers import READ
from interlace.model import Half, VLModel
from interlace.objectives.base import Batch, Objective, Scored, Views, systems_where

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


def answers_loss(logits: Tensor, labels: Tensor, weight: Tensor, questions: int,
                 smoothing: float = SMOOTHING) -> Tensor:  # fmt: skip
    """All answers of a batch (N, A, V), (N, A), the weight of each (N,), and the number of questions -> scalar.
    A question's answers are weighed by how many people gave them (BLIP, section 5.3)."""
    return torch.dot(weight, text_losses(logits, labels, smoothing)) / questions


# ------------------------------------------------------------------------------------------- a text's start and end


def ends(tokenizer: Any) -> tuple[int, int]:
    """The ids a text begins and ends with: [CLS] and [SEP], or whatever the tokenizer has in their place. Raises
    UserError when it has none."""
    start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    start = end if start is None else start
    if end is None:
        raise UserError(f"{type(tokenizer).__name__} has no token that ends a text, so nobody could tell when one is "
                        "finished: set tokenizer.sep_token or eos_token.")  # fmt: skip
    return start, end


def framed(ids: Tensor, inner: Tensor, start: int, end: int, pad: int) -> tuple[Tensor, Tensor]:
    """Ids (B, T), which of them are words and no special tokens (B, T) bool -> the words between start and end
    (B, 2+W), W of the longest, and their mask.

    >>> framed([[5, 6, 0], [7, 0, 0]], [[True, True, False], [True, False, False]], 1, 2, 0)
    [[1, 5, 6, 2], [1, 7, 2, 0]], [[1, 1, 1, 1], [1, 1, 1, 0]]
    """
    words = inner.sum(1, keepdim=True)  # (B, 1)
    order = (~inner).long().argsort(dim=1, stable=True)
    ids = F.pad(ids.gather(1, order)[:, : int(words.max())], (1, 1), value=pad)
    at = torch.arange(ids.shape[1], device=ids.device)
    ids = torch.where(at == words + 1, end, torch.where(at > words + 1, pad, ids))
    ids[:, 0] = start
    return ids, (at <= words + 1).long()


def plain(ids: Tensor, mask: Tensor, end: int) -> Tensor:
    """Which of (B, T) are words, bool: a row whose last token is `end` came with a first and a last one of its own."""
    length = mask.sum(1, keepdim=True)
    last = ids.gather(1, (length - 1).clamp(min=0))
    at = torch.arange(ids.shape[1], device=ids.device)
    return mask.bool() & ~((last == end) & ((at == 0) | (at == length - 1)))


def own_decoder(text: Embedder, layers: int, context: str, tokenizer: Any) -> Decoder:
    """A decoder for a model with this text part: it writes the words the model reads, or, beside a tower, words of its
    own, as many as the tower has."""
    start, end = ends(tokenizer)
    words = None
    if isinstance(text, TextStem):
        positions = text.tower.get("max_position_embeddings") or text.tower.get("n_positions") or 512
        words = Words(text.width, vocabulary=text.tower["vocab_size"], positions=positions, types=0,
                      pad=tokenizer.pad_token_id)  # fmt: skip
    return Decoder({"write": [READ] * layers}, context, () if words else ("words",), "", start, end, words)


READS = {"image": "the picture", "text": "the text", "both": "text and picture"}


def wanted_decoder(objectives: list[Objective], text: Embedder, tokenizer: Any) -> Decoder | None:
    """The decoder that these objectives ask for, for a composed model; None when none does. Raises UserError when they
    want it to read different things."""
    wanted = {o.name: o.decoder_for(text, tokenizer) for o in objectives if hasattr(o, "decoder_for")}
    asked = {name: decoder for name, decoder in wanted.items() if decoder is not None}
    if len({decoder.context for decoder in asked.values()}) > 1:
        raise UserError("one decoder cannot serve " + ", ".join(f"{name} (it reads {READS[decoder.context]})"
                        for name, decoder in asked.items()) + ": learn by one of them.")  # fmt: skip
    return max(asked.values(), key=lambda decoder: sum(map(len, dict(decoder.segments).values())), default=None)


def decoder_that_reads(model: VLModel, context: tuple[str, ...], who: str) -> TextDecoder:
    """Raises UserError when the model has no decoder, or one that reads something else."""
    if model.decoder is None or model.config.writes.context not in context:
        def writes(config: Any) -> bool:
            own = getattr(config, "writes", None)
            if own is None:  # transformers' own pair of encoder and decoder
                return "image" in context and getattr(config, "is_encoder_decoder", False)
            return own.context in context

        has = "none" if model.decoder is None else f"one that reads {READS[model.config.writes.context]}"
        wanted = " or ".join(READS[one] for one in context)
        raise UserError(f"{who} wants a decoder that reads {wanted}, and this model has {has}: choose a system with "
                        f"such a decoder.{systems_where(writes)}")  # fmt: skip
    return model.decoder


def read_for(model: VLModel, text: Half, image: Half | None) -> Half:
    """What a decoder that reads the text, or both, writes from: the halves (of a question, of the start of a text)
    through the rest of the model."""
    assert model.decoder is not None
    out = model.fuse(text, image)
    if model.config.writes.context == "both":
        return Half(*model.decoder.beside(out.text, text.mask, out.image, None if image is None else image.mask))
    return Half(out.text, text.mask)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- objectives


class LM(Objective):
    """Write the caption from the picture: the decoder's own loss. BLIP, section 3.2.

    Columns: image, caption. Hides: the words that are not yet written. Sees: a word the words up to itself and the
    whole picture. Head: the decoder's. Logs: lm (smoothed), lm_accuracy.

    `smoothing`: 0.1 as BLIP, wherever it scores words; 0 is plain cross-entropy. `prompt`: words before each caption
    that are given, not scored ("a picture of" in BLIP's fine-tuning). `decoder`: layers of the decoder that a composed
    model gets; a system has its own. The sum over words is divided by the words of the whole batch, over ranks and
    micro-batches. A caption that ITM swapped is not scored.
    """

    name = "lm"
    head = ""
    fused = True

    def __init__(self, smoothing: float = SMOOTHING, prompt: str = "", decoder: int = 2):
        if not 0 <= smoothing < 1:
            raise UserError(f"lm.smoothing is a share of the probability, from 0 to below 1; got {smoothing}.")
        if decoder < 1:
            raise UserError(f"lm.decoder, its number of layers, is at least 1; got {decoder}.")
        self.smoothing, self.prompt, self.layers = smoothing, prompt, decoder

    def decoder_for(self, text: Embedder, tokenizer: Any) -> Decoder:
        return own_decoder(text, self.layers, "image", tokenizer)

    def check(self, model: VLModel) -> None:
        decoder_that_reads(model, ("image",), "lm")

    def corrupt(self, part: Batch, rngs: list[np.random.Generator], processor) -> None:
        if "word_labels" in part:
            raise UserError("lm writes the whole sentence, and words of this pass's are hidden: give it a pass of its "
                            "own.")  # fmt: skip
        start, end = ends(processor.tokenizer)
        ids, words = part["text_ids"], part["text_words"]
        prompt = processor.tokenizer(self.prompt, add_special_tokens=False)["input_ids"] if self.prompt else []
        given = torch.tensor(prompt, dtype=ids.dtype).expand(len(ids), -1)
        ids, words = torch.cat([given, ids], 1), torch.cat([torch.zeros_like(given), words], 1)
        inner = words >= 0
        inner &= inner.cumsum(1) <= processor.max_length - 2  # the positions there are
        part["lm_ids"], part["lm_mask"] = framed(ids, inner, start, end, processor.tokenizer.pad_token_id)
        scored = part["text_real"] & part.get("matched", torch.ones(len(ids))).bool()
        part["lm_scored"] = part["lm_mask"].bool() & scored.unsqueeze(1)
        part["lm_scored"][:, : 1 + len(prompt)] = False

    def count(self, part: Batch, batch: Batch) -> Tensor:
        return part["lm_scored"].sum()

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        decoder, part, image = model.decoder, views.part, views.image()
        assert decoder is not None
        ids = with_ends(part["lm_ids"], part["lm_mask"], decoder)
        states = decoder.states(ids[:, :-1], image.states, image.mask)  # (B, T-1, D)
        asked, target = part["lm_scored"][:, 1:], ids[:, 1:]
        return words_scored(self.name, decoder.says(states[asked]), target[asked], views.total(self), self.smoothing)


def with_ends(ids: Tensor, mask: Tensor, decoder: TextDecoder) -> Tensor:
    """The decoder's own start and end in the place of the tokenizer's: BLIP begins with [DEC], not [CLS]."""
    ids = ids.scatter(1, mask.sum(1, keepdim=True) - 1, decoder.config.eos_token_id)
    ids[:, 0] = decoder.config.bos_token_id
    return ids


def words_scored(name: str, logits: Tensor, target: Tensor, total: Tensor, smoothing: float) -> Scored:
    """Logits (n, V) of the words asked about, (n,) -> their summed loss by `total`, and how many were right."""
    logits = logits.float()
    loss = F.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing) / total
    right = (logits.argmax(-1) == target).float().sum() / max(len(target), 1)
    return Scored(loss, {name: loss.detach(), f"{name}_accuracy": right})
