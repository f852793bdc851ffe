"""Transformers' encoder-decoder of a vision and a text tower, with its holes closed.

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

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)
from transformers.modeling_outputs import Seq2SeqLMOutput

from interlace.embed.patches import check_pixels
from interlace.errors import UserError
from interlace.loading import LoadedWhole
from interlace.model import check_ids
from interlace.towers import (
    build_tower,
    native_size,
)

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
        check_reads(self.decoder)
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


def check_reads(decoder: PreTrainedModel) -> None:
    if not any("crossattention" in name or "encoder_attn" in name for name, _ in decoder.named_modules()):
        raise UserError(f"A {decoder.config.model_type} decoder has no layers that read a picture. Expected one of"
                        f" {', '.join(TEXT)}, from a config or by load_decoder.")  # fmt: skip
