"""Image-text contrast."""

from __future__ import annotations

import torch
from torch import Tensor

from interlace.errors import UserError
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Scored, Views, cross_entropy_soft, mean
from interlace.objectives.whole import Cached, cached, gather


class ITC(Objective):
    """Each text finds its picture among the batch's, each picture its text. Radford et al. 2021 (CLIP), section 2.3;
    several positives a row as in BLIP's retrieval fine-tuning (arXiv:2201.12086).

    Columns: image, caption, group. Hides: nothing. Sees: each stream only itself. Head: contrast.
    Logs: itc, itc_accuracy (both directions, a positive on top), itc_chance (the loss of knowing nothing, ln(batch)
    when every row is a group of its own).

    Rows of one `group` are positives of each other, never negatives. The batch is the global one: vectors are gathered
    from all ranks with gradients, and under gradient accumulation the gradient is cached (whole.py), which gives that
    of the whole batch.
    """

    name = "itc"
    head = "contrast"
    only_vectors = True

    def __init__(self, size: int = 256, temperature: float = 0.07):
        self.size, self.temperature = size, checked_temperature(self.name, temperature)

    def head_options(self) -> dict:
        return {"size": self.size, "temperature": self.temperature}

    def check_batch(self, batch: int, micro: int, rows: int) -> None:
        at_least_two(self.name, batch)

    def prepare(self, sample, row, index, draw, rng) -> None:
        sample["texts"]["caption"] = row.caption

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        text, image, scale = views.vector("caption"), views.vector("image"), model.contrast.scale
        whole = views.whole(self)
        if whole is None:
            rows = gather(text, True), gather(image, True), gather(batch["group"]), gather(batch["caption_real"])
            return Scored(*contrast(*rows, scale))
        known: Cached = whole.settled
        return Scored(known.loss(whole.own, whole.shares, text, image, [scale]), logs(known.value, known.sums))

    def looks(self, parts: int) -> bool:
        return parts > 1

    def look(self, model: VLModel, batch: Batch, views: Views) -> dict[str, Tensor]:
        return {"image": views.vector("image"), "text": views.vector("caption"), "group": batch["group"],
                "real": batch["caption_real"]}  # fmt: skip

    def settle(self, model: VLModel, rows: dict[str, Tensor]) -> Cached:
        def share(of: slice, text: Tensor, image: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return contrast_rows(of, text, image, rows["group"], rows["real"], scale)

        return cached(share, rows["text"], rows["image"], [model.contrast.scale])


def contrast(text: Tensor, image: Tensor, group: Tensor, real: Tensor,
             scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """text, image (N, P) normalised; group (N,) int; real (N,) bool, False = no caption, in no sum -> loss, logs."""
    loss, sums = contrast_rows(slice(None), text, image, group, real, scale)
    return loss, logs(loss.detach(), sums)


def contrast_rows(of: slice, text: Tensor, image: Tensor, group: Tensor, real: Tensor,
                  scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The part of the loss that the texts and the pictures of the slice `of` give, looking for their partners among
    all N; and how many were right, of how many."""
    mine = real[of]  # (R,)
    together = (group[of, None] == group[None, :]) & mine[:, None] & real[None, :]  # (R, N)
    closed = ~(mine[:, None] & real[None, :])
    target = together / together.sum(-1, keepdim=True).clamp(min=1)
    count = real.sum().clamp(min=1)
    loss, right = torch.zeros((), device=text.device), torch.zeros((), device=text.device)
    for asked, found in ((text, image), (image, text)):
        with torch.autocast(text.device.type, enabled=False):
            logits = scale * asked[of] @ found.T  # (R, N)
        logits = logits.masked_fill(closed, -1e4)  # finite: a row without caption must not make NaN gradients
        loss = loss + (cross_entropy_soft(logits, target) * mine).sum() / (2 * count)
        with torch.no_grad():
            top = together.gather(1, logits.argmax(1, keepdim=True))[:, 0].float()
            right = right + mean(top, mine) * mine.sum() / 2
    return loss, {"right": right, "rows": mine.sum().float()}


def logs(loss: Tensor, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    count = sums["rows"].clamp(min=1)
    return {"itc": loss, "itc_accuracy": sums["right"] / count, "itc_chance": torch.log(count)}


def checked_temperature(name: str, temperature: float) -> float:
    """Raises UserError where the head's scale, which is kept between 1 and 100, could not start."""
    if not 0.01 <= temperature <= 1:
        raise UserError(f"{name}.temperature is where similarities' divisor starts, from 0.01 to 1; "
                        f"got {temperature}.")  # fmt: skip
    return temperature


def at_least_two(name: str, batch: int) -> None:
    if batch < 2:
        raise UserError(f"{name} tells the rows of a batch apart, and a batch of {batch} has nothing to tell: "
                        "set train.batch to 2 or more.")  # fmt: skip
