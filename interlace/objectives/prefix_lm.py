"""The rest of the text, from the picture and the words before it. Wang et al. 2021 (SimVLM, arXiv:2108.10904)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.decoder import Decoder, TextDecoder
from interlace.embed.base import Embedder
from interlace.embed.words import WordEmbedding
from interlace.errors import UserError
from interlace.heads import Tied
from interlace.layers import Kind, Width, build_layer
from interlace.model import Half, VLModel, VLOutput, _with_mask
from interlace.objectives.base import Batch, Objective, Scored, Views
from interlace.objectives.lm import ends, framed, own_decoder, read_for, words_scored
from interlace.objectives.mlm import word_head, word_logits, word_table
from interlace.streams import Streams, first_words, prefix


def read_and_write(model: VLModel, ids: Tensor, mask: Tensor | None, given: Tensor, image: Half | None) -> VLOutput:
    """One stack: words (B, T), mask (B, T), how many of each row are its prefix (B,), the image's half -> the states of
    both streams. The state of a word tells the word after it: it has seen the picture, the prefix and what came before.
    """
    see = prefix(mask, None if image is None else image.mask, first_words(given, ids.shape[1]))
    return model.fuse(model.half_text(ids, mask, see=see), image, see)


def next_words(ids: Tensor, mask: Tensor, given: Tensor) -> Tensor:
    """Words (B, T), mask (B, T), prefixes (B,) -> labels (B, T): at each place the word after it, if that is to be
    written; else -100. The last word of the prefix tells the first one."""
    scored = mask.bool() & ~first_words(given, ids.shape[1])
    return F.pad(ids.masked_fill(~scored, -100)[:, 1:], (0, 1), value=-100)


def read_prefix(model: VLModel, ids: Tensor, mask: Tensor, given: Tensor, image: Half | None) -> Half:
    """Encoder and decoder: the prefix (the first `given` (B,) of the words (B, T)) and the image's half through the
    model, where all see each other -> what the decoder reads. The other words are not there at all."""
    return read_for(model, model.half_text(ids, mask.bool() & first_words(given, ids.shape[1])), image)


def rest(decoder: TextDecoder, ids: Tensor, mask: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """The words after the prefix as the decoder meets them: its start and all but the last (B, T), and as labels
    (B, T), -100 = not scored.

    >>> rest(decoder, [[101, 7, 8, 9, 102]], [[1, 1, 1, 1, 1]], [2])      # 7 is given
    [[101, 8, 9, 102, 0]], [[8, 9, 102, -100, -100]]
    """
    length = ids.shape[1]
    at = torch.arange(length, device=ids.device) + given.unsqueeze(1)  # (B, T)
    real = (at < length) & mask.bool().gather(1, at.clamp(max=length - 1))
    words = ids.gather(1, at.clamp(max=length - 1))
    start, pad = decoder.config.bos_token_id, decoder.config.pad_token_id
    before = F.pad(words.masked_fill(~real, pad)[:, :-1], (1, 0), value=start)
    return before, words.masked_fill(~real, -100)


# ------------------------------------------------------------------------------------------- which models can write


def check_writes(model: VLModel, head: str = "mlm") -> None:
    """Raises UserError for a model whose states at a word know later words, or whose words never see the picture, or
    without a head `head` that says a word."""
    if not model.fuses:
        raise UserError("in late fusion no layer lets a word see the picture, so the model cannot write about it: "
                        "choose fusion mid or early.")  # fmt: skip
    if head not in model.heads:
        raise UserError(f"this model has no head {head!r} to say a word with: train it with prefix_lm, or give it the "
                        f"head {{{head!r}: {{'kind': 'tied', 'labels': vocabulary}}}}.")  # fmt: skip
    if isinstance(says := model.heads[head], Tied) and says.dense.out_features != (size := word_table(model).shape[1]):
        raise UserError(f"the words' vectors have {size} numbers and the head that is tied to them "
                        f"{says.dense.out_features}: give it `size: {size}`, or `kind: transformed`.")  # fmt: skip
    for kind in {kind for kinds in model.config.segments.values() for kind in kinds}:
        if not keeps_order(kind):
            raise UserError(f"a layer of kind {kind} tells the picture or earlier words about later ones, so the model "
                            "would learn to copy instead of to write. A kind that takes part reads words only through "
                            "the visibility it is given.")  # fmt: skip
    if not isinstance(model.text, WordEmbedding) and looks_ahead(model.text):
        spec: Any = model.config.text
        what = getattr(spec, "tower", {}).get("model_type", spec.name)
        raise UserError(f"the text part ({what}) looks at later words before it says anything of a word, so predicting "
                        "the next one from it would be copying. Take words without a tower, a tower that reads from "
                        "left to right (gpt2), or a decoder, which writes what the whole model has read.")  # fmt: skip


@cache
def keeps_order(kind: Kind) -> bool:
    """Whether a small layer of this kind, with random weights so that a gate which starts shut is open, gives the same
    states of earlier words and of the picture however the text goes on."""
    width, words, cells = Width(8, heads=2, dropout=0.0, attention_dropout=0.0), 4, 3
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        layer = build_layer(kind, width, width).eval()
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        text, image = torch.randn(1, words, 8), torch.randn(1, cells, 8)
        given = torch.tensor([[True, True, False, False]])
        long = layer(Streams(text, image), prefix(None, None, given))
        short = layer(Streams(text[:, :3], image), prefix(None, None, given[:, :3]))
    pairs = [(long.text[:, :3], short.text), (long.image, short.image)]
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-4) for a, b in pairs)


@torch.no_grad()
def looks_ahead(text: nn.Module) -> bool:
    """Whether what a text part says of three words depends on the fourth."""
    was = text.training
    text.eval()
    device = next(text.parameters()).device
    texts = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=device)
    states, _ = _with_mask(text(texts), None)
    one, other = states[:, :3].float()
    text.train(was)
    return not torch.allclose(one, other, atol=1e-3 * float(one.abs().max()))


# ------------------------------------------------------------------------------------------------- the objective


class PrefixLM(Objective):
    """Read the picture and the first words, write the rest. Wang et al. 2021, section 3.1; the only loss of SimVLM.

    Columns: image, caption. Hides: the words after the prefix, whose length is drawn for each row: 0 to all but one of
    the sentence's words, so that a word and the end remain. Sees: the picture itself alone, since through it later
    words would leak back; words of the prefix each other and the picture; a later word all of these and the words up to
    itself. Head: mlm, at scored places alone; the decoder's, where there is one. Logs: prefix_lm, prefix_lm_accuracy.

    Without a decoder the model's own layers write (`decoder: 0`), and its text part must not look ahead: words, or a
    tower such as GPT-2. With one that reads both streams, as in SimVLM, the model reads picture and prefix, each seeing
    all of the other, and the decoder writes; `decoder`: its layers in a composed model, a system has its own. `prefix`
    "none": nothing but the picture is given, plain language modelling, which the paper finds worse.

    The sum over words is divided by the words of the whole batch, over ranks and micro-batches: a short rest counts for
    as many words as it has. A sentence that ITM swapped is not scored.
    """

    name = "prefix_lm"
    head = "mlm"
    fused = True

    def __init__(self, prefix: str = "drawn", decoder: int = 0, smoothing: float = 0.0):
        if prefix not in ("drawn", "none"):
            raise UserError(f"prefix_lm.prefix is drawn or none; got {prefix!r}.")
        if decoder < 0:
            raise UserError(f"prefix_lm.decoder, its number of layers, is 0 (none) or more; got {decoder}.")
        if not 0 <= smoothing < 1:
            raise UserError(f"prefix_lm.smoothing is a share of the probability, from 0 to below 1; got {smoothing}.")
        self.prefix, self.layers, self.smoothing = prefix, decoder, smoothing
        if decoder:
            self.head = ""  # type: ignore[misc]

    def head_for(self, text: Embedder, image: Embedder) -> dict[str, Any]:
        return word_head(text)

    def decoder_for(self, text: Embedder, tokenizer: Any) -> Decoder | None:
        return own_decoder(text, self.layers, "both", tokenizer) if self.layers else None

    def check(self, model: VLModel) -> None:
        if not reads_both(model):
            if model.decoder is not None:
                raise UserError("this model has a decoder, and one that does not read both streams: it learns by lm or "
                                "vqa_writes, not by prefix_lm.")  # fmt: skip
            if self.layers:
                raise UserError("prefix_lm.decoder is set, but the model has no decoder that reads both streams: leave "
                                "it out, and the model's own layers write.")  # fmt: skip
            check_writes(model)

    def corrupt(self, part: Batch, rngs: list[np.random.Generator], processor) -> None:
        if "word_labels" in part:
            raise UserError("prefix_lm writes the whole sentence, and words of this pass's are hidden: give it a pass "
                            "of its own.")  # fmt: skip
        start, end = ends(processor.tokenizer)
        inner = part["text_words"] >= 0
        inner &= inner.cumsum(1) <= processor.max_length - 2  # the positions there are
        ids, mask = framed(part["text_ids"], inner, start, end, processor.tokenizer.pad_token_id)
        words = (mask.sum(1) - 2).tolist()  # of each sentence
        given = torch.tensor([1 + int(rng.integers(max(n, 1))) for n, rng in zip(words, rngs)])  # with the start
        given = torch.ones_like(given) if self.prefix == "none" else given
        scored = part["text_real"] & part.get("matched", torch.ones(len(ids))).bool()
        part["prefix_ids"], part["prefix_mask"] = ids, mask
        part["prefix_given"] = torch.where(scored, given, mask.sum(1))  # all of it: nothing is written

    def count(self, part: Batch, batch: Batch) -> Tensor:
        return (part["prefix_mask"].sum(1) - part["prefix_given"]).sum()

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        ids, mask, given = (views.part[f"prefix_{name}"] for name in ("ids", "mask", "given"))  # (B, T), (B, T), (B,)
        image = views.image() if views.plan is None or views.plan.image else None
        if reads_both(model):
            assert model.decoder is not None
            ids = ids.scatter(1, mask.sum(1, keepdim=True) - 1, model.decoder.config.eos_token_id)
            context = read_prefix(model, ids, mask, given, image)
            words, labels = rest(model.decoder, ids, mask, given)
            states = model.decoder.states(words, context.states, context.mask, first=given)  # (B, T, D)
            asked = labels >= 0
            logits = model.decoder.says(states[asked])
        else:
            labels = next_words(ids, mask, given)
            asked = labels >= 0
            states = read_and_write(model, ids, mask, given, image).text  # type: ignore[assignment]
            logits = word_logits(model, states[asked])  # (n, V)
        return words_scored(self.name, logits, labels[asked], views.total(self), self.smoothing)


def reads_both(model: VLModel) -> bool:
    """Whether a decoder writes from the states of words and picture; else the model's own layers write."""
    return model.decoder is not None and model.config.writes.context == "both"
