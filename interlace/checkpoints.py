"""The safety layer on transformers.Trainer: what a run leaves on disk is complete, and resuming goes on bit for bit.

A checkpoint is written aside, flushed to the disk, and only then renamed to `checkpoint-N`, with a `COMPLETE` mark that
lists its files and their sizes. Whatever kills the run (SIGKILL, power, a full disk), the newest complete checkpoint
stays and is the one found again.

Decisions a caller should know:
- A checkpoint that cannot be written (full disk, quota, file too large) is removed and warned about; the run goes on
  and tries again at the next one, for the weights in memory are worth more than the stop. Only when the run is being
  stopped by a signal is it an error. The caller's own save at the end decides whether the run succeeded.
- SIGTERM, and SIGINT once, checkpoint at the next step boundary and `train()` returns; `SafeTrainer.exit_code` is then
  143 or 130. A second SIGINT interrupts at once.
- Every loss is the mean over its batch. Then neither gradient accumulation nor the number of ranks changes loss or
  gradient, provided all batches are of one size (`dataloader_drop_last=True`).
- With several ranks they must share the file system of `output_dir`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from interlace.errors import UserError
from interlace.progress import JsonlLog, Progress, jsonable, say
from interlace.towers import quiet

MARK = "COMPLETE"


# ------------------------------------------------------------------------------------------------ folders on the disk

def missing_from(checkpoint: Path) -> str | None:
    """Why this checkpoint is not complete, in a few words; None if it is. Reads sizes, not contents."""
    try:
        files: dict[str, int] = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MARK} mark"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MARK} mark is unreadable"
    for name, size in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def step_of(checkpoint: Path) -> int | None:
    """30 for `checkpoint-30`, None for any other name."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else None


def checkpoints_in(folder: Path) -> list[Path]:
    """All `checkpoint-N` folders, complete or not, newest step first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def newest_complete(folder: str | Path, warn: Callable[[str], None] = say) -> Path | None:
    """The newest complete checkpoint in `folder`, or None. Newer ones, if damaged, are passed over with a warning."""
    for checkpoint in checkpoints_in(Path(folder)):
        reason = missing_from(checkpoint)
        if reason is None:
            return checkpoint
        warn(f"WARNING: ignoring {checkpoint}: {reason}.")
    return None


def publish(scratch: Path, final: Path, **facts: Any) -> None:
    """Flush every file of `scratch`, write the mark, and rename the folder to `final` in one step.

    After this returns the checkpoint survives a power cut; before, `final` does not exist (or is still the old one)."""
    files = sorted(path for path in scratch.rglob("*") if path.is_file() and path.name != MARK)
    for file in files:
        _fsync(file)
    mark = {"files": {file.relative_to(scratch).as_posix(): file.stat().st_size for file in files}, **facts}
    (scratch / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
    _fsync(scratch / MARK)
    for folder in [*(path for path in scratch.rglob("*") if path.is_dir()), scratch]:
        _fsync(folder)
    if final.exists():  # left by an earlier run, or damaged: folders cannot be replaced by a rename
        old = final.with_name(f".replaced-{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        os.rename(scratch, final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(scratch, final)
    _fsync(final.parent)


def rotate(folder: Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest complete checkpoints beyond `limit`; the newest and `best` always stay."""
    complete = [path for path in checkpoints_in(folder) if (path / MARK).is_file()]
    for checkpoint in complete[limit:] if limit and limit > 0 else []:
        if best is None or checkpoint.resolve() != Path(best).resolve():
            (checkpoint / MARK).unlink(missing_ok=True)  # half deleted must not look complete
            shutil.rmtree(checkpoint, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_refused(error: BaseException) -> bool:
    """The error says that the disk took no more (as opposed to a mistake of ours)."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    # torch and safetensors write from C++ and Rust, so the errno is gone or inside the text
    signs = ("No space left", "quota exceeded", "File too large", "file write failed", "PytorchStreamWriter",
             "iostream", "Input/output error", "Read-only file system")
    return any(sign.lower() in str(error).lower() for sign in signs)


# --------------------------------------------------------------------------------------------------------- the trainer

class SafeTrainer(Trainer):
    """A transformers Trainer whose checkpoints are atomic, whose stops are clean and whose losses are watched.

    Differences a caller sees, beyond the module's docstring:
    - `train(resume_from_checkpoint=True)` takes the newest complete checkpoint of `output_dir`, and starts from the
      beginning if there is none; a path must be a complete checkpoint. Without it, a folder that already has one is
      refused (UserError), so that two runs never mix.
    - The model's output may carry `losses`, a dict of name to scalar tensor; their means since the last log join each
      log, over all ranks. `note` takes more such numbers.
    - The batch may carry `ids`, a list of row ids. The model does not get them: they are for `bad_batch.json`.
    - A loss or gradient that is not finite stops the run before the optimiser touches the weights (UserError), with the
      rows of the batch in `bad_batch.json` in `output_dir`.
    - Logs go to `log_file` (default `output_dir/log.jsonl`) and to a progress display.
    """

    def __init__(self, *args: Any, log_file: str | Path | None = None, progress_seconds: float = 30, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # ours are means; else ranks and accumulation scale the loss wrongly
        self.args.logging_nan_inf_filter = False  # we stop instead of hiding it
        self.stopped_by: signal.Signals | None = None
        self.failed_steps: list[int] = []  # checkpoints that the disk refused
        self._asked: signal.Signals | None = None
        self._saved_step: int | None = None
        self._notes: dict[str, tuple[Tensor | float, int]] = {}
        self._window_ids: list[str] = []
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(_StopAtStepBoundary(self))
        self.add_callback(JsonlLog(Path(log_file) if log_file else self.folder / "log.jsonl"))
        self.add_callback(Progress(progress_seconds))

    @property
    def folder(self) -> Path:
        """Where the checkpoints lie: `args.output_dir`."""
        return Path(str(self.args.output_dir))

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal that stopped the run (143 for SIGTERM, 130 for SIGINT), as a shell would report it."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in transformers. Raises UserError for a folder or checkpoint that cannot be used (see the class), and when
        the loss or the gradient is not finite."""
        checkpoint = self._start_from(resume_from_checkpoint)
        self.stopped_by, self._asked, self._saved_step = None, None, None
        self._notes, self._window_ids = {}, []
        with self._listening():
            result = super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        if self.stopped_by is not None and self.is_world_process_zero():
            say(f"Stopped by {self.stopped_by.name} after step {self.state.global_step} of {self.state.max_steps}; "
                f"everything up to here is in {newest_complete(self.folder)}. Resume to go on.")
        return result

    def _start_from(self, wanted: str | Path | bool | None) -> Path | None:
        folder, first = self.folder, self.is_world_process_zero()
        if first:  # what a killed run left half-written
            for leftover in [*folder.glob(".saving-*"), *folder.glob(".replaced-*")]:
                shutil.rmtree(leftover, ignore_errors=True)
        self._barrier()
        if wanted is None or wanted is False:
            if found := newest_complete(folder, warn=lambda line: None):
                raise UserError(f"{folder} already holds a run, up to {found.name}. Resume it, or choose another "
                                "folder for a new run.")
            return None
        if wanted is True:
            found = newest_complete(folder, warn=say if first else lambda line: None)
            if first:
                say(f"Resuming from {found}." if found else f"No complete checkpoint in {folder}: starting afresh.")
        else:
            found = Path(wanted)
            if reason := missing_from(found):
                others = [path.name for path in checkpoints_in(found.parent) if missing_from(path) is None]
                raise UserError(f"Cannot resume from {found}: {reason}. Complete ones beside it: "
                                f"{', '.join(others) or 'none'}.")
        if found is not None and first:
            before = json.loads((found / MARK).read_text(encoding="utf-8"))
            for fact, value in self._facts().items():
                if before.get(fact, value) != value:
                    say(f"WARNING: {found.name} was made with {fact.replace('_', ' ')} {before[fact]}, now it is "
                        f"{value}: the run goes on, but not over the same data in the same order.")
        return found

    def _facts(self) -> dict[str, int]:
        """What must be the same for a resumed run to see the same data."""
        args = self.args
        return {"ranks": args.world_size,
                "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size}

    # ------------------------------------------------------------------------------------------------------- saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, first = self.state.global_step, self.is_world_process_zero()
        if self._saved_step == step:  # asked twice for one step: by the schedule and by the end of the epoch
            return
        final = self.folder / f"checkpoint-{step}"
        scratch = final.with_name(f".saving-{step}")
        problem: Exception | None = None
        try:
            if first:
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
            self._barrier()
            with quiet():
                self._write(scratch, final)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not disk_refused(error):
                raise
            problem = error
        if not self._on_any_rank(problem is not None) and first:
            try:
                publish(scratch, final, step=step, **self._facts())
            except OSError as error:
                problem = error
        if self._on_any_rank(problem is not None):
            if first:
                shutil.rmtree(scratch, ignore_errors=True)
            self._not_saved(step, final.parent, problem)
            return
        self._saved_step = step
        if first:
            rotate(final.parent, self.args.save_total_limit, self.state.best_model_checkpoint)
        self._barrier()

    def _write(self, scratch: Path, final: Path) -> None:
        """Everything a checkpoint holds, in the order transformers reads it."""
        self.store_flos()
        self.save_model(str(scratch), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(scratch))
            self._save_scaler(str(scratch))
            self._save_rng_state(str(scratch))  # each rank its own
        if self.state.best_global_step:
            best = final.with_name(f"checkpoint-{self.state.best_global_step}")
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            (scratch / "training_args.bin").unlink(missing_ok=True)  # a pickle nobody should load
            stored: Any = self.state.stateful_callbacks
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    stored[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(scratch / "trainer_state.json"))

    def _not_saved(self, step: int, folder: Path, problem: Exception | None) -> None:
        reason = str(problem).strip().splitlines()[0] if problem else "another rank could not write"
        last = newest_complete(folder, warn=lambda line: None)
        message = (f"The checkpoint at step {step} could not be written to {folder}: {reason}. The newest complete one "
                   f"is {last.name if last else 'none'}. Free space there (or lower save_total_limit).")
        if self.stopped_by is not None:
            raise UserError(f"{message} The run was asked to stop, so what it learned since then is lost.")
        self.failed_steps.append(step)
        if self.is_world_process_zero():
            say(f"WARNING: {message} The run goes on and tries again at the next checkpoint.")

    # ---------------------------------------------------------------------------------------------- stopping on request

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """SIGTERM and SIGINT set a flag while training; the callback looks at it after each step."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only
            return
        main = os.getpid()

        def handle(number: int, frame: Any) -> None:
            if os.getpid() != main:  # a data worker, forked with our handlers
                if number == signal.SIGTERM:
                    # A stop sent to the whole group must not take the workers before the step is done, yet a worker has
                    # to go in the end.
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)
                    signal.alarm(60)
                return
            if self._asked is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._asked = signal.Signals(number)
            # os.write: print may be interrupted in the middle of another print
            os.write(2, f"\n{self._asked.name}: finishing this step, then a checkpoint, then the end.\n".encode())

        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ----------------------------------------------------------------------------------------------- watching the loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        ids = inputs.pop("ids", None) if isinstance(inputs, dict) else None
        if ids is not None and self.model is not None and self.model.training:
            self._window_ids.extend(ids.tolist() if isinstance(ids, Tensor) else map(str, ids))
        return super()._prepare_inputs(inputs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and isinstance(outputs, dict) and outputs.get("losses"):
            self.note(outputs["losses"])
        return (loss, outputs) if return_outputs else loss

    def note(self, values: Mapping[str, Tensor | float]) -> None:
        """Numbers by name for the log, which gets their mean since the last log."""
        for name, value in values.items():
            total, count = self._notes.get(name, (0.0, 0))
            self._notes[name] = (total + (value.detach() if isinstance(value, Tensor) else value), count + 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._drain_notes())
        super().log(logs, start_time)

    def _drain_notes(self) -> dict[str, float]:
        mine = {name: (float(total), count) for name, (total, count) in self._notes.items()}
        self._notes = {}
        ranks = [mine]
        if self.args.world_size > 1:  # names may differ: each rank draws its own objectives
            ranks = [{} for _ in range(self.args.world_size)]
            dist.all_gather_object(ranks, mine)
        names = dict.fromkeys(name for rank in ranks for name in rank)
        sums = {name: [rank[name] for rank in ranks if name in rank] for name in names}
        return {name: sum(total for total, _ in seen) / sum(count for _, count in seen)
                for name, seen in sums.items()}

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        bad = not math.isfinite(loss.item())
        if self._on_any_rank(bad):
            self._stop_on_bad_batch("loss", bad)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With a loss scaler infinite gradients are part of the search for the scale: it skips those steps by itself.
        if norm is not None and getattr(self.accelerator, "scaler", None) is None and not math.isfinite(float(norm)):
            self._stop_on_bad_batch("gradient", True)
        self._window_ids = []  # the optimiser steps next
        return norm

    def _stop_on_bad_batch(self, what: str, mine: bool) -> None:
        losses = {name: float(total) / count for name, (total, count) in self._notes.items()}
        report: dict[str, Any] = {"rank": self.args.process_index, "not_finite": mine, "losses": jsonable(losses),
                                  "ids": self._window_ids}
        reports = [report]
        if self.args.world_size > 1:
            reports = [{} for _ in range(self.args.world_size)]
            dist.all_gather_object(reports, report)
        folder, step = self.folder, self.state.global_step + 1
        file, last = folder / "bad_batch.json", newest_complete(folder, warn=lambda line: None)
        if self.is_world_process_zero():
            guilty = [entry for entry in reports if entry["not_finite"]]
            ids = [row for entry in guilty for row in entry["ids"]]
            content = {"step": step, "epoch": self.state.epoch, "what": what, "ids": ids, "ranks": guilty}
            try:
                file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                say(f"WARNING: could not write {file}: {error}")
        named = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        raise UserError(
            f"The {what} of step {step} is not a finite number{f' ({named})' if named else ''}. The weights were not "
            f"updated with it; the last checkpoint is {last.name if last else 'none yet'}. The rows of the batch are "
            f"in {file}. Usual fixes: a lower learning rate or longer warmup, clipped gradients (train.clip=1), "
            "float32 or bfloat16 instead of float16, a look at those rows.")

    # ------------------------------------------------------------------------------------------------ several ranks

    def _on_any_rank(self, flag: bool) -> bool:
        if self.args.world_size <= 1:
            return flag
        shared = torch.tensor(float(flag), device=self.args.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return bool(shared.item())

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()


class _StopAtStepBoundary(TrainerCallback):
    def __init__(self, trainer: SafeTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        # all ranks leave at the same step, though the signal may reach them at different ones
        if trainer._on_any_rank(trainer._asked is not None) and state.global_step < state.max_steps:
            trainer.stopped_by = trainer._asked or signal.SIGTERM
            control.should_save = control.should_training_stop = True
