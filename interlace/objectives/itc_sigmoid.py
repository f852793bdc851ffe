"""Image-text contrast, a pair at a time."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from interlace.errors import UserError
from interlace.heads.sigmoid import SigmoidContrast
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Scored, Views
from interlace.objectives.itc import at_least_two, checked_temperature
from interlace.objectives.whole import Cached, add_up, cached, rank, world
from interlace.sharded import one_number


class SigmoidITC(Objective):
    """Of every text and every picture of the batch: do they belong together? SigLIP (Zhai et al. 2023,
    arXiv:2303.15343), section 3: each pair a binary question, so no sum over the batch stands in a denominator.

    Columns: image, caption, group. Hides: nothing. Sees: each stream only itself. Head: contrast, with a bias.
    Logs: itc_sigmoid, itc_sigmoid_accuracy (of a picture, a positive on top of all texts), itc_sigmoid_chance (the loss
    of saying the share of positives of every pair; ln(batch) + 1 when every row is a group of its own).

    The loss is the sum over all pairs, divided by rows. All pairs of rows of one `group` are positives. `temperature`
    is 1 over the scale at the start, `bias` added to every logit; both are learned. The batch is that of all ranks: a
    rank's texts are shown to each other rank in turn, so that memory grows with a rank's rows alone (section 3.3);
    under accumulation the gradient is cached (whole.py).
    """

    name = "itc_sigmoid"
    head = "contrast"
    only_vectors = True

    def __init__(self, size: int = 256, temperature: float = 0.1, bias: float = -10.0):
        self.size, self.temperature, self.bias = size, checked_temperature(self.name, temperature), bias

    def head_options(self) -> dict:
        return {"kind": "sigmoid_contrast", "size": self.size, "temperature": self.temperature, "bias": self.bias}

    def check(self, model: VLModel) -> None:
        super().check(model)
        if not isinstance(model.contrast, SigmoidContrast):
            raise UserError(f"{self.name} needs a contrast head with a bias (kind: sigmoid_contrast), and this model's "
                            "has none: it is the other contrast's, or the system's own. Give one contrast, and a model "
                            "composed of parts.")  # fmt: skip

    def check_batch(self, batch: int, micro: int, rows: int) -> None:
        at_least_two(self.name, batch)

    def prepare(self, sample, row, index, draw, rng) -> None:
        sample["texts"]["caption"] = row.caption

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        text, image, head = views.vector("caption"), views.vector("image"), scale_and_bias(model)
        group, real, whole = batch["group"], batch["caption_real"], views.whole(self)
        if whole is None and world() == 1:
            loss, sums = pairs(text, image, group, real, group, real, real.sum(), *head)
            return Scored(loss, self.logs(loss.detach(), sums))
        if whole is None:
            known, own, shares = round_robin(text, image, group, real, head), torch.arange(views.size), world()
        else:
            known, own, shares = whole.settled, whole.own, whole.shares
        return Scored(known.loss(own, shares, text, image, head), self.logs(known.value, known.sums))

    def looks(self, parts: int) -> bool:
        return parts > 1

    def look(self, model: VLModel, batch: Batch, views: Views) -> dict[str, Tensor]:
        return {"image": views.vector("image"), "text": views.vector("caption"), "group": batch["group"],
                "real": batch["caption_real"]}  # fmt: skip

    def settle(self, model: VLModel, rows: dict[str, Tensor]) -> Cached:
        group, real = rows["group"], rows["real"]

        def share(of: slice, text: Tensor, image: Tensor, *head: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return pairs(text, image[of], group, real, group[of], real[of], real.sum(), *head)

        return cached(share, rows["text"], rows["image"], scale_and_bias(model))

    def logs(self, loss: Tensor, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        rows, share = sums["rows"].clamp(min=1), sums["positive"] / sums["pairs"].clamp(min=1)
        doubt = F.binary_cross_entropy(share, share)  # of one pair
        return {self.name: loss, f"{self.name}_accuracy": sums["right"] / rows,
                f"{self.name}_chance": doubt * sums["pairs"] / rows}  # fmt: skip


def scale_and_bias(model: VLModel) -> list[Tensor]:
    return [model.contrast.scale, one_number(model.contrast.bias)]  # type: ignore[arg-type]


def pairs(text: Tensor, image: Tensor, text_group: Tensor, text_real: Tensor, image_group: Tensor, image_real: Tensor,
          rows: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """text (N, P), image (M, P), normalised; groups and `real` (False = no caption, in no sum) of both; `rows`: of the
    whole batch -> the loss of these N x M pairs, and counts."""
    with torch.autocast(text.device.type, enabled=False):
        logits = scale * image @ text.T + bias  # (M, N)
    opened = image_real[:, None] & text_real[None, :]
    together = (image_group[:, None] == text_group[None, :]) & opened
    sign = 2 * together.to(logits.dtype) - 1
    loss = -(F.logsigmoid(sign * logits) * opened).sum() / rows.clamp(min=1)
    with torch.no_grad():
        best = logits.masked_fill(~opened, -torch.inf).argmax(1, keepdim=True)
        right = together.gather(1, best)[:, 0]
    return loss, {"right": (right & image_real).sum().float(), "rows": image_real.sum().float(),
                  "positive": together.sum().float(), "pairs": opened.sum().float()}  # fmt: skip


def round_robin(text: Tensor, image: Tensor, group: Tensor, real: Tensor, head: list[Tensor]) -> Cached:
    """text, image (B, P) of this rank. Each rank's texts go round all ranks, and their derivatives are added up where
    they came from: no rank ever holds more than B x B similarities."""
    leaves = [t.detach().float().requires_grad_() for t in (image, *head)]
    rows = add_up(real.sum())
    value, back = torch.zeros((), device=text.device), torch.zeros_like(text, dtype=torch.float)
    best = torch.full((len(image),), -torch.inf, device=text.device)
    right = torch.zeros(len(image), dtype=torch.bool, device=text.device)
    counts = {"positive": torch.zeros_like(value), "pairs": torch.zeros_like(value)}
    for source in range(world()):
        chunk, chunk_group, chunk_real = (sent(x.detach(), source) for x in (text.float(), group, real))
        chunk.requires_grad_()
        with torch.enable_grad():
            loss, sums = pairs(chunk, leaves[0], chunk_group, chunk_real, group, real, rows, *leaves[1:])
        loss.backward()
        value = value + loss.detach()
        counts = {name: counts[name] + sums[name] for name in counts}
        with torch.no_grad():  # the best text so far of each picture
            cosine = (leaves[0] @ chunk.T).masked_fill(~chunk_real[None, :], -torch.inf)
            top = cosine.max(1)
            hit = (group == chunk_group[top.indices]) & chunk_real[top.indices]
            right = torch.where(top.values > best, hit, right)
            best = torch.maximum(top.values, best)
            assert chunk.grad is not None
            dist.reduce(chunk.grad, source)
            if source == rank():
                back = chunk.grad
    sums = {"right": (right & real).sum().float(), "rows": real.sum().float(), **counts}
    by_head = [leaf.grad for leaf in leaves[1:] if leaf.grad is not None]
    for tensor in (value, *by_head, *sums.values()):
        add_up(tensor)
    return Cached(value, back, leaves[0].grad, by_head, sums)  # type: ignore[arg-type]


def sent(x: Tensor, source: int) -> Tensor:
    """That rank's tensor, on all."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.broadcast(x, source)
    return x
