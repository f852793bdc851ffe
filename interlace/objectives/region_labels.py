"""What LXMERT guesses of regions: their detected object and attribute, and the feature that was hidden.

Tan & Bansal 2019 (arXiv:1908.07490), section 3.1.2, as its release does it, which is not quite as the paper says:
labels are scored for every region, hidden or not, weighed by how sure the detector was; the feature is scored just
where it was hidden. All three are means over all regions times `SCALE`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from interlace.errors import UserError
from interlace.model import VLModel
from interlace.objectives.base import Batch, Scored, Views
from interlace.objectives.mvm import MaskedRegions, true_features

SCALE = 1 / 0.15  # one region in SCALE is hidden, and the mean is over all


def label_loss(logits: Tensor, labels: Tensor, confidence: Tensor) -> Tensor:
    """(B, I, C) logits, (B, I) labels (below 0 not scored), (B, I) the detector's confidence, 0 to 1 -> scalar."""
    losses = F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=-1), ignore_index=-1, reduction="none")  # (B, I)
    return (losses * confidence).mean() * SCALE


def feature_loss(predicted: Tensor, features: Tensor, hidden: Tensor) -> Tensor:
    """(B, I, F) predicted, (B, I, F) the features before they were hidden, (B, I) 1 = hidden -> scalar."""
    losses = F.smooth_l1_loss(predicted, features, reduction="none").mean(-1)  # (B, I)
    return (losses * hidden).mean() * SCALE


class RegionLabels(MaskedRegions):
    """Guess objects and attributes of all regions as the detector was sure of them, and the features of the hidden.

    Columns: image with stored regions and their `objects`, `attributes` and how sure the detector was. Hides, sees: as
    all guesses at regions. Head: regions. Logs: region_labels, region_objects, region_attributes, region_features, and
    region_objects_accuracy, region_attributes_accuracy.

    What the store does not have (a grid's cells have no labels, DETR's boxes no attributes) is left out; without
    confidences every label counts as sure.
    """

    name = "region_labels"
    head = "regions"

    def count(self, part: Batch, batch: Batch) -> Tensor:
        mask = batch.get("region_mask")
        return part["hidden"].new_tensor(part["hidden"].numel() if mask is None else int(mask.sum()), dtype=torch.long)

    def asks(self, part: Batch) -> tuple[bool | Tensor, bool | Tensor]:
        return False, True

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        said = model.heads["regions"](views.cells())
        total, parts, logs = views.total(self), list[Tensor](), dict[str, Tensor]()
        for name in ("objects", "attributes"):
            labels = batch.get(f"region_{name}")
            if labels is None:
                continue
            sure = batch.get(f"region_{name}_confidence", batch.get("region_confidence"))
            logits = said[name].float()
            if int(labels.shape[-1]) and logits.shape[-1] <= 1:
                raise UserError(f"the model's head knows {logits.shape[-1]} {name}: build it with these regions.")
            losses = F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=-1), ignore_index=-1, reduction="none")
            parts.append((losses if sure is None else losses * sure).sum() / total * SCALE)
            right = (logits.argmax(-1) == labels)[labels >= 0].float()
            logs[f"region_{name}"] = parts[-1].detach()
            logs[f"region_{name}_accuracy"] = right.sum() / max(len(right), 1)
        losses = F.smooth_l1_loss(said["features"].float(), true_features(model, batch).float(), reduction="none")
        parts.append((losses.mean(-1) * self.scored(views.part)).sum() / total * SCALE)
        logs["region_features"] = parts[-1].detach()
        loss = torch.stack(parts).sum()
        return Scored(loss, {"region_labels": loss.detach(), **logs})
