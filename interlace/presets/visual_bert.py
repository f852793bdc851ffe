"""VisualBERT (Li et al. 2019, arXiv:1908.03557), figure 2: BERT over the words, and after them the regions.

The release (github.com/uclanlp/visualbert) and transformers' classes agree to rounding, except:
- regions have type 0 in the release and here; transformers takes type 1 where none is given;
- class 1 of matching is "the second caption is of this picture" in the release's data and here; transformers'
  documentation has it the other way round;
- transformers answers with log-probabilities when labels are given, with logits otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interlace.config import VLConfig
from interlace.embed.regions import VisualBERTRegions
from interlace.embed.words import Words
from interlace.heads import HEADS
from interlace.layers import JOINT, Width
from interlace.systems import BERT_WORDS, Parts, bert_start
from interlace.weights import Keys, bert_layer


def visual_bert(**changes: Any) -> VLConfig:
    """Base, the one size of the paper, with the heads of pre-training. Features: 2048 for VQA, 1024 for NLVR2, 2054 for
    Flickr30K (six box numbers among them), 512 for VCR."""
    return VLConfig(**{
        "text": Words(Width(768, heads=12), pool="tanh"),
        "image": VisualBERTRegions(Width(768, heads=12)),
        "segments": {"joint": [JOINT] * 12},
        "heads": heads(30522),
        **changes,
    })  # fmt: skip


def tiny(**changes: Any) -> VLConfig:
    width = Width(32, heads=4)
    return visual_bert(**{"text": Words(width, pool="tanh", vocabulary=99, positions=24),
                          "image": VisualBERTRegions(width, features=20, positions=24),
                          "segments": {"joint": [JOINT] * 2}, "heads": heads(99), **changes})  # fmt: skip


def small(parts: Parts) -> VLConfig:
    """At the size of the parts; grid cells stand for regions, which have no boxes here."""
    return visual_bert(text=parts.words(), image=parts.grid(VisualBERTRegions, boxes=0),
                       segments={"joint": [JOINT] * parts.layers}, heads=heads(parts.vocabulary))  # fmt: skip


def full(parts: Parts) -> VLConfig:
    """At the paper's size, with the parts' words and regions."""
    width = Width(768, heads=12)
    return visual_bert(text=parts.words(width=width), image=parts.grid(VisualBERTRegions, width=width, boxes=0),
                       heads=heads(parts.vocabulary))  # fmt: skip


def start(config: VLConfig) -> Keys:
    """The lines by which BERT starts it."""
    return {**BERT_WORDS, **bert_start("schedule.joint.{n}")}


def heads(vocabulary: int) -> dict[str, dict[str, Any]]:
    """Masked words, and whether both captions belong to the picture."""
    return {"mlm": {"kind": "tied", "labels": vocabulary}, "match": {"kind": "linear", "labels": 2}}


# Section 3.3, task-agnostic: both losses in every step, on two captions of which the second is another picture's half
# of the time.
PRETRAIN: list[dict[str, Any]] = [
    {"mlm": {"mask": 0.15, "at_least_one": False}, "itm": {"negatives": "swap", "rate": 0.5}},
]


def answer_place(mask: Tensor) -> Tensor:
    """VQA asks "question ? [MASK] [SEP]" and reads the state of that [MASK]: mask (B, T) -> where it stands, (B,)."""
    return mask.long().sum(1) - 2


def answer_states(states: Tensor, mask: Tensor) -> Tensor:
    """The state of that [MASK]: (B, T, D), mask (B, T) -> (B, D)."""
    return states[torch.arange(len(states), device=states.device), answer_place(mask)]


class Grounding(nn.Module):
    """Which region does a word mean: one attention from words to regions, its weights the answer. Section 4.4."""

    def __init__(self, text: int, image: int, size: int = 64):
        super().__init__()
        self.query, self.key, self.size = nn.Linear(text, size), nn.Linear(image, size), size

    def forward(self, words: Tensor, regions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Last sub-words (B, E, D), regions (B, I, D), mask (B, I) -> scores (B, E, I)."""
        scores = self.query(words) @ self.key(regions).transpose(1, 2) / self.size**0.5
        return scores if mask is None else scores.masked_fill(~mask.bool().unsqueeze(1), -1e4)


HEADS["visual_bert_grounding"] = Grounding


def _keys(trunk: str, grounding: str) -> dict[str, Any]:
    return {
        f"{trunk}.embeddings.word_embeddings": "text.words",
        f"{trunk}.embeddings.position_embeddings": "text.positions",
        f"{trunk}.embeddings.token_type_embeddings": "text.types",
        f"{trunk}.embeddings.LayerNorm": "text.norm",
        f"{trunk}.embeddings.position_ids": None,
        **bert_layer(f"{trunk}.encoder.layer.{{n}}", "schedule.joint.{n}"),
        f"{trunk}.pooler.dense": "poolers.text.dense",
        "cls.predictions.transform.dense": "heads.mlm.dense",
        "cls.predictions.transform.LayerNorm": "heads.mlm.norm",
        "cls.predictions.decoder.weight": "text.words.weight",
        "cls.predictions.bias": "heads.mlm.bias",
        "cls.seq_relationship": "heads.match.out",
        f"{grounding}.query": "heads.ground.query",
        f"{grounding}.key": "heads.ground.key",
        f"{grounding}.value": None,  # never used
    }


KEYS: Keys = {  # files of the training wrapper have "bert." in front of all: load_foreign(..., prefix="bert.")
    **_keys("bert", "flickr_attention"),
    "bert.embeddings.projection": "image.features",
    "bert.embeddings.position_embeddings_visual": "image.positions",
    "bert.embeddings.token_type_embeddings_visual": "image.types",
    "classifier": "heads.answers.out",  # VQA, 3129 answers; NLVR2, true or false
}
HF_KEYS: Keys = {
    **_keys("visual_bert", "attention"),
    "visual_bert.embeddings.visual_projection": "image.features",
    "visual_bert.embeddings.visual_position_embeddings": "image.positions",
    "visual_bert.embeddings.visual_token_type_embeddings": "image.types",
    "cls.predictions.decoder.bias": "heads.mlm.bias",
    "cls": "heads.answers.out",
}
