"""Visual question answering over a closed list of answers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from interlace.errors import UserError
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Pairs, Scored, Views, mean


class VQA(Objective):
    """Choose the answer from a list. Binary cross-entropy against soft scores, summed over the answers, mean over the
    rows: as UNITER, LXMERT and ViLT fine-tune VQAv2 (BCE mean times the number of answers).

    Columns: image, question, answers with weights. Hides: nothing. Sees: everyone sees everyone. Head: answers.
    Logs: vqa, vqa_accuracy (the soft score of the answer on top).

    `questions` of the picture are drawn a visit, by (seed, epoch, row): the picture is encoded once for all of them.
    Answers outside the list are dropped; a question none of whose answers is in the list is not scored.
    """

    name = "vqa"
    head = "answers"

    def __init__(self, answers: list[str] | None = None, min_count: int = 1, questions: int = 1):
        if questions < 1:
            raise UserError("vqa.questions, how many are asked about a picture a visit, is at least 1; "
                            f"got {questions}.")  # fmt: skip
        self.answers, self.min_count, self.questions = answers or [], min_count, questions
        self.index = {a: n for n, a in enumerate(self.answers)}

    def head_options(self) -> dict:
        return {"labels": len(self.answers)}

    def texts(self) -> list[str]:
        """Names of its texts in a sample: "question", "question1", ..."""
        return ["question", *(f"question{n}" for n in range(1, self.questions))]

    def prepare(self, sample, row, index, draw, rng) -> None:
        target = np.zeros((self.questions, len(self.answers)), np.float32)
        drawn = draw.questions_about(index, rng, self.questions)
        for n, name in enumerate(self.texts()):
            question = drawn[n] if n < len(drawn) else None
            sample["texts"][name] = question.question if question else ""
            for answer, score in question.answers if question else []:
                if answer in self.index:
                    target[n, self.index[answer]] = max(score, target[n, self.index[answer]])
        sample["answer_scores"] = torch.from_numpy(target)

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        pairs = self.pairs(model, batch, views)
        return self.score(model.heads[self.head](pairs.text, pairs.image).float(), pairs.target, pairs.weight)

    def pairs(self, model: VLModel, batch: Batch, views: Views) -> Pairs:
        """Of each question and its picture; target (N, A) scores of the answers."""
        target = batch["answer_scores"]  # (B, questions, A), or (B, A) when there is one
        target = target if target.ndim == 3 else target.unsqueeze(1)
        names = self.texts()[: target.shape[1]]
        words, rows = views.text(names[0]), torch.arange(len(target), device=target.device).repeat(len(names))
        for name in names[1:]:
            words = words.join(views.text(name))
        image = views.image() if len(names) == 1 else views.image().rows(rows)
        out = model.fuse(words, image, asked=model.asked_by(self.head))
        assert out.pooled_text is not None and out.pooled_image is not None
        scores = target.transpose(0, 1).flatten(0, 1)  # (questions * B, A)
        real = torch.cat([batch[f"{name}_real"] for name in names])
        return Pairs(out.pooled_text, out.pooled_image, scores, (real & (scores > 0).any(-1)).float(), rows)

    def score(self, logits: Tensor, target: Tensor, weight: Tensor) -> Scored:
        target = target.to(logits)
        per_row = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
        loss = (per_row * weight).sum() / len(weight)  # by all rows: micro-batches average to the whole
        with torch.no_grad():
            right = target.gather(1, logits.argmax(-1, keepdim=True))[:, 0]
            logs = {"vqa": loss.detach(), "vqa_accuracy": mean(right, weight)}
        return Scored(loss, logs)
