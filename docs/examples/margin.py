"""An objective of one's own, on the ordinary command line.

    python docs/examples/margin.py train demo objectives.itc=false objectives.margin.margin=0.2 train.out=runs/margin
"""

from __future__ import annotations

import sys

import torch

from interlace.model import VLModel
from interlace.objectives import Batch, Objective, Scored, Views


class Margin(Objective):
    """A text is nearer to its own picture than to any other of the batch, by a margin, and each picture likewise; only
    the hardest negative counts. Faghri et al. 2018 (VSE++, arXiv:1707.05612), equation 6.

    Columns: image, caption, group. Hides: nothing. Sees: each stream only itself. Head: contrast.
    Logs: margin, margin_accuracy (the share of texts whose nearest picture is one of their group).
    """

    name = "margin"  # the key under `objectives:` in a config
    head = "contrast"  # which of heads.HEADS it reads

    def __init__(self, margin: float = 0.2, size: int = 256):
        self.margin, self.size = margin, size

    def head_options(self) -> dict:
        return {"size": self.size}

    def prepare(self, sample, row, index, draw, rng) -> None:
        sample["texts"]["caption"] = row.caption

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        text, image, real = views.vector("caption"), views.vector("image"), batch["caption_real"]
        cosine = text @ image.T  # (B, B)
        same = batch["group"][:, None] == batch["group"][None, :]
        negative = ~same & real[:, None] & real[None, :]  # rows of one group are never negatives
        own = cosine.diagonal()
        by_text = ((self.margin + cosine - own[:, None]).clamp(min=0) * negative).amax(1)  # (B,)
        by_image = ((self.margin + cosine - own[None, :]).clamp(min=0) * negative).amax(0)  # (B,)
        # by all rows, not by the real ones: so the mean over micro-batches or ranks is a mean over rows
        loss = ((by_text + by_image) * real).sum() / len(real)
        with torch.no_grad():
            right = same.gather(1, cosine.argmax(1, keepdim=True))[:, 0] & real
            accuracy = right.sum() / real.sum().clamp(min=1)
        return Scored(loss, {"margin": loss.detach(), "margin_accuracy": accuracy})


if __name__ == "__main__":
    from interlace.cli import main

    sys.exit(main())
