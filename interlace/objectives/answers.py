"""Questions among the sentences of pre-training. Tan & Bansal 2019 (LXMERT, arXiv:1908.07490), section 3.1.3."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from interlace.errors import UserError
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Scored, Views


class AnswerQuestions(Objective):
    """Some sentences are questions about the picture, and the model answers them in the forward it has anyway.

    Columns: image, question, answers. Hides: nothing itself. Sees: everyone sees everyone. Head: answers. Logs:
    answers, answers_accuracy.

    `rate`: share of the visits of a picture with questions that read one instead of its caption. Of several answers one
    is drawn, in proportion to how many people gave it. A question that ITM swapped for another picture's sentence is
    not answered (section 3.1.3: mismatched pairs are left out).
    """

    name = "answers"
    head = "answers"
    fused = True
    stage = 0

    def __init__(self, answers: list[str] | None = None, min_count: int = 1, rate: float = 0.5):
        if not 0 < rate <= 1:
            raise UserError("answers.rate is the share of visits that read a question, above 0 and at most 1; "
                            f"got {rate}.")  # fmt: skip
        self.answers, self.min_count, self.rate = answers or [], min_count, rate
        self.index = {a: n for n, a in enumerate(self.answers)}

    def head_options(self) -> dict:
        return {"labels": len(self.answers)}

    def prepare(self, sample, row, index, draw, rng) -> None:
        label = -100
        if rng.random() < self.rate:
            for question in draw.questions_about(index, rng, 1):
                known = [(score, self.index[a]) for a, score in question.answers if a in self.index and score > 0]
                sample["part"]["text"], label = question.question, -100
                if len(known) > 1:  # one of several, as often as people gave it, as in the release
                    share = np.array([score for score, _ in known])
                    label = known[rng.choice(len(known), p=share / share.sum())][1]
                elif known:
                    label = known[0][1]
        sample["part"]["answer"] = torch.tensor(label)

    def corrupt(self, part: Batch, rngs: list[np.random.Generator], processor) -> None:
        if "matched" in part:
            part["answer"] = part["answer"].masked_fill(~part["matched"], -100)

    def count(self, part: Batch, batch: Batch) -> Tensor:
        return (part["answer"] >= 0).sum()

    def asks(self, part: Batch) -> tuple[bool | Tensor, bool | Tensor]:
        return False, False

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        out, label = views.fused(), views.part["answer"]
        logits = model.heads["answers"](out.pooled_text, out.pooled_image).float()  # (B, A)
        loss = F.cross_entropy(logits, label, ignore_index=-100, reduction="sum") / views.total(self)
        asked = label >= 0
        right = ((logits.argmax(-1) == label) & asked).float().sum() / asked.sum().clamp(min=1)
        return Scored(loss, {"answers": loss.detach(), "answers_accuracy": right})
