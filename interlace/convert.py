"""A release's weights, brought over once: read through the preset's table of names, saved under ours.

The sizes are those of the tensors. What tensors do not say (how many heads an attention has, the activation, the norm's
epsilon) comes from the configuration beside them, the release's or transformers'; without one, heads are 64 wide, as in
every released base and large model but ViLBERT's image stream, and the rest is the preset's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interlace.config import VLConfig
from interlace.errors import UserError
from interlace.layers import Kind
from interlace.model import VLModel
from interlace.presets import Preset, preset, vilbert, vilt, vision_encoder_decoder, vl_bert
from interlace.weights import OURS_ALONE, Keys, Report, _line, load_foreign, read_release

if TYPE_CHECKING:
    from rich.console import Console

ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".th", ".ckpt", ".model")
PREFIXES = ("", "module.", "model.", "bert.", "module.bert.")  # of training wrappers; VisualBERT's is "bert."
TABLES = {  # of the presets whose files differ by task; the others have KEYS and perhaps HF_KEYS
    "lxmert_vqa": ("VQA_KEYS", "HF_KEYS"), "lxmert_nlvr2": ("NLVR2_KEYS",),
    "blip_retrieval": ("RETRIEVAL_KEYS", "HF_KEYS"), "blip_caption": ("CAPTION_KEYS", "HF_CAPTION_KEYS"),
    "blip_vqa": ("VQA_KEYS", "HF_VQA_KEYS"), "blip": ("KEYS",), "blip_large": ("KEYS",),
    "blip_nlvr2": ("NLVR2_KEYS",), "vl_bert_refcoco": ("REFCOCO_KEYS",), "vl_bert_vcr": ("VCR_KEYS",),
}  # fmt: skip
BARE = ("lxmert", "visual_bert", "vilt")  # of transformers, whose bare models leave this out before their names
HEADS: dict[str, Any] = {  # that fine-tuned files have, beside those of pre-training; their sizes come from the file
    "uniter": {"answers": {"kind": "transformed"}, "rank": {"kind": "linear"},
               "refer": {"kind": "transformed", "stream": "image"}, "pair": {"kind": "uniter_pair"}},
    "visual_bert": {"answers": {"kind": "linear"}, "ground": {"kind": "visual_bert_grounding"}},
    "vl_bert": {"answers": {"kind": "transformed"}},
    "vilt": {"rank": {"kind": "linear"}, "answers": {"kind": "vilt_verdict"},
             "nlvr2": {"kind": "vilt_verdict", "pictures": 2}},
}  # fmt: skip


@dataclass
class Converted:
    """What was read: the model, what became of each tensor, and which table and prefix knew the names."""

    model: VLModel
    report: Report
    table: str
    prefix: str


# ---------------------------------------------------------------------------------------------------------- the source


def read(source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file or a transformers folder, and the configuration beside them ({} if there is none).
    Pickles are opened with weights_only alone. Raises UserError for what cannot be read."""
    if not source.exists():
        raise UserError(f"nothing at {source}: give a file ({', '.join(ENDINGS)}) or a folder of transformers.")
    folder = source if source.is_dir() else source.parent
    files = _files(source) if source.is_dir() else [source]
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_release(file)
    if not tensors:
        raise UserError(f"{source} holds no tensors: is it the weights' file?")
    beside = folder / "config.json" if source.is_dir() else source.with_suffix(".json")
    beside = beside if beside.is_file() else folder / "config.json"
    if not beside.is_file():
        return tensors, {}
    try:
        given = json.loads(beside.read_text())
    except ValueError as error:
        raise UserError(f"{beside} is not JSON ({error}): mend it or take it away.") from None
    if not isinstance(given, dict):
        raise UserError(f"{beside}: expected a configuration, names and values; got a {type(given).__name__}.")
    return _of_transformers(tensors, given), given


def _of_transformers(tensors: dict[str, Tensor], given: dict[str, Any]) -> dict[str, Tensor]:
    """Under the names that its models with heads have."""
    base = f"{given.get('model_type')}."
    if base[:-1] in BARE and not any(name.startswith(base) for name in tensors):
        tensors = {base + name: tensor for name, tensor in tensors.items()}
    return vilt.told_apart(tensors)


def _files(folder: Path) -> list[Path]:
    """The weights in a folder: one file, or the parts that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            parts = json.loads(index.read_text())["weight_map"].values()
            return [folder / Path(part).name for part in sorted(set(parts))]
    found = sorted(f for f in folder.iterdir() if f.suffix in ENDINGS)
    if len(found) == 1:
        return found
    names = ", ".join(f.name for f in found[:6]) or "none"
    raise UserError(f"{folder} should hold one file of weights ({', '.join(ENDINGS)}), and has {names}: name the file.")


# ------------------------------------------------------------------------------------------------- sizes from tensors


def shapes_of(tensors: Mapping[str, Tensor], keys: Keys, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the file's tensors under our names."""
    out: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        line = _line(re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name.removeprefix(prefix))), keys)
        if line is None:
            continue
        shape = tuple(tensor.shape)
        if isinstance(line.target, tuple):  # query, key, value in one; or a table whose last or first row is apart
            parts = [shape[0] // 3] * 3 if len(line.ours) == 3 else [1, shape[0] - 1]
            parts = parts[::-1] if line.ours[0] == "text.types.weight" else parts
            out |= {ours: (rows, *shape[1:]) for ours, rows in zip(line.ours, parts)}
        else:
            flipped = shape[::-1] if type(line.target).__name__ == "Flip" else shape
            out |= dict.fromkeys(line.ours, flipped)
    return out


def best_table(name: str, line: Preset, tensors: Mapping[str, Tensor]) -> tuple[str, Keys, str]:
    """(name of the table, the table, prefix) that knows most names of the file."""
    tables = TABLES.get(name, tuple(t for t in ("KEYS", "HF_KEYS") if hasattr(line.module, t)))
    best: tuple[int, str, str] = (-1, "", "")
    for table in tables:
        for prefix in PREFIXES:
            keys = getattr(line.module, table)
            own = [n.removeprefix(prefix) for n in tensors if n.startswith(prefix)]
            # a trunk's own "bert." is no wrapper's: the shorter prefix wins when both know as many
            if (known := sum(_line(n, keys) is not None for n in own)) > best[0]:
                best = known, table, prefix
    return best[1], getattr(line.module, best[1]), best[2]


def _find(given: dict[str, Any], *names: str) -> Any:
    """The first of these dotted names that the configuration has."""
    for name in names:
        at: Any = given
        for part in name.split("."):
            at = at.get(part) if isinstance(at, dict) else None
        if at is not None:
            return at
    return None


def sized(config: VLConfig, shapes: Mapping[str, tuple[int, ...]], given: dict[str, Any], further: dict[str, Any],
          hf: bool) -> VLConfig:  # fmt: skip
    """The preset's configuration at the sizes of the file. Raises UserError where neither tensors nor the configuration
    beside them say a size, and where the two say different ones."""
    common = ("num_attention_heads", "num_heads", "NETWORK.VLBERT.num_attention_heads")
    prefer = {"text": ("text_config", "med_config"), "image": ("vision_config", "vision")}
    for stream in ("text", "image"):
        spec, own = getattr(config, stream), prefer[stream]
        heads = _find(given, *_places(own, *common))
        act = _find(given, *_places(own, "hidden_act", "NETWORK.VLBERT.hidden_act"))
        changes: dict[str, Any] = {}
        if act:
            changes["activation"] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(act, act)
        if hf and (eps := _find(given, *_places(own, "layer_norm_eps"))) is not None:
            changes["eps"] = eps
            if hasattr(spec, "eps"):
                spec.eps = eps
        found, said = _width(shapes, stream, config), _find(given, *_places(own, "hidden_size", "embed_dim"))
        if found and said and found != said:
            raise UserError(f"the {stream} is {found} wide, but the configuration beside the weights is of a model "
                            f"whose {stream} is {said} wide: put their own there.")  # fmt: skip
        size = found or spec.width.size
        ffn = _inner(shapes, stream, config) or 4 * size
        if not heads and size % 64:
            raise UserError(f"the {stream} is {size} wide, which no released model is, and tensors do not say how many "
                            "heads their attention has: put the release's configuration beside the weights as "
                            "config.json.")  # fmt: skip
        spec.width = replace(spec.width, size=size, heads=heads or size // 64, ffn=ffn, **changes)
        for field, name in (("vocabulary", "words"), ("positions", "positions"), ("types", "types")):
            for place in (stream, "decoder.words") if stream == "text" else (stream,):
                if hasattr(spec, field) and (shape := shapes.get(f"{place}.{name}.weight")):
                    setattr(spec, field, shape[0])
    _image(config, shapes)
    config.segments = {name: _repeat(kinds, f"schedule.{name}", shapes) for name, kinds in config.segments.items()}
    if config.writes is not None:
        config.writes.segments = {name: _repeat(kinds, f"decoder.schedule.{name}", shapes)
                                  for name, kinds in config.writes.segments.items()}  # type: ignore[union-attr]  # fmt: skip
    if "poolers.text.dense.weight" in shapes and config.text.pool == "first":
        config.text.pool = "tanh"
    config.heads = found_heads({**config.heads, **further}, shapes, config.text.width.heads)
    for head in config.heads.values():
        if hf and head.get("kind") in ("tied", "transformed"):  # transformers has one epsilon for all
            head["eps"] = config.text.width.eps
    if hf and config.writes is not None:  # BLIP's: it starts with [DEC] and ends with [SEP]
        config.writes.start = _find(given, "text_config.bos_token_id") or config.writes.start
        config.writes.end = _find(given, "text_config.sep_token_id") or config.writes.end
    if hasattr(config.text, "eos") and (eos := _find(given, "text_config.eos_token_id")) not in (None, 2):
        config.text.eos = eos  # 2 stands in OpenAI's own folders, written before the id was read: 49407 is meant
    return config


def _places(own: tuple[str, ...], *names: str) -> list[str]:
    """A stream's own part of the configuration first, then the whole."""
    return [*(f"{part}.{name}" for part in own for name in names), *names]


def _width(shapes: Mapping[str, tuple[int, ...]], stream: str, config: VLConfig) -> int:
    names = {"text": ("text.words.weight",), "image": ("image.positions", "image.features.weight", "image.norm.weight")}
    for name in names[stream]:
        if name in shapes:
            return shapes[name][0 if name.endswith("features.weight") else -1]
    return 0


def _inner(shapes: Mapping[str, tuple[int, ...]], stream: str, config: VLConfig) -> int:
    """The inner size of a stream's feed-forward, of the first layer that changes this stream; 0 if there is none."""
    from interlace.draw import ask

    places = [(f"schedule.{name}.{n}", kind) for name, kinds in config.segments.items() for n, kind in enumerate(kinds)]
    if config.writes is not None and stream == "text":
        written = dict(config.writes.segments)
        places += [(f"decoder.schedule.{name}.{n}", k) for name, kinds in written.items() for n, k in enumerate(kinds)]
    for at, kind in places:
        parts = (f"{stream}.ffn", f"{stream}_ffn", *(("ffn",) if stream in ask(kind).reads else ()))
        for part in parts:
            if (shape := shapes.get(f"{at}.{part}.up.weight")) is not None:
                return shape[0]
    return 0


def _image(config: VLConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    spec: Any = config.image
    for field, name in (("features", "image.features.weight"), ("boxes", "image.boxes.weight")):
        if hasattr(spec, field) and name in shapes:
            setattr(spec, field, shapes[name][1])
    if hasattr(spec, "geometry") and "image.hidden_feature" in shapes:
        spec.features = shapes["image.hidden_feature"][-1]
        spec.geometry = (shapes["image.project.weight"][1] - spec.features) // 4
    elif hasattr(spec, "geometry") and "image.project.weight" in shapes:  # fine-tuned: the geometry is as released
        spec.features = shapes["image.project.weight"][1] - 4 * spec.geometry
    if hasattr(spec, "patch") and "image.project.weight" in shapes:
        spec.patch = shapes["image.project.weight"][-1]
        places = next((shapes[n][-2] for n in ("image.positions",) if n in shapes), 0)
        if places:
            spec.size = round((places - 1) ** 0.5) * spec.patch
    if hasattr(spec, "images") and "image.modality" in shapes:
        spec.images = shapes["image.modality"][0]


def _repeat(kinds: list[Kind], at: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Kind]:
    """A segment's pattern as often as the file has layers. A layer with options of its own (positions) takes them."""
    from interlace.draw import fold

    found = [int(m[1]) for name in shapes if (m := re.match(re.escape(at) + r"\.(\d+)\.", name))]
    if not found:
        return kinds
    pattern = fold(kinds)[0][0]
    if (places := shapes.get(f"{at}.0.positions.weight")) is not None:  # VL-BERT's first layer
        return [Kind(kinds[0].name, (*(o for o in kinds[0].options if o[0] != "positions"), ("positions", places[0])))]
    return pattern * ((max(found) + len(pattern)) // len(pattern))


def found_heads(known: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], attention: int) -> dict[str, Any]:
    """The heads that the file has, at its sizes."""
    out = {}
    for name, options in known.items():
        at, options = f"heads.{name}", dict(options)
        if not any(n.startswith(f"{at}.") for n in shapes):
            continue
        kind = options.get("kind", name)
        if kind == "region_labels":
            options |= {part: shapes[f"{at}.{part}.weight"][0] for part in ("objects", "attributes", "features")}
        elif kind in ("contrast", "blip_contrast"):
            options["size"] = shapes[f"{at}.text.weight"][0]
        elif kind == "visual_bert_grounding":
            options["size"] = shapes[f"{at}.query.weight"][0]
        elif kind == "uniter_pair":
            options["heads"] = attention
        elif kind == "tied":
            options["labels"] = shapes[f"{at}.bias"][0]
        elif f"{at}.out.weight" in shapes:
            options["labels"] = shapes[f"{at}.out.weight"][0]
            if kind == "transformed":
                options["hidden"] = shapes[f"{at}.dense.weight"][0]
        out[name] = options
    return out


def _vilbert(tensors: Mapping[str, Tensor], given: dict[str, Any], prefix: str) -> tuple[VLConfig, Keys]:
    """Which layers meet is in the release's configuration alone; without it, the base size."""
    tasks = tensors.get(f"{prefix}bert.embeddings.task_embeddings.weight")
    rows = 0 if tasks is None else len(tasks)
    if "v_hidden_size" in given:
        config = vilbert.from_release(given, rows)
    else:
        size = next((t.shape[1] for n, t in tensors.items() if n.endswith("embeddings.word_embeddings.weight")), 768)
        if size != 768:
            raise UserError(f"a ViLBERT {size} wide: only its configuration says where its streams meet; put the "
                            "release's configuration beside the weights as config.json.")  # fmt: skip
        config = vilbert.twelve_in_one() if rows else vilbert.vilbert()
    keys = vilbert.keys(config.segments)
    shapes = shapes_of(tensors, keys, prefix)
    config.text.vocabulary = shapes["text.words.weight"][0]  # type: ignore[attr-defined]
    config.heads = found_heads(config.heads, shapes, 0)
    return config, keys


# -------------------------------------------------------------------------------------------------------------- whole


def load(source: str | Path, name: str) -> Converted:
    """The model of a preset with a release's weights. Raises UserError for an unknown preset, a source that cannot be
    read, sizes that nothing tells, and every name and shape that does not fit, together."""
    line, make = preset(name)
    if line.module is vision_encoder_decoder:
        raise UserError("a vision encoder-decoder is transformers' own model and keeps its names, so there is nothing "
                        "to convert: `interlace caption FOLDER PICTURE` writes by it, and "
                        "interlace.captioner.load_captioner reads it.")
    plain = name.strip().lower().replace("-", "_")
    tensors, given = read(Path(source).expanduser())
    table, keys, prefix = best_table(plain, line, tensors)
    if line.module is vilbert:
        config, keys = _vilbert(tensors, given, prefix)
    else:
        shapes = shapes_of(tensors, keys, prefix)
        first = line.module.__name__.rpartition(".")[2]
        if sum(_line(n.removeprefix(prefix), keys) is not None for n in tensors) < len(tensors) / 2:
            # another system's file: the complaint says whose
            with torch.device("meta"):
                load_foreign(VLModel(make()), tensors, keys, prefix)
        further = HEADS.get(first, {})
        config = sized(make(), shapes, given, further, "HF_" in table)
        if line.system == "ViLT" and "mlm" in config.heads and "heads.mlm.out.weight" not in shapes:
            # transformers ties it
            words = tensors[f"{prefix}vilt.embeddings.text_embeddings.word_embeddings.weight"]
            tensors[f"{prefix}mlm_score.decoder.weight"] = words
            config.heads["mlm"]["labels"] = len(words)
    fresh: tuple[str, ...] = getattr(line.module, "FRESH", ())  # of a system that has no release, and starts from BERT
    config.heads |= {head: options for head, options in make().heads.items() if f"heads.{head}." in fresh}
    if table == "HF_KEYS" and line.system == "BLIP":
        fresh = ("heads.contrast.temperature",)
    if line.module is vl_bert and "mlm" not in config.heads:
        fresh = vl_bert.UNTUNED
    model = VLModel(config)
    return Converted(model, load_foreign(model, tensors, keys, prefix, fresh), table, prefix)


def convert(source: str | Path, out: str | Path, name: str, console: Console | None = None, tokenizer: str = "",
            answers: str | Path = "") -> Converted:  # fmt: skip
    """`interlace convert`: writes a run folder that the other commands take, and `VLModel.from_pretrained` too; without
    a tokenizer (`tokenizer` names one, or it lies beside the weights) only what `VLModel` reads. `answers`: the file
    with the answer list of the model's answer head. Prints what was mapped and dropped, and the largest difference
    from transformers' class where the source is a folder of its. Raises UserError as `load` does, when `out` is not
    empty, and for a tokenizer or an answer list of another model."""
    from rich.console import Console

    from interlace.convert_run import answers_from, difference, tokenizer_for, write_run
    from interlace.towers import quiet

    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: give a folder that is new.")
    done, origin = load(source, name), Path(source).expanduser()
    words = tokenizer_for(origin, tokenizer)
    labels = done.model.config.heads.get("answers", {}).get("labels", 0)
    if answers and not labels:
        raise UserError(f"{answers} was given as its answers, but the model has no answer head.")
    listed = answers_from(answers, labels) if answers else []
    if words is None:
        done.model.config.architectures = ["VLModel"]
        with quiet():
            done.model.save_pretrained(folder)
    else:
        write_run(folder, done.model, preset(name)[0], words, origin, listed)
    console = console or Console()
    names = "transformers' names" if "HF_" in done.table else "the release's names"
    stripped = f", {done.prefix!r} taken off" if done.prefix else ""
    console.print(f"{len(done.report.mapped)} tensors mapped by {names}{stripped}", markup=False)
    if done.report.dropped:
        console.print(f"{len(done.report.dropped)} dropped, as the preset's table says: {_short(done.report.dropped)}",
                      markup=False)  # fmt: skip
    if done.report.types:
        console.print(f"{' and '.join(sorted(done.report.types))} became {done.model.dtype}".replace("torch.", ""))
    if done.report.fresh:
        console.print(f"not in the file, at their initial values: {', '.join(done.report.fresh)}", markup=False)
    heads = ", ".join(done.model.config.heads) or "none"
    total = sum(p.numel() for p in done.model.parameters())
    alone = [n for n in done.model.state_dict() if n in OURS_ALONE]
    console.print(done.model.config.describe(), markup=False)
    console.print(f"heads: {heads}. {total / 1e6:.1f} M parameters"
                  + (f"; {', '.join(alone)} from the preset." if alone else "."), markup=False)  # fmt: skip
    if (apart := difference(origin, done.model)) is not None:
        console.print(f"largest difference from transformers on a random batch: {apart:.1e}", markup=False)
    else:
        console.print("not compared with transformers: the source is no folder of its, with a class that it ships",
                      markup=False)  # fmt: skip
    if words is None:
        console.print("no tokenizer lies beside the weights, so this is a model and no run yet: name one with "
                      "--tokenizer, and search, answer, caption and evaluate take the folder.", markup=False)
    return done


def _short(names: list[str]) -> str:
    """`encoder.layer.0.x`, `encoder.layer.1.x` -> `encoder.layer.*.x (2)`."""
    kinds: dict[str, int] = {}
    for name in names:
        plain = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        kinds[plain] = kinds.get(plain, 0) + 1
    shown = [name if n == 1 else f"{name} ({n})" for name, n in list(kinds.items())[:12]]
    return ", ".join(shown) + (f" and {len(kinds) - 12} more sorts" if len(kinds) > 12 else "")
