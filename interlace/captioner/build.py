"""A captioner from two towers, by configs, models, folders or hub names, and from its own folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VisionEncoderDecoderConfig,
)

from interlace import towers
from interlace.captioner.model import ROUNDING, TEXT, VISION, CaptionModel, Ids, check_reads, longest_text
from interlace.errors import UserError, first_line
from interlace.progress import say
from interlace.towers import (
    PixelSpec,
    load_tokenizer,
    load_tower,
    pixel_spec,
    pixels_of,
    read_tokenizer,
    resolve_tower,
    tower_config,
)


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
        check_reads(text)
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

    def caption(self, pictures: Iterable[Image.Image], prompt: str = "", beams: int = 3, max_length: int = 0,
                sample: bool = False, top_p: float = 0.9, seed: int = 0, batch: int = 16) -> list[str]:  # fmt: skip
        """A caption each, which begins with the prompt; RGB pictures of any size, squeezed into the tower's square as
        transformers does. `max_length`: tokens, 0 for as many as `generate` writes. `sample`: words are drawn, with
        `seed`, from the likeliest that together have `top_p` of the probability; else `beams`. Raises UserError for a
        prompt that leaves no room."""
        from interlace.run import chunks

        model, ids = self.model, Ids.of_config(self.model.config)
        most = max_length or model.generation_config.max_length
        words = self.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt.strip() else []
        if len(words) + 2 > most:
            raise UserError(f"the prompt has {len(words)} tokens and the text at most {most}: shorten the prompt or "
                            "raise the length.")  # fmt: skip
        way: dict[str, Any] = {"do_sample": True, "top_p": top_p, "top_k": 0} if sample else {"num_beams": beams}
        texts: list[str] = []
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            for some in chunks(pictures, batch):
                pixels = torch.stack([self._pixels(picture) for picture in some]).to(model.device)
                start = torch.tensor([[ids.start, *words]] * len(some), device=model.device)
                written = model.generate(pixel_values=pixels, decoder_input_ids=start, max_length=most, **way)
                texts += [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]
        return texts

    def _pixels(self, picture: Image.Image) -> Tensor:
        """-> (3, S, S), normalised."""
        spec = self.pixels
        small = picture.convert("RGB").resize((spec.size, spec.size), Image.Resampling(spec.resample), reducing_gap=2.0)
        mean, std = (torch.tensor(x)[:, None, None] for x in (spec.mean, spec.std))
        return (torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255 - mean) / std


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
    check_reads(model)
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
    """What `Captioner.save` wrote, or transformers with its tokenizer and its image processor beside the model, in
    evaluation mode. Raises UserError for a folder without one of these, and for a tokenizer of other ids than the
    model's."""
    folder = Path(folder).expanduser()
    if absent := [name for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json")
                  if not (folder / name).is_file()]:  # fmt: skip
        raise UserError("Expected a folder with model, tokenizer and pixel settings, as Captioner.save writes it, but "
                        f"{folder} has no {', '.join(absent)}.")  # fmt: skip
    model = CaptionModel.from_pretrained(folder).eval()
    try:
        tokenizer = read_tokenizer(folder)
    except ValueError as error:
        raise UserError(f"{folder} has no tokenizer that can be used: {error}. Copy its files there.") from None
    tokenizer.padding_side = "right"
    if (theirs := Ids.of(tokenizer)) != (ours := Ids.of_config(model.config)):
        raise UserError(f"The model in {folder} was trained with {ours}, but its tokenizer has {theirs}.")
    return Captioner(model, tokenizer, pixels_of(folder, model.config.encoder))


def is_captioner(folder: str | Path) -> bool:
    """Whether a folder holds an encoder-decoder of transformers, and not a run."""
    file = Path(folder).expanduser() / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("model_type") == "vision-encoder-decoder"
    except (OSError, ValueError, AttributeError):
        return False


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
