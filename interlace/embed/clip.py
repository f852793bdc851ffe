"""CLIP's two inputs. Radford et al. 2021 (arXiv:2103.00020), sections 2.4 and 2.5; details as in the release."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from interlace.embed.patches import PatchEmbedding, Patches
from interlace.embed.words import WordEmbedding, Words


@dataclass
class CLIPWords(Words):
    """Word + position, no norm. `eos`: the text ends there, and its vector is the state there (pool "last")."""

    pool: str = "last"
    vocabulary: int = 49408
    positions: int = 77
    types: int = 0
    eos: int = 49407
    name = "clip_words"

    def build(self) -> nn.Module:
        return CLIPWordEmbedding(self)


class CLIPWordEmbedding(WordEmbedding):
    def __init__(self, spec: CLIPWords):
        super().__init__(spec)
        self.words = nn.Embedding(spec.vocabulary, spec.width.size)  # [EOS] also pads, so no row of it may be frozen
        self.norm = nn.Identity()  # type: ignore[assignment]
        self.eos = spec.eos

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, mask: Tensor | None = None, type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """ids (B, T) -> (B, T, D) and the mask (B, T) of the words up to the first [EOS], itself included."""
        ended = (input_ids == self.eos).cumsum(1) - (input_ids == self.eos).long()  # [EOS] before this word
        real = ended == 0
        return super().forward(input_ids), real if mask is None else real & mask.bool()


@dataclass
class CLIPPatches(Patches):
    """Patches without a bias in the convolution, and a norm after the positions."""

    name = "clip_patches"

    def build(self) -> nn.Module:
        return CLIPPatchEmbedding(self)


class CLIPPatchEmbedding(PatchEmbedding):
    def __init__(self, spec: CLIPPatches):
        super().__init__(spec)
        self.project = nn.Conv2d(3, spec.width.size, spec.patch, stride=spec.patch, bias=False)
        self.norm = nn.LayerNorm(spec.width.size, eps=spec.width.eps)

    def forward(self, pixels: Tensor, hidden: Tensor | None = None) -> Tensor:
        """(B, 3, h, w), normalised -> (B, 1 + cells, D)."""
        return self.norm(super().forward(pixels, hidden))


MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # of the release; BLIP's too
