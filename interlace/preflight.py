"""What is looked at before a training's first step: settings, data, and the folder that it would write to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from interlace.checkpoints import newest_complete
from interlace.data.rows import Source
from interlace.errors import UserError, suggest
from interlace.objectives import Pass
from interlace.ranges import check_ranges
from interlace.run import MARK
from interlace.settings import Settings

CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"
SCHEDULES = {"cosine": "cosine", "linear": "linear", "epochs": "constant_with_warmup",
             "constant": "constant_with_warmup"}  # fmt: skip  "epochs" is made by VLTrainer.create_scheduler
COMPARING = ("itc", "itc_momentum", "itc_sigmoid", "itm")  # objectives that tell pairs of different groups apart


def check_settings(settings: Settings) -> None:
    """Raises UserError for a number, a schedule or an optimiser that there is not."""
    check_ranges(settings)
    t = settings.train
    if t.schedule not in SCHEDULES:
        raise UserError(f"train.schedule is {', '.join(SCHEDULES)}; got {t.schedule!r}."
                        f"{suggest(t.schedule, SCHEDULES)}")  # fmt: skip
    if len(t.betas) != 2 or not all(0 <= beta < 1 for beta in t.betas):
        raise UserError(f"train.betas are two numbers from 0 to below 1, such as [0.9, 0.98]; got {t.betas}.")


def several_groups(source: Source, passes: list[Pass]) -> None:
    """Raises UserError where an objective tells pairs apart, and all rows of the training split are one group."""
    names = {o.name for one in passes for o, _ in one.objectives} & set(COMPARING)
    rows = np.asarray(source.indices("train"))
    if names and len(np.unique(np.asarray(source.group_codes)[rows])) < 2:
        raise UserError(f"{', '.join(sorted(names))}: pairs of different groups are told apart, and all {len(rows)} "
                        f"training rows of {source.name} are one group (the same `group` cell, caption or picture): "
                        "give the things groups of their own, or leave these objectives out.")  # fmt: skip


def no_strangers(out: Path) -> None:
    """A run writes a README.md, a config.json and more. Raises UserError for a folder that holds other things than a
    run's, and for a file."""
    if out.is_file():
        raise UserError(f"train.out is a folder, and {out} is a file: choose another train.out.")
    held = {file.name for file in out.iterdir() if file.name[0] != "."} if out.is_dir() else set()
    begun = {"config.yaml", "data.json"}
    if held - begun and not begun <= held:
        raise UserError(f"{out} holds files that are no run's ({', '.join(sorted(held - begun)[:3])}, ...), and a run "
                        "writes a README.md, a config.json and others: choose another train.out.")  # fmt: skip


def same_settings(out: Path, settings: Settings) -> None:
    """A folder belongs to one experiment, from its first step on: a run that failed before one leaves nothing that
    other settings could spoil. Raises UserError naming the first settings that differ."""
    file = out / "config.yaml"
    begun = (out / MARK).is_file() or (out / LOG).is_file() or (out / CHECKPOINTS).is_dir()
    if not (file.is_file() and begun):
        return
    now, before = _flat(settings.to_dict()), _flat(yaml.safe_load(file.read_text()))
    # what an older version did not write had today's default
    defaults = {k: v for k, v in _flat(Settings().to_dict()).items() if not k.startswith("objectives")}
    before = {k: defaults[k] for k in now if k in defaults} | before
    free = ("train.out", "data.workers", "train.keep_checkpoints")
    differ = [f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in sorted(before.keys() | now.keys())
              if before.get(k) != now.get(k) and k not in free]  # fmt: skip
    if differ:
        raise UserError(f"{out} holds a run with other settings ({'; '.join(differ[:3])}). Choose another train.out, "
                        "or remove the folder.")  # fmt: skip


def same_data(out: Path, now: dict[str, Any]) -> None:
    """A run that was begun goes on over the rows it began with: others would come in another order. Raises UserError
    that says how they differ."""
    file = out / "data.json"
    if newest_complete(out / CHECKPOINTS, warn=lambda line: None) is None or not file.is_file():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    if before["fingerprint"] != now["fingerprint"]:
        counts = [f"{rows['train']} rows to train on and {rows['val'] + rows['test']} others"
                  for rows in (before["rows"], now["rows"])]  # fmt: skip
        how = f"it had {counts[0]}, now {counts[1]}" if counts[0] != counts[1] else "as many rows, other contents"
        raise UserError(f"the data changed since the run in {out} began ({how}). Put back what it was, or train to "
                        f"another train.out. If the rows are the same and only files were copied or touched, remove "
                        f"{file} and run the same command again.")  # fmt: skip
    if before.get("regions") != now.get("regions"):
        raise UserError(f"the regions were made by another extractor when the run in {out} began. Give those as "
                        "data.regions, or train to another train.out.")  # fmt: skip


def _flat(tree: Any, at: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {at: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{at}.{key}" if at else str(key)).items()}
