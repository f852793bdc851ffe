"""Pre-trained towers by name: the two shipped ones, a local folder, or a name on the Hugging Face hub.

Whatever the name, what comes back is an ordinary transformers folder and an ordinary transformers model. How the files
come to this machine is in `interlace.shipped`.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from interlace.embed import efficientnet_lite
from interlace.errors import UserError, first_line
from interlace.progress import say
from interlace.shipped import SHIPPED, Kind, hub_folder, shipped_folder

# ---------------------------------------------------------------------------------------------------- where it lies

def resolve_tower(name: str | Path, kind: Kind = "text") -> Path:
    """The transformers folder (config.json, weights, tokenizer) of a tower.

    `name` is one of `SHIPPED` ("minilm", "efficientnet-lite0"), a local folder, or a hub name ("org/model"). The
    network is used only when the files are not on this machine yet, and for the hub not at all under
    `HF_HUB_OFFLINE=1`. Raises UserError for an unknown name, a folder without config.json, a tower of the other kind,
    a failed download.
    """
    text = str(name)
    shipped = SHIPPED.get(text.lower())
    if shipped is not None:
        if shipped.kind != kind:
            raise _wrong_kind(text, shipped.kind, kind)
        return shipped_folder(text.lower(), shipped)
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"Expected a transformers folder, but {folder} has no config.json."
                            " Point at the folder that save_pretrained wrote.")
    elif folder.is_absolute() or text.startswith(("~", ".")):
        raise UserError(f"No folder {folder}. Expected a local transformers folder, a hub name or one of: "
                        f"{', '.join(SHIPPED)}.")
    else:
        folder = hub_folder(text)
    _part(_read_config(folder, text), kind, text)  # a tower of the wrong kind fails here, by name
    return folder


# ------------------------------------------------------------------------------------------------------- what it is

def tower_config(name: str | Path, kind: Kind = "image") -> PreTrainedConfig:
    """The tower's transformers config; of a two-tower model (CLIP, SigLIP, ...) the part for `kind`.

    `AutoModel.from_config` of it builds the class that `load_tower` returns, with random weights."""
    return _part(_read_config(resolve_tower(name, kind), name), kind, name)


def _read_config(folder: Path, name: str | Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The config.json of tower {name} is not one transformers can read: "
                        f"{first_line(error)}") from error


def _part(config: PreTrainedConfig, kind: Kind, name: str | Path) -> PreTrainedConfig:
    part = getattr(config, {"text": "text_config", "image": "vision_config"}[kind], None)
    if isinstance(part, PreTrainedConfig):
        return part
    # BEiT has a vocabulary too (its visual words), so the channels decide first
    found = "image" if hasattr(config, "num_channels") else "text" if hasattr(config, "vocab_size") else None
    if found is None:
        raise UserError(f"Tower {name} is a {config.model_type!r} model, which is neither a text nor an image tower.")
    if found != kind:
        raise _wrong_kind(name, found, kind)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"Tower {name} is an encoder-decoder ({config.model_type}); expected an encoder such as BERT"
                        " or a decoder such as GPT-2.")
    return config


def _wrong_kind(name: str | Path, found: str, wanted: str) -> UserError:
    examples = [short for short, shipped in SHIPPED.items() if shipped.kind == wanted]
    return UserError(f"Expected {_an(wanted)} tower, but {name} is {_an(found)} tower. "
                     f"Were the two names swapped? {wanted.capitalize()} towers: {', '.join(examples)}, or any"
                     " transformers one.")


def _an(kind: str) -> str:
    return ("an " if kind[0] in "aeiou" else "a ") + kind


@dataclass(frozen=True)
class Extras:
    """What a caller needs beyond the model: where it lies, what it is, and how its output is laid out."""

    folder: Path
    model_type: str
    prefix: int = 0  # image, 3-d output: leading tokens that are no grid cell (CLS, distillation, registers)
    grid: tuple[int, int] | None = None  # image: (h, w) cells at the tower's own picture size
    is_map: bool = False  # image: last_hidden_state is (B, D, h, w), not (B, prefix + h*w, D)
    max_tokens: int | None = None  # text: longest input, special tokens included


class Tower(NamedTuple):
    model: PreTrainedModel
    hidden_size: int
    extras: Extras


def load_tower(name: str | Path, kind: Kind, layers: int = -1) -> Tower:
    """The pre-trained model behind `name`, its width D, and how to read its output. `layers`: how many of its layers
    are kept, from below; -1: all, 0: its embeddings alone.

    A text tower gives `last_hidden_state` (B, T, D). An image tower gives (B, prefix + h*w, D), or (B, D, h, w) if
    `extras.is_map`; `grid_tokens` makes (B, h*w, D) of either. The model is in evaluation mode, in float32, without the
    pooling layer where the class can do without. Raises UserError as `resolve_tower` does, and when the weights cannot
    be read or do not fill the model.
    """
    folder = resolve_tower(name, kind)
    config = _part(_read_config(folder, name), kind, name)
    model_class = _model_class(config, name)
    try:
        with quiet():  # its report says less than the check below
            loaded = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True,
                                                 **_without_pooling(model_class))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"Could not load the weights of tower {name} from {folder}: {first_line(error)}") from error
    model, report = cast(tuple[PreTrainedModel, dict], loaded)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"The weights in {folder} leave {len(missing)} parts of a {config.model_type} tower unfilled "
                        f"({', '.join(missing[:3])}, ...): config.json and weights are of different models.")
    model.eval()
    if layers >= 0:
        _cut(model, layers, name)
    if kind == "text":
        return Tower(model, config.hidden_size, Extras(folder, config.model_type, max_tokens=longest_text(model)))
    shape = _output_shape(config, native_size(config))
    return Tower(model, shape.width, Extras(folder, config.model_type, shape.prefix, shape.grid, shape.is_map))


def _cut(model: PreTrainedModel, layers: int, name: str | Path) -> None:
    """The first `layers` layers stay. Raises UserError for more than there are, and for a tower without such a list."""
    count = getattr(model.config, "num_hidden_layers", 0)
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    if len(stacks) != 1:
        raise UserError(f"tower {name} ({model.config.model_type}) has no list of layers to take the first {layers} "
                        "of: leave model.text_layers out.")  # fmt: skip
    if layers > count:
        raise UserError(f"model.text_layers is {layers}, but {name} has {count} layers.")
    del stacks[0][layers:]
    model.config.num_hidden_layers = layers


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """The model `load_tower` returns for this config (`tower_config`), with random weights."""
    model_class = _model_class(config, config.model_type)
    return model_class._from_config(config, **_without_pooling(model_class))


def _model_class(config: PreTrainedConfig, name: str | Path) -> type[PreTrainedModel]:
    try:
        found = AutoModel._model_mapping[type(config)]
    except KeyError:
        raise UserError(f"Tower {name}: transformers has no plain model for a {config.model_type!r} config.") from None
    return cast(type[PreTrainedModel], found[0] if isinstance(found, tuple) else found)


def _without_pooling(model_class: type[PreTrainedModel]) -> dict[str, Any]:
    # we read last_hidden_state; an unused pooler is dead weight, and an error under distributed training
    takes = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if takes else {}


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no warnings of transformers while it loads or saves: errors only."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def longest_text(model: PreTrainedModel) -> int | None:
    """How many tokens a text tower has positions for; None: as many as there are."""
    longest = getattr(model.config, "max_position_embeddings", None)
    for path, module in model.named_modules():
        # RoBERTa and its kin count positions from padding_idx + 1, so their table is longer than their input
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return longest


# --------------------------------------------------------------------------------------------------- grids of cells

class _Shape(NamedTuple):
    width: int
    grid: tuple[int, int]
    prefix: int
    is_map: bool


def grid_size(model: PreTrainedModel, image_size: int) -> tuple[int, int]:
    """(h, w), the cells an image tower makes of a square picture of `image_size` pixels. Works for any tower because it
    asks a weightless copy of it; call it once per size. Raises UserError if the tower refuses this size."""
    return _output_shape(model.config, image_size).grid


def grid_tokens(hidden: Tensor, prefix: int = 0) -> Tensor:
    """An image tower's `last_hidden_state`, (B, D, h, w) or (B, prefix + h*w, D), as cells (B, h*w, D) row by row."""
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden[:, prefix:]


def averaged(cells: Tensor, side: int) -> Tensor:
    """Cells of a square picture (B, I, D), row by row -> (B, side * side, D), each the mean over its part of the
    picture."""
    grid = cells.transpose(1, 2).unflatten(2, (math.isqrt(cells.shape[1]), -1))  # (B, D, h, w)
    return nn.functional.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2)


def _output_shape(config: PreTrainedConfig, image_size: int) -> _Shape:
    shape = _run_weightless(config, image_size)
    if len(shape) == 4:
        return _Shape(shape[1], (shape[2], shape[3]), 0, True)
    tokens, width = shape[1], shape[2]
    patch = getattr(config, "patch_size", None)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    side = image_size // patch if patch else 0
    if not 0 < side * side <= tokens:  # towers that merge patches on the way (Swin) have fewer, and no prefix
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise UserError(f"A {config.model_type} tower gives {tokens} tokens for {image_size} pixels, which is not a"
                            " square grid. Choose another tower or picture size.")
    return _Shape(width, (side, side), tokens - side * side, False)


def _run_weightless(config: PreTrainedConfig, image_size: int) -> torch.Size:
    """The shape of last_hidden_state for one picture; on the meta device, so nothing is computed."""
    with torch.device("meta"), torch.no_grad():
        model = build_tower(config).eval()
        pixels = torch.zeros(1, getattr(config, "num_channels", 3), image_size, image_size)
        try:
            return model(pixel_values=pixels, **resize_positions(model, image_size)).last_hidden_state.shape
        except (ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"A {config.model_type} tower cannot take pictures of {image_size} x {image_size} pixels: "
                            f"{first_line(error)} Its own size is {native_size(config)}.") from error


def resize_positions(model: PreTrainedModel, image_size: int) -> dict[str, bool]:
    """The keyword a transformer tower needs in its forward for another picture size than its own, if it has one."""
    takes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if takes and image_size != native_size(model.config) else {}


def native_size(config: PreTrainedConfig) -> int:
    """Side in pixels of the pictures an image tower was trained on; 224 where its config does not say (ResNet)."""
    size = getattr(config, "image_size", None) or 224
    return size if isinstance(size, int) else size[0]


# ----------------------------------------------------------------------------------------------------------- pixels

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LITE = ((efficientnet_lite.PIXEL_MEAN,) * 3, (efficientnet_lite.PIXEL_STD,) * 3)
# Without preprocessor_config.json: what transformers' own image processor of this model type defaults to, and
# ImageNet's numbers for all others. Resampling: 2 bilinear, 3 bicubic (PIL.Image.Resampling).
PIXELS = {"vit": (HALF, 2), "beit": (HALF, 3), "siglip_vision_model": (HALF, 3), "siglip2_vision_model": (HALF, 2),
          "clip_vision_model": (CLIP, 3), "blip_vision_model": (CLIP, 3), "efficientnet-lite": (LITE, 3)}


@dataclass(frozen=True)
class PixelSpec:
    """How a tower wants its pictures: square of `size` pixels, RGB in [0, 1], minus `mean`, divided by `std`.
    `resample` is a PIL.Image.Resampling number."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 3

    def save(self, folder: Path) -> None:
        """Write preprocessor_config.json, in the form transformers reads too."""
        content = {"do_resize": True, "size": {"height": self.size, "width": self.size}, "resample": self.resample,
                   "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                   "image_mean": list(self.mean), "image_std": list(self.std)}
        (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def pixel_spec(name: str | Path) -> PixelSpec:
    """The image tower's preprocessor_config.json, or the defaults of its model type (`PIXELS`) at its config's size.

    A centre crop there is read as the size, whole picture in: we do not cut what an evaluation script would.
    Raises UserError for a size that is not square.
    """
    folder = resolve_tower(name, "image")
    return pixels_of(folder, _part(_read_config(folder, name), "image", name))


def pixels_of(folder: Path, config: PreTrainedConfig) -> PixelSpec:
    """The preprocessor_config.json that lies in a folder, for the image tower of this config."""
    statistics, resample = PIXELS.get(config.model_type, (IMAGENET, 3))
    mean: tuple[float, ...] = statistics[0]
    std: tuple[float, ...] = statistics[1]
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return PixelSpec(native_size(config), mean, std, resample)
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        size = _side(saved.get("crop_size") if saved.get("do_center_crop") else saved.get("size"), native_size(config))
        mean = tuple(saved.get("image_mean") or mean) if saved.get("do_normalize", True) else (0.0,) * 3
        std = tuple(saved.get("image_std") or std) if saved.get("do_normalize", True) else (1.0,) * 3
        # ours start from [0, 1]; a tower that rescales otherwise (or not at all) has its statistics in other units
        units = 255 * (saved.get("rescale_factor", 1 / 255) if saved.get("do_rescale", True) else 1)
        if not math.isclose(units, 1, rel_tol=1e-3):
            mean, std = tuple(m / units for m in mean), tuple(s / units for s in std)
        return PixelSpec(size, mean, std, int(saved.get("resample") or resample))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"Could not read {file}: {first_line(error)} Delete it to use the defaults of a "
                        f"{config.model_type} tower.") from error


def _side(size: Any, default: int) -> int:
    if size is None:
        return default
    if isinstance(size, dict):
        size = size.get("shortest_edge") or (size.get("height"), size.get("width"))
    if isinstance(size, int):
        return size
    height, width = size
    if height != width:
        raise ValueError(f"expected a square picture size, got {height} x {width}.")
    return int(height)


# ------------------------------------------------------------------------------------------------------------ words

# what tokenizers keep their words in; tokenizer_config.json holds none
VOCABULARIES = ("tokenizer.json", "vocab*", "tokenizer.model", "spiece.model", "*.bpe.model", "sentencepiece*.model",
                "spm*.model", "*.spm", "*.tiktoken", "tekken.json", "dict.txt", "bpe.codes")  # fmt: skip
LEAST_WORDS = 3  # beside special tokens: an empty tokenizer, as transformers makes one up, has two at the most


def has_vocabulary(folder: Path) -> bool:
    """A file with a tokenizer's words lies in the folder."""
    return any(file.is_file() for pattern in VOCABULARIES for file in folder.glob(pattern))


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a folder. Raises ValueError, with the reason alone, for one that cannot be read or
    knows no words: without a vocabulary transformers makes up an empty one, which takes every word for [UNK]."""
    bare = not has_vocabulary(folder)  # of use only to tokenizers of bytes and letters (ByT5, CANINE)
    nothing = ValueError("tokenizer_config.json has no vocabulary beside it (tokenizer.json, vocab.txt, ...)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        raise ValueError(first_line(error)) from error
    except Exception as error:  # its Rust part raises no narrower class
        raise nothing if bare else ValueError(first_line(error)) from error
    # a config can list runs of blanks and the like, which are words only beside a vocabulary
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if bare or token.special}
    words = len(tokenizer) - len(special.union(tokenizer.all_special_ids))
    if words < LEAST_WORDS:
        raise nothing if bare else ValueError(f"besides special tokens it has {words} words")
    return tokenizer


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The text tower's tokenizer, padding on the right. One without a padding token (GPT-2) pads with its end token:
    only `attention_mask` tells such padding from text, never a comparison of ids. Raises UserError if it has neither,
    and for a tokenizer that is not there, cannot be read or knows no words.
    """
    folder = resolve_tower(name, "text")
    if not has_vocabulary(folder) and not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"Tower {name} has no tokenizer in {folder} (expected tokenizer.json or its like). Copy the "
                        "tokenizer's files there; save_pretrained of the tokenizer writes them.")
    try:
        tokenizer = read_tokenizer(folder)
    except ValueError as error:
        raise UserError(f"Tower {name} has no tokenizer that can be used in {folder}: {error}. Copy the tokenizer's "
                        "files there; save_pretrained of the tokenizer writes them.") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"The tokenizer of tower {name} has neither a padding nor an end token; set `pad_token` in "
                            f"{folder / 'tokenizer_config.json'}.")
        say(f"Tower {name} has no padding token: padding with its end token {tokenizer.eos_token}; the attention mask "
             "tells them apart.")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer
