"""What LXMERT guesses of regions: their detected object and attribute, and the feature that was hidden.

Tan & Bansal 2019 (arXiv:1908.07490), section 3.1.2, as its release does it, which is not quite as the paper says:
labels are scored for every region, hidden or not, weighed by how sure the detector was; the feature is scored just
where it was hidden. All three are means over all regions times `SCALE`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

SCALE = 1 / 0.15  # one region in SCALE is hidden, and the mean is over all


def label_loss(logits: Tensor, labels: Tensor, confidence: Tensor) -> Tensor:
    """(B, I, C) logits, (B, I) labels (below 0 not scored), (B, I) the detector's confidence, 0 to 1 -> scalar."""
    losses = F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=-1), ignore_index=-1, reduction="none")  # (B, I)
    return (losses * confidence).mean() * SCALE


def feature_loss(predicted: Tensor, features: Tensor, hidden: Tensor) -> Tensor:
    """(B, I, F) predicted, (B, I, F) the features before they were hidden, (B, I) 1 = hidden -> scalar."""
    losses = F.smooth_l1_loss(predicted, features, reduction="none").mean(-1)  # (B, I)
    return (losses * hidden).mean() * SCALE
