"""VL-BERT's input: every element, word or region, has a token, a visual feature, a segment and a position.

Su et al. 2020 (arXiv:1908.08530), section 3.2 and figure 1. A word's visual feature is that of the whole picture, and a
region's position comes after the last word: each stream needs something of the other before the first layer. So the
embedders give what they can say alone, and a layer of its own kind (`Meet`) adds what they owe each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.embed.base import Embedder
from interlace.embed.regions import RegionEmbedder, Regions
from interlace.errors import UserError
from interlace.layers import Kind, Layer, Width, _one_width
from interlace.streams import Streams, Visibility

SCALE, BASE = 100.0, 1000.0  # of a box number before its sines, and of their wavelengths (the release's)


class QuietNorm(nn.Module):
    """A layer norm that starts at a small scale. At zero, as released, the words are at first just BERT's, and vision
    comes in as it learns to; that takes more steps than a small run has."""

    def __init__(self, size: int, eps: float, scale: float):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((size,), scale)), nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def vector(size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, size).normal_(std=0.02))  # BERT's


@dataclass
class VLBERTWords(Embedder):
    """Token + segment; position, norm and the visual feature follow where the streams meet."""

    vocabulary: int = 30522
    types: int = 2
    pad: int = 0
    name = "vl_bert_words"
    stream = "text"

    def build(self) -> nn.Module:
        return ElementWords(self)


class ElementWords(nn.Module):
    def __init__(self, spec: VLBERTWords):
        super().__init__()
        self.words = nn.Embedding(spec.vocabulary, spec.width.size, padding_idx=spec.pad)
        self.types = nn.Embedding(spec.types, spec.width.size)

    def forward(self, input_ids: Tensor, mask: Tensor | None = None, type_ids: Tensor | None = None) -> Tensor:
        """ids (B, T) -> (B, T, D)."""
        return self.words(input_ids) + (self.types.weight[0] if type_ids is None else self.types(type_ids))


def sines(boxes: Tensor, size: int) -> Tensor:
    """Corners (..., 4) in parts of the picture -> (..., 4 * size): centre, width and height, each as `size` / 2 sines
    and as many cosines."""
    sides = boxes[..., 2:] - boxes[..., :2]
    middle = (boxes[..., 2:] + boxes[..., :2]) / 2
    at = SCALE * torch.cat([middle, sides], -1)  # (..., 4)
    waves = BASE ** (torch.arange(size // 2, device=boxes.device, dtype=boxes.dtype) / (size // 2))
    angles = at.unsqueeze(-1) / waves  # (..., 4, size / 2)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


@dataclass
class VLBERTRegions(RegionEmbedder):
    """The first region is the whole picture, its feature the mean of the others'."""

    geometry: int = 512  # numbers per box number
    scale: float = 0.0  # of a region's visual feature at first: the release's visual_scale_object_init
    name = "vl_bert_regions"

    def build(self) -> nn.Module:
        return ElementRegions(self)


class ElementRegions(nn.Module):
    lead = 1  # [END], see below
    masks_pixels = True  # it gives one cell more than there are regions, so it has to extend the mask

    def __init__(self, spec: VLBERTRegions):
        super().__init__()
        size, self.spec = spec.width.size, spec
        self.dropout = nn.Dropout(0.1)
        self.project = nn.Linear(4 * spec.geometry + spec.features, size)
        self.token, self.hidden_token = vector(size), vector(size)  # [IMG], and what a hidden region has instead
        self.hidden_feature = nn.Parameter(torch.zeros(1, spec.features))
        self.norm = QuietNorm(size, spec.width.eps, spec.scale)

    def objects(self, regions: Regions) -> Tensor:
        """Geometry and feature of each region -> (B, I, D)."""
        self.spec.check(regions)
        assert regions.boxes is not None
        features = regions.features
        if regions.hidden is not None:
            features = torch.where(regions.hidden.unsqueeze(-1), self.hidden_feature, features)
        x = torch.cat([sines(regions.boxes, self.spec.geometry), features], -1)
        return torch.relu(self.project(self.dropout(x)))

    def forward(self, regions: Regions, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features (B, I, F), boxes (B, I, 4), mask (B, I) -> states (B, 1+I, D), mask (B, 1+I). Cell 0 carries the
        whole picture's feature to the words; where the streams meet it becomes [END], whose place here is free."""
        objects = self.objects(regions)
        token: Tensor = self.token
        if regions.hidden is not None:
            token = torch.where(regions.hidden.unsqueeze(-1), self.hidden_token, token)  # (B, I, D)
        states = torch.cat([objects[:, :1], token + self.norm(objects)], 1)
        real = torch.ones(objects.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask.bool()
        return states, F.pad(real, (1, 0), value=True)


class Meet(Layer):
    """Words take the picture's feature and their positions, regions the position after the last word, [END] the next;
    then one norm over all. Without regions a word has a learned feature in their stead, and [END] still follows."""

    kind = "vl_bert_meet"
    crosses = True

    def __init__(self, text: Width, image: Width, positions: int = 512, scale: float = 0.0):
        super().__init__(text, image)
        _one_width(text, image, self.kind)
        self.positions = nn.Embedding(positions, text.size)
        self.segment, self.end, self.no_picture = vector(text.size), vector(text.size), vector(text.size)
        self.norm_picture = QuietNorm(text.size, text.eps, scale)
        self.norm, self.dropout = nn.LayerNorm(text.size, eps=text.eps), nn.Dropout(text.dropout)

    def forward(self, streams: Streams, see: Visibility) -> Streams:
        text, image = streams
        lengths = self.lengths(streams, see)  # (B,)
        end = self.end + self.segment + self.positions(lengths + 1)  # (B, D)
        if text is not None:
            picture = self.no_picture if image is None else image[:, :1]  # (B or 1, 1, D)
            text = text + self.norm_picture(picture) + self.positions.weight[: text.shape[1]]
            text = self.dropout(self.norm(text))
        cells = end.unsqueeze(1)
        if image is not None:
            cells = torch.cat([cells, image[:, 1:] + self.segment + self.positions(lengths).unsqueeze(1)], 1)
        return Streams(text, self.dropout(self.norm(cells)))  # (B, T, D), (B, 1+I, D)

    def lengths(self, streams: Streams, see: Visibility) -> Tensor:
        """How many words each row has: (B,)."""
        text, image = streams
        if text is None:
            assert image is not None
            return torch.zeros(len(image), dtype=torch.long, device=image.device)
        if text.shape[1] + 2 > self.positions.num_embeddings:
            raise UserError(f"a text of {text.shape[1]} tokens, but the model has {self.positions.num_embeddings} "
                            "positions, two of them for regions and [END]: lower the maximum length.")  # fmt: skip
        if see.tt is None:
            return torch.full((len(text),), text.shape[1], device=text.device)
        return see.tt.any(1).sum(-1).expand(len(text))  # a word that no word may see is padding


def meet(positions: int = 512, scale: float = 0.0) -> Kind:
    """`scale`: of the picture's feature in a word at first, the release's visual_scale_text_init."""
    return Kind("vl_bert_meet", (("positions", positions), *((("scale", scale),) if scale else ())))
