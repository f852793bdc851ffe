"""A slow copy of the model and a queue of its vectors, for contrast with soft targets.

MoCo (He et al. 2020, arXiv:1911.05722) as in ALBEF (Li et al. 2021, arXiv:2107.07651) and BLIP (arXiv:2201.12086). The
state lives here, not in the model: a saved model has none of it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.config import VLConfig
from interlace.errors import UserError
from interlace.model import VLModel
from interlace.sharded import on_one_rank


class Momentum(nn.Module):
    """`model`: the slow copy, without decoder and with the contrast head alone, never in training mode (the releases
    leave its dropout on). What is frozen it shares with the fast one. `text`, `image`: queues (P, Q) of normalised
    vectors, the oldest at `at`; `group` (Q,) of each, -1 for the random vectors that they start with; `real` (Q,) bool,
    False = a row without caption."""

    text: Tensor
    image: Tensor
    group: Tensor
    real: Tensor
    at: Tensor

    def __init__(self, model: VLModel, queue: int = 57600, decay: float = 0.995):
        super().__init__()
        config: VLConfig = copy.deepcopy(model.config)  # type: ignore[assignment]
        config.writes, config.heads = None, {"contrast": config.heads["contrast"]}
        self.model, self.decay, self.size = VLModel(config).eval(), decay, queue
        nn.Module.to(self.model, model.device)
        self._share_frozen(model)
        self.follow(model, decay=0.0)
        self.requires_grad_(False)
        width: int = model.heads["contrast"].text.out_features  # type: ignore[assignment,union-attr]
        g = torch.Generator().manual_seed(0)  # the same on every rank
        for name in ("text", "image"):
            self.register_buffer(name, F.normalize(torch.randn(width, queue, generator=g), dim=0))
        self.register_buffer("group", torch.full((queue,), -1))
        self.register_buffer("real", torch.ones(queue, dtype=torch.bool))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))

    def _share_frozen(self, model: VLModel) -> None:
        """What does not learn is the same in both: a tensor that is no parameter here, and in no checkpoint twice."""
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        for name, _ in list(self.model.named_parameters()):
            if name in frozen:
                where, _, last = name.rpartition(".")
                module = self.model.get_submodule(where)
                del module._parameters[last]
                module.register_buffer(last, frozen[name].detach(), persistent=False)

    @torch.no_grad()
    def follow(self, model: VLModel, decay: float | None = None) -> None:
        """Moves the slow copy a little towards the model; before its vectors are taken, once a step. Running statistics
        are those of the model."""
        decay = self.decay if decay is None else decay
        fast, statistics = dict(model.named_parameters()), dict(model.named_buffers())
        for name, slow in self.model.named_parameters():
            if name != "heads.contrast.temperature" and name != "heads.contrast.logit_scale":
                slow.mul_(decay).add_(on_one_rank(fast[name].detach()), alpha=1 - decay)
        for name, buffer in self.model.named_buffers():
            if name in statistics:
                buffer.copy_(statistics[name])

    @torch.no_grad()
    def push(self, text: Tensor, image: Tensor, group: Tensor | None = None, real: Tensor | None = None) -> None:
        """Takes in a batch's slow vectors (B, P), of all ranks, with the group and caption (B,) of each row. Raises
        UserError unless batches fill the queue."""
        at, rows = int(self.at), len(text)
        check_queue("a queue", self.size, rows)
        here = slice(at, at + rows)
        self.text[:, here], self.image[:, here] = text.T, image.T
        self.group[here] = -1 if group is None else group
        self.real[here] = True if real is None else real
        self.at[0] = (at + rows) % self.size


def check_queue(name: str, queue: int, batch: int) -> None:
    """Raises UserError unless batches of so many rows fill the queue."""
    if queue % batch:
        raise UserError(f"{name} of {queue} does not divide into batches of {batch}: choose a multiple, for instance "
                        f"{max(1, queue // batch) * batch}.")  # fmt: skip


def soft_contrast(text: Tensor, image: Tensor, slow_text: Tensor, slow_image: Tensor, queue_text: Tensor,
                  queue_image: Tensor, scale: Tensor, alpha: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Each vector (B, P) finds its partner among the batch's slow ones and the queue (P, Q). The target is the true
    partner, 1 - `alpha`, and what the slow pair itself finds similar, `alpha`. BLIP, section 3.2; ALBEF, equation 6.

    -> loss, and the scaled similarities image to text and text to image (B, B+Q), from which hard negatives are drawn.
    """
    texts, images = torch.cat([slow_text.T, queue_text], 1), torch.cat([slow_image.T, queue_image], 1)  # (P, B+Q)
    with torch.no_grad():
        one = torch.eye(len(text), texts.shape[1], device=text.device)
        by_image = alpha * F.softmax(scale * slow_image @ texts, 1) + (1 - alpha) * one
        by_text = alpha * F.softmax(scale * slow_text @ images, 1) + (1 - alpha) * one
    image_to_text, text_to_image = scale * image @ texts, scale * text @ images
    loss = -(F.log_softmax(image_to_text, 1) * by_image).sum(1).mean()
    loss = loss - (F.log_softmax(text_to_image, 1) * by_text).sum(1).mean()
    return loss / 2, image_to_text, text_to_image
