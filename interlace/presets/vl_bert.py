"""VL-BERT (Su et al. 2020, arXiv:1908.08530), figure 1: one BERT over words and regions, each with a visual feature.

The release (github.com/jackroos/VL-BERT) in its form with features computed before. It closes the gap that padding
leaves; here positions are counted over real words, which gives the same states. Words that name a box (VCR) take the
whole picture's feature like all others; the heads of VCR and RefCOCO+ are not here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from interlace.config import VLConfig
from interlace.embed.vl_bert import VLBERTRegions, VLBERTWords, meet
from interlace.heads import HEADS
from interlace.layers import JOINT, Width
from interlace.systems import Parts, bert_start
from interlace.weights import Keys, bert_layer


def vl_bert(**changes: Any) -> VLConfig:
    """Base, with the heads of pre-training. The whole picture first, then 10 to 100 regions."""
    return VLConfig(**{
        "text": VLBERTWords(Width(768, heads=12)),
        "image": VLBERTRegions(Width(768, heads=12)),
        "segments": {"meet": [meet()], "joint": [JOINT] * 12},
        "heads": heads(30522, classes=1601),
        **changes,
    })  # fmt: skip


def vl_bert_large(**changes: Any) -> VLConfig:
    width = Width(1024, heads=16)
    return vl_bert(**{"text": VLBERTWords(width), "image": VLBERTRegions(width),
                      "segments": {"meet": [meet()], "joint": [JOINT] * 24}, **changes})  # fmt: skip


def tiny(**changes: Any) -> VLConfig:
    width = Width(32, heads=4)
    return vl_bert(**{"text": VLBERTWords(width, vocabulary=99), "image": VLBERTRegions(width, features=20, geometry=8),
                      "segments": {"meet": [meet(24)], "joint": [JOINT] * 2},
                      "heads": heads(99, classes=11), **changes})  # fmt: skip


def small(parts: Parts) -> VLConfig:
    """At the size of the parts; grid cells stand for regions, after the whole picture. Their features begin as loud as
    a word's vector: from zero, as released, a few hundred steps would not hear them."""
    width, loud = parts.width(), 0.05
    words = VLBERTWords(width, vocabulary=parts.vocabulary, pad=parts.tokenizer.pad_token_id)
    return vl_bert(text=words, image=parts.grid(VLBERTRegions, whole=True, geometry=64, scale=loud),
                   segments={"meet": [meet(scale=loud)], "joint": [JOINT] * parts.layers},
                   heads=heads(parts.vocabulary, parts.classes))  # fmt: skip


def full(parts: Parts) -> VLConfig:
    """At the paper's size, with the parts' words and regions."""
    width = Width(768, heads=12)
    words = VLBERTWords(width, vocabulary=parts.vocabulary, pad=parts.tokenizer.pad_token_id)
    return vl_bert(text=words, image=parts.grid(VLBERTRegions, whole=True, width=width),
                   heads=heads(parts.vocabulary, parts.classes))  # fmt: skip


def start(config: VLConfig) -> Keys:
    """The lines by which BERT starts it, as in section 3.2."""
    words = {"embeddings.word_embeddings": "text.words", "embeddings.token_type_embeddings": "text.types",
             "embeddings.position_embeddings": "schedule.meet.0.positions",
             "embeddings.LayerNorm": "schedule.meet.0.norm"}  # fmt: skip
    return {**words, **bert_start("schedule.joint.{n}")}


def heads(vocabulary: int, classes: int) -> dict[str, dict[str, Any]]:
    """Masked words, classes of masked regions. The released models learn no matching."""
    return {"mlm": {"kind": "tied", "labels": vocabulary}, "mvrc": {"kind": "vl_bert_regions", "labels": classes}}


# Section 3.3: captions with their regions, and as many texts alone (books, Wikipedia), in every step.
PRETRAIN: list[dict[str, Any]] = [
    {"mlm": {"mask": 0.15, "whole_words": True, "at_least_one": False},
     "mvrc": {"mask": 0.15, "at_least_one": False, "kept": 0.1}},
    {"name": "text", "image": False, "mlm": {"mask": 0.15, "whole_words": True, "at_least_one": False}},
]  # fmt: skip


class RegionClasses(nn.Module):
    """Linear, GELU, linear: the head of masked regions, which has no norm."""

    def __init__(self, text: int, image: int, labels: int):
        super().__init__()
        self.dense, self.out = nn.Linear(image, image), nn.Linear(image, labels)

    def forward(self, states: Tensor) -> Tensor:  # (..., D) -> (..., labels)
        return self.out(F.gelu(self.dense(states)))


HEADS["vl_bert_regions"] = RegionClasses

KEYS: Keys = {
    "vlbert.word_embeddings": "text.words",
    # the third type is that of regions and [END]
    "vlbert.token_type_embeddings.weight": ("text.types.weight", "schedule.meet.0.segment"),
    "vlbert.position_embeddings": "schedule.meet.0.positions",
    "vlbert.end_embedding.weight": "schedule.meet.0.end",
    "vlbert.embedding_LayerNorm": "schedule.meet.0.norm",
    "vlbert.visual_ln_text": "schedule.meet.0.norm_picture",
    "vlbert.visual_ln_object": "image.norm",
    "aux_text_visual_embedding.weight": "schedule.meet.0.no_picture",
    "object_linguistic_embeddings.weight": "image.token",
    "object_mask_word_embedding.weight": "image.hidden_token",
    "object_mask_visual_embedding.weight": "image.hidden_feature",
    "image_feature_extractor.obj_downsample.1": "image.project",
    **bert_layer("vlbert.encoder.layer.{n}", "schedule.joint.{n}"),
    "vlbert.pooler.dense": "poolers.text.dense",  # VQA's files have one and do not read it
    "vlbert.mlm_head.predictions.transform.dense": "heads.mlm.dense",
    "vlbert.mlm_head.predictions.transform.LayerNorm": "heads.mlm.norm",
    "vlbert.mlm_head.predictions.decoder.weight": "text.words.weight",
    "vlbert.mlm_head.predictions.bias": "heads.mlm.bias",
    "vlbert.mvrc_head.transform.dense": "heads.mvrc.dense",
    "vlbert.mvrc_head.region_cls_pred": "heads.mvrc.out",
    "final_mlp.0.dense": "heads.answers.dense",  # VQA: of the state of [MASK] in "question [SEP] [MASK] [SEP]"
    "final_mlp.0.LayerNorm": "heads.answers.norm",
    "final_mlp.2": "heads.answers.out",
}
