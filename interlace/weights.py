"""Weights of published releases: tables of names read in both directions.

A preset's `KEYS` maps each name of the original checkpoint to ours. A line may name a module (its `.weight`, `.bias`
and whatever lies below come along) or one tensor; the longest line that fits wins.

    "encoder.layer.{n}.attention.self.query": "schedule.joint.{n}.attend.query",  any index
    "x_layers.{n}.visual_attention": "schedule.cross.{2n}.attend",   counted differently: {2n}, {2n+1}, {n-1}
    "blocks.{n}.attn.qkv": ("...query", "...key", "...value"),       rows, split by the sizes of ours
    "decoder.weight": "text.words.weight",                           a second name of one tensor (tied)
    "text_projection": Flip("heads.contrast.text.weight"),           transposed
    "class_embedding": Lead("image.first"),                          ours has leading axes of length one
    "position_ids": None,                                            dropped on purpose
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from interlace.errors import UserError

FIELD = re.compile(r"\{(\d*)([a-z])([+-]\d+)?\}")
OURS_ALONE = ("pixel_mean", "pixel_std")  # buffers that the configuration fills; no release has them
SHOWN = 12  # names of one sort that an error lists before it counts the rest


@dataclass(frozen=True)
class Flip:
    """The release stores the transpose."""

    name: str


@dataclass(frozen=True)
class Lead:
    """Ours has leading axes of length one that the release's tensor lacks."""

    name: str


@dataclass(frozen=True)
class Copies:
    """One tensor of the release fills several of ours, which were trained as one and may now part."""

    names: tuple[str, ...]


Target = str | tuple[str, ...] | Flip | Lead | Copies | None
Keys = Mapping[str, Target]


@dataclass
class Report:
    """What became of every tensor of a release."""

    mapped: dict[str, tuple[str, ...]] = field(default_factory=dict)  # theirs -> ours
    dropped: list[str] = field(default_factory=list)  # theirs, left out by the table or for want of that head
    fresh: list[str] = field(default_factory=list)  # ours, allowed to keep their initial values
    types: set[str] = field(default_factory=set)  # of numbers in the file that became the model's own: "bfloat16"

    def __str__(self) -> str:
        return f"{len(self.mapped)} tensors mapped, {len(self.dropped)} dropped, {len(self.fresh)} of ours untouched" \
               + (f", converted from {' and '.join(sorted(self.types))}" if self.types else "")


# ------------------------------------------------------------------------------------------------ one line of a table


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """The names a template fits; the last group is what lies below a module."""
    parts, at = [], 0
    for found in FIELD.finditer(template):
        parts += [re.escape(template[at : found.start()]), r"(\d+)"]
        at = found.end()
    return re.compile("".join(parts) + re.escape(template[at:]) + r"((?:\.[^.]+)*)")


def _read(template: str, name: str) -> tuple[dict[str, int], str] | None:
    """The indices and the rest of `name` if the template fits, else None."""
    match = _pattern(template).fullmatch(name)
    if match is None:
        return None
    index: dict[str, int] = {}
    for (times, letter, plus), digits in zip(FIELD.findall(template), match.groups()):
        n, rest = divmod(int(digits) - int(plus or 0), int(times or 1))
        if rest or n < 0 or index.setdefault(letter, n) != n:
            return None
    return index, match.groups()[-1]


def _write(template: str, index: Mapping[str, int], below: str) -> str:
    return FIELD.sub(lambda f: str(int(f[1] or 1) * index[f[2]] + int(f[3] or 0)), template) + below


def _names(target: Target) -> tuple[str, ...]:
    if target is None:
        return ()
    if isinstance(target, str):
        return (target,)
    if isinstance(target, Flip | Lead):
        return (target.name,)
    return target.names if isinstance(target, Copies) else target


@dataclass(frozen=True)
class Line:
    theirs: str
    target: Target
    index: Mapping[str, int]
    below: str

    @property
    def ours(self) -> tuple[str, ...]:
        return tuple(_write(name, self.index, self.below) for name in _names(self.target))

    def load(self, tensor: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
        """The release's tensor as ours. Raises ValueError when the shapes cannot be brought together."""
        if isinstance(self.target, tuple):
            rows = [shape[0] for shape in shapes]
            if tensor.dim() == 0 or len(tensor) != sum(rows):
                raise ValueError(f"expected {' + '.join(map(str, rows))} rows, got {tuple(tensor.shape)}")
            parts = list(tensor.split(rows))
        elif isinstance(self.target, Flip):
            parts = [tensor.t()]
        elif isinstance(self.target, Lead):
            lead = len(shapes[0]) - tensor.dim()
            parts = [tensor[(None,) * lead] if lead > 0 else tensor]
        else:
            parts = [tensor] * len(shapes)
        for part, shape in zip(parts, shapes):
            if part.shape != shape:
                raise ValueError(f"expected {tuple(shape)}, got {tuple(part.shape)}")
        return parts

    def save(self, parts: list[Tensor]) -> Tensor:
        if isinstance(self.target, tuple):
            return torch.cat(parts)
        if isinstance(self.target, Flip):
            return parts[0].t()
        if isinstance(self.target, Lead):
            return parts[0].reshape(parts[0].shape[next((n for n, s in enumerate(parts[0].shape) if s > 1), -1) :])
        return parts[0]


def _line(name: str, keys: Keys) -> Line | None:
    """The most specific line of the table that fits one of their names."""
    best: tuple[int, Line] | None = None
    for theirs, target in keys.items():
        size = len(FIELD.sub("", theirs))
        if (best is None or size > best[0]) and (found := _read(theirs, name)) is not None:
            best = size, Line(theirs, target, *found)
    return None if best is None else best[1]


def fitting_lines(name: str, keys: Keys) -> list[Line]:
    """Every line of the table that fits one of their names."""
    found = [(theirs, target, _read(theirs, name)) for theirs, target in keys.items()]
    return [Line(theirs, target, *fits) for theirs, target, fits in found if fits is not None]


def bert_layer(theirs: str, ours: str) -> dict[str, str]:
    """The lines of one layer in BERT's names, which most releases kept: `theirs` ends before `.attention`."""
    return {
        f"{theirs}.attention.self": f"{ours}.attend",  # query, key, value
        f"{theirs}.attention.output.dense": f"{ours}.attend.out",
        f"{theirs}.attention.output.LayerNorm": f"{ours}.attend.norm",
        f"{theirs}.intermediate.dense": f"{ours}.ffn.up",
        f"{theirs}.output.dense": f"{ours}.ffn.down",
        f"{theirs}.output.LayerNorm": f"{ours}.ffn.norm",
    }


# --------------------------------------------------------------------------------------------------- whole checkpoints


def load_foreign(model: nn.Module, tensors: Mapping[str, Tensor], keys: Keys, prefix: str = "",
                 fresh: Iterable[str] = ()) -> Report:  # fmt: skip
    """Fills `model` with a release's tensors through its table of names.

    `prefix` ("module.", "model.") stands before every name of the file and is taken off. `fresh`: beginnings of our
    names that may keep their initial values (a new head). Heads in the file that the model does not have are dropped
    and named in the report. Half precision becomes the model's own. Raises UserError that lists together every name
    the table does not know, every tensor of ours that stays unfilled, and every shape that differs; the model is then
    unchanged.
    """
    state = model.state_dict()
    report, values = Report(), dict[str, tuple[str, Tensor]]()
    unknown, wrong = list[str](), list[str]()
    for name, tensor in tensors.items():
        if not name.startswith(prefix):
            unknown.append(name)
            continue
        plain = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name[len(prefix) :]))  # BERT's first files
        line = _line(plain, keys)
        if line is None:
            unknown.append(name)
        elif line.target is None or _absent_head(model, line.ours):
            report.dropped.append(name)
        elif missing := [ours for ours in line.ours if ours not in state]:
            wrong.append(f"{name} goes to {', '.join(missing)}, which the model does not have")
        else:
            if not tensor.is_floating_point():  # quantised weights mean nothing without their scales
                wrong.append(f"{name} holds {_type(tensor)}, not weights: take the release that is not quantised")
                continue
            try:
                parts = line.load(tensor, [state[ours].shape for ours in line.ours])
            except ValueError as error:
                wrong.append(f"{name}: {error}")
                parts = []
            for ours, part in zip(line.ours, parts):
                if ours in values and not torch.equal(values[ours][1], part):
                    wrong.append(f"{name} and {values[ours][0]} are one tensor here, but differ in the file")
                values[ours] = name, part
            report.mapped[name] = line.ours
            report.types |= {_type(tensor)} - {_type(state[ours]) for ours in line.ours}
    touched = {ours for names in report.mapped.values() for ours in names}
    unfilled = [ours for ours in state if ours not in touched and ours not in OURS_ALONE]
    report.fresh = [ours for ours in unfilled if ours.startswith(tuple(fresh))]
    unfilled = [ours for ours in unfilled if ours not in report.fresh]
    if unknown or wrong or unfilled:
        raise UserError(_complaint(list(tensors), unknown, wrong, unfilled, keys))
    with torch.no_grad():
        for ours, (_, part) in values.items():
            state[ours].copy_(part)  # casts; state_dict() shares memory with the parameters
    return report


def save_foreign(model: nn.Module, keys: Keys, prefix: str = "") -> dict[str, Tensor]:
    """The model's tensors under the release's names: `load_foreign` backwards, tied names written out, each with memory
    of its own, as safetensors asks.

    Raises UserError when a tensor of ours has no name in the release.
    """
    state = model.state_dict()
    out, touched, taken = dict[str, Tensor](), set[str](), set[int]()
    firsts = [(theirs, _names(target)[0]) for theirs, target in keys.items() if target is not None]
    for ours in state:
        fits = [(theirs, first, *found) for theirs, first in firsts if (found := _read(first, ours)) is not None]
        # of lines that name modules the longest speaks; lines that name the very tensor are further names of it
        longest = max((len(first) for _, first, _, below in fits if below), default=0)
        for theirs, first, index, below in fits:
            line = _line(_write(theirs, index, below), keys)
            if (below and len(first) < longest) or line is None or line.theirs != theirs:
                continue
            if any(name not in state for name in line.ours):
                continue
            name = prefix + _write(theirs, line.index, line.below)
            value = line.save([state[ours] for ours in line.ours]).contiguous()
            place = value.untyped_storage().data_ptr()
            out[name] = value.clone() if place in taken else value
            taken.add(place)
            touched |= set(line.ours)
    if left := [ours for ours in state if ours not in touched and ours not in OURS_ALONE]:
        raise UserError(f"{len(left)} tensors have no name in the release: {_list(left)}. The table of names has no "
                        "line for them; remove those parts of the model before exporting.")  # fmt: skip
    return out


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _absent_head(model: nn.Module, ours: Iterable[str]) -> bool:
    heads: Iterable[str] = getattr(model, "heads", {})
    return all(name.startswith("heads.") and name.split(".")[1] not in heads for name in ours)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _complaint(names: list[str], unknown: list[str], wrong: list[str], unfilled: list[str], keys: Keys) -> str:
    text = ["These weights do not fit this model."]
    if unknown:
        text.append(f"Unknown names in the file ({len(unknown)} of {len(names)}): {_list(unknown)}.")
    if unfilled:
        text.append(f"Not in the file ({len(unfilled)} tensors of the model): {_list(unfilled)}.")
    if wrong:
        text.append(f"Do not fit ({len(wrong)}): " + "; ".join(wrong[:SHOWN])
                    + (f"; and {len(wrong) - SHOWN} more." if len(wrong) > SHOWN else "."))  # fmt: skip
        if any("expected" in line for line in wrong):
            text.append("Other shapes mean another size: build the model with the sizes of the release.")
    if len(unknown) > len(names) / 2:
        text.append(_guess(names, keys))
    return " ".join(part for part in text if part)


def _guess(names: list[str], keys: Keys) -> str:
    """Which preset, or which prefix, would know most of these names."""
    starts = {name.split(".")[0] + "." for name in names if "." in name}
    for start in sorted(starts):
        stripped = [name[len(start) :] for name in names if name.startswith(start)]
        if sum(_line(name, keys) is not None for name in stripped) > len(names) / 2:
            return f"With prefix={start!r} the table knows most of them."

    def known(table: Keys, start: str) -> float:
        own = [n[len(start) :] for n in names if n.startswith(start)]
        return sum(_line(n, table) is not None for n in own) / max(len(names), 1)

    share = {(preset, start): known(table, start) for preset, table in _tables().items() for start in ("", *starts)}
    best = max(share, key=lambda pair: share[pair], default=None)
    if best is None or share[best] <= 0.5:
        return "No preset knows most of these names."
    behind = f" behind the prefix {best[1]!r}" if best[1] else ""
    return f"They look like the release of {best[0]!r} ({share[best]:.0%} of the names are known there{behind})."


def _tables() -> dict[str, Keys]:
    import importlib
    import pkgutil

    import interlace.presets as presets

    tables = dict[str, Keys]()
    for found in pkgutil.iter_modules(presets.__path__):
        module = importlib.import_module(f"{presets.__name__}.{found.name}")
        for table, name in (("KEYS", found.name), ("HF_KEYS", f"{found.name} (transformers)")):
            if hasattr(module, table):
                tables[name] = getattr(module, table)
    return tables


def _why(error: Exception) -> str:
    """torch's advice is to open the file all the same; what it met is enough."""
    met = re.search(r"GLOBAL (\S+)", str(error))
    return f"it asks for {met[1]}" if met else "damaged, or not written by torch.save"


def read_release(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a release file: safetensors, or a pickle of nothing but tensors (torch.load, weights_only=True).

    A training checkpoint's `state_dict` or `model` entry is opened. Raises UserError for a file that needs unpickling
    of anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}: give the release's weights, .safetensors, .bin, .pt, .pth or .model.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path.name} is no safetensors file, or half of one ({str(error).strip()}): copy it "
                            "again.") from None  # fmt: skip
    try:
        with warnings.catch_warnings(action="ignore"):  # about how a file that is refused was pickled
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path.name} is no file of plain tensors ({_why(error)}). Only such files are opened, since "
                        "others may run code: where you trust it, write its tensors to a safetensors file "
                        "first.") from None  # fmt: skip
    for entry in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
    if not isinstance(content, dict):
        raise UserError(f"{path.name} holds a {type(content).__name__}, expected names and tensors.")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
