"""One YAML, dotted overrides: what a run is made of. Typed, checked before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from interlace.compose import Composition
from interlace.data.processor import Augment
from interlace.errors import UserError, suggest
from interlace.ranges import check_ranges


@dataclass
class DataSettings:
    """`source`: a sample set's name, a path, or several of either. `columns`: ours -> theirs, e.g. {caption: title}."""

    source: str | list[str] = ""
    columns: dict[str, str] = field(default_factory=dict)
    regions: str = ""  # what `interlace extract` wrote, or released features: for systems that read regions
    pictures: str = ""  # folder that relative picture paths start from; empty: the table's own
    max_skipped: float = 0.1  # the run stops when more than this share of the pictures it asked for cannot be read
    workers: int = 0  # loader processes; 0 decodes in the main one
    keep_states_gb: float = 2.0  # disk for what frozen towers say of the training split; 0 runs them at every step
    views: int = 4  # augmented views of each picture kept there


@dataclass
class TrainSettings:
    out: str = "runs/latest"
    epochs: float = 20
    steps: int = 0  # 0: as many as `epochs` gives
    batch: int = 64  # rows per optimiser step and rank
    accumulate: int = 1  # micro-batches the batch is split into
    memory: str = ""  # such as 8GB: as many micro-batches as it takes to stay below
    lr: float = 5e-4  # of everything that starts untrained
    aligned_lr: float = 5e-5  # of projections, and the contrast over stems, where they start aligned (model.align)
    text_lr: float = 2e-5  # of the text tower; 0 freezes it
    image_lr: float = 0.0  # of the image tower; 0 freezes it
    heads_first: bool = False  # matching and answers: their heads learn alone, before anything moves
    start_lr: float = 0.0  # of what starts from the text tower (a system's words and layers) or a run; 0: as `lr`
    freeze: list[str] = field(default_factory=list)  # regular expressions: parameters so named stop learning
    weight_decay: float = 0.05
    decay_all: bool = False  # norms, biases and scales too (LXMERT, VL-BERT)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])  # AdamW's; METER's and UNITER's
    eps: float = 1e-6  # AdamW's
    warmup: float = 0.1  # below 1: share of the steps; else steps
    schedule: str = "cosine"  # after the warm-up: cosine | linear, to zero at the last step | epochs | constant
    epoch_factor: float = 0.9  # of `schedule: epochs`: what each epoch leaves of the rate (BLIP)
    clip: float = 1.0  # gradient norm
    seed: int = 0
    bf16: bool = False
    checkpoint_every: int = 200  # steps
    log_every: int = 10  # steps
    keep_checkpoints: bool = False  # after the run has finished
    evaluate: bool = True  # on the validation split, at the end
    gradient_checkpointing: bool = False
    mix: str = "sum"  # passes: sum (all in every step) | draw (one a step, by share) | turns (one a step, in turns)


@dataclass
class Settings:
    """`objectives`: name -> options, each with a forward of its own. `passes` instead: a list of such mappings, whose
    objectives share one forward, each with `share`, `image`, `name` (see `Pass`)."""

    data: DataSettings = field(default_factory=DataSettings)
    model: Composition = field(default_factory=Composition)
    augment: Augment = field(default_factory=Augment)
    objectives: dict[str, dict[str, Any]] = field(default_factory=lambda: {"itc": {}, "itm": {}, "vqa": {}})
    passes: list[dict[str, Any]] = field(default_factory=list)
    train: TrainSettings = field(default_factory=TrainSettings)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, file: Path) -> None:
        file.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))


def load_settings(file: str | Path | None, overrides: list[str] | None = None) -> Settings:
    """A YAML file (or the name of a shipped recipe) with `key.sub=value` laid over it.

    Raises UserError for a file that is not there or no YAML, a misspelt key (with the nearest one) or one that stands
    twice, and a value of the wrong type, out of its range, or without effect beside another.
    """
    given: Any = {}
    if file is not None:
        path = find_recipe(file)
        given = read_yaml(path) or {}
        if not isinstance(given, dict):
            raise UserError(f"{path}: expected a mapping with {', '.join(_names(Settings))}; "
                            f"got {type(given).__name__}.")  # fmt: skip
    given.setdefault("objectives", {} if given.get("passes") else Settings().objectives)
    laid: set[str] = set()
    for override in overrides or []:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise UserError(f"{override!r} is no override: write key.sub=value, for instance train.batch=32.")
        try:
            value = yaml.load(text, Once)
        except KeyTwice as error:
            raise UserError(f"{override!r}: {error}.") from None
        except yaml.YAMLError:
            value = text
        _lay(given, key.strip().split("."), value, override)
        laid.add(key.strip())
    # an objective without options may be written as a bare line, `itc:`, and left out again by `objectives.itm=false`
    asked = given["objectives"]
    if not isinstance(asked, dict):
        raise UserError("objectives: expected objectives and their options, such as {itc: {size: 256}}; got "
                        f"{'nothing' if asked is None else repr(asked)}.")  # fmt: skip
    left_out = {name for name, options in asked.items() if options is False}
    _check_left_out(left_out)
    given["objectives"] = {name: _options(options) for name, options in asked.items() if options is not False}
    for name, options in given["objectives"].items():
        if not isinstance(options, dict):
            raise UserError(f"objectives.{name} takes options, such as {name}: {{weight: 0.5}}, or false to leave it "
                            f"out; got {options!r}.{_if_unknown(name)}")  # fmt: skip
    given["passes"] = _plain_passes(given.get("passes") or [], left_out)
    if given["passes"] and given["objectives"]:
        raise UserError("give either objectives, each with a forward of its own, or passes, whose objectives share "
                        f"one; got objectives {', '.join(given['objectives'])} beside passes.")  # fmt: skip
    _check_keys(Settings, given, "")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Settings, None)
    try:
        settings = Settings(**parser.instantiate(parser.parse_object(given)))
    except argparse.ArgumentError as error:
        raise UserError(_plainly(error)) from None
    check_ranges(settings)
    _check_system(settings.model, laid)
    return settings


class KeyTwice(yaml.YAMLError):
    """Says which key, and where."""


class Once(yaml.SafeLoader):
    """YAML in which no mapping has a key twice: of two the reader would keep the last, and say nothing."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":  # << is no name of its own
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                where = f"lines {lines[name]} and {line}" if lines[name] != line else f"line {line}"
                raise KeyTwice(f"the key {key.value!r} stands twice, in {where}: keep one")
            lines[name] = line
        return node


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises UserError for one that is not text or not YAML, and for a key that stands twice in
    one mapping."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Once)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path} is not UTF-8 text (byte {byte:#04x} at {error.start}): save it as UTF-8, or name the "
                        "config you meant.") from None  # fmt: skip
    except KeyTwice as error:
        raise UserError(f"{path}: {error}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from None


def _check_system(model: Composition, laid: set[str]) -> None:
    """Raises UserError for fusion or streams asked for beside a system, which has its own. `laid`: keys of overrides;
    in a file the default asks for nothing, since a run's config.yaml has every key."""
    usual = Composition()
    for name in ("fusion", "streams"):
        asked = getattr(model, name)
        if model.system and (f"model.{name}" in laid or asked != getattr(usual, name)):
            raise UserError(f"model.{name}={asked} has no effect beside model.system={model.system}, which says itself "
                            f"where its streams meet: leave model.{name} out, or model.system.")  # fmt: skip


def _if_unknown(name: str) -> str:
    """That no objective has this name, and which is near."""
    from interlace.objectives import Objective

    return "" if name in Objective.known else f" No objective is called {name!r}.{suggest(name, Objective.known)}"


def _options(given: Any) -> Any:
    """A bare line, and `true`, mean the defaults."""
    return {} if given is None or given is True else given


def _check_left_out(names: set[str]) -> None:
    """Raises UserError for a name that no objective has: leaving it out would leave out nothing."""
    from interlace.objectives import Objective  # which imports the models; most configs leave nothing out

    for name in sorted(names - Objective.known.keys()):
        raise UserError(f"objectives.{name}=false leaves out nothing: no objective is called {name!r} (known: "
                        f"{', '.join(sorted(Objective.known))}).{suggest(name, Objective.known)}")  # fmt: skip


def _plain_passes(given: Any, left_out: set[str]) -> list[dict[str, Any]]:
    """A bare line `mlm:` means its defaults, `mlm: false`, or `objectives.mlm=false`, leaves it out, and a pass of
    which nothing is left. Raises UserError for anything but mappings."""
    if not isinstance(given, list) or not all(isinstance(one, dict) and one for one in given):
        raise UserError("passes: expected a list of mappings from objectives to their options, such as "
                        f"[{{mlm: {{mask: 0.15}}, itm: {{negatives: swap}}}}]; got {given!r}.")  # fmt: skip
    plain = ("share", "image", "name")
    passes = [{k: v if k in plain else _options(v) for k, v in one.items()
               if k in plain or (v is not False and k not in left_out)} for one in given]  # fmt: skip
    return [one for one in passes if one.keys() - set(plain)]


def _plainly(error: argparse.ArgumentError) -> str:
    """What jsonargparse says of a wrong type, as "train.lr: expected a number, got 'fast'."."""
    text = " ".join(str(error).split())
    found = re.fullmatch(r'Parser key "([\w.]+)": .*?(?:Got|Given) value: (.*)', text)
    if found is None:
        return text
    key, got = found.groups()
    hint: Any = Settings
    for part in key.split("."):
        hint = typing.get_type_hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    return f"{key}: expected {WORDS[hint]}, got {got!r}." if hint in WORDS else text


WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text",
    str | list[str]: "a text or a list of texts",
    dict[str, str]: "names of columns, ours to theirs, such as {caption: title}",
    list[str]: "a list of texts", list[float]: "a list of numbers",
}  # fmt: skip


def find_recipe(file: str | Path) -> Path:
    """A path, or the name of a recipe that ships with the package. Raises UserError when there is none, and when what
    is named is data or a run."""
    path = Path(file).expanduser()
    shipped = {p.stem: p for p in (Path(__file__).parent / "recipes").glob("*.yaml")}
    if str(file) in shipped and not path.is_file():
        return shipped[str(file)]
    if path.is_dir() and (path / "config.yaml").is_file():
        raise UserError(f"{file} is a run folder, not a config: give {file}/config.yaml to go on with it.")
    if _is_source(str(file), path):
        raise UserError(f"{file} is data, not a config: give it as data.source={file}, for instance "
                        f"`interlace train demo data.source={file}`.")  # fmt: skip
    if path.is_file():
        return path
    raise UserError(f"no config at {path}, and no shipped recipe of that name (there are: "
                    f"{', '.join(sorted(shipped)) or 'none'}).{suggest(str(file), shipped)}")  # fmt: skip


def _is_source(name: str, path: Path) -> bool:
    """Whether someone who names this as a config means the data. A .json is a config as well: YAML includes it."""
    from interlace.data.samples import SAMPLES
    from interlace.data.sources.open import TABLES

    if path.is_file():
        return path.suffix.lower() in {*TABLES, ".tar"} - {".json"}
    return path.is_dir() or name.endswith(".tar") or all(part in SAMPLES for part in re.split(r"[,+]", name))


def _lay(given: dict, keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if given.get(key) is None:
            given[key] = {}
        given = given[key]
        if not isinstance(given, dict):
            raise UserError(f"{override!r}: {key!r} is a value, it has no parts.")
    given[keys[-1]] = value


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _check_keys(cls: type, given: Any, at: str) -> None:
    """jsonargparse checks types and names the key; the nearest right key is ours to say."""
    if not isinstance(given, dict):
        raise UserError(f"{at or 'the config'}: expected {', '.join(_names(cls))}; got {given!r}.")
    hints = typing.get_type_hints(cls)
    for key, value in given.items():
        where = f"{at}.{key}" if at else str(key)
        if key not in hints:
            raise UserError(f"unknown key {where!r}; {at or 'a config'} has {', '.join(hints)}."
                            f"{suggest(str(key), hints)}")  # fmt: skip
        if value is None and hints[key] in WORDS:  # jsonargparse lets nothing pass as a number
            raise UserError(f"{where}: expected {WORDS[hints[key]]}, got nothing.")
        if dataclasses.is_dataclass(hints[key]):
            _check_keys(typing.cast(type, hints[key]), value, where)
