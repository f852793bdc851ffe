"""Which numbers a config may hold: one table over all its sections, checked before anything is loaded."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from interlace.errors import UserError

if TYPE_CHECKING:
    from interlace.settings import Settings


class Range(NamedTuple):
    """From `least` to `most`, both ends included unless said otherwise."""

    least: float
    most: float = math.inf
    above: bool = False  # `least` itself is too little
    below: bool = False  # `most` itself is too much

    def holds(self, value: float) -> bool:
        """Whether the number lies in it; NaN lies nowhere."""
        low = value > self.least if self.above else value >= self.least
        return low and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        """What is said of it, after "is"."""
        if self.most == math.inf:
            return f"{'above' if self.above else 'at least'} {self.least:g}"
        most = int(self.most) if self.most == int(self.most) else self.most  # 4294967295 in all its digits
        if self.above:
            return f"above {self.least:g} and {'below' if self.below else 'at most'} {most}"
        return f"from {self.least:g} to {'below ' if self.below else ''}{most}"


SHARE = Range(0, 1)
RANGES = {
    "data.max_skipped": SHARE,
    "data.workers": Range(0),
    "data.keep_states_gb": Range(0),
    "data.views": Range(1),
    "model.layers": Range(0),
    "model.width": Range(1),
    "model.heads": Range(1),
    "model.dropout": Range(0, 1, below=True),
    "model.size": Range(1),
    "model.grid": Range(0),
    "model.patch": Range(1),
    "model.text_layers": Range(-1),
    "model.max_length": Range(3),  # where a text begins, a word, where it ends
    "augment.smallest_crop": Range(0, 1, above=True),
    "augment.colour": SHARE,
    "train.steps": Range(0),
    "train.batch": Range(1),
    "train.accumulate": Range(1),
    "train.lr": Range(0),
    "train.aligned_lr": Range(0),
    "train.text_lr": Range(0),
    "train.image_lr": Range(0),
    "train.start_lr": Range(0),
    "train.weight_decay": Range(0),
    "train.eps": Range(0, above=True),
    "train.warmup": Range(0),
    "train.epoch_factor": Range(0, 1, above=True),
    "train.clip": Range(0),
    "train.seed": Range(0, 2**32 - 1),  # what numpy's global generator takes
    "train.checkpoint_every": Range(1),
    "train.log_every": Range(1),
}
WEIGHT = Range(0)
ENDLESS = ("data.keep_states_gb", "train.clip")  # infinity means no limit


def check_ranges(settings: Settings) -> None:
    """Raises UserError for the first number that is out of its range, a warm-up longer than the run, or a source that
    is named twice."""
    for key, within in RANGES.items():
        section, name = key.split(".")
        check_range(key, getattr(getattr(settings, section), name), within)
    for one in settings.passes or [settings.objectives]:
        for name, options in one.items():
            weight = options.get("weight") if isinstance(options, dict) else None
            if isinstance(weight, int | float):  # anything else is named where the objective is built
                check_range(f"objectives.{name}.weight", weight, WEIGHT)
    t = settings.train
    if not t.steps:
        check_range("train.epochs", t.epochs, Range(0, above=True))
    elif t.warmup >= 1 and t.warmup > t.steps:
        raise UserError(f"train.warmup is {t.warmup:g} steps, more than the run has (train.steps={t.steps}): give "
                        "fewer, or a share of the steps, such as 0.1.")  # fmt: skip
    _check_sources(settings.data.source)


def check_range(key: str, value: float, within: Range) -> None:
    """Raises UserError for a number outside of the range, and for one without end where none is meant."""
    got = f"{value:g}" if isinstance(value, float) else value
    if not within.holds(value):
        raise UserError(f"{key} is {within}; got {got}.")
    if math.isinf(value) and key not in ENDLESS:
        raise UserError(f"{key} is a finite number; got {got}.")


def _check_sources(given: str | list[str]) -> None:
    """Rows of a source that is read twice would count twice, and be each other's wrong answers."""
    names: list[Any] = given if isinstance(given, list) else [given]
    if isinstance(given, str) and "{" not in given and not Path(given).expanduser().exists():
        names = re.split("[,+]", given)  # as `open_source` does
    count = Counter(os.path.realpath(os.path.expanduser(name.strip())) for name in names if name.strip())
    for name in names:
        if count[os.path.realpath(os.path.expanduser(name.strip()))] > 1:
            raise UserError(f"data.source names {name.strip()} twice: name each source once.")
