"""ViLT's two inputs: words, and patches of pictures of unequal sizes. Kim et al. 2021 (arXiv:2102.03334), 3.1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.embed.patches import PatchEmbedding, Patches, check_pixels
from interlace.embed.words import WordEmbedding, Words
from interlace.errors import UserError


@dataclass
class ViLTWords(Words):
    """BERT's words, and a modality vector after their norm, whose epsilon is BERT's while the blocks have ViT's."""

    positions: int = 40
    eps: float = 1e-12
    name = "vilt_words"

    def build(self) -> nn.Module:
        return ViLTWordEmbedding(self)


class ViLTWordEmbedding(WordEmbedding):
    def __init__(self, spec: ViLTWords):
        super().__init__(spec)
        self.norm = nn.LayerNorm(spec.width.size, eps=spec.eps)
        self.modality = nn.Parameter(torch.zeros(1, spec.width.size))

    def forward(self, input_ids: Tensor, mask: Tensor | None = None, type_ids: Tensor | None = None,
                start: int | Tensor = 0) -> Tensor:  # fmt: skip
        """ids (B, T) -> (B, T, D)."""
        return super().forward(input_ids, mask, type_ids, start) + self.modality


@dataclass
class ViLTPatches(Patches):
    """Patches of pictures that keep their shape, padded to the batch's largest.

    `images`: modality vectors, 2 for two pictures a text (NLVR2). `most`: in training a picture keeps at most so many
    patches, drawn at random (200 in pre-training; 0 = all).
    """

    size: int = 384
    patch: int = 32
    images: int = 1
    most: int = 0
    name = "vilt_patches"

    def build(self) -> nn.Module:
        return ViLTPatchEmbedding(self)


class ViLTPatchEmbedding(PatchEmbedding):
    """The positions are stretched to each picture's own grid, so padding changes nothing in a picture. The release puts
    the patches in random order; here they stand row by row, then the padding: attention knows no difference."""

    masks_pixels = True

    def __init__(self, spec: ViLTPatches):
        super().__init__(spec)
        self.modality = nn.Parameter(torch.zeros(spec.images, spec.width.size))
        self.most = spec.most

    def grid(self, mask: Tensor) -> Tensor:
        """Mask of pixels (B, H, W) -> of patches (B, H/p, W/p), bool: a patch is real if its first pixel is.
        Raises UserError when the real pixels are no rectangle from the top left corner."""
        real = mask[:, :: self.patch, :: self.patch].bool()
        real = real[:, : mask.shape[1] // self.patch, : mask.shape[2] // self.patch]
        box = real[:, :, :1] & real[:, :1, :]
        if not torch.equal(real, box) or not real[:, 0, 0].all():
            raise UserError("a mask of pixels marks one rectangle from the top left corner of each picture, at least a "
                            f"patch ({self.patch} pixels) on each side: pad on the right and below.")  # fmt: skip
        return real

    def order(self, real: Tensor) -> Tensor:
        """Mask of patches (B, h, w) -> (B, K): the place, row by row, of each slot. Real patches first, in reading
        order; K is the largest count of the batch, at most `most` in training."""
        real = real.flatten(1)  # (B, h*w)
        longest = int(real.sum(1).max())
        key = (~real).float()
        if self.training and 0 < self.most < longest:
            lot = torch.rand_like(key) + 2 * key  # who leaves is drawn, who stays keeps the reading order
            kept = torch.zeros_like(real).scatter_(1, lot.argsort(dim=1)[:, : self.most], True)
            key, longest = key + (~kept), self.most
        return key.argsort(dim=1, stable=True)[:, :longest]

    def stretched(self, real: Tensor) -> Tensor:
        """Mask of patches (B, h, w) -> the positions of each picture's own grid (B, D, h, w), zero in padding. They are
        stretched once for each shape among the pictures."""
        table = self.positions[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)  # (1, D, s, s)
        high, wide = real[:, :, 0].sum(1), real[:, 0].sum(1)  # (B,)
        out = table.new_zeros(len(real), table.shape[1], *real.shape[1:])
        for h, w in set(zip(high.tolist(), wide.tolist())):
            grid = F.interpolate(table, (h, w), mode="bilinear", align_corners=True)  # (1, D, h, w)
            out[(high == h) & (wide == w), :, :h, :w] = grid
        return out

    def embed(self, pixels: Tensor, mask: Tensor | None = None,
              hidden: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """-> patches with positions (B, 1+K, D), their mask (B, 1+K), and their row and column (B, K, 2)."""
        check_pixels(pixels, self.patch)
        if mask is not None and mask.shape != (len(pixels), *pixels.shape[-2:]):
            raise UserError(f"expected a mask of pixels {(len(pixels), *pixels.shape[-2:])}, got {tuple(mask.shape)}: "
                            "it has a number for each pixel, not for each patch.")  # fmt: skip
        cells = self.project(pixels)  # (B, D, h, w)
        width = cells.shape[-1]
        if hidden is not None:
            if self.training and self.most:
                raise UserError("patches cannot be hidden where most of them are left out in training: set the image's "
                                "`most` to 0.")  # fmt: skip
            cells = torch.where(hidden.unflatten(1, cells.shape[-2:]).unsqueeze(1), self.hidden.mT.unsqueeze(-1), cells)
        real = self.grid(mask) if mask is not None else torch.ones_like(cells[:, 0], dtype=torch.bool)
        order = self.order(real)  # (B, K)
        x = (cells + self.stretched(real if mask is not None else real[:1])).flatten(2).transpose(1, 2)  # (B, h*w, D)
        x = x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        first = (self.first + self.positions[:, :1]).expand(len(x), -1, -1)
        kept = torch.cat([torch.ones_like(order[:, :1], dtype=torch.bool), real.flatten(1).gather(1, order)], 1)
        return torch.cat([first, x], 1), kept, torch.stack([order // width, order % width], -1)

    def forward(  # type: ignore[override]
        self, pixels: Tensor, mask: Tensor | None = None, image: int = 0, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W), normalised, and the mask of their pixels (B, H, W), None = nothing is padded
        -> (B, 1+K, D), mask (B, 1+K). `image`: which of a text's pictures these are. `hidden`
        (B, h*w) bool, row by row: patches that become the one vector for what is to be guessed."""
        x, kept, _ = self.embed(pixels, mask, hidden)
        return self.dropout(x) + self.modality[image], kept
