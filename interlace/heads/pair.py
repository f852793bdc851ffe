"""Heads over two pooled vectors, one of each stream."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.errors import UserError
from interlace.sharded import one_number


class Standard(nn.Module):
    """Vectors without what all of them have in common, of unit size: (..., D) -> (..., D). Nothing in it learns."""

    mean: Tensor
    spread: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("spread", torch.ones(()))

    def expect(self, vectors: Tensor) -> None:
        """These (N, D) are what it will be shown."""
        self.mean.copy_(vectors.mean(0))
        self.spread.copy_((vectors - vectors.mean(0)).square().mean().sqrt())

    def forward(self, vectors: Tensor) -> Tensor:
        return (vectors - self.mean) / self.spread


class Contrast(nn.Module):
    """Both pooled vectors into one space. Radford et al. 2021 (CLIP), section 2.3.

    The logit scale starts at ln(1/0.07) and is clamped to [0, ln 100] as in the release. `norm`: the streams arrive
    without a closing norm (a pre-norm model contrasted before its fusion layers), so norm them here. `whole`: a
    system's own layers were made to be run through: it reads the mean over the words' states after all of them, with
    no picture there. `features`: numbers of a cell or region as the tower or detector says it, whose mean is what it
    reads of a picture, as VSE++ does (Faghri et al. 2018, arXiv:1707.05612, section 3.1): the system's projection of
    them is made for its words, and tells pictures apart along few directions. 0: there are none, and it reads the mean
    over the picture's states before the streams meet. Such means are nearly the same for all rows; what
    `align_contrast` found they have in common is taken out first, else the first steps would only push that about.
    """

    def __init__(self, text: int, image: int, size: int = 256, temperature: float = 0.07, norm: bool = False,
                 whole: bool = False, features: int = 0):  # fmt: skip
        super().__init__()
        self.whole, self.features = whole, features
        image = features or image
        self.standard = nn.ModuleDict({"text": Standard(text), "image": Standard(image)}) if whole else None
        self.norm = nn.ModuleDict({"text": nn.LayerNorm(text), "image": nn.LayerNorm(image)}) if norm else None
        self.text, self.image = nn.Linear(text, size, bias=False), nn.Linear(image, size, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    @property
    def scale(self) -> Tensor:
        scale = one_number(self.logit_scale)
        # at a bound it still learns: a release clamps the parameter itself, after each step
        return (scale + (scale.clamp(0, math.log(100)) - scale).detach()).exp()

    def project(self, pooled: Tensor, stream: str) -> Tensor:
        """(B, D) -> (B, P), L2-normalised. `stream`: "text" or "image"."""
        if self.standard is not None:
            pooled = self.standard[stream](pooled)
        if self.norm is not None:
            pooled = self.norm[stream](pooled)
        return F.normalize(getattr(self, stream)(pooled).float(), dim=-1)


class Pair(nn.Module):
    """Pooled text u and image v -> [u; v; u*v] through one hidden layer: the pair as one vector.

    The product is what lets late fusion, whose streams never met, compare them (VQA and NLVR baselines; VOLTA's `mul`).
    u and v are normed one by one before they are multiplied: with small initial weights the product of un-normed
    vectors is two orders smaller than its factors, and a matching head that cannot see it stays at one class.
    """

    def __init__(self, text: int, image: int, hidden: int, out: int, dropout: float = 0.1):
        super().__init__()
        common = min(text, image)
        self.text, self.image = nn.Linear(text, common), nn.Linear(image, common)
        self.norm_text, self.norm_image = nn.LayerNorm(common), nn.LayerNorm(common)
        self.hidden = nn.Linear(3 * common, hidden)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, out)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:  # (B, Dt), (B, Di) -> (B, out)
        u, v = self.norm_text(self.text(text)), self.norm_image(self.image(image))
        return self.out(self.dropout(F.gelu(self.hidden(torch.cat([u, v, u * v], -1)))))


class Match(Pair):
    """Do text and image belong together? Two classes, index 1 = match."""

    def __init__(self, text: int, image: int, dropout: float = 0.1):
        super().__init__(text, image, hidden=min(text, image), out=2, dropout=dropout)


class Answers(Pair):
    """One of a closed list of answers, from the pooled pair."""

    def __init__(self, text: int, image: int, labels: int):
        super().__init__(text, image, hidden=2 * min(text, image), out=labels)
        self.labels = labels


def start_answers(head: nn.Module) -> None:
    """One answer of many is right: an answer head, a preset's own too, begins there, or the first steps only learn that
    most are wrong, so loudly that all else the model knew is drowned (Lin et al. 2017, arXiv:1708.02002, section
    4.1)."""
    last = getattr(head, "out", None)
    if isinstance(last, nn.Linear) and last.bias is not None:
        nn.init.constant_(last.bias, -math.log(max(last.out_features - 1, 1)))


def two_each(texts: int, pictures: int) -> None:
    """NLVR2 asks whether a text is true of two pictures. Raises UserError unless there are two for each."""
    if pictures != 2 * texts:
        raise UserError(f"expected two pictures for each text, {2 * texts} for {texts}, and got {pictures}: give both "
                        "pictures of the first text, then both of the second, and so on.")  # fmt: skip


def side_by_side(vectors: Tensor) -> Tensor:
    """(2B, P) -> (B, 2P): rows 2n and 2n+1 as one. Raises UserError for an odd number of rows."""
    if len(vectors) % 2:
        raise UserError(f"expected pairs of rows, a text with its first picture and with its second, and got "
                        f"{len(vectors)} rows: is a picture missing?")  # fmt: skip
    return vectors.reshape(len(vectors) // 2, -1)
