"""Which of two captions with the same words: matching against a row's own caption with two places exchanged."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from interlace.errors import UserError
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Scored, Views, mean


class Binding(Objective):
    """The true caption should match better than the same words with two things exchanged: what stands where cannot be
    read off a bag of words or a bag of picture cells. The pairs are those of Winoground (Thrush et al. 2022,
    arXiv:2204.03162); such captions as negatives in training: Yuksekgonul et al. 2023 (arXiv:2210.01936), section 4.

    Columns: image, caption, and the attribute `swapped`, as `interlace data scenes` writes it; rows without one are not
    scored. Hides: nothing. Sees: everyone sees everyone. Head: match.
    Logs: binding, binding_accuracy (share of rows whose true caption scores higher; 0.5 is chance).

    The loss is the mean of two: the cross-entropy of choosing between the two captions by the difference of their match
    logits, and ITM's own, match or not, of each. The first alone would leave the head's zero anywhere; the second alone
    spends its first hundreds of steps on where the zero is.
    """

    name = "binding"
    head = "match"

    def __init__(self, column: str = "swapped"):
        self.column = column

    def prepare(self, sample, row, index, draw, rng) -> None:
        if self.column not in row.attributes:
            raise UserError(f"the binding objective reads the column {self.column!r}, and this source has none: make "
                            "scenes with `interlace data scenes`, or name the column "
                            "(objectives.binding.column=...).")  # fmt: skip
        sample["texts"]["caption"] = row.caption
        sample["texts"]["swapped"] = str(row.attributes[self.column] or "")

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        rows = torch.arange(views.size, device=batch["group"].device)
        texts = views.text("caption").join(views.text("swapped"))
        out = model.fuse(texts, views.image().rows(torch.cat([rows, rows])))
        logits = model.heads["match"](out.pooled_text, out.pooled_image).float()  # (2B, 2)
        real = (batch["caption_real"] & batch["swapped_real"]).float()  # (B,)
        true, swapped = (logits[:, 1] - logits[:, 0]).chunk(2)  # (B,), (B,)
        chosen = F.softplus(swapped - true)
        matched = (F.softplus(-true) + F.softplus(swapped)) / 2
        loss = ((chosen + matched) / 2 * real).sum() / len(rows)  # by all rows: micro-batches average to the batch
        with torch.no_grad():
            logs = {"binding": loss.detach(), "binding_accuracy": mean((true > swapped).float(), real)}
        return Scored(loss, logs)
