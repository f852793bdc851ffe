"""LXMERT (Tan & Bansal 2019, arXiv:1908.07490), figure 1: two encoders, then a cross-modality encoder.

The release (github.com/airsplay/lxmert) and transformers' classes agree to rounding, except:
- transformers weighs the visual losses with 6.67 (`visual_loss_normalizer`), the release and we with 1 / 0.15;
- what is not scored is labelled -1 in the release, -100 in transformers, anything below 0 here; a batch without any
  scored answer is NaN in both, 0 here;
- transformers' hidden states leave out the embeddings, and its VQA class fine-tunes with cross-entropy, where the
  release and we take the binary one.
Position 0 and type 0 get no gradient in both (`padding_idx`); here they learn. The release never hides a region, since
it always has 36; a mask of regions hides padding here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.config import VLConfig
from interlace.embed.regions import LXMERTRegions
from interlace.embed.words import Words
from interlace.heads import HEADS, task_head
from interlace.heads.pair import side_by_side, two_each
from interlace.layers import BOTH, IMAGE, TEXT, Width, co
from interlace.model import Half, VLModel
from interlace.streams import POOLED
from interlace.systems import BERT_WORDS, Parts, bert_start
from interlace.weights import bert_layer


class RegionLabels(nn.Module):
    """What is in a region: its object, its attribute, its feature. One transform, three linears."""

    def __init__(self, text: int, image: int, objects: int, attributes: int, features: int):
        super().__init__()
        self.dense, self.activation = nn.Linear(image, image), nn.GELU()
        self.norm = nn.LayerNorm(image, eps=1e-12)
        self.objects, self.attributes = nn.Linear(image, objects), nn.Linear(image, attributes)
        self.features = nn.Linear(image, features)

    def forward(self, states: Tensor) -> dict[str, Tensor]:  # (B, I, D) -> three times (B, I, labels)
        x = self.norm(self.activation(self.dense(states)))
        return {"objects": self.objects(x), "attributes": self.attributes(x), "features": self.features(x)}


class TwoPictures(nn.Module):
    """NLVR2, is a text true of two pictures: what was pooled of the text with either, side by side, then linear, GELU,
    norm, linear, all but the last twice as wide as the text. The release's src/tasks/nlvr2_model.py."""

    def __init__(self, text: int, image: int, labels: int = 2):
        super().__init__()
        self.dense, self.norm = nn.Linear(2 * text, 2 * text), nn.LayerNorm(2 * text, eps=1e-12)
        self.out = nn.Linear(2 * text, labels)

    def forward(self, text: Tensor, image: Tensor | None = None) -> Tensor:
        """Rows 2n and 2n+1 are one text with its two pictures: (2B, D) -> (B, labels). Raises UserError for an odd
        number of rows."""
        return self.out(self.norm(F.gelu(self.dense(side_by_side(text)))))


HEADS["region_labels"] = RegionLabels
HEADS["lxmert_two_pictures"] = TwoPictures

NLVR2: dict[str, Any] = {"kind": "lxmert_two_pictures", "labels": 2}  # class 1 = true


def lxmert(text: Words | None = None, image: LXMERTRegions | None = None, layers: tuple[int, int, int] = (9, 5, 5),
           objects: int = 1600, attributes: int = 400, answers: int = 9500, **changes: Any) -> VLConfig:  # fmt: skip
    """Base, the one size of the paper. `layers`: of the three encoders; then the label counts of the heads."""
    text = text or Words(Width(768, heads=12), pool="tanh")
    image = image or LXMERTRegions(Width(768, heads=12))
    language, regions, cross = layers
    return VLConfig(**{
        "text": text,
        "image": image,
        "segments": {
            "language": [TEXT] * language,
            "objects": [IMAGE] * regions,
            "cross": [co(tied=True, ffn=False), BOTH] * cross,  # one attention reads both ways, then each its own
        },
        "heads": {
            "mlm": {"kind": "tied", "labels": text.vocabulary},
            "regions": {"kind": "region_labels", "objects": objects, "attributes": attributes,
                        "features": image.features},
            "match": {"kind": "linear", "labels": 2},  # 1 = match
            "answers": {"kind": "transformed", "labels": answers, "hidden": 2 * text.width.size},
        },
        **changes,
    })  # fmt: skip


def lxmert_vqa(answers: int = 3129, **changes: Any) -> VLConfig:
    """As fine-tuned for VQA v2 (GQA: 1842 answers): the pre-training's answer head, with that task's answers, alone."""
    config = lxmert(answers=answers, **changes)
    config.heads = {"answers": config.heads["answers"]}
    return config


def lxmert_nlvr2(**changes: Any) -> VLConfig:
    """As fine-tuned for NLVR2: a text, two pictures, true or false. `compare` asks it."""
    return lxmert(**{"heads": {"nlvr2": NLVR2}, **changes})


def small(parts: Parts) -> VLConfig:
    """At the size of the parts; grid cells stand for regions. Beside its 9 language layers the paper has 5 of objects
    and 5 that cross; here it is a third each, so that the language encoder can be the whole text tower."""
    layers = parts.layers, max(1, parts.layers // 3), max(1, parts.layers // 3)
    objects, attributes = max(1, parts.classes - 1), 400  # the release's attributes
    return lxmert(parts.words(), parts.grid(LXMERTRegions), layers, objects, attributes, 1)  # type: ignore[arg-type]


def full(parts: Parts) -> VLConfig:
    """At the paper's size, with the parts' words and regions."""
    width = Width(768, heads=12)
    return lxmert(parts.words(width=width), parts.grid(LXMERTRegions, width=width),  # type: ignore[arg-type]
                  objects=max(1, parts.classes - 1))  # fmt: skip


def start(config: VLConfig) -> dict[str, Any]:
    """The lines by which BERT starts it: the paper's option "from BERT", its own runs start from nothing."""
    alone = len(config.segments["language"])
    return {**BERT_WORDS, **bert_start("schedule.language.{n}"), **bert_start("schedule.cross.{2n+1}.text", alone)}


def tiny(**changes: Any) -> VLConfig:
    width = Width(32, heads=4)
    words = Words(width, pool="tanh", vocabulary=99, positions=24)
    return lxmert(words, LXMERTRegions(width, features=20), (2, 1, 2), objects=7, attributes=5, answers=11, **changes)


def compare(model: VLModel, text: Half, pictures: Half) -> Tensor:
    """NLVR2: is each text true of its two pictures? B texts, 2B pictures, both of the first text before those of the
    second -> (B, 2). A text is read alone once and then crosses with either picture. Raises UserError
    for another number of pictures and for a model without the head."""
    head, texts = task_head(model.heads, "nlvr2", "lxmert_nlvr2"), len(text.states)
    two_each(texts, len(pictures.states))
    twice = torch.arange(texts, device=text.states.device).repeat_interleave(2)  # 0, 0, 1, 1, ...
    return head(model.fuse(text.rows(twice), pictures, asked=POOLED).pooled_text)


# Section 3: all summed in one forward. A mismatched pair scores all but the answer; the paper asks questions in the
# second half of the epochs, the release in all of them. Of hidden regions 80% become zero, 10% a region of any picture.
PRETRAIN: list[dict[str, Any]] = [
    {"mlm": {"mask": 0.15, "at_least_one": False},
     "region_labels": {"mask": 0.15, "at_least_one": False, "kept": 0.1},
     "itm": {"negatives": "swap", "rate": 0.5}, "answers": {"rate": 0.5}},
]  # fmt: skip


def _half(stream: str, theirs: str) -> dict[str, str]:
    """One stream's own block in a cross-modality layer."""
    at, ours = f"{_CROSS}.{theirs}", f"schedule.cross.{{2n+1}}.{stream}"
    return {
        f"{at}_self_att.self": f"{ours}.attend",
        f"{at}_self_att.output.dense": f"{ours}.attend.out",
        f"{at}_self_att.output.LayerNorm": f"{ours}.attend.norm",
        f"{at}_inter.dense": f"{ours}.ffn.up",
        f"{at}_output.dense": f"{ours}.ffn.down",
        f"{at}_output.LayerNorm": f"{ours}.ffn.norm",
    }


_CROSS = "encoder.x_layers.{n}"
_BODY = {
    "embeddings.word_embeddings": "text.words",
    "embeddings.position_embeddings": "text.positions",
    "embeddings.token_type_embeddings": "text.types",
    "embeddings.LayerNorm": "text.norm",
    "encoder.visn_fc.visn_fc": "image.features",
    "encoder.visn_fc.visn_layer_norm": "image.norm_features",
    "encoder.visn_fc.box_fc": "image.boxes",
    "encoder.visn_fc.box_layer_norm": "image.norm_boxes",
    **bert_layer("encoder.layer.{n}", "schedule.language.{n}"),
    **bert_layer("encoder.r_layers.{n}", "schedule.objects.{n}"),
    f"{_CROSS}.visual_attention.att": "schedule.cross.{2n}.attend",  # one weight, both directions
    f"{_CROSS}.visual_attention.output.dense": "schedule.cross.{2n}.attend.out",
    f"{_CROSS}.visual_attention.output.LayerNorm": "schedule.cross.{2n}.attend.norm",
    **_half("text", "lang"),
    **_half("image", "visn"),
    "pooler.dense": "poolers.text.dense",
}


def _classifier(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.0": f"{ours}.dense", f"{theirs}.2": f"{ours}.norm", f"{theirs}.3": f"{ours}.out"}


_HEADS = {
    "cls.predictions.transform.dense": "heads.mlm.dense",
    "cls.predictions.transform.LayerNorm": "heads.mlm.norm",
    "cls.predictions.decoder.weight": "text.words.weight",  # tied
    "cls.predictions.bias": "heads.mlm.bias",
    "cls.seq_relationship": "heads.match.out",
    "obj_predict_head.transform.dense": "heads.regions.dense",
    "obj_predict_head.transform.LayerNorm": "heads.regions.norm",
    "obj_predict_head.decoder_dict.obj": "heads.regions.objects",
    "obj_predict_head.decoder_dict.attr": "heads.regions.attributes",
    "obj_predict_head.decoder_dict.feat": "heads.regions.features",
    **_classifier("answer_head.logit_fc", "heads.answers"),
}

KEYS = {f"bert.{theirs}": ours for theirs, ours in _BODY.items()} | _HEADS  # *_LXRT.pth
HF_KEYS = {f"lxmert.{theirs}": ours for theirs, ours in _BODY.items()} | _HEADS  # LxmertForPreTraining, ...Answering
_TUNED = {f"lxrt_encoder.model.bert.{theirs}": ours for theirs, ours in _BODY.items()}
VQA_KEYS = _TUNED | _classifier("logit_fc", "heads.answers")  # GQA's, too
NLVR2_KEYS = _TUNED | _classifier("logit_fc", "heads.nlvr2")  # the same names, twice as wide
