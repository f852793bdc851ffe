"""UNITER (Chen et al. 2020, arXiv:1909.11740), figure 1: words and regions are one sequence from the first layer on.

The release (github.com/ChenRocks/UNITER) closes the gap between words and regions that padding leaves; here padding
stays where it is and is not seen, which gives the same states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interlace.config import VLConfig
from interlace.embed.regions import UNITERRegions
from interlace.embed.words import Words
from interlace.heads import HEADS
from interlace.layers import JOINT, Width
from interlace.systems import BERT_WORDS, Parts, bert_start
from interlace.weights import Keys, bert_layer


def uniter(**changes: Any) -> VLConfig:
    """Base, with the heads of pre-training. Cased words; 10 to 100 regions of a detector with 1600 classes."""
    return VLConfig(**{
        "text": Words(Width(768, heads=12), pool="tanh", vocabulary=28996),
        "image": UNITERRegions(Width(768, heads=12)),
        "segments": {"joint": [JOINT] * 12},
        "heads": heads(28996, features=2048, classes=1601),
        **changes,
    })  # fmt: skip


def uniter_large(**changes: Any) -> VLConfig:
    width = Width(1024, heads=16)
    return uniter(**{"text": Words(width, pool="tanh", vocabulary=28996), "image": UNITERRegions(width),
                     "segments": {"joint": [JOINT] * 24}, **changes})  # fmt: skip


def tiny(**changes: Any) -> VLConfig:
    width = Width(32, heads=4)
    return uniter(**{"text": Words(width, pool="tanh", vocabulary=99, positions=24),
                     "image": UNITERRegions(width, features=20), "segments": {"joint": [JOINT] * 2},
                     "heads": heads(99, features=20, classes=11), **changes})  # fmt: skip


def small(parts: Parts) -> VLConfig:
    """At the size of the parts; grid cells stand for regions."""
    return uniter(text=parts.words(), image=parts.grid(UNITERRegions), segments={"joint": [JOINT] * parts.layers},
                  heads=heads(parts.vocabulary, parts.channels, parts.classes))  # fmt: skip


def full(parts: Parts) -> VLConfig:
    """At the paper's size, with the parts' words and regions."""
    width = Width(768, heads=12)
    return uniter(text=parts.words(width=width), image=parts.grid(UNITERRegions, width=width),
                  heads=heads(parts.vocabulary, parts.channels, parts.classes))  # fmt: skip


def start(config: VLConfig) -> Keys:
    """The lines by which BERT starts it, as in section 4.1."""
    return {**BERT_WORDS, **bert_start("schedule.joint.{n}")}


def heads(vocabulary: int, features: int, classes: int) -> dict[str, dict[str, Any]]:
    """Masked words, region features, region classes (and KL, the same head), matching."""
    return {
        "mlm": {"kind": "tied", "labels": vocabulary},  # to the words' table
        "mrfr": {"kind": "tied", "labels": features, "stream": "image"},  # to the features' projection, backwards
        "mrc": {"kind": "transformed", "labels": classes, "stream": "image"},
        "match": {"kind": "linear", "labels": 2},
    }


def answers(labels: int, size: int = 768) -> dict[str, Any]:
    """The head of VQA and visual entailment: twice as wide inside. Section 4 of the supplement."""
    return {"kind": "transformed", "labels": labels, "hidden": 2 * size}


# Section 4.1, on all data: one task a step, drawn with these shares. Only one stream is ever corrupted (section 3.2).
PRETRAIN = [
    {"share": 12, "mlm": {"mask": 0.15}},
    {"share": 9, "itm": {"negatives": "swap", "rate": 0.5}, "wra": {"weight": 0.1}},
    {"share": 6, "mrfr": {"mask": 0.15}},
    {"share": 6, "mrc_kl": {"mask": 0.15}},
]


class PairedAttention(nn.Module):
    """NLVR2, is a sentence true of two pictures: each (text, picture) sequence reads the other one, both are pooled by
    attention. Figure 5 of the paper's supplement: pair-biattn."""

    def __init__(self, text: int, image: int, heads: int, labels: int = 2, dropout: float = 0.1):
        super().__init__()
        self.left = nn.MultiheadAttention(text, heads, dropout=dropout, batch_first=True)
        self.right = nn.MultiheadAttention(text, heads, dropout=dropout, batch_first=True)
        self.merge, self.dropout = nn.Linear(2 * text, text), nn.Dropout(dropout)
        self.weigh, self.out = nn.Linear(text, 1), nn.Linear(2 * text, labels)

    def pool(self, x: Tensor, mask: Tensor) -> Tensor:
        score = torch.relu(self.weigh(x)).squeeze(-1).masked_fill(~mask.bool(), -torch.inf)
        return (self.dropout(score.softmax(-1)).unsqueeze(1) @ x).squeeze(1)  # (B, D)

    def forward(self, left: Tensor, right: Tensor, left_mask: Tensor, right_mask: Tensor) -> Tensor:
        """Two joint sequences (B, L, D) with masks (B, L), 1 = real -> (B, labels)."""
        no_left, no_right = ~left_mask.bool(), ~right_mask.bool()
        from_right = self.left(left, right, right, key_padding_mask=no_right, need_weights=False)[0]
        from_left = self.right(right, left, left, key_padding_mask=no_left, need_weights=False)[0]
        left = self.dropout(torch.relu(self.merge(torch.cat([from_right, left], -1))))
        right = self.dropout(torch.relu(self.merge(torch.cat([from_left, right], -1))))
        return self.out(torch.cat([self.pool(left, left_mask), self.pool(right, right_mask)], -1))


HEADS["uniter_pair"] = PairedAttention

KEYS: Keys = {
    "uniter.embeddings.word_embeddings": "text.words",
    "uniter.embeddings.position_embeddings": "text.positions",
    "uniter.embeddings.token_type_embeddings": "text.types",
    "uniter.embeddings.LayerNorm": "text.norm",
    "uniter.img_embeddings.img_linear": "image.features",
    "uniter.img_embeddings.img_layer_norm": "image.norm_features",
    "uniter.img_embeddings.pos_linear": "image.boxes",
    "uniter.img_embeddings.pos_layer_norm": "image.norm_boxes",
    "uniter.img_embeddings.mask_embedding": "image.hidden",
    "uniter.img_embeddings.LayerNorm": "image.norm",
    **bert_layer("uniter.encoder.layer.{n}", "schedule.joint.{n}"),
    "uniter.pooler.dense": "poolers.text.dense",
    "cls.predictions.transform.dense": "heads.mlm.dense",
    "cls.predictions.transform.LayerNorm": "heads.mlm.norm",
    "cls.predictions.decoder.weight": "text.words.weight",
    "cls.predictions.bias": "heads.mlm.bias",
    "feat_regress.net.0": "heads.mrfr.dense",
    "feat_regress.net.2": "heads.mrfr.norm",
    "feat_regress.weight": "image.features.weight",
    "feat_regress.bias": "heads.mrfr.bias",
    "region_classifier.net.0": "heads.mrc.dense",
    "region_classifier.net.2": "heads.mrc.norm",
    "region_classifier.net.3": "heads.mrc.out",
    "itm_output": "heads.match.out",
    "rank_output": "heads.rank.out",  # starts as row 1 of itm_output
    "vqa_output.0": "heads.answers.dense",
    "vqa_output.2": "heads.answers.norm",
    "vqa_output.3": "heads.answers.out",
    "re_output.0": "heads.refer.dense",  # referring expressions: a score for each region
    "re_output.2": "heads.refer.norm",
    "re_output.3": "heads.refer.out",
    "attn1": "heads.pair.left",
    "attn2": "heads.pair.right",
    "fc.0": "heads.pair.merge",
    "attn_pool.fc.0": "heads.pair.weigh",
    "nlvr2_output": "heads.pair.out",
}
