"""Visual question answering in words: answers are written, not chosen. BLIP (Li et al. 2022, arXiv:2201.12086), 5.3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from interlace.decoder import Decoder
from interlace.embed.base import Embedder
from interlace.errors import UserError
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Scored, Views
from interlace.objectives.lm import (
    SMOOTHING,
    answers_loss,
    decoder_that_reads,
    framed,
    own_decoder,
    plain,
    read_for,
)


class GenerativeVQA(Objective):
    """The question reads the picture, the decoder writes each answer from what it has read; its loss is weighed by how
    many people gave it.

    Columns: image, question, answers with weights. Hides: nothing. Sees: question and picture each other, as the
    schedule lets them; a word of an answer those before it. Head: the decoder's. Logs: vqa_writes, the smoothed loss of
    an answer's words, summed; vqa_writes_accuracy, the share of its words that are right after those before them.

    One question of the picture is drawn a visit, by (seed, epoch, row), and of its answers the `answers` heaviest, the
    weights divided by their sum. `smoothing` as in BLIP. `decoder`: layers of the decoder that a composed model gets,
    which reads both the question and the picture; BLIP's reads the question. Mean over all rows, those without a
    question counted as 0, so that micro-batches and ranks average to the whole.
    """

    name = "vqa_writes"

    def __init__(self, answers: int = 10, smoothing: float = SMOOTHING, decoder: int = 2):
        if answers < 1:
            raise UserError(f"vqa_writes.answers, how many a question is learnt with, is at least 1; got {answers}.")
        if decoder < 1:
            raise UserError(f"vqa_writes.decoder, its number of layers, is at least 1; got {decoder}.")
        self.answers, self.smoothing, self.layers = answers, smoothing, decoder
        self.by_words = tuple(f"written_answer{n}" for n in range(answers))

    def decoder_for(self, text: Embedder, tokenizer: Any) -> Decoder:
        return own_decoder(text, self.layers, "both", tokenizer)

    def check(self, model: VLModel) -> None:
        decoder_that_reads(model, ("text", "both"), self.name)

    def prepare(self, sample, row, index, draw, rng) -> None:
        drawn = draw.questions_about(index, rng, 1)
        answers = [pair for pair in (drawn[0].answers if drawn else []) if pair[1] > 0 and pair[0].strip()]
        answers = sorted(answers, key=lambda pair: -pair[1])[: self.answers]
        sample["texts"]["written_question"] = drawn[0].question if drawn else ""
        weight = torch.zeros(self.answers)
        for n in range(self.answers):
            sample["texts"][f"written_answer{n}"] = answers[n][0] if n < len(answers) else ""
            weight[n] = answers[n][1] if n < len(answers) else 0.0
        sample["written_weight"] = weight / weight.sum().clamp(min=1e-6)

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        decoder = model.decoder
        assert decoder is not None
        ids, mask = self.texts(batch)  # (B, answers, A)
        weight = batch["written_weight"] * batch["written_question_real"].unsqueeze(1) * mask[..., 0]  # (B, answers)
        context = read_for(model, views.text("written_question"), views.image())
        row, number = (weight > 0).nonzero(as_tuple=True)  # the answers there are, (N,) each
        if not len(row):  # a batch without questions: zero, with a gradient
            nothing = context.states.new_zeros(())
            return Scored(context.states.sum() * 0, {self.name: nothing, f"{self.name}_accuracy": nothing})
        ids, mask = ids[row, number], mask[row, number]
        start, end, pad = (getattr(decoder.config, f"{which}_token_id") for which in ("bos", "eos", "pad"))
        words, real = framed(ids, plain(ids, mask, end), start, end, pad)  # (N, 2+W)
        read = context.rows(row)
        logits = decoder(words, read.states, read.mask).logits.float()
        labels = words.masked_fill(real == 0, -100)
        loss = answers_loss(logits, labels, weight[row, number].to(logits), len(weight), self.smoothing)
        asked = labels[:, 1:] >= 0
        right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[asked].float().mean()
        return Scored(loss, {self.name: loss.detach(), f"{self.name}_accuracy": right})

    def texts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """All answers as ids and masks, (B, answers, A)."""
        given = [[batch[f"{name}_{what}"] for name in self.by_words] for what in ("ids", "mask")]
        longest = max(x.shape[1] for x in given[0])
        ids, mask = (torch.stack([F.pad(x, (0, longest - x.shape[1])) for x in xs], 1) for xs in given)
        return ids, mask
