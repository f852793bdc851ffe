"""A contrast head for a loss over single pairs."""

from __future__ import annotations

import torch
from torch import nn

from interlace.heads.pair import Contrast


class SigmoidContrast(Contrast):
    """Both pooled vectors into one space; a pair's logit is `scale` times its cosine, plus `bias`. SigLIP (Zhai et al.
    2023, arXiv:2303.15343), section 3.2: scale 10 and bias -10 at the start, so that most pairs are no match then."""

    def __init__(self, text: int, image: int, size: int = 256, temperature: float = 0.1, bias: float = -10.0,
                 norm: bool = False, whole: bool = False, features: int = 0):  # fmt: skip
        super().__init__(text, image, size, temperature, norm, whole, features)
        self.bias = nn.Parameter(torch.tensor(bias))
