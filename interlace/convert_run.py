"""What makes converted weights a run: words, a way to make pictures square, a mark; and a check with transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from interlace import towers
from interlace.data.processor import Processor
from interlace.embed.regions import Regions
from interlace.errors import UserError
from interlace.model import Half, VLModel
from interlace.presets import Preset
from interlace.run import save_run
from interlace.towers import quiet

FITS = {"blip": "squash", "clip": "crop", "vilt": "squash"}  # of the releases' evaluation; others read regions
LONGEST = 40  # tokens, where the model has more positions


def tokenizer_for(source: Path, given: str) -> PreTrainedTokenizerBase | None:
    """The one named, else the one beside the weights; None where there is neither. Raises UserError for one that cannot
    be read or knows no words."""
    if given:
        return towers.load_tokenizer(given)
    folder = source if source.is_dir() else source.parent
    if not towers.has_vocabulary(folder) and not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        return towers.read_tokenizer(folder)
    except ValueError as error:
        raise UserError(f"the tokenizer beside the weights in {folder} cannot be used ({error}): name another one with "
                        "--tokenizer.") from None  # fmt: skip


def answers_from(file: str | Path, labels: int) -> list[str]:
    """A release's answer list: JSON, a list of answers, of {"ans": answer}, or a mapping of answers to numbers.
    Raises UserError when it is not as long as the head."""
    try:
        said = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no answer list: {error}. Expected JSON, a list of answers or {{answer: number}}.") \
            from None  # fmt: skip
    if isinstance(said, dict):
        said = [answer for answer, _ in sorted(said.items(), key=lambda pair: pair[1])]
    answers = [str(one["ans"] if isinstance(one, dict) and "ans" in one else one) for one in said]
    if len(answers) != labels:
        raise UserError(f"{file} has {len(answers)} answers, the model's head {labels}: give the list it was trained "
                        "with.")  # fmt: skip
    return answers


def write_run(folder: Path, model: VLModel, line: Preset, tokenizer: PreTrainedTokenizerBase, source: Path,
              answers: list[str]) -> None:  # fmt: skip
    """A run folder: everything the other commands ask for. Raises UserError for a tokenizer with more words than the
    model."""
    words, known = cast(Any, model.config.text), len(tokenizer)
    if known > words.vocabulary:
        raise UserError(f"the tokenizer has {known:,} words and the model {words.vocabulary:,}: it is another model's. "
                        "Name the right one with --tokenizer.")  # fmt: skip
    pixels, system = cast(Any, model.config.image), line.module.__name__.rpartition(".")[2]
    longest = min(LONGEST, getattr(words, "positions", LONGEST))
    if hasattr(pixels, "size"):
        size = pixels.size
        mean, std = getattr(pixels, "mean", (0.0,) * 3), getattr(pixels, "std", (1.0,) * 3)  # MLIM takes pixels as such
        processor = Processor(tokenizer, size, list(mean), list(std), FITS.get(system, "squash"), longest)
    else:  # a detector of the release found its regions, which is not here
        whole = system in ("vilbert", "vl_bert")
        processor = Processor(tokenizer, max_length=longest,
                              regions={"extractor": {"kind": "release", "name": f"{line.system}'s own detector"},
                                       "boxes": pixels.boxes, "whole": whole})  # fmt: skip
    total = sum(p.numel() for p in model.parameters())
    save_run(folder, model, processor, answers or None, name=folder.name, system=system, steps=0, train_seconds=0.0,
             parameters=total, trained=0, data=f"converted from {source.name}", data_fingerprint="",
             match_weight=1.0 if "match" in model.heads and "contrast" in model.heads else 0.0)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the check


def difference(source: Path, model: VLModel) -> float | None:
    """The largest difference between states of transformers' class, loaded from the folder, and of the model, on a
    batch drawn at random; None where transformers has no such class, or the source is no folder of its."""
    file = source / "config.json"
    if not source.is_dir() or not file.is_file():
        return None
    check = CHECKS.get(json.loads(file.read_text()).get("model_type", ""))
    if check is None:
        return None
    torch.manual_seed(0)
    text, image = cast(Any, model.config.text), cast(Any, model.config.image)
    length = min(12, getattr(text, "positions", 12))
    ids = torch.randint(5, text.vocabulary - 1, (2, length))
    if hasattr(text, "eos"):
        ids[:, -1] = text.eos
    seen = torch.rand(2, 3, image.size, image.size) if hasattr(image, "patch") else None
    training = model.training
    with torch.no_grad(), quiet():  # heads that its class leaves out are no news
        pairs = check(source, model.eval(), ids, seen)
    model.train(training)
    return max(float((a - b).abs().max()) for a, b in pairs)


Pairs = list[tuple[Any, Any]]


def _lxmert(source: Path, model: VLModel, ids: Tensor, seen: Tensor | None) -> Pairs:
    other: Any = hf.LxmertModel.from_pretrained(source, local_files_only=True).eval()
    features, boxes = _regions(model)
    theirs = other(ids, visual_feats=features, visual_pos=boxes)
    ours = model(ids, Regions(features, boxes))
    return [(ours.text, theirs.language_output), (ours.image, theirs.vision_output)]


def _visual_bert(source: Path, model: VLModel, ids: Tensor, seen: Tensor | None) -> Pairs:
    other: Any = hf.VisualBertModel.from_pretrained(source, local_files_only=True).eval()
    features, _ = _regions(model)
    out = other(input_ids=ids, attention_mask=torch.ones_like(ids), visual_embeds=features,
                visual_attention_mask=torch.ones(features.shape[:2], dtype=torch.long),
                visual_token_type_ids=torch.zeros(features.shape[:2], dtype=torch.long))  # fmt: skip
    ours = model(ids, Regions(features, None))
    return [(torch.cat([ours.text, ours.image], 1), out.last_hidden_state)]


def _vilt(source: Path, model: VLModel, ids: Tensor, seen: Tensor | None) -> Pairs:
    other: Any = hf.ViltModel.from_pretrained(source, local_files_only=True).eval()
    out = other(input_ids=ids, pixel_values=seen, pixel_mask=torch.ones(2, *seen.shape[2:], dtype=torch.long))  # type: ignore
    return [(model(ids, seen).text, out.last_hidden_state[:, : ids.shape[1]])]  # it draws the order of patches


def _clip(source: Path, model: VLModel, ids: Tensor, seen: Tensor | None) -> Pairs:
    other: Any = hf.CLIPModel.from_pretrained(source, local_files_only=True).eval()
    out = other(input_ids=ids, pixel_values=seen)
    return [(model.encode_text(ids), out.text_embeds), (model.encode_image(seen), out.image_embeds)]  # type: ignore


def _blip(source: Path, model: VLModel, ids: Tensor, seen: Tensor | None) -> Pairs:
    reads = "" if model.decoder is None else model.config.writes.context
    class_ = {"": hf.BlipForImageTextRetrieval, "image": hf.BlipForConditionalGeneration,
              "text": hf.BlipForQuestionAnswering}[reads]  # fmt: skip
    other: Any = class_.from_pretrained(source, local_files_only=True).eval()
    theirs, ours = other.vision_model(pixel_values=seen).last_hidden_state, model.half_image(seen)  # type: ignore
    pairs: Pairs = [(ours.states, theirs)]
    if not reads:
        text = other.text_encoder(input_ids=ids, encoder_hidden_states=theirs).last_hidden_state
        return [*pairs, (model.fuse(model.half_text(ids), ours).text, text)]
    decoder: Any = model.decoder
    if reads == "text":
        theirs = other.text_encoder(input_ids=ids, encoder_hidden_states=theirs).last_hidden_state
        ours = Half(cast(Tensor, model.fuse(model.half_text(ids), ours).text), None)
        pairs.append((ours.states, theirs))
    written = other.text_decoder(input_ids=ids, encoder_hidden_states=theirs).logits
    return [*pairs, (decoder(ids, ours.states).logits, written)]


def _regions(model: VLModel) -> tuple[Tensor, Tensor]:
    corners = torch.rand(2, 5, 2, 2).sort(2).values.flatten(2)  # (2, 5, 4): x1 y1 x2 y2, in order
    return torch.rand(2, 5, cast(Any, model.config.image).features), corners


CHECKS: dict[str, Callable[[Path, VLModel, Tensor, Tensor | None], Pairs]] = {
    "lxmert": _lxmert, "visual_bert": _visual_bert, "vilt": _vilt, "clip": _clip, "blip": _blip}  # fmt: skip
