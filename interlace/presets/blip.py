"""BLIP (Li et al. 2022, arXiv:2201.12086), figure 2: an image encoder, a text encoder that may read it, a decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.config import VLConfig
from interlace.decoder import Decoder
from interlace.embed.clip import MEAN, STD
from interlace.embed.patches import Patches
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.heads import HEADS, task_head
from interlace.heads.pair import two_each
from interlace.layers import IMAGE, READ, Attend, FeedForward, Kind, Layer, Width, norm
from interlace.model import Half, VLModel
from interlace.sharded import one_number
from interlace.streams import POOLED, Streams, Visibility, sight
from interlace.systems import BERT_WORDS, Parts, bert_start


class Aligned(nn.Module):
    """Both first states into one space, with biases; similarities are divided by a learned temperature, kept within
    [0.001, 0.5]. Section 3.2, image-text contrastive loss; after ALBEF (arXiv:2107.07651)."""

    def __init__(self, text: int, image: int, size: int = 256, temperature: float = 0.07):
        super().__init__()
        self.text, self.image = nn.Linear(text, size), nn.Linear(image, size)
        self.temperature = nn.Parameter(torch.tensor(temperature))

    @property
    def scale(self) -> Tensor:
        temperature = one_number(self.temperature)
        bounded = temperature.clamp(0.001, 0.5)
        # at a bound it still learns, as in the release, which clamps the value itself before each step
        return 1 / (temperature + (bounded - temperature).detach())

    def project(self, pooled: Tensor, stream: str) -> Tensor:
        """(B, D) -> (B, P), L2-normalised."""
        return F.normalize(getattr(self, stream)(pooled).float(), dim=-1)


class ReadTwo(Layer):
    """The text attends to itself, then to two pictures by an attention for each; it takes the mean of what both say or,
    with `merge`, a linear of both side by side. Section 5.4, figure 5: NLVR2.

    2B pictures stand beside B texts, both of the first text before those of the second. One picture for each text is
    read by both attentions.
    """

    kind = "blip_read_two"
    crosses = True
    changes = ("text",)

    def __init__(self, text: Width, image: Width, merge: bool = False):
        super().__init__(text, image)
        if text.norm != "post":
            raise UserError(f"a {self.kind!r} layer has one norm after both attentions: expected a text of norm "
                            f"'post', as BERT's, got {text.norm!r}.")  # fmt: skip
        self.attend_self, self.ffn = Attend(text), FeedForward(text)
        self.attend_first, self.attend_second = Attend(text, image), Attend(text, image)
        del self.attend_first.norm, self.attend_second.norm  # one norm for both
        self.merge = nn.Linear(2 * text.size, text.size) if merge else None
        self.norm, self.dropout = nn.LayerNorm(text.size, eps=text.eps), nn.Dropout(text.dropout)

    def forward(self, streams: Streams, see: Visibility) -> Streams:
        text, image = streams
        if text is None:
            return streams
        text = self.attend_self(text, None, see.sight("tt"))  # (B, T, D)
        if image is not None:
            step = 2 if len(image) == 2 * len(text) else 1
            said = [attend.read(text, image[n::step], sight(_rows(see.ti, n, step)))
                    for attend, n in ((self.attend_first, 0), (self.attend_second, step - 1))]  # fmt: skip
            both = (said[0] + said[1]) / 2 if self.merge is None else self.merge(torch.cat(said, -1))  # (B, T, D)
            text = self.norm(text + self.dropout(both))
        return Streams(self.ffn(text), image)


def _rows(mask: Tensor | None, first: int, step: int) -> Tensor | None:
    """Every `step`th row of a mask; one row stands for all."""
    return mask if mask is None or len(mask) == 1 else mask[first::step]


def read_two(merge: bool = False) -> Kind:
    return Kind("blip_read_two", (("merge", True),) if merge else ())


class Verdict(nn.Module):
    """Linear, ReLU, linear over the state of the first word, which has read both pictures. Section 5.4."""

    def __init__(self, text: int, image: int, labels: int = 2):
        super().__init__()
        self.dense, self.out = nn.Linear(text, text), nn.Linear(text, labels)

    def forward(self, text: Tensor, image: Tensor | None = None) -> Tensor:  # (B, D) -> (B, labels)
        return self.out(torch.relu(self.dense(text)))


HEADS["blip_contrast"] = Aligned
HEADS["blip_verdict"] = Verdict

CONTRAST: dict[str, Any] = {"kind": "blip_contrast", "size": 256}
MATCH: dict[str, Any] = {"kind": "linear", "labels": 2}  # class 1 = match; the text begins with [ENC] instead of [CLS]
NLVR2: dict[str, Any] = {"kind": "blip_verdict", "labels": 2}  # class 1 = true
DEC, SEP, ENC = 30522, 102, 30523  # a text's start and end; [DEC] and [ENC] are two words more than BERT's


def blip(text: Width | None = None, image: Width | None = None, layers: tuple[int, int] = (12, 12), pixels: int = 224,
         patch: int = 16, words: dict[str, Any] | None = None, ends: tuple[int, int] = (DEC, SEP),
         **changes: Any) -> VLConfig:  # fmt: skip
    """Pre-training, ViT-B/16: contrast, matching, captions. The decoder shares all but its self-attention. `layers`: of
    text and image; `ends`: the ids a written text starts and ends with."""
    text, image = text or Width(768), image or Width(768, norm="pre", eps=1e-6, dropout=0.0, attention_dropout=0.0)
    write = Decoder({"write": [READ] * layers[0]}, "image", ("words", "attend_image", "ffn"), "fuse", *ends)
    return VLConfig(**{
        "text": Words(text, **{"vocabulary": 30524, "types": 0, **(words or {})}),
        "image": Patches(image, size=pixels, patch=patch, mean=MEAN, std=STD),
        "segments": {"image": [IMAGE] * layers[1], "close": [norm(stream="image")], "fuse": [READ] * layers[0]},
        "heads": {"contrast": CONTRAST, "match": MATCH},
        "writes": write,
        **changes,
    })  # fmt: skip


def large() -> dict[str, Any]:
    """ViT-L/16 beside the same text: `blip(**large())`."""
    image = Width(1024, heads=16, norm="pre", eps=1e-6, dropout=0.0, attention_dropout=0.0)
    return {"image": image, "layers": (12, 24)}


def blip_retrieval(**changes: Any) -> VLConfig:
    """The encoders alone: `encode_text`, `encode_image`, and `match` to re-rank."""
    return blip(**{"pixels": 384, "writes": None, **changes})


def blip_caption(layers: tuple[int, int] = (12, 12), ends: tuple[int, int] = (DEC, SEP), **changes: Any) -> VLConfig:
    """The image encoder and a decoder, whose words are the only text there is."""
    write = Decoder({"write": [READ] * layers[0]}, "image", ("words",), "", *ends)
    segments = {"image": [IMAGE] * layers[1], "close": [norm(stream="image")]}
    return blip(layers=layers, **{"pixels": 384, "segments": segments, "heads": {}, "writes": write, **changes})


def blip_vqa(layers: tuple[int, int] = (12, 12), ends: tuple[int, int] = (DEC, SEP), **changes: Any) -> VLConfig:
    """The question reads the image; the answer's decoder, which shares nothing, reads the question. Figure 5."""
    write = Decoder({"answer": [READ] * layers[0]}, "text", (), "", *ends)
    return blip(layers=layers, **{"pixels": 480, "heads": {}, "writes": write, **changes})


def blip_nlvr2(layers: tuple[int, int] = (12, 12), mean: int = 6, **changes: Any) -> VLConfig:
    """Is a text true of two pictures? `compare` asks it. The first `mean` layers of the text take the mean of what they
    read of both, the others merge it."""
    mean = min(mean, layers[0])
    segments = {"image": [IMAGE] * layers[1], "close": [norm(stream="image")], "fuse": [read_two()] * mean,
                "merge": [read_two(merge=True)] * (layers[0] - mean)}  # fmt: skip
    return blip(layers=layers, **{"pixels": 384, "segments": segments, "heads": {"nlvr2": NLVR2},
                                  "writes": None, **changes})  # fmt: skip


def compare(model: VLModel, text: Half, pictures: Half) -> Tensor:
    """NLVR2: is each text true of its two pictures? B texts, which begin with [ENC], and 2B pictures, both of the first
    text before those of the second -> (B, 2), class 1 = true. Raises UserError for another number of pictures and for
    a model without the head."""
    head = task_head(model.heads, "nlvr2", "blip_nlvr2")
    two_each(len(text.states), len(pictures.states))
    return head(model.fuse(text, pictures, asked=POOLED).pooled_text)


def small(parts: Parts) -> VLConfig:
    """At the size of the parts: the image encoder is the tower and one layer more, the text reads it from its first
    layer on. [CLS] and [SEP] serve as the first and last word, for lack of [ENC] and [DEC] among the tower's words."""
    width = parts.width()
    seen = parts.width(norm="pre", eps=1e-6, dropout=0.0, attention_dropout=0.0)
    write = Decoder({"write": [READ] * parts.layers}, "image", ("words", "attend_image", "ffn"), "fuse",
                    parts.tokenizer.cls_token_id, parts.tokenizer.sep_token_id)  # fmt: skip
    return VLConfig(text=parts.words(width=width, types=0, pool="first"), image=parts.cells(seen),
                    segments={"image": [IMAGE], "close": [norm(stream="image")], "fuse": [READ] * parts.layers},
                    heads={"contrast": {**CONTRAST}, "match": MATCH}, writes=write)  # fmt: skip


def answerer(config: VLConfig) -> Decoder:
    """The decoder that a pre-trained model goes on with to write answers: it reads the question and shares nothing."""
    assert config.writes is not None
    layers = len(config.segments["fuse"])
    return Decoder({"answer": [READ] * layers}, "text", (), "", config.writes.start, config.writes.end)


# and what its parts start as: the captions' decoder, what that shares with the text encoder, the words
ANSWERER_STARTS = (("decoder.schedule.answer.", "decoder.schedule.write."),
                   ("decoder.schedule.answer.", "schedule.fuse."), ("decoder.words.", "text."))  # fmt: skip


def full(parts: Parts) -> VLConfig:
    """At the paper's size, ViT-B/16, with the parts' words; their first and last serve for [ENC] and [DEC]."""
    words = {"vocabulary": parts.vocabulary, "pad": parts.tokenizer.pad_token_id, "pool": "first"}
    return blip(words=words, ends=parts.ends)


def start(config: VLConfig) -> dict[str, Any]:
    """BERT starts the text encoder, and the decoder's own self-attentions."""
    return {**BERT_WORDS, **bert_start("schedule.fuse.{n}", attend="attend_self")}


def tiny(make: Callable[..., VLConfig] = blip, **changes: Any) -> VLConfig:
    image = Width(48, heads=4, norm="pre", eps=1e-6, dropout=0.0, attention_dropout=0.0)
    return make(text=Width(32, heads=4), image=image, layers=(2, 2), words={"vocabulary": 99, "positions": 32},
                **{"pixels": 32, "patch": 8, "ends": (97, 3), **changes})  # fmt: skip


PRETRAIN: list[dict[str, Any]] = [  # section 3.2; one forward, equal weights
    {"itc_momentum": {"momentum": 0.995, "queue": 57600, "alpha": 0.4, "ramp": 2.0},
     "itm": {"negatives": "hard", "alike": "momentum"},
     "lm": {"smoothing": 0.1}},
]  # fmt: skip

_LAYER = {"intermediate.dense": "ffn.up", "output.dense": "ffn.down", "output.LayerNorm": "ffn.norm"}


def _attention(theirs: str, ours: str) -> dict[str, str]:
    return {**{f"{theirs}.self.{part}": f"{ours}.{part}" for part in ("query", "key", "value")},
            f"{theirs}.output.dense": f"{ours}.out", f"{theirs}.output.LayerNorm": f"{ours}.norm"}  # fmt: skip


def _embeddings(theirs: str, words: str) -> dict[str, Any]:
    return {f"{theirs}.embeddings.word_embeddings": f"{words}.words",
            f"{theirs}.embeddings.position_embeddings": f"{words}.positions",
            f"{theirs}.embeddings.LayerNorm": f"{words}.norm",
            f"{theirs}.embeddings.position_ids": None}  # fmt: skip


def _bert(theirs: str, words: str, layers: str, selves: str = "") -> dict[str, Any]:
    """A text stack's names. `selves`: where the self-attentions are, if elsewhere than the rest."""
    at = f"{theirs}.encoder.layer.{{n}}"
    return {**_embeddings(theirs, words),
            **_attention(f"{at}.attention", f"{selves or layers}.attend_self"),
            **_attention(f"{at}.crossattention", f"{layers}.attend_image"),
            **{f"{at}.{name}": f"{layers}.{ours}" for name, ours in _LAYER.items()}}  # fmt: skip


def _decoder(words: str, layers: str, selves: str = "") -> dict[str, Any]:
    at = "text_decoder.cls.predictions"
    return {**_bert("text_decoder.bert", words, layers, selves),
            f"{at}.transform.dense": "decoder.head.dense", f"{at}.transform.LayerNorm": "decoder.head.norm",
            f"{at}.bias": "decoder.head.bias",
            f"{at}.decoder.bias": "decoder.head.bias", f"{at}.decoder.weight": f"{words}.words.weight"}  # fmt: skip


def _vit(theirs: str) -> dict[str, Any]:
    at, to = f"{theirs}.blocks.{{n}}", "schedule.image.{n}"
    return {f"{theirs}.cls_token": "image.first", f"{theirs}.pos_embed": "image.positions",
            f"{theirs}.patch_embed.proj": "image.project",
            f"{at}.norm1": f"{to}.attend.norm", f"{at}.norm2": f"{to}.ffn.norm",
            f"{at}.attn.qkv": tuple(f"{to}.attend.{part}" for part in ("query", "key", "value")),
            f"{at}.attn.proj": f"{to}.attend.out", f"{at}.mlp.fc1": f"{to}.ffn.up", f"{at}.mlp.fc2": f"{to}.ffn.down",
            f"{theirs}.norm": "schedule.close.0.image"}  # fmt: skip


_PROJECTIONS = {"vision_proj": "heads.contrast.image", "text_proj": "heads.contrast.text"}
_HEADS = {**_PROJECTIONS, "temp": "heads.contrast.temperature", "itm_head": "heads.match.out"}
_TRAINING = dict.fromkeys(("visual_encoder_m", "text_encoder_m", "vision_proj_m", "text_proj_m", "image_queue",
                           "text_queue", "queue_ptr", "ptr_queue", "idx_queue"))  # fmt: skip  see MOMENTUM_KEYS
_ENCODERS = {**_vit("visual_encoder"), **_bert("text_encoder", "text", "schedule.fuse.{n}")}
KEYS: dict[str, Any] = {**_ENCODERS, **_HEADS, **_TRAINING,
                        **_decoder("text", "schedule.fuse.{n}", "decoder.schedule.write.{n}")}  # fmt: skip
RETRIEVAL_KEYS: dict[str, Any] = {**_ENCODERS, **_HEADS, **_TRAINING, "text_decoder": None}
CAPTION_KEYS: dict[str, Any] = {**_vit("visual_encoder"), **_decoder("text", "decoder.schedule.write.{n}")}
VQA_KEYS: dict[str, Any] = {**_ENCODERS, **_decoder("decoder.words", "decoder.schedule.answer.{n}")}
MOMENTUM_KEYS: dict[str, Any] = {**_vit("visual_encoder_m"), **_bert("text_encoder_m", "text", "schedule.fuse.{n}"),
                                 **{f"{theirs}_m": ours for theirs, ours in _PROJECTIONS.items()}}  # fmt: skip


def _two(theirs: str, ours: str) -> dict[str, Any]:
    """A layer that reads two pictures."""
    cross = f"{theirs}.crossattention"
    return {**_attention(f"{theirs}.attention", f"{ours}.attend_self"),
            **{f"{cross}.self{n}": f"{ours}.attend_{which}" for n, which in enumerate(("first", "second"))},
            f"{cross}.output.dense0": f"{ours}.attend_first.out", f"{cross}.output.dense1": f"{ours}.attend_second.out",
            f"{cross}.output.LayerNorm": f"{ours}.norm", f"{cross}.output.merge_layer": f"{ours}.merge",
            **{f"{theirs}.{name}": f"{ours}.{part}" for name, part in _LAYER.items()}}  # fmt: skip


NLVR2_KEYS: dict[str, Any] = {
    **_vit("visual_encoder"),
    **_embeddings("text_encoder", "text"),
    **_two("text_encoder.encoder.layer.{n+6}", "schedule.merge.{n}"),  # before the next, which fits these, too
    **_two("text_encoder.encoder.layer.{n}", "schedule.fuse.{n}"),
    "cls_head.0": "heads.nlvr2.dense", "cls_head.2": "heads.nlvr2.out",
}  # fmt: skip


def _hf(keys: dict[str, Any]) -> dict[str, Any]:
    """The release's names as transformers writes them: those of the image encoder differ."""
    at = "vision_model.encoder.layers.{n}"
    other = {"cls_token": "vision_model.embeddings.class_embedding",
             "pos_embed": "vision_model.embeddings.position_embedding",
             "patch_embed.proj": "vision_model.embeddings.patch_embedding", "norm": "vision_model.post_layernorm",
             "blocks.{n}.norm1": f"{at}.layer_norm1", "blocks.{n}.norm2": f"{at}.layer_norm2",
             "blocks.{n}.attn.qkv": f"{at}.self_attn.qkv", "blocks.{n}.attn.proj": f"{at}.self_attn.projection",
             "blocks.{n}.mlp.fc1": f"{at}.mlp.fc1", "blocks.{n}.mlp.fc2": f"{at}.mlp.fc2"}  # fmt: skip
    return {other[name.removeprefix("visual_encoder.")] if name.startswith("visual_encoder.") else name: target
            for name, target in keys.items()}  # fmt: skip


HF_KEYS = _hf(RETRIEVAL_KEYS)  # BlipForImageTextRetrieval, which has no temperature
HF_CAPTION_KEYS, HF_VQA_KEYS = _hf(CAPTION_KEYS), _hf(VQA_KEYS)
