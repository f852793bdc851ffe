"""Image-text matching."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from interlace.errors import UserError
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Scored, Views


class ITM(Objective):
    """Does this text belong to this picture? Two classes, 1 = match.

    Columns: image, caption, group. Hides: nothing. Sees: everyone sees everyone. Head: match.
    Logs: itm, itm_accuracy (balanced over the classes), itm_positive (share predicted a match; 0 or 1 is a collapse).

    `negatives`
      drawn  each row brings a caption of another group, drawn by (seed, epoch, row): a row's loss depends on that row
             alone, so neither accumulation nor the number of ranks changes it (Lu et al. 2019; Tan & Bansal 2019).
      hard   for each text a wrong picture of the batch and for each picture a wrong text, drawn in proportion to
             exp(contrast similarity) (BLIP, arXiv:2201.12086, section 3.2). Needs itc; drawn within the micro-batch.
      both   the two together.
    A negative never comes from the row's own group. A batch that has nothing but one group has no hard negatives and
    scores its positives alone.
    """

    name = "itm"
    head = "match"

    def __init__(self, negatives: str = "drawn"):
        if negatives not in ("drawn", "hard", "both"):
            raise UserError(f"itm.negatives is drawn, hard or both; got {negatives!r}.")
        self.negatives = negatives

    def check(self, model: VLModel) -> None:
        super().check(model)
        if self.negatives != "drawn" and "contrast" not in model.heads:
            raise UserError("itm with hard negatives ranks them by contrast similarity: add the itc objective, or set "
                            "objectives.itm.negatives=drawn.")  # fmt: skip

    def prepare(self, sample, row, index, draw, rng) -> None:
        sample["texts"]["caption"] = row.caption
        if self.negatives != "hard":
            sample["texts"]["other"] = draw.caption_of_another_group(row.group, rng)

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        image, text, real = views.image(), views.text("caption"), batch["caption_real"]
        rows = torch.arange(views.size, device=real.device)
        texts, images, labels, weight = [text], [rows], [torch.ones_like(rows)], [real]
        if self.negatives != "hard":
            texts.append(views.text("other"))
            images.append(rows)
            labels.append(torch.zeros_like(rows))
            weight.append(real & batch["other_real"])
        if self.negatives != "drawn":
            wrong_text, wrong_image, found = self.mine(model, batch, views)
            texts += [text, text.rows(wrong_text)]
            images += [wrong_image, rows]
            labels += [torch.zeros_like(rows)] * 2
            weight += [found & real] * 2
        joined = texts[0]
        for half in texts[1:]:
            joined = joined.join(half)
        out = model.fuse(joined, image.rows(torch.cat(images)))
        logits = model.heads["match"](out.pooled_text, out.pooled_image).float()  # (2..4 B, 2)
        label, scored = torch.cat(labels), torch.cat(weight).float()
        # each class weighs half, however many negatives there are to a positive: else "never a match" is a comfortable
        # answer. Divided by the rows there could have been, not by those that were: so the mean over micro-batches or
        # ranks is the mean over the whole batch
        scored = scored * torch.where(label == 1, 1.0, 1.0 / (len(labels) - 1))
        loss = (F.cross_entropy(logits, label, reduction="none") * scored).sum() / (2 * len(rows))
        return Scored(loss, self.logs(logits.detach(), label, scored, loss))

    @staticmethod
    def logs(logits: Tensor, label: Tensor, scored: Tensor, loss: Tensor) -> dict[str, Tensor]:
        said = logits.argmax(-1)
        right = (said == label).float() * scored
        positive, negative = label * scored, (1 - label) * scored
        balanced = ((right * label).sum() / positive.sum().clamp(min=1)
                    + (right * (1 - label)).sum() / negative.sum().clamp(min=1)) / 2  # fmt: skip
        share = (said * scored).sum() / scored.sum().clamp(min=1)  # of a half and half mix: 0.5 when all is right
        return {"itm": loss.detach(), "itm_accuracy": balanced, "itm_positive": share}

    def mine(self, model: VLModel, batch: Batch, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        """Row -> a wrong text (B,), a wrong image (B,), and whether there is one at all (B,)."""
        with torch.no_grad():
            sim = model.contrast.scale * views.vector("caption") @ views.vector("image").T  # (B text, B image)
            group, real = batch["group"], batch["caption_real"]
            wrong = group[:, None] != group[None, :]
            to_image = torch.softmax(sim, 1) * wrong + 1e-8 * wrong
            to_text = (torch.softmax(sim.T, 1) + 1e-8) * wrong * real[None, :]
            found = wrong.any(1) & (wrong & real[None, :]).any(1)
            # a row that has no negative still needs a distribution to draw from; `found` takes it out of the loss
            to_image, to_text = to_image + (~found)[:, None], to_text + (~found)[:, None]
            return torch.multinomial(to_text, 1)[:, 0], torch.multinomial(to_image, 1)[:, 0], found
