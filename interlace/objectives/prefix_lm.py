"""The rest of the text, from the picture and the words before it. Wang et al. 2021 (SimVLM, arXiv:2108.10904)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from interlace.decoder import TextDecoder
from interlace.model import Half, VLModel, VLOutput
from interlace.streams import first_words, prefix


def read_and_write(model: VLModel, ids: Tensor, mask: Tensor | None, given: Tensor, image: Half | None) -> VLOutput:
    """One stack: words (B, T), mask (B, T), how many of each row are its prefix (B,), the image's half -> the states of
    both streams. The state of a word tells the word after it: it has seen the picture, the prefix and what came before.
    """
    see = prefix(mask, None if image is None else image.mask, first_words(given, ids.shape[1]))
    return model.fuse(model.half_text(ids, mask, see=see), image, see)


def next_words(ids: Tensor, mask: Tensor, given: Tensor) -> Tensor:
    """Words (B, T), mask (B, T), prefixes (B,) -> labels (B, T): at each place the word after it, if that is to be
    written; else -100. The last word of the prefix tells the first one."""
    scored = mask.bool() & ~first_words(given, ids.shape[1])
    return F.pad(ids.masked_fill(~scored, -100)[:, 1:], (0, 1), value=-100)


def read_prefix(model: VLModel, ids: Tensor, mask: Tensor, given: Tensor, image: Half | None) -> Half:
    """Encoder and decoder: the prefix (the first `given` (B,) of the words (B, T)) and the image's half through the
    model, where all see each other -> what the decoder reads. The other words are not there at all."""
    assert model.decoder is not None
    text = model.half_text(ids, mask.bool() & first_words(given, ids.shape[1]))
    out = model.fuse(text, image)
    return Half(*model.decoder.beside(out.text, text.mask, out.image, None if image is None else image.mask))


def rest(decoder: TextDecoder, ids: Tensor, mask: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """The words after the prefix as the decoder meets them: its start and all but the last (B, T), and as labels
    (B, T), -100 = not scored.

    >>> rest(decoder, [[101, 7, 8, 9, 102]], [[1, 1, 1, 1, 1]], [2])      # 7 is given
    [[101, 8, 9, 102, 0]], [[8, 9, 102, -100, -100]]
    """
    length = ids.shape[1]
    at = torch.arange(length, device=ids.device) + given.unsqueeze(1)  # (B, T)
    real = (at < length) & mask.bool().gather(1, at.clamp(max=length - 1))
    words = ids.gather(1, at.clamp(max=length - 1))
    start, pad = decoder.config.bos_token_id, decoder.config.pad_token_id
    before = F.pad(words.masked_fill(~real, pad)[:, :-1], (1, 0), value=start)
    return before, words.masked_fill(~real, -100)
