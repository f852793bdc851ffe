"""Which of two captions with the same words: matching against a row's own caption with two places exchanged."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.nn import functional as F

from interlace.data.processor import Augment
from interlace.errors import UserError
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Scored, Views, mean

BETWEEN = re.compile(r",? and |[,;.] ?")  # clauses of a caption


class Binding(Objective):
    """The true caption should match better than the same words with two things exchanged: what stands where cannot be
    read off a bag of words or a bag of picture cells. The pairs are those of Winoground (Thrush et al. 2022,
    arXiv:2204.03162); such captions as negatives in training: Yuksekgonul et al. 2023 (arXiv:2210.01936), section 4.

    clauses: share of the visits that read one clause of each caption instead of the whole, one that is true of the
    picture and one that is not. It is the smaller lesson, and what a model learns first (a curriculum: Bengio et al.
    2009); a caption that is all one clause stays as it is.

    Columns: image, caption, and the attribute `swapped`, as `interlace data scenes` writes it; rows without one are not
    scored. Hides: nothing. Sees: everyone sees everyone. Head: match.
    Logs: binding, binding_accuracy (share of rows whose true caption scores higher; 0.5 is chance).

    The loss is the mean of two: the cross-entropy of choosing between the two captions by the difference of their match
    logits, and ITM's own, match or not, of each. The first alone would leave the head's zero anywhere; the second alone
    spends its first hundreds of steps on where the zero is.
    """

    name = "binding"
    head = "match"

    def __init__(self, column: str = "swapped", clauses: float = 0.0):
        if not 0 <= clauses <= 1:
            raise UserError(f"objectives.binding.clauses is a share of the visits, 0 to 1; got {clauses}.")
        self.column, self.clauses = column, clauses
        self.text = "clause" if clauses else "caption"  # the caption's half may serve other objectives too

    def check_augment(self, augment: Augment) -> None:
        if augment.flip or augment.smallest_crop < 1:
            raise UserError("binding asks what stands where, and training pictures are mirrored (augment.flip) or "
                            "cropped (augment.smallest_crop), so that their captions are no longer true: set "
                            "augment.flip=false augment.smallest_crop=1.")  # fmt: skip

    def head_options(self) -> dict[str, Any]:
        # what is dropped is not the same for both captions, and at first they differ by less than that
        return {"dropout": 0.0}

    def prepare(self, sample, row, index, draw, rng) -> None:
        if self.column not in row.attributes:
            raise UserError(f"the binding objective reads the column {self.column!r}, and this source has none: make "
                            "scenes with `interlace data scenes`, or name the column "
                            "(objectives.binding.column=...).")  # fmt: skip
        true, swapped = row.caption, str(row.attributes[self.column] or "")
        if self.clauses and rng.random() < self.clauses:
            true, swapped = one_clause(true, swapped, rng)
        sample["texts"][self.text], sample["texts"]["swapped"] = true, swapped

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        rows = torch.arange(views.size, device=batch["group"].device)
        texts = views.text(self.text).join(views.text("swapped"))
        out = model.fuse(texts, views.image().rows(torch.cat([rows, rows])), asked=model.asked_by("match"))
        logits = model.heads["match"](out.pooled_text, out.pooled_image).float()  # (2B, 2)
        real = (batch[f"{self.text}_real"] & batch["swapped_real"]).float()  # (B,)
        true, swapped = (logits[:, 1] - logits[:, 0]).chunk(2)  # (B,), (B,)
        chosen = F.softplus(swapped - true)
        matched = (F.softplus(-true) + F.softplus(swapped)) / 2
        loss = ((chosen + matched) / 2 * real).sum() / len(rows)  # by all rows: micro-batches average to the batch
        with torch.no_grad():
            logs = {"binding": loss.detach(), "binding_accuracy": mean((true > swapped).float(), real)}
        return Scored(loss, logs)


def one_clause(true: str, swapped: str, rng: Any) -> tuple[str, str]:
    """A clause that only the true caption has, and one that only the other has: "a chair at the top left", "a lamp at
    the top left". The captions themselves where they do not fall into clauses that differ."""
    ours, others = (set(BETWEEN.split(text)) for text in (true, swapped))
    mine, theirs = sorted(ours - others), sorted(others - ours)
    if not (mine and theirs):
        return true, swapped
    return mine[int(rng.integers(len(mine)))], theirs[int(rng.integers(len(theirs)))]
