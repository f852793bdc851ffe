"""Word-region alignment: the cheapest way to carry a text's words onto a picture's regions, small for a true pair.

UNITER (Chen et al. 2020, arXiv:1909.11740), section 3.2; the transport is approximated by IPOT (Xie et al. 2018,
arXiv:1802.04307, algorithm 1). Masks here are 1 = real, as everywhere; [CLS] and [SEP] count as words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from interlace.errors import UserError
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Scored, Views

PADDING = 1e4  # a divisor that leaves padding with next to no mass
SMALLEST = 1e-5  # a state shorter than this counts as this long


def cosine_cost(text: Tensor, image: Tensor, text_mask: Tensor, image_mask: Tensor) -> Tensor:
    """(B, T, D), (B, I, D), masks (B, T), (B, I) -> 1 - cosine (B, T, I), 0 at padding."""
    words, regions = F.normalize(text, dim=-1, eps=SMALLEST), F.normalize(image, dim=-1, eps=SMALLEST)
    cost = 1 - words @ regions.transpose(1, 2)
    return cost * (text_mask.bool().unsqueeze(2) & image_mask.bool().unsqueeze(1))


@torch.no_grad()
def transport_plan(cost: Tensor, text_mask: Tensor, image_mask: Tensor, beta: float = 0.5, steps: int = 50) -> Tensor:
    """Cost (B, T, I) -> plan (B, I, T); its sums converge to 1/words and 1/regions. Zero for a row without either."""
    text_mask, image_mask = text_mask.to(cost), image_mask.to(cost)
    there = image_mask.unsqueeze(2) * text_mask.unsqueeze(1)  # (B, I, T)
    # an empty caption has no word to carry: its row is computed as if all were real, for there is none to divide by
    text_mask = text_mask.masked_fill(~text_mask.any(1, keepdim=True), 1)
    image_mask = image_mask.masked_fill(~image_mask.any(1, keepdim=True), 1)
    words, regions = text_mask.sum(1, keepdim=True), image_mask.sum(1, keepdim=True)  # (B, 1)
    real = image_mask.unsqueeze(2) * text_mask.unsqueeze(1)  # (B, I, T)
    kernel = torch.exp(-cost.transpose(1, 2) / beta) * real
    plan, sigma = real, text_mask / words  # (B, I, T), (B, T)
    for _ in range(steps):
        q = kernel * plan
        delta = 1 / (regions * (q @ sigma.unsqueeze(2)).squeeze(2) + PADDING * (1 - image_mask))  # (B, I)
        sigma = 1 / (words * (q.transpose(1, 2) @ delta.unsqueeze(2)).squeeze(2) + PADDING * (1 - text_mask))  # (B, T)
        plan = delta.unsqueeze(2) * q * sigma.unsqueeze(1)
    return plan * there


def transport_distance(text: Tensor, image: Tensor, text_mask: Tensor, image_mask: Tensor) -> Tensor:
    """(B, T, D), (B, I, D) -> (B,), in float32 whatever autocast says: in bfloat16 the cosines of states that are
    nearly alike are off by more than they differ. The gradient flows through the cost, not through the plan."""
    with torch.autocast(text.device.type, enabled=False):
        cost = cosine_cost(text.float(), image.float(), text_mask, image_mask)
        return (cost * transport_plan(cost.detach(), text_mask, image_mask).transpose(1, 2)).sum((1, 2))


def alignment_loss(distance: Tensor, matched: Tensor) -> Tensor:
    """(B,), (B,) 1 = a true pair -> scalar: true pairs are drawn together, wrong ones pushed apart."""
    return torch.where(matched.bool(), distance, -distance).mean()


class WRA(Objective):
    """Words and regions of a true pair are cheap to carry onto each other, those of a wrong one dear.

    Columns: image, caption. Hides: nothing. Sees: everyone sees everyone. Head: none; both streams have one width.
    Wants `itm: {negatives: swap}` in its pass, else all pairs are true. A row without caption is not scored. Logs: wra,
    wra_matched and wra_swapped (mean distances). The plan itself, for drawing: `transport_plan`.
    """

    name = "wra"
    fused = True

    def check(self, model: VLModel) -> None:
        text, image = model.config.text.width.size, model.config.image.width.size
        if text != image:
            raise UserError(f"{self.name} compares words with regions, so both streams must have one width; the text "
                            f"has {text}, the image {image}: use a single-stream system.")  # fmt: skip

    def masks(self, model: VLModel, views: Views, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Who takes part: (B, T), (B, I) bool, padding out."""
        words = torch.ones(text.shape[:2], device=text.device) if views.text_mask is None else views.text_mask
        cells = torch.ones(image.shape[:2], device=image.device) if views.image_mask is None else views.image_mask
        return words.bool(), cells.bool()

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        out = views.fused()
        assert out.text is not None and out.image is not None
        distance = transport_distance(out.text, out.image, *self.masks(model, views, out.text, out.image))  # (B,)
        distance = distance * views.part["text_real"]
        matched = views.matched
        loss = alignment_loss(distance, matched)
        seen = distance.detach()
        return Scored(loss, {
            self.name: loss.detach(),
            f"{self.name}_matched": (seen * matched).sum() / matched.sum().clamp(min=1),
            f"{self.name}_swapped": (seen * ~matched).sum() / (~matched).sum().clamp(min=1),
        })  # fmt: skip


class WPA(WRA):
    """The same with patches (ViLT, section 3.2): [CLS], [SEP] and the class token take no part."""

    name = "wpa"

    def masks(self, model: VLModel, views: Views, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        words, cells = super().masks(model, views, text, image)
        words, cells = words.clone(), cells.clone()
        words[torch.arange(len(words), device=words.device), words.sum(1) - 1] = False
        words[:, 0] = False
        cells[:, : getattr(model.image, "lead", 0)] = False
        return words, cells
