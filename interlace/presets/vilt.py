"""ViLT (Kim et al. 2021, arXiv:2102.03334), figure 3: patches and words in one pre-norm transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.config import VLConfig
from interlace.embed.vilt import ViLTPatches, ViLTWords
from interlace.heads import HEADS
from interlace.layers import JOINT, Width, norm
from interlace.model import Half, VLModel
from interlace.streams import POOLED
from interlace.systems import BERT_WORDS, Parts, bert_start


class Verdict(nn.Module):
    """Linear, norm, GELU, linear over the pooled text of `pictures` passes: answers (1), NLVR2 (2). Section 4.3."""

    def __init__(self, text: int, image: int, labels: int, pictures: int = 1):
        super().__init__()
        self.dense, self.norm = nn.Linear(pictures * text, 2 * text), nn.LayerNorm(2 * text)
        self.out = nn.Linear(2 * text, labels)

    def forward(self, text: Tensor, image: Tensor | None = None) -> Tensor:  # (B, pictures * D) -> (B, labels)
        return self.out(F.gelu(self.norm(self.dense(text))))


HEADS["vilt_verdict"] = Verdict

MATCH: dict[str, Any] = {"kind": "linear", "labels": 2}  # class 1 = match
RANK: dict[str, Any] = {"kind": "linear", "labels": 1}  # retrieval; starts as row 1 of `match`


def words(vocabulary: int = 30522) -> dict[str, Any]:
    """Masked words; unlike BERT's, the last table is not the words' own."""
    return {"kind": "transformed", "labels": vocabulary}


def answers(labels: int = 3129) -> dict[str, Any]:
    return {"kind": "vilt_verdict", "labels": labels}


NLVR2: dict[str, Any] = {"kind": "vilt_verdict", "labels": 2, "pictures": 2}  # with ViLTPatches(images=2)


def vilt(width: Width | None = None, layers: int = 12, text: dict[str, Any] | None = None,
         image: dict[str, Any] | None = None, **changes: Any) -> VLConfig:  # fmt: skip
    """ViLT-B/32. `text`, `image`: changes to the embedders. (The release also drops out inside the feed-forward.)"""
    width = width or Width(768, heads=12, norm="pre", eps=1e-6, attention_dropout=0.0)
    read = ViLTWords(width, **{"pool": "tanh", **(text or {})})
    return VLConfig(**{
        "text": read,
        "image": ViLTPatches(width, **(image or {})),
        "segments": {"joint": [JOINT] * layers, "close": [norm(shared=True)]},
        "heads": {"mlm": words(read.vocabulary), "match": MATCH},
        **changes,
    })  # fmt: skip


def tiny(**changes: Any) -> VLConfig:
    width = Width(32, heads=4, norm="pre", eps=1e-6, attention_dropout=0.0)
    return vilt(width, 2, {"vocabulary": 99, "positions": 16}, {"size": 32, "patch": 8}, **changes)


def small(parts: Parts) -> VLConfig:
    """At the size of the parts. The paper's transformer starts from an ImageNet ViT; here grid cells of the image tower
    stand where its patches are, and the layers start from the text tower's, if those fit, whose norms stand after the
    blocks. With `model.image=patches` nothing has seen a picture before: pre-norm as in the paper, random layers."""
    if parts.image is not None:
        width = parts.width()
        return VLConfig(text=parts.words(width=width), image=parts.cells(width),
                        segments={"joint": [JOINT] * parts.layers},
                        heads={"mlm": words(parts.vocabulary), "match": MATCH})  # fmt: skip
    width = parts.width(norm="pre", eps=1e-6, attention_dropout=0.0)
    return VLConfig(text=parts.words(ViLTWords, width=width), image=parts.patches(ViLTPatches, width=width),
                    segments={"joint": [JOINT] * parts.layers, "close": [norm(shared=True)]},
                    heads={"mlm": words(parts.vocabulary), "match": MATCH})  # fmt: skip


def full(parts: Parts) -> VLConfig:
    """At the paper's size, with the parts' words."""
    return vilt(text={"vocabulary": parts.vocabulary, "pad": parts.tokenizer.pad_token_id})


def start(config: VLConfig) -> dict[str, Any]:
    """BERT's words, and its layers where the norms stand as BERT's do; the paper's layers start from a ViT's."""
    layers = bert_start("schedule.joint.{n}") if config.text.width.norm == "post" else {}
    return {**BERT_WORDS, **layers}


# each task has a forward pass of its own; the losses are summed
PRETRAIN: list[dict[str, Any]] = [
    {"mlm": {"mask": 0.15, "whole_words": True}},
    {"itm": {"negatives": "swap", "rate": 0.5}, "wpa": {"weight": 0.1}},
]


def picture(model: VLModel, pixels: Tensor, mask: Tensor | None = None, number: int = 0) -> Half:
    """Picture `number` of each text (NLVR2 has two) as the image stream's half: pixels (B, 3, H, W), mask (B, H, W)."""
    return Half(*model.image(model.normalise(pixels), mask, number))


def compare(model: VLModel, text: Half, first: Half, second: Half) -> Tensor:
    """NLVR2: is the text true of the two pictures? One pass for each, then both pooled texts: (B, 2), 1 = true."""
    both = [model.fuse(text, image, asked=POOLED).pooled_text for image in (first, second)]
    return model.heads["nlvr2"](torch.cat(both, -1))  # type: ignore[arg-type]


def align(real_words: Tensor, real_patches: Tensor) -> tuple[Tensor, Tensor]:
    """What takes part in the word-patch alignment (section 3.2): words without [CLS] and the last one, [SEP]; patches
    without the class token. Masks (B, T), (B, 1+K) -> the same shapes, bool."""
    text, image = real_words.bool().clone(), real_patches.bool().clone()
    text[torch.arange(len(text)), text.sum(1) - 1] = False
    text[:, 0] = image[:, 0] = False
    return text, image


_AT, _TO = "transformer.blocks.{n}", "schedule.joint.{n}"
_EMBEDDINGS = {"word_embeddings": "words", "position_embeddings": "positions", "token_type_embeddings": "types",
               "LayerNorm": "norm"}  # fmt: skip
KEYS = {
    **{f"text_embeddings.{theirs}": f"text.{ours}" for theirs, ours in _EMBEDDINGS.items()},
    "text_embeddings.position_ids": None,
    "token_type_embeddings.weight": ("text.modality", "image.modality"),
    "transformer.cls_token": "image.first",
    "transformer.pos_embed": "image.positions",
    "transformer.patch_embed.proj": "image.project",
    f"{_AT}.norm1": f"{_TO}.attend.norm",
    f"{_AT}.attn.qkv": (f"{_TO}.attend.query", f"{_TO}.attend.key", f"{_TO}.attend.value"),
    f"{_AT}.attn.proj": f"{_TO}.attend.out",
    f"{_AT}.norm2": f"{_TO}.ffn.norm",
    f"{_AT}.mlp.fc1": f"{_TO}.ffn.up",
    f"{_AT}.mlp.fc2": f"{_TO}.ffn.down",
    "transformer.norm": "schedule.close.0.norm",
    "pooler.dense": "poolers.text.dense",
    "mlm_score.transform.dense": "heads.mlm.dense",
    "mlm_score.transform.LayerNorm": "heads.mlm.norm",
    "mlm_score.decoder.weight": "heads.mlm.out.weight",
    "mlm_score.bias": "heads.mlm.out.bias",
    "itm_score.fc": "heads.match.out",
    "rank_output": "heads.rank.out",
    **{f"{theirs}_classifier.{n}": f"heads.{ours}.{part}" for theirs, ours in (("vqa", "answers"), ("nlvr2", "nlvr2"))
       for n, part in ((0, "dense"), (1, "norm"), (3, "out"))},
}  # fmt: skip

_AT = "vilt.encoder.layer.{n}"
HF_KEYS = {  # transformers' ViltForMaskedLM and its kin
    **{f"vilt.embeddings.text_embeddings.{theirs}": f"text.{ours}" for theirs, ours in _EMBEDDINGS.items()},
    "vilt.embeddings.token_type_embeddings.weight": ("text.modality", "image.modality"),
    "vilt.embeddings.cls_token": "image.first",
    "vilt.embeddings.position_embeddings": "image.positions",
    "vilt.embeddings.patch_embeddings.projection": "image.project",
    f"{_AT}.layernorm_before": f"{_TO}.attend.norm",
    **{f"{_AT}.attention.attention.{part}": f"{_TO}.attend.{part}" for part in ("query", "key", "value")},
    f"{_AT}.attention.output.dense": f"{_TO}.attend.out",
    f"{_AT}.layernorm_after": f"{_TO}.ffn.norm",
    f"{_AT}.intermediate.dense": f"{_TO}.ffn.up",
    f"{_AT}.output.dense": f"{_TO}.ffn.down",
    "vilt.layernorm": "schedule.close.0.norm",
    "vilt.pooler.dense": "poolers.text.dense",
    "mlm_score.transform.dense": "heads.mlm.dense",
    "mlm_score.transform.LayerNorm": "heads.mlm.norm",
    "mlm_score.decoder": "heads.mlm.out",
    "mlm_score.bias": "heads.mlm.out.bias",  # a second name in older files
    "rank_output": "heads.rank.out",
    **{f"{theirs}classifier.{n}": f"heads.{ours}.{part}" for theirs, ours in (("", "answers"), ("nlvr2_", "nlvr2"))
       for n, part in ((0, "dense"), (1, "norm"), (3, "out"))},  # "nlvr2_": not its own name, see `told_apart`
}


def told_apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' two classifiers have one name; that over two pictures reads twice the width of the words."""
    table = tensors.get("vilt.embeddings.text_embeddings.word_embeddings.weight")
    first = tensors.get("classifier.0.weight")
    if table is None or first is None or first.shape[1] == table.shape[1]:
        return tensors
    return {f"nlvr2_{name}" if name.startswith("classifier.") else name: value for name, value in tensors.items()}
