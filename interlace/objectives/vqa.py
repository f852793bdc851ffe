"""Visual question answering over a closed list of answers."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Scored, Views


class VQA(Objective):
    """Choose the answer from a list. Binary cross-entropy against soft scores, summed over the answers, mean over the
    rows: as UNITER, LXMERT and ViLT fine-tune VQAv2 (BCE mean times the number of answers).

    Columns: image, question, answers with weights. Hides: nothing. Sees: everyone sees everyone. Head: answers.
    Logs: vqa, vqa_accuracy (the soft score of the answer on top).

    One question of the picture is drawn a visit, by (seed, epoch, row). Answers outside the list are dropped; a
    question none of whose answers is in the list is not scored.
    """

    name = "vqa"
    head = "answers"

    def __init__(self, answers: list[str] | None = None, min_count: int = 1):
        self.answers, self.min_count = answers or [], min_count
        self.index = {a: n for n, a in enumerate(self.answers)}

    def head_options(self) -> dict:
        return {"labels": len(self.answers)}

    def prepare(self, sample, row, index, draw, rng) -> None:
        question = draw.question_about(index, rng)
        sample["texts"]["question"] = question.question if question else ""
        target = np.zeros(len(self.answers), np.float32)
        for answer, score in question.answers if question else []:
            if answer in self.index:
                target[self.index[answer]] = max(score, target[self.index[answer]])
        sample["answer_scores"] = torch.from_numpy(target)

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        out = model.fuse(views.text("question"), views.image())
        logits = model.heads["answers"](out.pooled_text, out.pooled_image).float()  # (B, A)
        target = batch["answer_scores"].to(logits)
        asked = batch["question_real"] & (target > 0).any(-1)
        per_row = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
        loss = (per_row * asked).sum() / len(asked)  # by all rows, so that micro-batches and ranks average to the whole
        with torch.no_grad():
            score = target.gather(1, logits.argmax(-1, keepdim=True))[:, 0]
            logs = {"vqa": loss.detach(), "vqa_accuracy": (score * asked).sum() / asked.sum().clamp(min=1)}
        return Scored(loss, logs)
