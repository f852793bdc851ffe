"""Regions a detector found: a feature and a box each. How the two become one state is one small class per paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from interlace.embed.base import Embedder
from interlace.embed.words import WordEmbedding
from interlace.errors import UserError


class Regions(NamedTuple):
    """What a region model is given where others are given pixels."""

    features: Tensor  # (B, I, F), of the detector's last pooled layer
    # (B, I, P), corners in parts of the picture, 0 to 1: x1, y1, x2, y2, and more or none as the paper has it
    boxes: Tensor | None
    hidden: Tensor | None = None  # (B, I) bool, True = to be guessed: the model must not see this feature
    types: Tensor | None = None  # (B, I), which picture a region is from, where a model takes two
    words: Tensor | None = None  # (B, I, A), positions of the words that name a region, -1 = none


def whole_of_shown(regions: Regions, mask: Tensor | None = None) -> Regions:
    """Regions (B, I, F), the first the whole picture, mask (B, I) -> the same, the whole made anew of those that are
    shown. Beside all others but one a mean of all would tell that one. Hidden ones count as zero, as in 12-in-1's
    release."""
    if regions.hidden is None:
        return regions
    features, hidden = regions.features, regions.hidden
    real = torch.ones_like(hidden) if mask is None else mask.bool()
    shown = features[:, 1:] * (real & ~hidden)[:, 1:].unsqueeze(-1)
    whole = shown.sum(1, keepdim=True) / real[:, 1:].sum(1).clamp(min=1).view(-1, 1, 1)
    return regions._replace(features=torch.cat([whole, features[:, 1:]], 1))


BESIDE = 0.01  # of the picture's side that a box may reach beyond it, by rounding


def check_boxes(boxes: Tensor | None, mask: Tensor | None) -> None:
    """(B, I, 4 or more), the corners first, mask (B, I). Raises UserError for a real region whose box lies outside the
    picture or has its corners in the wrong order. On a CPU alone: another device would have to be waited for."""
    if boxes is None or boxes.device.type != "cpu" or boxes.shape[-1] < 4 or torch.compiler.is_compiling():
        return
    first, last = boxes[..., :2], boxes[..., 2:4]
    turned = (last < first).any(-1)  # (B, I)
    outside = ~((first >= -BESIDE) & (last <= 1 + BESIDE)).all(-1)  # a number that is none, too
    wrong = turned | outside if mask is None else (turned | outside) & mask.bool()
    if wrong.any():
        row, region = wrong.nonzero()[0].tolist()
        numbers = ", ".join(f"{number:.4g}" for number in boxes[row, region, :4].tolist())
        what = ("has its corners in the wrong order: expected x1, y1, x2, y2" if turned[row, region] else
                "lies outside the picture, which is 0 to 1: divide pixels by its width and height")  # fmt: skip
        raise UserError(f"box {region} of picture {row} ({numbers}) {what}.")


@dataclass
class RegionEmbedder(Embedder):
    """`features`: numbers per region. `boxes`: numbers per box."""

    features: int = 2048
    boxes: int = 4
    stream = "image"

    def seen(self, regions: Regions) -> Tensor:
        """Checked features (B, I, F), zero where they are to be guessed."""
        self.check(regions)
        features, hidden = regions.features, regions.hidden
        return features if hidden is None else features.masked_fill(hidden.unsqueeze(-1), 0)

    def check(self, regions: Regions) -> None:
        """Raises UserError for pixels, for no regions, and when features or boxes have other sizes than the model or
        than each other. Shapes alone: a look at values is taken where files are read
        (`interlace.regions.check_regions`), and by a model that does not learn (`check_boxes`)."""
        if not isinstance(regions, Regions):
            raise UserError(f"the model reads regions of a detector, Regions(features, boxes), got a "
                            f"{type(regions).__name__}: extract the pictures' regions first.")  # fmt: skip
        if regions.features.dim() != 3:
            raise UserError(f"expected features (pictures, regions, {self.features}), got "
                            f"{tuple(regions.features.shape)}.")  # fmt: skip
        if not regions.features.shape[1]:
            raise UserError("a picture without regions: for a text alone give no regions at all, "
                            "model.fuse(model.half_text(...), None).")  # fmt: skip
        for name in ("boxes", "hidden", "types", "words"):
            part = getattr(regions, name)
            if part is not None and part.shape[:2] != regions.features.shape[:2]:
                raise UserError(f"features of {tuple(regions.features.shape[:2])} (pictures, regions), but {name} of "
                                f"{tuple(part.shape[:2])}: they must be the same regions.")  # fmt: skip
        got = (regions.features.shape[-1], 0 if regions.boxes is None else regions.boxes.shape[-1])
        if got != (self.features, self.boxes):
            raise UserError(f"the model reads {self.features} features and {self.boxes} box numbers per region, got "
                            f"{got[0]} and {got[1]}: use features of the detector it was trained with.")  # fmt: skip


@dataclass
class LXMERTRegions(RegionEmbedder):
    """The mean of the normed feature and the normed box. Tan & Bansal 2019 (arXiv:1908.07490), section 2.1."""

    name = "lxmert_regions"

    def build(self) -> nn.Module:
        return MeanOfNorms(self)


class MeanOfNorms(nn.Module):
    def __init__(self, spec: LXMERTRegions):
        super().__init__()
        size, self.spec = spec.width.size, spec
        self.features, self.boxes = nn.Linear(spec.features, size), nn.Linear(spec.boxes, size)
        self.norm_features = nn.LayerNorm(size, eps=spec.width.eps)
        self.norm_boxes = nn.LayerNorm(size, eps=spec.width.eps)
        self.dropout = nn.Dropout(spec.width.dropout)

    def forward(self, regions: Regions) -> Tensor:
        """Features (B, I, F), boxes (B, I, 4) -> (B, I, D). The norms stand before the mean, none after it."""
        features = self.norm_features(self.features(self.spec.seen(regions)))
        return self.dropout((features + self.norm_boxes(self.boxes(regions.boxes))) / 2)


@dataclass
class ViLBERTRegions(RegionEmbedder):
    """One norm over the sum of feature and box; the fifth box number is the region's share of the picture's area, and
    the first region is the whole picture. Lu et al. 2019 (arXiv:1908.02265), section 3.1."""

    boxes: int = 5
    name = "vilbert_regions"

    def build(self) -> nn.Module:
        return NormOfSum(self)


class NormOfSum(nn.Module):
    whole_of_shown = True  # VL-BERT's release takes the mean of all, hidden or not

    def __init__(self, spec: ViLBERTRegions):
        super().__init__()
        size, self.spec = spec.width.size, spec
        self.features, self.boxes = nn.Linear(spec.features, size), nn.Linear(spec.boxes, size)
        self.norm = nn.LayerNorm(size, eps=spec.width.eps)
        self.dropout = nn.Dropout(spec.width.dropout)

    def forward(self, regions: Regions) -> Tensor:
        """Features (B, I, F), boxes (B, I, 5) -> (B, I, D)."""
        return self.dropout(self.norm(self.features(self.spec.seen(regions)) + self.boxes(regions.boxes)))


@dataclass
class UNITERRegions(RegionEmbedder):
    """Normed feature + normed box + type, normed again. The seven box numbers are the corners, width, height, area;
    words and regions share one table of types, in which regions have row 1. Chen et al. 2020 (arXiv:1909.11740),
    section 3.1."""

    boxes: int = 7
    name = "uniter_regions"

    def build(self) -> nn.Module:
        return NormOfNorms(self)


def seven(boxes: Tensor) -> Tensor:
    """Corners (..., 4) in parts of the picture -> UNITER's (..., 7): corners, width, height, area."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return torch.cat([boxes, sides, sides.prod(-1, keepdim=True)], -1)


class NormOfNorms(nn.Module):
    reads_words = True

    def __init__(self, spec: UNITERRegions):
        super().__init__()
        size, self.spec = spec.width.size, spec
        self.features, self.boxes = nn.Linear(spec.features, size), nn.Linear(spec.boxes, size)
        self.norm_features = nn.LayerNorm(size, eps=spec.width.eps)
        self.norm_boxes = nn.LayerNorm(size, eps=spec.width.eps)
        self.hidden = nn.Embedding(2, spec.features, padding_idx=0)  # row 1 stands for a hidden feature
        self.norm = nn.LayerNorm(size, eps=spec.width.eps)
        self.dropout = nn.Dropout(spec.width.dropout)

    def forward(self, regions: Regions, words: WordEmbedding) -> Tensor:
        """Features (B, I, F), boxes (B, I, 7) -> (B, I, D). A hidden region's feature is replaced before it is
        projected."""
        self.spec.check(regions)
        features = regions.features
        if regions.hidden is not None:
            features = torch.where(regions.hidden.unsqueeze(-1), self.hidden.weight[1], features)
        assert words.types is not None
        types = words.types.weight[1] if regions.types is None else words.types(regions.types)
        x = self.norm_features(self.features(features)) + self.norm_boxes(self.boxes(regions.boxes)) + types
        return self.dropout(self.norm(x))


@dataclass
class VisualBERTRegions(RegionEmbedder):
    """Feature + position + type, through the words' own norm; no boxes. Every region has position 0 of a table of its
    own, and one that words name adds the mean of their positions in the words' table. Li et al. 2019
    (arXiv:1908.03557), section 3.2."""

    boxes: int = 0
    positions: int = 512
    types: int = 2
    name = "visual_bert_regions"

    def build(self) -> nn.Module:
        return SumAsWords(self)


class SumAsWords(nn.Module):
    reads_words = True

    def __init__(self, spec: VisualBERTRegions):
        super().__init__()
        size, self.spec = spec.width.size, spec
        self.features = nn.Linear(spec.features, size)
        self.positions, self.types = nn.Embedding(spec.positions, size), nn.Embedding(spec.types, size)

    def forward(self, regions: Regions, words: WordEmbedding) -> Tensor:
        """Features (B, I, F) -> (B, I, D)."""
        x = self.features(self.spec.seen(regions)) + self.positions.weight[0]
        x = x + (self.types.weight[0] if regions.types is None else self.types(regions.types))
        if regions.words is not None:
            named = (regions.words >= 0).unsqueeze(-1)  # (B, I, A, 1)
            places = words.positions(regions.words.clamp(min=0)) * named  # (B, I, A, D)
            x = x + places.sum(2) / named.sum(2).clamp(min=1)
        return words.dropout(words.norm(x))
