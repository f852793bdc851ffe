"""MLIM (Arici et al. 2021, arXiv:2109.12178): words and a shallow CNN's cells in one BERT, which guesses hidden words
and draws the whole picture again. No detector, no alignment loss, no negatives.

There is neither code nor a checkpoint of the paper, and the paper's text was not at hand: what follows was told by its
abstract and by summaries. Known: the CNN's and the decoder's kinds, depths and sizes, BERT-large uncased, 384 pixels,
[MASK]'s vector for hidden words and cells alike, both losses and their sum, the three masking modes and the heavy rate
of 0.8, modality dropout. Not verified, so defaults of ours and options all:
- how many of the CNN's seven layers have a stride: five here (12x12 cells), seven in `mlim_grid3` (3x3 cells); the
  channels of CNN and decoder, which meet the published sizes of 0.2 and 2.8 million;
- pixels between 0 and 1 for the CNN too, no class token for the picture, type 0 and one norm for words and cells;
- hidden words are always replaced by [MASK], a light rate of 0.15, the weight 1 of the picture's loss;
- how the two items of a pair are compared in fine-tuning, and the chances of modality dropout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.config import VLConfig
from interlace.embed.conv import Blocks
from interlace.embed.stem import ImageStem
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.heads import HEADS
from interlace.heads.pixels import halving
from interlace.layers import JOINT, Width
from interlace.model import VLModel, VLOutput
from interlace.systems import BERT_WORDS, Parts, bert_start
from interlace.weights import Keys, Report, bert_layer, load_foreign


def mlim(text: Words | None = None, image: Blocks | ImageStem | None = None, layers: int = 24,
         **changes: Any) -> VLConfig:  # fmt: skip
    """The paper's size: BERT-large, 384 pixels, 12x12 cells, with the heads of pre-training. Texts of 128 words."""
    text = text or Words(LARGE, pool="tanh")
    image = image or Blocks(LARGE)
    return VLConfig(**{
        "text": text,
        "image": image,
        "segments": {"joint": [JOINT] * layers},
        "heads": {"mlm": {"kind": "tied", "labels": text.vocabulary}, "pixels": decoder(image)},
        **changes,
    })  # fmt: skip


def mlim_grid3(**changes: Any) -> VLConfig:
    """All seven layers of the CNN with a stride, read literally: 3x3 cells of 128x128 pixels."""
    image = Blocks(LARGE, channels=[8, 16, 24, 32, 40, 44], strides=[2] * 7, kernels=[2] * 7)
    return mlim(**{"image": image, **changes})


def mlim_base(**changes: Any) -> VLConfig:
    """BERT-base, 224 pixels, 7x7 cells. Not in the paper."""
    width = Width(768, heads=12)
    return mlim(**{"text": Words(width, pool="tanh"), "image": Blocks(width, size=224), "layers": 12, **changes})


def tiny(**changes: Any) -> VLConfig:
    width = Width(32, heads=4)
    image = Blocks(width, size=32, channels=[8, 16], strides=[2, 2, 2], kernels=[2, 2, 2], mask=4)
    words = Words(width, pool="tanh", vocabulary=99, positions=24)
    heads = {"mlm": {"kind": "tied", "labels": 99}, "pixels": decoder(image, layers=5)}
    return mlim(**{"text": words, "image": image, "layers": 2, "heads": heads, **changes})


LARGE = Width(1024, heads=16)


def decoder(image: Blocks | ImageStem, layers: int = 10) -> dict[str, Any]:
    """The pixels head for this embedder. Raises UserError for cells whose side in pixels is no power of two."""
    side = round(image.cells**0.5)
    pixels = image.size // side
    doublings = round(math.log2(pixels))
    if side * 2**doublings != image.size:
        raise UserError(f"the decoder doubles cells to pixels, so a block's side must be a power of two; got "
                        f"{pixels}: {side} x {side} cells of a picture of {image.size}. Choose model.size and "
                        "model.grid or model.patch for that.")  # fmt: skip
    return halving(image.width.size, side, doublings, layers)


def small(parts: Parts) -> VLConfig:
    """At the size of the parts. Where they have an image tower its grid cells stand for the CNN's: the paper's CNN
    starts untrained, and a thousand pairs teach it next to nothing. What is hidden of them their neighbours still know
    a little of. With `model.image=patches` the paper's CNN: of seven convolutions as many have a stride as it takes to
    make blocks of `patch` pixels. Raises UserError for a patch that is no power of two up to 128, and for cells that
    cannot be doubled to the picture."""
    if parts.image is not None:
        return mlim(text=parts.words(), image=parts.cells(parts.width(), hide=True), layers=parts.layers)
    patch = parts.what.patch
    strided = patch.bit_length() - 1
    if 2**strided != patch or not 0 < strided <= 7:
        raise UserError(f"mlim halves a picture up to seven times, so model.patch is 2, 4, 8, ... or 128; got {patch}.")
    layers = [2] * strided + [1] * (7 - strided)
    image = Blocks(parts.width(), size=parts.what.size, strides=layers, kernels=list(layers),
                   mask=parts.tokenizer.mask_token_id)  # fmt: skip
    return mlim(text=parts.words(), image=image, layers=parts.layers)


def full(parts: Parts) -> VLConfig:
    """At the paper's size, with the parts' words."""
    return mlim(text=parts.words(width=LARGE), image=Blocks(LARGE, mask=parts.tokenizer.mask_token_id))


def start(config: VLConfig) -> Keys:
    """The lines by which BERT starts it."""
    return {**BERT_WORDS, **bert_start("schedule.joint.{n}")}


# Both losses in one forward: a row hides most of its picture, most of its words, or a little of both
PRETRAIN: list[dict[str, Any]] = [
    {"mam": {"heavy": 0.8, "light": 0.15}, "recon": {"recon_reduction": "sum"}},
]

# --------------------------------------------------------------------------------------------------------- fine-tuning


class PairOfItems(nn.Module):
    """Are two items, each a picture with its text, the same? [p; q; |p - q|; p * q] of their pooled vectors through one
    hidden layer."""

    def __init__(self, text: int, image: int, hidden: int = 0, dropout: float = 0.1):
        super().__init__()
        self.hidden, self.dropout = nn.Linear(4 * text, hidden or text), nn.Dropout(dropout)
        self.out = nn.Linear(hidden or text, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:  # (B, D), (B, D) -> (B,)
        both = torch.cat([first, second, (first - second).abs(), first * second], -1)
        return self.out(self.dropout(F.gelu(self.hidden(both)))).squeeze(-1)


HEADS["mlim_same"] = PairOfItems
ITEMS: dict[str, Any] = {"kind": "mlim_same"}  # mlim(heads={"same": ITEMS})


def compare(model: VLModel, first: VLOutput, second: VLOutput) -> Tensor:
    """Closely matching items: the outputs of two passes, one for each item -> logits (B,), above 0 = the same item. The
    order of the two counts. Train with binary cross-entropy, and modality dropout in both passes."""
    return model.heads["same"](first.pooled_text, second.pooled_text)


# ------------------------------------------------------------------------------------------------------------- weights

KEYS: Keys = {  # of the BERT it starts from; there is no release of its own
    "bert.embeddings.word_embeddings": "text.words",
    "bert.embeddings.position_embeddings": "text.positions",
    "bert.embeddings.token_type_embeddings": "text.types",
    "bert.embeddings.LayerNorm": "text.norm",
    "bert.embeddings.position_ids": None,
    **bert_layer("bert.encoder.layer.{n}", "schedule.joint.{n}"),
    "bert.pooler.dense": "poolers.text.dense",
    "cls.predictions.transform.dense": "heads.mlm.dense",
    "cls.predictions.transform.LayerNorm": "heads.mlm.norm",
    "cls.predictions.decoder.weight": "text.words.weight",  # tied
    "cls.predictions.decoder.bias": "heads.mlm.bias",
    "cls.predictions.bias": "heads.mlm.bias",
    "cls.seq_relationship": None,  # next sentence: not learnt here
}
FRESH = ("image.", "heads.pixels.", "heads.same.")  # no BERT has them


def load_bert(model: VLModel, tensors: Mapping[str, Tensor], prefix: str = "") -> Report:
    """Fills words, layers, pooler and word head with a BERT's weights (bert-large-uncased), under transformers' names.
    CNN, cells' positions and decoder keep their random ones. Raises UserError as `load_foreign` does."""
    return load_foreign(model, tensors, KEYS, prefix, FRESH)
