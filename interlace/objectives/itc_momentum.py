"""Image-text contrast against a queue, by a slow copy of the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.errors import UserError
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Scored, Views, cross_entropy_soft, mean
from interlace.objectives.itc import checked_temperature
from interlace.objectives.momentum import Momentum, check_queue
from interlace.objectives.whole import Whole, gather, world


class MomentumITC(Objective):
    """Each text finds its picture among the batch's and a queue of earlier ones, all encoded by a slow copy of the
    model; the target is the true partner, 1 - `alpha`, and what the slow pair itself finds similar, `alpha`. ALBEF (Li
    et al. 2021, arXiv:2107.07651), section 3.3; BLIP (arXiv:2201.12086), section 3.2; the queue is MoCo's.

    Columns: image, caption, group. Hides: nothing. Sees: each stream only itself. Head: contrast.
    Logs: itc_momentum, itc_momentum_accuracy (both directions, a positive on top), itc_momentum_chance (the loss of
    knowing nothing, ln(candidates); the least possible is not zero, for the target is soft).

    `momentum`  of the slow copy, which moves once per optimiser step, before its vectors are taken.
    `queue`     vectors kept; a multiple of the batch over all ranks, and no more than the training split has rows.
                0: as many as that allows, 57,600 at most, the papers' number.
    `alpha`     the soft target's weight, after `ramp` epochs of rising from 0 (the papers: 0.4, after 1 when
                fine-tuning).

    Rows of one `group`, in the batch or the queue, are positives of each other, never negatives, as in BLIP's retrieval
    fine-tuning. All candidates are constants, so a row's loss depends on no other row's gradient: under accumulation,
    the slow vectors of all micro-batches come from one slow copy, before the first of them is learned from, and the
    queue turns once per optimiser step. Unlike the releases, the batch's candidates are those of all ranks.
    """

    name = "itc_momentum"
    head = "contrast"

    def __init__(self, size: int = 256, temperature: float = 0.07, momentum: float = 0.995, queue: int = 0,
                 alpha: float = 0.4, ramp: float = 1.0):  # fmt: skip
        if not 0 <= momentum < 1:
            raise UserError(f"{self.name}.momentum is how much of itself the slow copy keeps in a step, from 0 to "
                            f"below 1; got {momentum}.")  # fmt: skip
        if not 0 <= alpha <= 1:
            raise UserError(f"{self.name}.alpha is the soft target's weight, from 0 to 1; got {alpha}.")
        if queue < 0 or ramp < 0:
            raise UserError(f"{self.name}.queue and .ramp are not below 0; got {queue} and {ramp}.")
        self.size, self.temperature = size, checked_temperature(self.name, temperature)
        self.momentum, self.queue, self.alpha, self.ramp = momentum, queue, alpha, ramp

    def head_options(self) -> dict:
        return {"size": self.size, "temperature": self.temperature}

    def check_batch(self, batch: int, micro: int, rows: int) -> None:
        check_queue(f"{self.name}.queue", self.queue, batch)
        if self.queue > rows:
            raise UserError(f"{self.name}.queue of {self.queue} would hold the {rows} rows of the training split more "
                            f"than once: set it to {rows // batch * batch} or less, or to 0.")  # fmt: skip

    def prepare(self, sample, row, index, draw, rng) -> None:
        sample["texts"]["caption"] = row.caption

    # --------------------------------------------------------------------------------------------- from step to step

    def attach(self, model: VLModel, batch: int, rows: int) -> nn.Module:
        self.check_batch(batch, batch, rows)
        return Slow(model, self.queue or min(57600, rows) // batch * batch, self.momentum)

    def slow(self, model: VLModel) -> Slow:
        beside = getattr(model, "beside", {})
        if self not in beside:
            raise UserError(f"{self.name} keeps a slow copy of the model: before the first step, call "
                            "learner.attach(batch, rows).")  # fmt: skip
        return beside[self]

    def before_step(self, model: VLModel, epoch: float) -> None:
        slow = self.slow(model)
        slow.seen = {}
        slow.follow(model)
        slow.alpha = self.alpha * min(1.0, epoch / self.ramp) if self.ramp else self.alpha

    def after_step(self, model: VLModel) -> None:
        slow = self.slow(model)
        if slow.seen:  # another pass may have been drawn
            slow.push(slow.seen["text"], slow.seen["image"], slow.seen["group"], slow.seen["real"])
        slow.seen = {}

    # ------------------------------------------------------------------------------------------------- in every step

    def looks(self, parts: int) -> bool:
        return True

    @torch.no_grad()
    def look(self, model: VLModel, batch: Batch, views: Views) -> dict[str, Tensor]:
        slowly = Views(self.slow(model).model, batch)
        return {"text": slowly.vector("caption"), "image": slowly.vector("image"), "group": batch["group"],
                "real": batch["caption_real"]}  # fmt: skip

    def settle(self, model: VLModel, rows: dict[str, Tensor]) -> None:
        self.slow(model).seen = rows

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        whole = views.whole(self)
        if whole is None:  # a loop of one's own, without `look_ahead`
            rows = {name: gather(x) for name, x in self.look(model, batch, views).items()}
            first = 0 if world() == 1 else torch.distributed.get_rank() * views.size
            whole = Whole(rows, torch.arange(first, first + views.size, device=batch["group"].device), world())
            self.settle(model, rows)
        slow, rows, own = self.slow(model), whole.rows, whole.own
        texts, images = torch.cat([rows["text"], slow.text.T]), torch.cat([rows["image"], slow.image.T])  # (C, P)
        group, real = torch.cat([rows["group"], slow.group]), torch.cat([rows["real"], slow.real])  # (C,)
        mine = batch["caption_real"]  # (B,)
        together = (batch["group"][:, None] == group[None, :]) & mine[:, None] & real[None, :]  # (B, C)
        closed = ~(mine[:, None] & real[None, :])
        hard = together / together.sum(1, keepdim=True).clamp(min=1)
        count, scale = rows["real"].sum().clamp(min=1), model.contrast.scale
        loss, right = torch.zeros_like(scale), []
        for asked, slowly, found in ((views.vector("caption"), rows["text"][own], images),
                                     (views.vector("image"), rows["image"][own], texts)):  # fmt: skip
            with torch.autocast(found.device.type, enabled=False):
                logits = (scale * asked @ found.T).masked_fill(closed, -1e4)  # (B, C)
                soft = F.softmax((scale.detach() * slowly @ found.T).masked_fill(closed, -1e4), 1)
            target = slow.alpha * soft + (1 - slow.alpha) * hard
            loss = loss + (cross_entropy_soft(logits, target) * mine).sum() / 2
            with torch.no_grad():
                right.append(mean(together.gather(1, logits.argmax(1, keepdim=True))[:, 0].float(), mine))
        loss = loss * whole.shares / count
        return Scored(loss, {self.name: loss.detach(), f"{self.name}_accuracy": (right[0] + right[1]) / 2,
                             f"{self.name}_chance": real.sum().float().log()})  # fmt: skip


class Slow(Momentum):
    """The slow copy and the queues, and what the present step adds to them."""

    def __init__(self, model: VLModel, queue: int, decay: float):
        super().__init__(model, queue, decay)
        self.seen: dict[str, Tensor] = {}  # of all rows of the step
        self.alpha = 0.0
