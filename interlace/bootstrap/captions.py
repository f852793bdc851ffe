"""One caption a picture, drawn from the nucleus: the likeliest words that together have `top_p` of the probability.
Holtzman et al. 2020 (arXiv:1904.09751), section 3.1; BLIP (arXiv:2201.12086), section 4: p = 0.9, since what beam
search writes is too safe to teach anything new."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from interlace.data.sources.build import hash64
from interlace.generate import describe
from interlace.model import Half
from interlace.run import Run

PENALTY = 1.1  # on words that were written already: of BLIP's release, whenever it samples


class Nucleus(LogitsProcessor):
    """Chooses the next word of each row by that row's own lot, (B, L) from 0 to below 1, one a step: what a row draws
    depends neither on the rows beside it nor on how often a process was started."""

    def __init__(self, lots: Tensor, top_p: float):
        self.lots, self.top_p, self.step = lots, top_p, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        share, word = likeliest(scores.float().softmax(-1), self.top_p)  # (B, K)
        before = share.cumsum(-1) - share
        share = share * (before < self.top_p)  # the likeliest is always among them
        upto = share.cumsum(-1)
        lot = self.lots[:, self.step, None] * upto[:, -1:]
        at = torch.searchsorted(upto, lot, right=True)
        # past the nucleus by rounding: back to its last word
        at = torch.minimum(at, (share > 0).sum(-1, keepdim=True) - 1)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, word.gather(-1, at), 0.0)


def likeliest(share: Tensor, top_p: float, most: int = 512) -> tuple[Tensor, Tensor]:
    """(B, V) -> shares and words, the largest first, (B, K): as many as hold the nuclei of all rows. All are sorted
    only where a few hundred do not."""
    if share.shape[-1] > most:
        top = share.topk(most, dim=-1)
        if bool((top.values.sum(-1) >= top_p).all()):
            return top.values, top.indices
    return share.sort(dim=-1, descending=True, stable=True)


def lots(ids: Sequence[str], seed: int, length: int) -> np.ndarray:
    """(B, length) float32 from 0 to below 1, by the seed and each row's id alone."""
    drawn = [np.random.default_rng([seed, hash64(id)]).random(length, np.float32) for id in ids]
    return np.stack(drawn)


@torch.inference_mode()
def sampled(run: Run, image: Half, ids: Sequence[str], seed: int, top_p: float, max_length: int = 0) -> list[str]:
    """A caption of each picture (the image's half, B rows), whose rows have these ids. `max_length`: tokens, 0 for as
    many as in training."""
    start, end, pad = run._start()
    most = max_length or run.processor.max_length
    drawn = torch.from_numpy(lots(ids, seed, most)).to(image.states.device)
    written = describe(run.model, image, torch.tensor([start]), (start, end, pad), beams=1, max_length=most,
                       min_length=0, repetition_penalty=PENALTY, suppress_tokens=run.never_written,
                       logits_processor=LogitsProcessorList([Nucleus(drawn, top_p)]))  # fmt: skip
    return [" ".join(text.split()) for text in run._texts(written[:, 1:], end)]
