"""The captioner and the filter: one pre-trained run, gone on from twice. BLIP (arXiv:2201.12086), section 4: fine-tuned
apart, since a filter that shares the captioner's weights believes what it wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interlace.bootstrap.folds import without
from interlace.data.rows import Source
from interlace.errors import UserError
from interlace.run import MARK, Run
from interlace.settings import Settings, load_settings


@dataclass
class Finetune:
    """How far both go on from the pre-trained run. `settings`: further keys of a training config, such as
    train.bf16=true."""

    steps: int = 200
    batch: int = 32
    lr: float = 1e-4
    settings: list[str] = field(default_factory=list)


def check_captioner(run: Run) -> None:
    """Raises UserError for a run that does not write about pictures."""
    if not run.can_caption:
        raise UserError(f"the run in {run.folder} does not write about pictures, so it cannot be the captioner: train "
                        "it with the lm objective (recipe blip-small), or name one that does with --captioner.")


def check_filter(run: Run, by: str) -> None:
    """Raises UserError for a run without the head that judges."""
    if not run.can_match:
        raise UserError(f"the run in {run.folder} has no match head, so it cannot be the filter: train it with the itm "
                        "objective (recipe blip-small), or name a run that has one with --filter.")
    if by == "cosine" and not run.dim:
        raise UserError(f"the run in {run.folder} has no contrast head, so texts cannot be judged by cosine: train it "
                        "with the itc objective, or judge by match.")  # fmt: skip


def finetuned(run: Run, role: str, source: Source, named: dict[str, Any], out: Path, how: Finetune, seed: int) -> Path:
    """Trains the run on as "captioner" (it writes) or "filter" (contrast, and matching with hard negatives), or goes on
    with such a training that was stopped; the folder of the finished run. `named`: keys of `data` for its config."""
    from interlace.train import train

    if (out / MARK).is_file():  # of the same plan, or the folder would have been refused
        return out
    return train(settings_for(run, role, named, out, how, seed), source=source)


def filter_of_fold(run: Run, source: Source, fold: int, folds: int, named: dict[str, Any], out: Path, how: Finetune,
                   seed: int) -> Path:  # fmt: skip
    """A filter that never saw a fold of the source's rows: of the run's parts and at its rates, but not from its
    weights, which may know all of them; of a run that went on from another, the other's parts and rates, and so on back
    to one that began anew or with weights of a release. Raises UserError for a run that was made without a config."""
    from interlace.train import train

    if (out / MARK).is_file():
        return out
    before = _config(run.folder)
    while (start := (before.get("model") or {}).get("start")) and (earlier := _config(Path(start))):
        before = earlier
    if "model" not in before:
        raise UserError(f"the run in {run.folder} has no config.yaml, so no filter of its kind can be trained: leave "
                        "--folds out, or name another run with --filter.")  # fmt: skip
    settings = settings_for(run, "filter", named, out, how, seed)
    for key, value in before["model"].items():
        setattr(settings.model, key, value)
    for key in ("lr", "start_lr", "aligned_lr", "text_lr", "image_lr", "freeze", "weight_decay", "bf16"):
        if key in before.get("train", {}):
            setattr(settings.train, key, before["train"][key])
    # hard negatives are too hard for a model that begins
    settings.passes = [{**({"itc": {}} if run.dim else {}), "itm": {"negatives": "drawn"}}]
    return train(settings, source=without(source, fold, folds))


def settings_for(run: Run, role: str, named: dict[str, Any], out: Path, how: Finetune, seed: int) -> Settings:
    """What was frozen in pre-training stays frozen, and pictures are varied as they were."""
    before = _config(run.folder)
    train = before.get("train") or {}
    given = [f"{key}={value}" for key, value in {
        "model.start": run.folder.absolute(), "train.out": out, "train.steps": how.steps, "train.batch": how.batch,
        "train.lr": how.lr, "train.seed": seed, "train.evaluate": "false", "train.log_every": 10,
        "train.checkpoint_every": 50, "train.text_lr": min(float(train.get("text_lr", 2e-5)), how.lr),
        "train.image_lr": min(float(train.get("image_lr", 0.0)), how.lr),
    }.items()]  # fmt: skip
    settings = load_settings(None, ["objectives={lm: {}}", *given, *how.settings])
    settings.objectives, settings.passes = {}, passes(run, role)
    settings.train.freeze = settings.train.freeze or list(train.get("freeze") or [])
    for key, value in named.items():
        setattr(settings.data, key, value)
    for key in ("views", "keep_states_gb"):
        if key in (before.get("data") or {}):
            setattr(settings.data, key, before["data"][key])
    for key, value in (before.get("augment") or {}).items():
        setattr(settings.augment, key, value)
    return settings


def passes(run: Run, role: str) -> list[dict[str, Any]]:
    if role == "captioner":
        writes = "lm" if run.model.decoder is not None and run.model.config.writes.context == "image" else "prefix_lm"
        # not smoothed: smoothing gives a tenth of the probability to words that nobody wrote, and the nucleus would
        # draw from just those wherever the model is unsure
        return [{writes: {"smoothing": 0.0} if writes == "lm" else {}}]
    return [{"itc": {}, "itm": {"negatives": "hard"}}] if run.dim else [{"itm": {"negatives": "drawn"}}]


def _config(folder: Path) -> dict[str, Any]:
    import yaml

    file = folder / "config.yaml"
    return (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}
