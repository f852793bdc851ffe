"""Image-text contrast."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Scored, Views, cross_entropy_soft, mean


class ITC(Objective):
    """Each text finds its picture among the batch's, each picture its text. Radford et al. 2021 (CLIP), section 2.3;
    several positives a row as in BLIP's retrieval fine-tuning (arXiv:2201.12086).

    Columns: image, caption, group. Hides: nothing. Sees: each stream only itself. Head: contrast.
    Logs: itc, itc_accuracy (both directions, a positive on top), itc_chance (the loss of knowing nothing, ln(batch)
    when every row is a group of its own).

    Rows of one `group` are positives of each other, never negatives. The batch is the global one: vectors are gathered
    from all ranks with gradients, and under gradient accumulation the other micro-batches stand in as constants, which
    gives the gradient of the whole batch (the sum over micro-batches of the derivative by that micro-batch's vectors).
    """

    name = "itc"
    head = "contrast"

    def __init__(self, size: int = 256, temperature: float = 0.07):
        self.size, self.temperature = size, temperature

    def head_options(self) -> dict:
        return {"size": self.size, "temperature": self.temperature}

    def prepare(self, sample, row, index, draw, rng) -> None:
        sample["texts"]["caption"] = row.caption

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        text, image, group = views.vector("caption"), views.vector("image"), batch["group"]
        real = batch["caption_real"]
        parts, scale = 1, model.contrast.scale
        if views.others is not None:
            parts = views.others.parts
            scale = scale / parts + scale.detach() * (1 - 1 / parts)  # it is differentiated once per micro-batch
        text, image, group, real = gather(text, True), gather(image, True), gather(group), gather(real)
        if views.others is not None:
            text, image = torch.cat([text, views.others.text]), torch.cat([image, views.others.image])
            group, real = torch.cat([group, views.others.group]), torch.cat([real, views.others.real])
        loss, logs = contrast(text, image, group, real, scale)
        if parts > 1:  # the trainer will divide by the number of micro-batches, but each gives only its own derivative
            loss = loss * parts - (loss * (parts - 1)).detach()
        return Scored(loss, logs)


def contrast(text: Tensor, image: Tensor, group: Tensor, real: Tensor,
             scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """text, image (N, P) normalised; group (N,) int; real (N,) bool, False = no caption, in no sum -> loss, logs."""
    logits = scale * text @ image.T  # (N, N)
    together = (group[:, None] == group[None, :]) & real[:, None] & real[None, :]
    closed = ~(real[:, None] & real[None, :])
    logits = logits.masked_fill(closed, -1e4)  # finite: a row without caption must not make NaN gradients
    target = together / together.sum(-1, keepdim=True).clamp(min=1)  # (N, N)
    count = real.sum().clamp(min=1)
    # the target is symmetric in support
    by_text, by_image = cross_entropy_soft(logits, target), cross_entropy_soft(logits.T, target)
    loss = ((by_text * real).sum() + (by_image * real).sum()) / (2 * count)
    with torch.no_grad():
        top_t = together.gather(1, logits.argmax(1, keepdim=True))[:, 0].float()
        top_i = together.gather(1, logits.argmax(0)[:, None])[:, 0].float()
        logs = {
            "itc": loss.detach(),
            "itc_accuracy": (mean(top_t, real) + mean(top_i, real)) / 2,
            "itc_chance": torch.log(count.float()),
        }
    return loss, logs


def gather(x: Tensor, with_gradient: bool = False) -> Tensor:
    """(B, ...) of every rank -> (W * B, ...). Every rank then holds the whole loss; the backward of the gather sums the
    ranks' gradients and data-parallel averaging divides by W, which leaves the gradient of one process with the whole
    batch. Ranks must have equally many rows."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    if with_gradient:
        from torch.distributed.nn.functional import all_gather

        return torch.cat(list(all_gather(x.contiguous())))
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
