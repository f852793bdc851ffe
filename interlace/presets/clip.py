"""CLIP (Radford et al. 2021, arXiv:2103.00020), figure 1: two encoders that never meet but in one contrast."""

from __future__ import annotations

from typing import Any

import torch

from interlace.config import VLConfig
from interlace.embed.clip import MEAN, STD, CLIPPatches, CLIPWords
from interlace.layers import IMAGE, NORM, Kind, Text, Width
from interlace.streams import ALL, Asked, Streams, Visibility
from interlace.systems import Parts
from interlace.weights import Flip, Lead


class Causal(Text):
    """The text attends to itself, each word to the words up to itself, in whatever task: the encoder was trained so."""

    kind = "causal"
    shortens = True

    def forward(self, streams: Streams, see: Visibility, asked: Asked = ALL) -> Streams:
        if streams.text is None:
            return streams
        length = streams.text.shape[1]
        past = torch.ones(1, length, length, dtype=torch.bool, device=streams.text.device).tril()
        return super().forward(streams, Visibility(tt=past if see.tt is None else past & see.tt), asked)


def width(size: int, heads: int) -> Width:
    return Width(size, heads=heads, norm="pre", eps=1e-5, dropout=0.0, attention_dropout=0.0, activation="quick_gelu")


def clip(text: Width | None = None, image: Width | None = None, layers: tuple[int, int] = (12, 12),
         size: int = 512, patch: int = 32, pixels: int = 224, words: dict[str, Any] | None = None,
         **changes: Any) -> VLConfig:  # fmt: skip
    """ViT-B/32. `layers`: of text and image; `size`: of the common space; `words`: changes to the vocabulary."""
    return VLConfig(**{
        "text": CLIPWords(text or width(512, 8), **(words or {})),
        "image": CLIPPatches(image or width(768, 12), size=pixels, patch=patch, mean=MEAN, std=STD),
        "segments": {"text": [Kind("causal")] * layers[0], "image": [IMAGE] * layers[1], "close": [NORM]},
        "heads": {"contrast": {"size": size}},
        **changes,
    })  # fmt: skip


def clip_large(**changes: Any) -> VLConfig:
    """ViT-L/14."""
    return clip(width(768, 12), width(1024, 16), (12, 24), size=768, patch=14, **changes)


def tiny(**changes: Any) -> VLConfig:
    words = {"vocabulary": 99, "positions": 16, "eos": 98}
    return clip(width(32, 4), width(48, 4), (2, 2), size=24, patch=8, pixels=32, words=words, **changes)


def full(parts: Parts) -> VLConfig:
    """At the paper's size, ViT-B/32, with the parts' words."""
    return clip(words={"vocabulary": parts.vocabulary, "pad": parts.tokenizer.pad_token_id, "eos": parts.ends[1]})


# section 2.3; 400M pairs, batch 32768, 32 epochs
PRETRAIN: list[dict[str, Any]] = [{"itc": {"size": 512, "temperature": 0.07}}]


def _tower(theirs: str, ours: str) -> dict[str, Any]:
    at, to = f"{theirs}.resblocks.{{n}}", f"schedule.{ours}.{{n}}"
    qkv = tuple(f"{to}.attend.{part}" for part in ("query", "key", "value"))
    return {f"{at}.attn.in_proj_weight": tuple(f"{name}.weight" for name in qkv),
            f"{at}.attn.in_proj_bias": tuple(f"{name}.bias" for name in qkv),
            f"{at}.attn.out_proj": f"{to}.attend.out",
            f"{at}.ln_1": f"{to}.attend.norm", f"{at}.ln_2": f"{to}.ffn.norm",
            f"{at}.mlp.c_fc": f"{to}.ffn.up", f"{at}.mlp.c_proj": f"{to}.ffn.down"}  # fmt: skip


KEYS = {  # the release, as `state_dict()` of its model
    "token_embedding": "text.words",
    "positional_embedding": "text.positions.weight",
    **_tower("transformer", "text"),
    "ln_final": "schedule.close.0.text",
    "text_projection": Flip("heads.contrast.text.weight"),
    "visual.class_embedding": Lead("image.first"),
    "visual.positional_embedding": Lead("image.positions"),
    "visual.conv1": "image.project",
    "visual.ln_pre": "image.norm",
    **_tower("visual.transformer", "image"),
    "visual.ln_post": "schedule.close.0.image",
    "visual.proj": Flip("heads.contrast.image.weight"),
    "logit_scale": "heads.contrast.logit_scale",
    "input_resolution": None,
    "context_length": None,
    "vocab_size": None,
}


def _hf_tower(theirs: str, ours: str) -> dict[str, Any]:
    at, to = f"{theirs}.encoder.layers.{{n}}", f"schedule.{ours}.{{n}}"
    return {f"{at}.self_attn.q_proj": f"{to}.attend.query", f"{at}.self_attn.k_proj": f"{to}.attend.key",
            f"{at}.self_attn.v_proj": f"{to}.attend.value", f"{at}.self_attn.out_proj": f"{to}.attend.out",
            f"{at}.layer_norm1": f"{to}.attend.norm", f"{at}.layer_norm2": f"{to}.ffn.norm",
            f"{at}.mlp.fc1": f"{to}.ffn.up", f"{at}.mlp.fc2": f"{to}.ffn.down"}  # fmt: skip


HF_KEYS = {  # transformers' CLIPModel
    "text_model.embeddings.token_embedding": "text.words",
    "text_model.embeddings.position_embedding": "text.positions",
    "text_model.embeddings.position_ids": None,
    **_hf_tower("text_model", "text"),
    "text_model.final_layer_norm": "schedule.close.0.text",
    "text_projection": "heads.contrast.text",
    "vision_model.embeddings.class_embedding": Lead("image.first"),
    "vision_model.embeddings.position_embedding.weight": Lead("image.positions"),
    "vision_model.embeddings.position_ids": None,
    "vision_model.embeddings.patch_embedding": "image.project",
    "vision_model.pre_layrnorm": "image.norm",
    **_hf_tower("vision_model", "image"),
    "vision_model.post_layernorm": "schedule.close.0.image",
    "visual_projection": "heads.contrast.image",
    "logit_scale": "heads.contrast.logit_scale",
}
