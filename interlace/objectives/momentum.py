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


class Momentum(nn.Module):
    """`model`: the slow copy, without decoder and with the contrast head alone. `text`, `image`: queues (P, Q) of
    normalised vectors, the oldest at `at`."""

    text: Tensor
    image: Tensor
    at: Tensor

    def __init__(self, model: VLModel, queue: int = 57600, decay: float = 0.995):
        super().__init__()
        config: VLConfig = copy.deepcopy(model.config)  # type: ignore[assignment]
        config.writes, config.heads = None, {"contrast": config.heads["contrast"]}
        self.model, self.decay, self.size = VLModel(config), decay, queue
        self.follow(model, decay=0.0)
        self.requires_grad_(False)
        width: int = model.heads["contrast"].text.out_features  # type: ignore[assignment,union-attr]
        for name in ("text", "image"):
            self.register_buffer(name, F.normalize(torch.randn(width, queue), dim=0))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def follow(self, model: VLModel, decay: float | None = None) -> None:
        """Moves the slow copy a little towards the model; before its vectors are taken, once a step."""
        decay = self.decay if decay is None else decay
        fast = dict(model.named_parameters())
        for name, slow in self.model.named_parameters():
            if name != "heads.contrast.temperature" and name != "heads.contrast.logit_scale":
                slow.mul_(decay).add_(fast[name].detach(), alpha=1 - decay)

    @torch.no_grad()
    def push(self, text: Tensor, image: Tensor) -> None:
        """Takes in a batch's slow vectors (B, P), of all ranks. Raises UserError unless batches fill the queue."""
        at, rows = int(self.at), len(text)
        if self.size % rows:
            raise UserError(f"a queue of {self.size} does not divide into batches of {rows}: choose a multiple.")
        self.text[:, at : at + rows], self.image[:, at : at + rows] = text.T, image.T
        self.at[0] = (at + rows) % self.size


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
