"""VL-BERT (Su et al. 2020, arXiv:1908.08530), figure 1: one BERT over words and regions, each with a visual feature.

The release (github.com/jackroos/VL-BERT) in its form with features computed before. It closes the gap that padding
leaves; here positions are counted over real words, which gives the same states. Words that name a box (VCR) take the
whole picture's feature like all others, as in the release with NO_GROUNDING.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.config import VLConfig
from interlace.embed.vl_bert import VLBERTRegions, VLBERTWords, meet
from interlace.errors import UserError
from interlace.heads import HEADS, task_head
from interlace.layers import JOINT, Width
from interlace.model import Half, VLModel
from interlace.streams import POOLED
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


# Section 4.2.3: a score for each region, through the transform of `mvrc`, which it starts as
REFER: dict[str, Any] = {"kind": "vl_bert_regions", "labels": 1}
# Section 4.2.1: a score for each answer, and of each region its class, of COCO's 80 and the background
CHOOSE: dict[str, Any] = {"kind": "linear", "labels": 1, "dropout": 0.1}
OBJECTS: dict[str, Any] = {"kind": "vl_bert_regions", "labels": 81}


def vl_bert_refcoco(make: Callable[..., VLConfig] = vl_bert, **changes: Any) -> VLConfig:
    """As fine-tuned for RefCOCO+: which region does an expression mean? `point` asks it. `make`: the size."""
    return make(**{"heads": {"refer": REFER}, **changes})


def vl_bert_vcr(make: Callable[..., VLConfig] = vl_bert, **changes: Any) -> VLConfig:
    """As fine-tuned for VCR: which of four answers is right, and in a second model which of four reasons? `choose` asks
    it. The only task whose model has a pooler. `make`: the size."""
    config = make(**{"heads": {"choose": CHOOSE, "objects": OBJECTS}, **changes})
    config.text.pool = "tanh"
    return config


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


def point(model: VLModel, text: Half, picture: Half) -> Tensor:
    """RefCOCO+: expressions and pictures, B of each -> a score for each region (B, I), the whole picture first; padding
    has -1e4. The release trains each score by itself: 1 where the region overlaps the one meant by more than half
    (intersection over union), else 0. Raises UserError for another number of pictures and for a model without the
    head."""
    head = task_head(model.heads, "refer", "vl_bert_refcoco")
    if len(text.states) != len(picture.states):
        raise UserError(f"expected a picture for each expression, {len(text.states)}, and got {len(picture.states)}: "
                        "repeat a picture that has several, picture.rows(index).")  # fmt: skip
    out = model.fuse(text, picture)
    assert out.image is not None and picture.mask is not None
    scores = head(out.image[:, 1:]).squeeze(-1)  # (B, I): the first cell is [END]
    return scores.masked_fill(~picture.mask[:, 1:].bool(), -1e4)


def choose(model: VLModel, answers: Half, pictures: Half, choices: int = 4) -> Tensor:
    """VCR: texts `[CLS] question [SEP] answer [SEP]`, types 0 and 1, all `choices` of the first question before those
    of the second, and B pictures -> scores (B, choices). The release trains each by itself, 1 for the right one and 0
    for the others. Raises UserError for another number of texts and for a model without the head."""
    head, count = task_head(model.heads, "choose", "vl_bert_vcr"), len(pictures.states)
    if len(answers.states) != choices * count:
        raise UserError(f"expected {choices} answers for each picture, {choices * count} for {count}, and got "
                        f"{len(answers.states)}: give all answers of the first question, then all of the second, and "
                        "a picture for each question.")  # fmt: skip
    own = torch.arange(count, device=pictures.states.device).repeat_interleave(choices)  # 0, 0, 0, 0, 1, ...
    return head(model.fuse(answers, pictures.rows(own), asked=POOLED).pooled_text).view(count, choices)


_BODY: Keys = {
    "vlbert.word_embeddings": "text.words",
    # the third type is that of regions and [END]
    "vlbert.token_type_embeddings.weight": ("text.types.weight", "schedule.meet.0.segment"),
    "vlbert.position_embeddings": "schedule.meet.0.positions",
    "vlbert.end_embedding.weight": "schedule.meet.0.end",
    "vlbert.embedding_LayerNorm": "schedule.meet.0.norm",
    "vlbert.visual_ln_text": "schedule.meet.0.norm_picture",
    "vlbert.visual_ln_object": "image.norm",
    "object_linguistic_embeddings.weight": "image.token",
    "image_feature_extractor.obj_downsample.1": "image.project",
    **bert_layer("vlbert.encoder.layer.{n}", "schedule.joint.{n}"),
    "vlbert.pooler.dense": "poolers.text.dense",  # VCR reads it; a VQA file that has one does not
    "aux_text_visual_embedding.weight": "schedule.meet.0.no_picture",
    "object_mask_word_embedding.weight": "image.hidden_token",
    "object_mask_visual_embedding.weight": "image.hidden_feature",
}
KEYS: Keys = {
    **_BODY,
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
# The two tasks below are trained end to end: their files hold the ResNet that made the features. It is left out here,
# and only features from that very network mean anything to such a model.
_RESNET: Keys = {"image_feature_extractor.backbone": None, "image_feature_extractor.head": None,
                 "image_feature_extractor.roi_head_feature_extractor": None}  # fmt: skip
REFCOCO_KEYS: Keys = {**_BODY, **_RESNET, "final_mlp.0.dense": "heads.refer.dense", "final_mlp.2": "heads.refer.out"}
VCR_KEYS: Keys = {
    **{theirs.replace("vlbert.", "vlbert._module."): ours for theirs, ours in _BODY.items()},
    **_RESNET,
    "final_mlp.1": "heads.choose.out",
    "cnn_loss_reg.0.dense": "heads.objects.dense",
    "cnn_loss_reg.2": "heads.objects.out",
}
# only pre-training reads them, where regions are hidden and texts are alone: files fine-tuned by the release lack them
UNTUNED = ("schedule.meet.0.no_picture", "image.hidden_token", "image.hidden_feature")
