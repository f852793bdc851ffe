"""VisionEncoderDecoder: a vision tower, and a text tower that writes what it reads there. ViT, BEiT, DeiT x GPT-2,
RoBERTa, BERT, on transformers' own model; with BEiT or DeiT and RoBERTa it is TrOCR (Li et al. 2021, arXiv:2109.10282).

    model = caption_model(ViTConfig(...), BertConfig(...), tokenizer)       # random weights
    model, tokenizer, pixels = caption_model_from_towers("my/vit", "my/gpt2")   # pre-trained folders or hub names
    loss = model(pixel_values=pictures, labels=caption_labels(tokenizer, ["a red circle", ...])).loss
    ids = model.generate(pixel_values=pictures, num_beams=4)                # (B, L)

The traps of transformers 5.23, and how each is closed here:

- *Start, pad and end ids live in three configs.* Training shifts by `config`, `generate` reads `generation_config`, and
  Trainer rewrites `config.decoder`. A BERT pair cannot generate; a GPT-2 or RoBERTa pair whose `config` was set after
  construction silently starts from another token. `Ids` comes once from the tokenizer, `set_ids` writes all three, the
  constructor refuses a config without them, and `generate` refuses configs that have drifted apart.
- *`from_encoder_decoder_pretrained` fails for GPT-2* (`GPT2Config.is_decoder`). The towers are loaded one by one.
- *An encoder pooler is built that nothing reads*: no gradient, an error under distributed training, random after
  reloading. The vision tower is built without one, here and when a saved folder is read.
- *The loss ignores `num_items_in_batch`*, so Trainer multiplies loss and gradient by the accumulation steps. `forward`
  divides the sum by it: captions of unequal lengths add up as in one big batch.
- *Label smoothing pops the labels* before the forward, which then has no input. Add to the batch
  `decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels)`.
- *Labels are shifted by the model.* A tokenizer's leading [CLS] would be written twice and learnt as the first word;
  GPT-2's tokenizer adds no end, and where pad = end, hiding padding by id hides the end too and the model never stops.
  `caption_labels` writes no start, one end, and hides by length.
- *A -100 before a word* (left padding, a hidden prompt) reaches the decoder as a padding word: refused by `forward`.
- *RoBERTa counts positions by comparing with pad*: a written pad moves all later words, differently with and without
  the cache, and start = pad moves all. Pad is never written (`suppress_tokens`), and start = pad is refused there.
- *Its position table is pad + 1 longer than its texts*, and beyond it is an IndexError. `max_length` is checked.
- *`resize_token_embeddings` stops half-way.* Here it grows the decoder.
- *`cross_attention_hidden_size` removes the projection between unequal widths*, which these decoders need. Refused.
- *A decoder without cross-attention (Llama, ...) never sees the picture.* Refused.
- *Configs are changed in place.* Ours are copies.
- *Seq2SeqTrainer pads predictions to `generation_config.max_length`*, which is set here, not left at 20.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.modeling_outputs import Seq2SeqLMOutput

from interlace import towers
from interlace.config import VLConfig
from interlace.decoder import Decoder
from interlace.embed.patches import Patches, check_pixels
from interlace.embed.stem import ImageStem
from interlace.errors import UserError, first_line
from interlace.layers import IMAGE, READ, Width, norm
from interlace.loading import LoadedWhole
from interlace.model import check_ids
from interlace.progress import say
from interlace.systems import BERT_WORDS, Parts, bert_start
from interlace.towers import (
    PixelSpec,
    build_tower,
    load_tokenizer,
    load_tower,
    native_size,
    pixel_spec,
    resolve_tower,
    tower_config,
)
from interlace.weights import Keys

VISION = ("vit", "beit", "deit")
TEXT = ("gpt2", "roberta", "bert")
HIDDEN = -100  # a label that is not scored
ROUNDING = 128  # tables are rounded up to a multiple of at most this; a larger gap is another tokenizer's table


@dataclass(frozen=True)
class Ids:
    """What a caption starts with (read, never scored), what it ends with (scored), what follows it (neither)."""

    start: int
    pad: int
    end: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Ids:
        """start: bos, else cls; end: eos, else sep. Raises UserError naming all that are missing."""
        found = {"start (bos or cls)": _first(tokenizer.bos_token_id, tokenizer.cls_token_id),
                 "padding": tokenizer.pad_token_id,
                 "end (eos or sep)": _first(tokenizer.eos_token_id, tokenizer.sep_token_id)}  # fmt: skip
        if missing := [name for name, number in found.items() if number is None]:
            fix = "Set tokenizer.bos_token, .pad_token and .eos_token."
            if missing == ["padding"]:
                fix = ("Set tokenizer.pad_token = tokenizer.eos_token, as interlace.towers.load_tokenizer does:"
                       " caption_labels hides padding by length, so the end is still learnt.")  # fmt: skip
            raise UserError(f"The tokenizer has no {' and no '.join(missing)} token. {fix}")
        return cls(*found.values())  # type: ignore[arg-type]

    @classmethod
    def of_config(cls, config: PreTrainedConfig) -> Ids:
        """Those a model was trained with. Raises UserError naming all that are missing."""
        names = ("decoder_start_token_id", "pad_token_id", "eos_token_id")
        found = [getattr(config, name, None) for name in names]
        if missing := [name for name, number in zip(names, found) if number is None]:
            raise UserError(f"The captioning config has no {', '.join(missing)}. Build it by caption_model(vision,"
                            " text, tokenizer), or add them to config.json.")  # fmt: skip
        start, pad, end = (number[0] if isinstance(number, list) else number for number in found)
        return cls(start, pad, end)  # type: ignore[arg-type]


def _first(*numbers: int | None) -> int | None:
    return next((number for number in numbers if number is not None), None)


# ------------------------------------------------------------------------------------------------------------ model


class CaptionModel(LoadedWhole, VisionEncoderDecoderModel):
    """transformers' VisionEncoderDecoderModel with one contract for its ids; its folders are read by either class.

    All tokens of the vision tower, (B, I, C), are projected to the text's width where the two differ
    (`enc_to_dec_proj`), and read by each layer of the decoder.
    """

    accepts_loss_kwargs = True  # Trainer: the loss is divided by num_items_in_batch
    # in folders that transformers wrote: a pooler that nothing reads, and masks and positions that older versions saved
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [  # type: ignore[misc]
        r"^encoder\.pooler\.", r"\.(attn|crossattention)\.(masked_)?bias$", r"\.position_ids$"]  # fmt: skip

    def __init__(self, config: VisionEncoderDecoderConfig, encoder: PreTrainedModel | None = None,
                 decoder: PreTrainedModel | None = None):  # fmt: skip
        """Raises UserError for a config without ids, or whose ids the decoder cannot have."""
        ids = Ids.of_config(config)
        super().__init__(config, encoder or build_tower(config.encoder), decoder)  # type: ignore[arg-type]
        pooler = getattr(self.encoder, "pooler", None)
        if isinstance(pooler, nn.Module) and list(pooler.parameters()):
            self.encoder.pooler = None  # type: ignore[assignment]  # of a tower that came with one
        _check_reads(self.decoder)
        self.check_ids(ids)

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput | tuple:
        """Pictures (B, 3, S, S), labels (B, T) -> loss (), logits (B, T, V). `labels`: see `caption_labels`; what the
        decoder reads is made of them unless `decoder_input_ids` is given. `num_items_in_batch`: scored labels of all
        the batches whose gradients are summed. Raises UserError for padding before a word, texts too long, words the
        decoder does not have, pictures the tower does not take, and another number of pictures than of texts."""
        if pixel_values is not None:
            self.check_pictures(pixel_values, kwargs.get("interpolate_pos_encoding", False))
        if labels is not None and pixel_values is not None and len(labels) != len(pixel_values):
            raise UserError(f"{len(labels)} texts and {len(pixel_values)} pictures: row n of one belongs to row n of"
                            " the other, so there must be as many.")  # fmt: skip
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            self.check_labels(labels)
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if labels is not None and use_cache is None:
            use_cache = False  # nothing will be written
        out = super().forward(
            pixel_values=pixel_values, decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask, encoder_outputs=encoder_outputs,
            past_key_values=past_key_values, decoder_inputs_embeds=decoder_inputs_embeds, use_cache=use_cache,
            return_dict=return_dict if labels is None else True, **kwargs)  # fmt: skip
        if labels is None:
            return out
        total = "mean" if num_items_in_batch is None else "sum"
        logits = out.logits.flatten(0, 1).float()  # (B*T, V)
        loss = F.cross_entropy(logits, labels.flatten().to(logits.device), ignore_index=HIDDEN, reduction=total)
        if num_items_in_batch is not None:
            loss = loss / torch.as_tensor(num_items_in_batch, device=logits.device)
        out = Seq2SeqLMOutput(loss=loss, **out)
        return out if _first(return_dict, self.config.return_dict) else out.to_tuple()

    def check_labels(self, labels: Tensor) -> None:
        """(B, T). Raises UserError for hidden labels before scored ones, for texts longer than the positions, and for
        words the decoder does not have."""
        check_ids(labels.masked_fill(labels.eq(HIDDEN), 0), self.decoder.config.vocab_size)
        if labels.shape[1] > (longest := longest_text(self.decoder)):
            raise UserError(f"Labels of {labels.shape[1]} tokens, but the text tower has positions for {longest}."
                            " Lower max_length in caption_labels.")  # fmt: skip
        scored = labels.ne(HIDDEN)
        if bool((scored[:, 1:] & ~scored[:, :-1]).any()):
            raise UserError(f"Labels have {HIDDEN} before a scored token: expected each caption first, padding after."
                            " Make them with caption_labels; for a prompt that is read but not scored, also give"
                            " decoder_input_ids.")  # fmt: skip

    def check_pictures(self, pixels: Tensor, interpolated: bool = False) -> None:
        """(B, 3, h, w), of ViT, BEiT, DeiT. Raises UserError for pictures smaller than a patch, not normalised, or of
        another size than the tower has places for; `interpolated`: it makes places for theirs."""
        tower: Any = self.config.encoder
        if tower.num_channels != 3 or tower.model_type not in VISION:
            return
        check_pixels(pixels, tower.patch_size)
        if not pixels.is_floating_point():
            raise UserError(f"Pictures as {pixels.dtype}, but the image tower reads normalised floats: divide by 255,"
                            " then take off the mean and divide by the deviation of its PixelSpec.")  # fmt: skip
        placed = getattr(getattr(self.encoder, "embeddings", None), "position_embeddings", None) is not None
        size = pixels.shape[-2:]
        if placed and not interpolated and size != (native_size(tower),) * 2:
            raise UserError(f"Pictures of {size[1]}x{size[0]} pixels, but the image tower was made for"
                            f" {native_size(tower)}x{native_size(tower)}: resize them, or give"
                            " interpolate_pos_encoding=True.")  # fmt: skip

    def check_length(self, options: dict[str, Any]) -> None:
        """The options of `generate`. Raises UserError for a text longer than the positions."""
        length, new, prompt = (options.get(name) for name in ("max_length", "max_new_tokens", "decoder_input_ids"))
        if new is not None:
            length = new + (1 if prompt is None else prompt.shape[1])
        if length is not None and length > (longest := longest_text(self.decoder)):
            raise UserError(f"A text of {length} tokens, but the text tower has positions for {longest}: lower"
                            " max_length.")  # fmt: skip

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`: pictures (B, 3, S, S) -> ids (B * num_return_sequences, L), start included. Raises
        UserError when the configs disagree on the ids, for pictures the tower does not take, and for a length beyond
        the positions."""
        pixels = kwargs.get("pixel_values", args[0] if args else None)
        if pixels is not None:
            self.check_pictures(pixels, kwargs.get("interpolate_pos_encoding", False))
        self.check_length(kwargs)
        ids, own = Ids.of_config(self.config), self.generation_config
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        if (own.decoder_start_token_id, own.pad_token_id) != (ids.start, ids.pad) or ids.end not in ends:
            raise UserError(
                f"The model was trained with start {ids.start}, pad {ids.pad}, end {ids.end}, but its generation_config"
                f" says start {own.decoder_start_token_id}, pad {own.pad_token_id}, end {own.eos_token_id}."
                " Change them together, with model.set_ids(Ids(...)).")  # fmt: skip
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def set_ids(self, ids: Ids) -> None:
        """Write the ids wherever training, `generate` and Trainer look for them. Raises UserError as `check_ids`."""
        self.check_ids(ids)
        configs: list[Any] = [self.config, self.generation_config, self.config.decoder]
        for config in configs:
            config.bos_token_id, config.eos_token_id, config.pad_token_id = ids.start, ids.end, ids.pad
        for config in configs[:2]:
            config.decoder_start_token_id = ids.start
        self.generation_config._from_model_config = False  # it says more than the config
        # where padding is the end, writing it is right
        self.generation_config.suppress_tokens = None if ids.pad == ids.end else [ids.pad]

    def check_ids(self, ids: Ids) -> None:
        """Raises UserError for ids outside the vocabulary, or not those the decoder's tables were built for."""
        size = self.decoder.config.vocab_size
        if outside := {name: number for name, number in vars(ids).items() if not 0 <= number < size}:
            raise UserError(f"The text tower knows the ids 0 to {size - 1}, but got {outside}. Is the tokenizer of"
                            " another model?")  # fmt: skip
        for name, table in self.decoder.named_modules():
            if not isinstance(table, nn.Embedding) or table.padding_idx is None:
                continue
            if table.padding_idx != ids.pad:
                raise UserError(f"The tokenizer pads with {ids.pad}, but the text tower was built to pad with"
                                f" {table.padding_idx} ({name}). Use the tower's own tokenizer.")  # fmt: skip
            if name.endswith("position_embeddings") and ids.start == ids.pad:
                raise UserError(f"Start and padding are both {ids.pad}, but a {self.decoder.config.model_type} tower"
                                " counts positions by what is padding. Start with bos.")  # fmt: skip

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:  # type: ignore[override]
        """Of the decoder, (V, D) -> (V', D); then `set_ids` if a new token is one of them."""
        return self.decoder.resize_token_embeddings(*args, **kwargs)


def longest_text(decoder: PreTrainedModel) -> int:
    """Tokens a decoder has positions for, the start included."""
    for name, table in decoder.named_modules():  # RoBERTa and its kin count from pad + 1
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.num_embeddings - table.padding_idx - 1
    return decoder.config.max_position_embeddings


def _check_reads(decoder: PreTrainedModel) -> None:
    if not any("crossattention" in name or "encoder_attn" in name for name, _ in decoder.named_modules()):
        raise UserError(f"A {decoder.config.model_type} decoder has no layers that read a picture. Expected one of"
                        f" {', '.join(TEXT)}, from a config or by load_decoder.")  # fmt: skip


# --------------------------------------------------------------------------------------------------- how to make one


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


def caption_model(vision: PreTrainedConfig | PreTrainedModel, text: PreTrainedConfig | PreTrainedModel,
                  tokenizer: PreTrainedTokenizerBase | Ids, max_length: int | None = None) -> CaptionModel:  # fmt: skip
    """Two towers as one model in evaluation mode. A config gives random weights, a model keeps its own: `vision` as
    `load_tower(name, "image").model`, `text` as `load_decoder(name)`. `max_length`: of what `generate` writes, start
    included; at most 40 unless given. The arguments' configs are left as they are.

    Raises UserError for a tower in the other's place, a text tower that cannot read pictures, a tokenizer without
    padding or end or of another vocabulary, `cross_attention_hidden_size`, and a length beyond the positions.
    """
    ids = tokenizer if isinstance(tokenizer, Ids) else Ids.of(tokenizer)
    vision_config, text_config = _config(vision, "image"), _config(text, "text")
    if not isinstance(tokenizer, Ids):
        _check_vocabulary(tokenizer, text_config, pretrained=isinstance(text, PreTrainedModel))
    if (width := getattr(text_config, "cross_attention_hidden_size", None)) is not None:
        raise UserError(f"The text config sets cross_attention_hidden_size={width}. Leave it unset: where the"
                        f" widths differ ({vision_config.hidden_size}, {text_config.hidden_size}), enc_to_dec_proj is"
                        " between them.")  # fmt: skip
    text_config.bos_token_id, text_config.eos_token_id = ids.start, ids.end
    if isinstance(text, PreTrainedConfig):
        text_config.pad_token_id = ids.pad  # BERT and RoBERTa build tables by it
    config: Any = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        vision_config, text_config, decoder_start_token_id=ids.start, bos_token_id=ids.start, pad_token_id=ids.pad,
        eos_token_id=ids.end)  # fmt: skip
    if isinstance(vision, PreTrainedModel): vision.config = config.encoder
    if isinstance(text, PreTrainedModel):
        _check_reads(text)
        text.config = config.decoder
    else:
        text = _build_decoder(config.decoder)
    model = CaptionModel(config, vision if isinstance(vision, PreTrainedModel) else None, text)
    model.set_ids(ids)
    longest = longest_text(model.decoder)
    if max_length is not None and max_length > longest:
        raise UserError(f"max_length={max_length}, but the text tower has positions for {longest} tokens.")
    model.generation_config.max_length = max_length or min(40, longest)
    return model.eval()


class Captioner(NamedTuple):
    """A model and what it needs to read pictures and write words. See `load_captioner`."""

    model: CaptionModel
    tokenizer: PreTrainedTokenizerBase
    pixels: PixelSpec

    def save(self, folder: str | Path) -> None:
        """A transformers folder: config, generation_config, weights, tokenizer, preprocessor_config."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.pixels.save(Path(folder))


def caption_model_from_towers(vision_name: str | Path, text_name: str | Path,
                              tokenizer: PreTrainedTokenizerBase | None = None,
                              max_length: int | None = None) -> Captioner:  # fmt: skip
    """Two pre-trained towers, by local folder or hub name. The layers that read the picture are new and random, as is
    the projection between unequal widths. `tokenizer`: the text tower's own unless given; GPT-2's pads with its end.

    Raises UserError as `load_tower`, `load_decoder` and `caption_model` do.
    """
    vision, _, extras = load_tower(vision_name, "image")
    if extras.is_map:
        raise UserError(f"Tower {vision_name} ({extras.model_type}) gives a map, not the tokens a decoder reads."
                        f" Expected one of {', '.join(VISION)} or another transformer.")  # fmt: skip
    text = load_decoder(text_name)
    tokenizer = tokenizer or load_tokenizer(text_name)
    return Captioner(caption_model(vision, text, tokenizer, max_length), tokenizer, pixel_spec(vision_name))


def load_decoder(name: str | Path) -> PreTrainedModel:
    """A pre-trained text tower as a decoder that reads a picture, in evaluation mode and float32. New and random: the
    reading layers; the word head too, where the folder holds an encoder alone (said on stderr).

    Raises UserError for an image tower, one that cannot be a decoder, and weights that leave anything else unfilled.
    """
    config = copy.deepcopy(tower_config(name, "text"))
    config.is_decoder, config.add_cross_attention = True, True
    folder = resolve_tower(name, "text")
    try:
        with towers.quiet():
            loaded = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32,
                                                          output_loading_info=True)  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"Could not load {name} as a decoder: {first_line(error)} Expected one of"
                        f" {', '.join(TEXT)}.") from error  # fmt: skip
    model, report = cast(tuple[PreTrainedModel, dict], loaded)
    _check_reads(model)
    missing = [key for key in report["missing_keys"] if not any(part in key for part in _READING)]
    if unfilled := sorted(key for key in missing if not key.startswith(("cls.", "lm_head."))):
        raise UserError(f"The weights in {folder} leave {len(unfilled)} parts of a {config.model_type} decoder unfilled"
                        f" ({', '.join(unfilled[:3])}, ...): config.json and weights are of different"
                        " models.")  # fmt: skip
    if missing:
        say(f"Tower {name} has no word head: it starts from random weights.")
    return model.eval()


_READING = ("crossattention", "ln_cross_attn", "encoder_attn")


def load_captioner(folder: str | Path) -> Captioner:
    """What `Captioner.save` wrote, in evaluation mode. Raises UserError for a folder without one of its parts, and for
    a tokenizer of other ids than the model's."""
    folder = Path(folder)
    if absent := [name for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json")
                  if not (folder / name).is_file()]:  # fmt: skip
        raise UserError(f"Expected a folder that Captioner.save wrote, but {folder} has no {', '.join(absent)}.")
    model = CaptionModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    if (theirs := Ids.of(tokenizer)) != (ours := Ids.of_config(model.config)):
        raise UserError(f"The model in {folder} was trained with {ours}, but its tokenizer has {theirs}.")
    saved = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    mean, std = tuple(saved["image_mean"]), tuple(saved["image_std"])
    return Captioner(model, tokenizer, PixelSpec(saved["size"]["height"], mean, std, saved["resample"]))


def _config(tower: PreTrainedConfig | PreTrainedModel, kind: str) -> PreTrainedConfig:
    """A copy of its config."""
    if not isinstance(tower, PreTrainedConfig | PreTrainedModel):
        raise UserError(f"Expected a transformers config or model as the {kind} tower, got {type(tower).__name__}."
                        " For names, use caption_model_from_towers.")  # fmt: skip
    config = tower if isinstance(tower, PreTrainedConfig) else tower.config
    # BEiT has a vocabulary too (its visual words), so the channels decide first
    found = "image" if hasattr(config, "num_channels") else "text" if hasattr(config, "vocab_size") else None
    if found != kind:
        raise UserError(f"Expected the {kind} tower, got {config.model_type}, which is {_article(found)}. The order is"
                        f" caption_model(vision, text, tokenizer), of {', '.join(VISION)} and"
                        f" {', '.join(TEXT)}.")  # fmt: skip
    if not hasattr(config, "hidden_size"):
        raise UserError(f"A {config.model_type} tower gives a map, not the tokens a decoder reads. Expected one of"
                        f" {', '.join(VISION)} or another transformer.")  # fmt: skip
    if isinstance(tower, PreTrainedModel):
        if kind == "image" and type(tower) is not towers._model_class(config, config.model_type):
            raise UserError(f"The image tower is a {type(tower).__name__}, which has a head. Give load_tower(name,"
                            " 'image').model.")  # fmt: skip
        if kind == "text" and tower.get_output_embeddings() is None:
            raise UserError(f"The text tower is a {type(tower).__name__}, which has no word head. Give"
                            " load_decoder(name).")  # fmt: skip
    return copy.deepcopy(config)


def _article(kind: str | None) -> str:
    return {"image": "an image tower", "text": "a text tower"}.get(kind or "", "neither a text nor an image tower")


def _build_decoder(config: PreTrainedConfig) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UserError(f"A {config.model_type} text tower cannot write. Expected one of {', '.join(TEXT)}.") from error


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, pretrained: bool) -> None:
    words = max(tokenizer.get_vocab().values()) + 1
    if words > config.vocab_size:
        raise UserError(f"The tokenizer has ids up to {words - 1}, but the text tower's vocabulary is"
                        f" {config.vocab_size}. Use the tower's own tokenizer; if you added words, set"
                        f" vocab_size={words} in the config, or give load_decoder(name) after its"
                        f" resize_token_embeddings({words}).")  # fmt: skip
    if pretrained and config.vocab_size - words >= ROUNDING:
        raise UserError(f"The tokenizer has {words} words, but the text tower was trained with {config.vocab_size}. Use"
                        " the tower's own tokenizer.")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- labels


def caption_labels(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int = 40) -> Tensor:
    """Captions -> (B, T), T <= max_length: their words, the end, then -100. No start: the model puts it in front. A
    caption that is too long loses words, not its end. Raises UserError as `Ids.of`.

    >>> caption_labels(tokenizer, ["a red circle", "a bar"])     # [SEP] = 3
    tensor([[17,  5, 11,  3], [17, 14,  3, -100]])
    """
    if isinstance(texts, str):
        raise UserError("Expected a list of captions, got one text: put it in a list.")
    ids = Ids.of(tokenizer)
    return _labels(tokenizer(list(texts), add_special_tokens=False)["input_ids"], ids, max_length)


def labels_of(input_ids: Tensor, attention_mask: Tensor, ids: Ids, max_length: int = 40) -> Tensor:
    """The same for captions a tokenizer has made tensors of, (B, T) each, padded on either side, with or without its
    special tokens: start and end are taken off, then as `caption_labels`. Raises UserError for unequal shapes."""
    if input_ids.shape != attention_mask.shape or input_ids.dim() != 2:
        raise UserError(f"Expected ids and mask of one shape (B, T), got {tuple(input_ids.shape)} and"
                        f" {tuple(attention_mask.shape)}.")  # fmt: skip
    rows = []
    for row, mask in zip(input_ids, attention_mask):
        words = row[mask.bool()].tolist()
        if words and words[0] == ids.start: words = words[1:]
        if words and words[-1] == ids.end: words = words[:-1]
        rows.append(words)
    return _labels(rows, ids, max_length).to(input_ids.device)


def _labels(rows: list[list[int]], ids: Ids, max_length: int) -> Tensor:
    ended = [torch.tensor([*row[: max_length - 1], ids.end]) for row in rows]
    return nn.utils.rnn.pad_sequence(ended, batch_first=True, padding_value=HIDDEN)
