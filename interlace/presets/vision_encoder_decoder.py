"""VisionEncoderDecoder: a vision tower, and a text tower that writes what it reads there. ViT, BEiT, DeiT x GPT-2,
RoBERTa, BERT, on transformers' own model; with BEiT or DeiT and RoBERTa it is TrOCR (Li et al. 2021, arXiv:2109.10282).

    model = caption_model(ViTConfig(...), BertConfig(...), tokenizer)       # random weights
    model, tokenizer, pixels = caption_model_from_towers("my/vit", "my/gpt2")   # pre-trained folders or hub names
    loss = model(pixel_values=pictures, labels=caption_labels(tokenizer, ["a red circle", ...])).loss
    ids = model.generate(pixel_values=pictures, num_beams=4)                # (B, L)

The model is `interlace.captioner.CaptionModel`; what it mends of transformers stands there.
"""

from __future__ import annotations

from typing import Any, cast

from transformers import GPT2Config, PreTrainedConfig, VisionEncoderDecoderConfig, ViTConfig

from interlace.captioner import Ids
from interlace.config import VLConfig
from interlace.decoder import Decoder
from interlace.embed.patches import Patches
from interlace.embed.stem import ImageStem
from interlace.layers import IMAGE, READ, Width, norm
from interlace.systems import BERT_WORDS, Parts, bert_start
from interlace.weights import Keys


def vit_gpt2(vision: PreTrainedConfig | None = None, text: PreTrainedConfig | None = None,
             ids: Ids | None = None) -> VisionEncoderDecoderConfig:  # fmt: skip
    """The usual pair, ViT-B/16 and GPT-2, as a configuration: `CaptionModel(vit_gpt2())` has random weights. GPT-2's
    one special token starts a caption, ends it and pads."""
    ids = ids or Ids(start=50256, pad=50256, end=50256)
    text = text or GPT2Config(bos_token_id=ids.start, eos_token_id=ids.end)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        vision or ViTConfig(), text, decoder_start_token_id=ids.start, bos_token_id=ids.start, pad_token_id=ids.pad,
        eos_token_id=ids.end)  # fmt: skip
    return cast(VisionEncoderDecoderConfig, config)


def tiny() -> VisionEncoderDecoderConfig:
    vision = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32,
                       patch_size=8)  # fmt: skip
    text = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=24, bos_token_id=98, eos_token_id=98)
    return vit_gpt2(vision, text, Ids(98, 98, 98))


def small(parts: Parts) -> VLConfig:
    """The same idea over the parts at hand, on our own decoder, so that it trains and saves as the other systems do: an
    image tower, and BERT's layers that write what they read there. Only what reads the picture starts untrained."""
    seen = parts.width(norm="pre", eps=1e-6, dropout=0.0, attention_dropout=0.0)
    write = Decoder({"write": [READ] * parts.layers}, "image", ("words",), "", parts.tokenizer.cls_token_id,
                    parts.tokenizer.sep_token_id)  # fmt: skip
    return VLConfig(text=parts.words(pool="first"), image=parts.cells(seen), segments={"close": [norm(stream="image")]},
                    writes=write)  # fmt: skip


def full(parts: Parts) -> VLConfig:
    """As `small`, at base size: twelve layers that write, over an image tower or, for patches, a ViT-B/16 of our own,
    which starts untrained."""
    text = Width(768, heads=12)
    seen = Width(768, heads=12, norm="pre", eps=1e-6, dropout=0.0, attention_dropout=0.0)
    image: Patches | ImageStem = Patches(seen) if parts.image is None else parts.cells(seen)
    alone = {"image": [IMAGE] * 12} if parts.image is None else {}
    write = Decoder({"write": [READ] * 12}, "image", ("words",), "", *parts.ends)
    return VLConfig(text=parts.words(width=text, pool="first"), image=image,
                    segments={**alone, "close": [norm(stream="image")]}, writes=write)  # fmt: skip


def start(config: VLConfig) -> Keys:
    """The lines by which BERT starts the decoder."""
    return {**BERT_WORDS, **bert_start("decoder.schedule.write.{n}", attend="attend_self")}


# both towers come trained; captions teach the layers that read
PRETRAIN: list[dict[str, Any]] = [{"lm": {"smoothing": 0.0}}]
