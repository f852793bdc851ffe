"""What a run says while it trains: lines for people on stderr, and log.jsonl for machines and for plots."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from transformers import TrainerCallback


def say(line: str) -> None:
    """A line for people, on stderr, above a progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


class JsonlLog(TrainerCallback):
    """One JSON object per log in `file`: step, epoch, time (Unix seconds), and the numbers by name.

    After a resume, lines beyond the resumed step are dropped (they will be written again) and a line with
    `"event": "resumed"` says so. A log that cannot be written is a warning, never the end of a run."""

    def __init__(self, file: Path):
        self.file = file
        self.warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept, dropped = [], 0
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []:
            try:
                keep = json.loads(line)["step"] <= state.global_step and state.global_step > 0
            except (ValueError, KeyError, TypeError):
                keep = False  # the last line of a killed run
            kept += [line] if keep else []
            dropped += not keep
        if state.global_step > 0:
            event = {"step": state.global_step, "time": round(time.time(), 3), "event": "resumed", "dropped": dropped}
            kept.append(json.dumps(event))
        aside = self.file.with_name(f".{self.file.name}")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(aside, self.file)
        except OSError as error:
            self._warn(error)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        line = {"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 3), **jsonable(logs)}
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self.warned:
            say(f"WARNING: cannot write {self.file}: {error}. The run goes on without it.")
        self.warned = True


def jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    """NaN and infinity are no JSON: null."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()}


class Progress(TrainerCallback):
    """Step, losses by name and time left: a bar on a terminal, else a line every `seconds`."""

    def __init__(self, seconds: float = 30, clock: Callable[[], float] = time.monotonic, stream: TextIO | None = None):
        self.seconds, self.clock, self.stream = seconds, clock, stream
        self.bar: tqdm | None = None
        self.losses = ""
        self.first_step, self.began, self.said = 0, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step, self.began, self.losses = state.global_step, self.clock(), ""
        self.said = self.began
        stream = self.stream or sys.stderr
        if state.is_world_process_zero and stream.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True,
                            file=stream)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        elif self.clock() - self.said >= self.seconds:
            self.said = self.clock()
            print(self.line(state), file=self.stream or sys.stderr, flush=True)

    def line(self, state: Any) -> str:
        """`step 120/400 (30%), 3.40 steps/s, 0:01:22 left, loss 1.72 mlm 1.20 itm 0.52`"""
        rate = (state.global_step - self.first_step) / max(self.clock() - self.began, 1e-9)
        left = timedelta(seconds=round((state.max_steps - state.global_step) / max(rate, 1e-9)))
        return (f"step {state.global_step}/{state.max_steps} ({state.global_step / state.max_steps:.0%}), "
                f"{rate:.2f} steps/s, {left} left{self.losses and ', '}{self.losses}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            hidden = {"grad_norm", "learning_rate", "epoch"}
            self.losses = " ".join(f"{name} {value:.4g}" for name, value in logs.items()
                                   if name not in hidden and isinstance(value, float | int))
            if self.bar is not None:
                self.bar.set_postfix_str(self.losses)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
