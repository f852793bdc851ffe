"""Image-text matching."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from interlace.errors import UserError
from interlace.model import Half, VLModel
from interlace.objectives.base import Batch, Objective, Pairs, Scored, Views
from interlace.objectives.whole import PAIRS, Whole, world


class ITM(Objective):
    """Does this text belong to this picture? Two classes, 1 = match.

    Columns: image, caption, group. Hides: nothing. Sees: everyone sees everyone. Head: match.
    Logs: itm, itm_accuracy (balanced over the classes), itm_positive (share predicted a match; 0 or 1 is a collapse).

    `negatives`
      drawn  each row brings a caption of another group, drawn by (seed, epoch, row): a row's loss depends on that row
             alone, so neither accumulation nor the number of ranks changes it (Lu et al. 2019; Tan & Bansal 2019).
      hard   for each text a wrong picture of the batch and for each picture a wrong text, drawn in proportion to
             exp(contrast similarity) (BLIP, arXiv:2201.12086, section 3.2). Needs itc, itc_momentum or itc_sigmoid.
      both   the two together.
      swap   in the pass's shared forward: a share `rate` of the rows reads another group's caption instead of its own
             (a question about another's picture instead of one about its own), hidden words and all (LXMERT,
             VisualBERT, UNITER: 0.5). Costs no forward of its own.
    A negative never comes from the row's own group. A batch that has nothing but one group has no hard negatives and
    scores its positives alone.

    `among`, where the hard ones are looked for:
      micro  in the micro-batch of this rank. Costs nothing more, and the choice gets smaller under accumulation.
      batch  in all micro-batches of all ranks, as in BLIP's fine-tuning for COCO. The chosen texts and pictures are
             encoded again, the pictures read again: about twice the halves. The loss and its gradient are those of one
             process with the whole batch, but for dropout, which falls elsewhere on what is encoded a second time.
    Lots are drawn by (seed, epoch, row).

    `alike`, whose vectors say what is alike:
      online    the model's own, on both sides.
      momentum  the model's of the row, the slow copy's (itc_momentum) of what is found: BLIP's pre-training.
    """

    name = "itm"
    head = "match"
    stage = 1
    match: ClassVar[int] = 1  # the class that says "match"

    def __init__(self, negatives: str = "drawn", rate: float = 0.5, among: str = "micro", alike: str = "online"):
        if negatives not in ("drawn", "hard", "both", "swap"):
            raise UserError(f"{self.name}.negatives is drawn, hard, both or swap; got {negatives!r}.")
        if not 0 < rate < 1:
            raise UserError(f"{self.name}.rate is the share of swapped captions, above 0 and below 1; got {rate}.")
        if among not in ("micro", "batch"):
            raise UserError(f"{self.name}.among is micro or batch; got {among!r}.")
        if alike not in ("online", "momentum"):
            raise UserError(f"{self.name}.alike is online or momentum; got {alike!r}.")
        self.negatives, self.rate, self.among, self.alike = negatives, rate, among, alike
        self.fused = negatives == "swap"  # type: ignore[misc]  # of an instance: the other modes fuse rows of their own

    def check(self, model: VLModel) -> None:
        super().check(model)
        if self.negatives in ("hard", "both") and "contrast" not in model.heads:
            raise UserError(f"{self.name} with hard negatives ranks them by contrast similarity: add the itc objective "
                            f"(or itc_momentum, itc_sigmoid), or set objectives.{self.name}.negatives=drawn.")
        if self.mines_slowly and not any(o.name == "itc_momentum" for o, _ in getattr(model, "objectives", [])):
            raise UserError(f"{self.name}.alike=momentum compares with the vectors of the slow copy that itc_momentum "
                            f"keeps: add that objective, or leave {self.name}.alike at online.")  # fmt: skip

    @property
    def mines_slowly(self) -> bool:
        return self.negatives in ("hard", "both") and self.alike == "momentum"

    def check_batch(self, batch: int, micro: int, rows: int) -> None:
        looked = batch if self.among == "batch" else micro
        if self.negatives in ("hard", "both") and looked < 2:
            raise UserError(f"{self.name} looks for hard negatives among the {looked} row of a micro-batch: set "
                            f"objectives.{self.name}.among=batch, or lower train.accumulate.")  # fmt: skip

    def prepare(self, sample, row, index, draw, rng) -> None:
        if self.negatives == "swap":
            other = self.another(sample, row, draw, rng) if rng.random() < self.rate else ""
            sample["part"]["matched"] = torch.tensor(not other)
            if other:
                sample["part"]["text"] = other
            return
        sample["texts"]["caption"] = row.caption
        if self.negatives != "hard":
            sample["texts"]["other"] = draw.caption_of_another_group(row.group, rng)
        if self.negatives != "drawn":
            sample["part"]["lots"] = torch.tensor(rng.random(2), dtype=torch.float32)

    @staticmethod
    def another(sample, row, draw, rng) -> str:
        """A caption of another group, or where the row reads a question (LXMERT) a question about another group's
        picture: were wrong sentences all captions, a question would belong to its picture by its form alone."""
        if sample["part"].get("text", row.caption) != row.caption:
            return draw.question_about_another_group(row.group, rng)
        return draw.caption_of_another_group(row.group, rng)

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        if self.negatives == "swap":
            return self.swapped(model, batch, views)
        pairs = self.beside(model, batch, views)
        return self.score(model.heads[self.head](pairs.text, pairs.image).float(), pairs.target, pairs.weight)

    def asks(self, part: Batch) -> tuple[bool | Tensor, bool | Tensor]:
        return False, False

    def pairs(self, model: VLModel, batch: Batch, views: Views) -> Pairs | None:
        return None if self.negatives == "swap" else self.beside(model, batch, views)

    def swapped(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        """The pass's own rows, some of whose sentences were swapped."""
        out, real = views.fused(), views.part["text_real"]
        logits = model.heads[self.head](out.pooled_text, out.pooled_image).float()  # (B, 2)
        label = views.matched.long()
        target = label if self.match == 1 else 1 - label
        loss = (F.cross_entropy(logits, target, reduction="none") * real).sum() / len(real)
        return Scored(loss, self.logs(logits.detach(), label, real.float(), loss))

    def beside(self, model: VLModel, batch: Batch, views: Views) -> Pairs:
        """The true pairs, and wrong ones made of the same halves; target (N,), 1 = they belong together."""
        image, text, real = views.image(), views.text("caption"), batch["caption_real"]
        rows = torch.arange(views.size, device=real.device)
        texts, images, labels, weight = [text], [rows], [torch.ones_like(rows)], [real]
        if self.negatives != "hard":
            texts.append(views.text("other"))
            images.append(rows)
            labels.append(torch.zeros_like(rows))
            weight.append(real & batch["other_real"])
        whole = views.whole(self)
        if self.negatives != "drawn" and whole is not None:
            wrong_text, _, found = (chosen[whole.own] for chosen in whole.settled)
            texts += [text, self.text_of(model, whole.rows, wrong_text)]
            image = image.join(Views(model, whole.partners or {}).image())
            images += [rows + len(rows), rows]
            labels += [torch.zeros_like(rows)] * 2
            weight += [found & real] * 2
        elif self.negatives != "drawn":
            wrong_text, wrong_image, found = self.mine(model, batch, views)
            texts += [text, text.rows(wrong_text)]
            images += [wrong_image, rows]
            labels += [torch.zeros_like(rows)] * 2
            weight += [found & real] * 2
        joined = texts[0]
        for half in texts[1:]:
            joined = joined.join(half)
        out = model.fuse(joined, image.rows(torch.cat(images)), asked=model.asked_by(self.head))
        assert out.pooled_text is not None and out.pooled_image is not None
        label, scored = torch.cat(labels), torch.cat(weight).float()
        # each class weighs half, however many negatives there are to a positive: else "never a match" is a comfortable
        # answer. Of the rows there could have been, not of those that were: so the mean over micro-batches or ranks is
        # the mean over the whole batch
        share = torch.where(label == 1, len(labels) / 2, len(labels) / (2 * (len(labels) - 1)))
        return Pairs(out.pooled_text, out.pooled_image, label, scored * share, rows.repeat(len(labels)))

    def score(self, logits: Tensor, target: Tensor, weight: Tensor) -> Scored:
        """logits (N, 2), target (N,), weight (N,)"""
        kind = target if self.match == 1 else 1 - target
        loss = (F.cross_entropy(logits, kind, reduction="none") * weight).sum() / len(weight)
        return Scored(loss, self.logs(logits.detach(), target, weight, loss))

    def logs(self, logits: Tensor, label: Tensor, scored: Tensor, loss: Tensor) -> dict[str, Tensor]:
        said = (logits.argmax(-1) == self.match).long()
        right = (said == label).float() * scored
        positive, negative = label * scored, (1 - label) * scored
        balanced = ((right * label).sum() / positive.sum().clamp(min=1)
                    + (right * (1 - label)).sum() / negative.sum().clamp(min=1)) / 2  # fmt: skip
        share = (said * scored).sum() / scored.sum().clamp(min=1)  # of a half and half mix: 0.5 when all is right
        name = self.name
        return {name: loss.detach(), f"{name}_accuracy": balanced, f"{name}_positive": share}

    def mine(self, model: VLModel, batch: Batch, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        """Row -> a wrong text (B,), a wrong image (B,), and whether there is one at all (B,); among these rows."""
        with torch.no_grad():
            lots = views.part.get("lots")
            lots = torch.rand(views.size, 2, device=batch["group"].device) if lots is None else lots
            found = self.candidates(model, batch, views)
            return hard_negatives(slice(None), views.vector("caption"), views.vector("image"), batch["group"],
                                  batch["caption_real"], lots, model.contrast.scale, *found)  # fmt: skip

    def candidates(self, model: VLModel, batch: Batch, views: Views) -> tuple[Tensor, ...]:
        """What the slow copy says of these rows' texts and images, (B, P) each, where it is asked; else nothing."""
        if not self.mines_slowly:
            return ()
        if not model.beside:  # before the first step, when the slow copy would be the model itself
            return ()
        objective: Any = next(o for o, _ in model.objectives if o.name == "itc_momentum")  # type: ignore[union-attr]
        whole = views.whole(objective)
        if whole is not None:  # it looked at these rows already
            return whole.rows["text"][whole.own], whole.rows["image"][whole.own]
        slowly = Views(objective.slow(model).model, batch)
        return slowly.vector("caption"), slowly.vector("image")

    # ------------------------------------------------------------------------------------------ among the whole batch

    def looks(self, parts: int) -> bool:
        return self.among == "batch" and self.negatives in ("hard", "both") and (parts > 1 or world() > 1)

    def look(self, model: VLModel, batch: Batch, views: Views) -> dict[str, Tensor]:
        names = ("caption_ids", "caption_states", "caption_mask")
        words: dict[str, Tensor] = {name: batch[name] for name in names if name in batch}
        slow = dict(zip(("slow_text", "slow_image"), self.candidates(model, batch, views)))
        return {"image": views.vector("image"), "text": views.vector("caption"), "group": batch["group"], **slow,
                "real": batch["caption_real"], "lots": views.part["lots"], "item": batch["item"], **words}  # fmt: skip

    @torch.no_grad()
    def settle(self, model: VLModel, rows: dict[str, Tensor]) -> tuple[Tensor, ...]:
        n = len(rows["group"])
        blocks = [slice(at, at + max(1, PAIRS // n)) for at in range(0, n, max(1, PAIRS // n))]
        slow = [rows[name] for name in ("slow_text", "slow_image") if name in rows]
        chosen = [hard_negatives(of, rows["text"], rows["image"], rows["group"], rows["real"], rows["lots"],
                                 model.contrast.scale, *slow) for of in blocks]  # fmt: skip
        return tuple(torch.cat(column) for column in zip(*chosen))

    def wants(self, whole: Whole) -> Tensor:
        return whole.settled[1][whole.own]

    def text_of(self, model: VLModel, rows: dict[str, Tensor], which: Tensor) -> Half:
        """The texts of rows of the whole batch, encoded here."""
        return Views(model, {key: x[which] for key, x in rows.items() if key.startswith("caption_")}).text("caption")


def hard_negatives(of: slice, text: Tensor, image: Tensor, group: Tensor, real: Tensor, lots: Tensor, scale: Tensor,
                   texts: Tensor | None = None,
                   images: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """text, image (N, P), group, real (N,), lots (N, 2) from 0 to below 1. For the R rows of the slice `of`: the number
    of a wrong text (R,), of a wrong image (R,), and whether there is one at all (R,) bool. `texts`, `images` (N, P):
    other vectors of the same rows, to be found instead."""
    texts, images = text if texts is None else texts, image if images is None else images
    wrong = group[of, None] != group[None, :]  # (R, N)
    with torch.autocast(text.device.type, enabled=False):
        to_image = (torch.softmax(scale * text[of] @ images.T, 1) + 1e-8) * wrong
        to_text = (torch.softmax(scale * image[of] @ texts.T, 1) + 1e-8) * wrong * real[None, :]
    found = wrong.any(1) & (wrong & real[None, :]).any(1)
    # a row that has no negative still needs a distribution to draw from; `found` takes it out of the loss
    to_image, to_text = to_image + (~found)[:, None], to_text + (~found)[:, None]
    return chosen_by(lots[of, 0], to_text), chosen_by(lots[of, 1], to_image), found


def chosen_by(lot: Tensor, share: Tensor) -> Tensor:
    """lot (R,) from 0 to below 1, share (R, N) not negative -> (R,) columns, each as often as its share says."""
    upto = share.cumsum(1)
    everything = upto[:, -1:]
    # strictly below the sum, rounded or not: so a share of zero is never chosen
    at = torch.minimum(lot[:, None] * everything, everything * (1 - 1e-6))
    return torch.searchsorted(upto, at, right=True)[:, 0]
