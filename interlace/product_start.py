"""A match head that begins knowing: two pooled vectors whose product says how much a text and a picture agree.

ViLBERT multiplies its pooled vectors and asks one linear (presets/vilbert.py). From random weights both poolers end up
saying one thing, whether they match, along a handful of directions, and what reads the same product afterwards,
answers, finds no more in it. So they begin as what captions and pictures agree on, their canonical correlations
(canonical.py), each direction once as it is and once turned round, since a ReLU lets half of it through:

    text   relu(+-A y)      image   relu(+-B x)      A y and B x: what agrees, of the states before anything is learned
    match  scale * sum of the product + offset, fitted on pairs that A and B have not seen (Platt 1999)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn

from interlace.canonical import canonical
from interlace.evaluate import platt
from interlace.presets.vilbert import Product
from interlace.streams import Asked
from interlace.tasks.baselines import fold_of_groups
from interlace.warm_start import over_rows

if TYPE_CHECKING:
    from interlace.data.batches import Collate, Samples
    from interlace.learner import Learner
    from interlace.model import Half

FOLDS, WRONG = 5, 4  # a fifth of the groups is what scale and offset are fitted on; wrong pictures of each text
Maps = dict[str, tuple[np.ndarray, np.ndarray]]  # stream -> (D, P) and (P,): of a pooler, before its ReLU


@torch.no_grad()
def align_product(learner: Learner, samples: Samples, collate: Collate, batch: int = 64,
                  seed: int = 0) -> float | None:  # fmt: skip
    """Both poolers and the match head of a model that multiplies its pooled vectors. Returns the share of held-out
    training pairs that the start tells right, balanced; None, with nothing changed, for another kind of head, with
    fewer than 20 groups of captions, or where all pictures have one vector."""
    head = dict(learner.heads.items()).get("match")
    dense = {stream: cast(nn.Linear, pooler.dense) for stream, pooler in learner.poolers.items()}
    if not isinstance(head, Product) or {part.out_features for part in dense.values()} != {head.out.in_features}:
        return None
    first = torch.zeros(1, 1, dtype=torch.long)

    def states(text: Half, image: Half) -> tuple[torch.Tensor, torch.Tensor]:
        out = learner.fuse(text, image, asked=Asked(first, first, pooled=()))
        assert out.text is not None and out.image is not None
        return out.text[:, 0], out.image[:, 0]

    y, x, groups = over_rows(learner, samples, collate, "match, start", batch, seed, states)
    if len(set(groups)) < 20 or any(part.std(0).max() <= 1e-4 * np.abs(part).max() for part in (x, y)):
        return None
    held = fold_of_groups(groups, FOLDS, seed) == 0
    signs, true = agreement(agreeing(x[~held], y[~held], [g for g, out in zip(groups, held) if not out],
                                     head.out.in_features, seed), x[held], y[held], seed)  # fmt: skip
    with torch.enable_grad():
        scale, offset = platt(signs, true)
    said = scale * signs[:, 0] + offset > 0
    for stream, (weight, bias) in agreeing(x, y, groups, head.out.in_features, seed).items():
        dense[stream].weight.copy_(torch.from_numpy(weight.T))
        dense[stream].bias.copy_(torch.from_numpy(bias))
    sign = torch.tensor([1.0, -1.0] if head.flipped else [-1.0, 1.0], device=head.out.weight.device)
    head.out.weight.copy_((scale / 2 * sign).unsqueeze(1).expand_as(head.out.weight))
    head.out.bias.copy_(offset / 2 * sign)
    return float((said[true].double().mean() + (~said[~true]).double().mean()) / 2)


def agreeing(x: np.ndarray, y: np.ndarray, groups: list, size: int, seed: int) -> Maps:
    """Pictures (N, Di) and texts (N, Dt) -> what poolers of `size` begin as; each side as loud as 1 on average."""
    found = canonical(x, y, groups=groups, seed=seed)
    maps: Maps = {}
    for stream, fit, states in (("text", found.text, y), ("image", found.image, x)):
        fit, mean = fit[:, : size // 2], states.mean(0)
        fit = fit / np.sqrt(np.square((states - mean) @ fit).mean())
        both = np.zeros((len(fit), size))  # units that are left over say nothing
        both[:, : 2 * fit.shape[1]] = np.concatenate([fit, -fit], 1)
        maps[stream] = both.astype(np.float32), (-mean @ both).astype(np.float32)
    return maps


def agreement(maps: Maps, x: np.ndarray, y: np.ndarray, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the product (N, 1) of each pair and of WRONG shuffled ones, and which of them are pairs (N,)."""
    pooled = {stream: np.maximum(states @ maps[stream][0] + maps[stream][1], 0)
              for stream, states in (("text", y), ("image", x))}  # fmt: skip
    rng, rows = np.random.default_rng(seed), np.arange(len(x))
    beside = np.concatenate([rows, *((rows + shift) % len(x) for shift in rng.integers(1, max(2, len(x)), WRONG))])
    sums = (np.tile(pooled["text"], (1 + WRONG, 1)) * pooled["image"][beside]).sum(1)
    return torch.from_numpy(sums).double().unsqueeze(1), torch.arange(len(sums)) < len(x)
