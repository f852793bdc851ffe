"""How many rows fit into so much memory: measured on a step, not guessed."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch.profiler import ProfilerActivity, profile

from interlace.data.step import pictures_of
from interlace.errors import UserError
from interlace.objectives.whole import (
    PAIRS,
    look_ahead,
    random_state,
    set_random_state,
    statistics_stay,
    world,
)

if TYPE_CHECKING:
    from interlace.data.batches import Collate, Samples
    from interlace.learner import Learner
    from interlace.settings import TrainSettings

UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
CHOSEN = "micro_batch.json"
MARGIN = 1.1  # captions of other batches are longer


def parse_bytes(text: str, key: str = "train.memory") -> float:
    """"8GB" -> 8e9. Raises UserError for anything but a number above 0 and a unit."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]+)\s*", text)
    try:
        size = float(found[1]) * UNITS[found[2].lower()] if found else 0.0
    except (KeyError, ValueError):
        size = 0.0
    if size <= 0:
        raise UserError(f"{key} is a size such as 8GB, 500MB or 6GiB; got {text!r}.")
    return size


def shown(size: float) -> str:
    return f"{size / 1e9:.2g} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


# ----------------------------------------------------------------------------------------------------------- measuring


def in_use(device: torch.device) -> float:
    """Bytes: of the device's tensors; without one, of this process."""
    if device.type == "cpu":
        return psutil.Process().memory_info().rss
    return torch.accelerator.memory_allocated(device)


def peak(work: Callable[[], Any], device: torch.device) -> float:
    """Bytes of tensors that `work` holds at once on the device, beyond those there were before."""
    if device.type != "cpu":
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        work()
        return torch.accelerator.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces its stages otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    now = most = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":  # in order of time: an allocation is positive, a release negative
            now += event.nbytes()
            most = max(most, now)
    return most


def process_peak(work: Callable[[], Any]) -> float:
    """The most bytes that this process took while it did `work`: what libraries allocate for themselves, and what was
    freed and not given back, is no tensor and counts too. Looked at every two milliseconds."""
    process, seen, done = psutil.Process(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(max(seen.pop(), process.memory_info().rss))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(*seen, process.memory_info().rss)


def largest(batch: int, room: float, measure: Callable[[int], float]) -> tuple[int, float]:
    """The largest divisor of `batch`, from 2 up, of which `measure` (rows -> bytes) says that it fits into `room`
    bytes, and what it said. Starts small, grows at most eightfold, and never tries a size that, taking as much a row as
    the one before, would be too much: a device that is full is an error. Raises UserError when not even the smallest
    fits."""
    sizes = [n for n in range(min(2, batch), batch + 1) if batch % n == 0]
    rows, took = sizes[0], measure(sizes[0])
    if took > room:
        raise UserError(f"train.memory leaves {shown(max(room, 0))} for a micro-batch, and one of {rows} rows takes "
                        f"{shown(took)}: give {shown(took - room)} more, or choose a smaller model, "
                        "model.size or train.gradient_checkpointing=true.")  # fmt: skip
    while larger := [n for n in sizes if rows < n <= 8 * rows and took * n / rows <= room]:
        said = measure(larger[-1])
        if said > room:
            sizes = [n for n in sizes if n < larger[-1]]
        else:
            rows, took = larger[-1], said
    return rows, took


# ------------------------------------------------------------------------------------------------------------ choosing


def choose_micro_batch(out: Path, t: TrainSettings, learner: Learner, samples: Samples, collate: Collate) -> int:
    """Rows of a micro-batch, so that a step stays within `t.memory`: of the device, or without one of this process. The
    choice is written into the run folder, where a resumed run finds it: other micro-batches would round otherwise.
    What takes most on any rank counts for all."""
    file = out / CHOSEN
    known = json.loads(file.read_text())["rows"] if file.is_file() else 0
    if world() > 1:  # what the first one sees: another may see its file already
        agreed = [known]
        dist.broadcast_object_list(agreed)
        known = agreed[0]
    if known:
        return known
    budget, device = parse_bytes(t.memory), learner.device
    learned = sum(p.nbytes for p in learner.parameters() if p.requires_grad)
    before = in_use(device)
    fixed = before + learned * (3 if world() == 1 else 4)  # gradients, AdamW's two, and what ranks exchange
    whole = t.batch * world()
    if any(objective.looks(2) for objective, _ in learner.objectives):
        size = learner.contrast.text.out_features
        fixed += 4 * (8 * whole * size + 8 * min(whole**2, PAIRS))  # all vectors, their derivatives, similarities
    if device.type == "cpu":
        fixed += min(t.batch * _picture_bytes(samples, collate), hold(t, device))
    passes = len(learner.passes) if t.mix != "sum" else 0

    def most(rows: int) -> float:
        """Of the rank that takes most: all have to try the same sizes, since a step compares rows of all ranks."""
        return agree(MARGIN * step_peak(learner, samples, collate, rows, passes, t.bf16, before), device)

    rows, took = largest(t.batch, -agree(fixed - budget, device), most)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"micro-batches of {rows} rows, {t.batch // rows} in a step: about {shown(fixed + took)} of {t.memory}")
        about = {"rows": rows, "in_a_step": t.batch // rows, "bytes": round(fixed + took), "bytes_fixed": round(fixed)}
        file.write_text(json.dumps(about, indent=1) + "\n")
    return rows


def agree(size: float, device: torch.device) -> float:
    """The largest that any rank says."""
    if world() == 1:
        return size
    largest_of_all = torch.tensor(size, device=device)  # float32: to a few bytes in a gigabyte
    dist.all_reduce(largest_of_all, dist.ReduceOp.MAX)
    return float(largest_of_all)


def hold(t: TrainSettings, device: torch.device) -> float:
    """Bytes of pictures of a step that may wait in main memory; the rest are read again."""
    return parse_bytes(t.memory) / 4 if t.memory and device.type == "cpu" else 2e9


def _picture_bytes(samples: Samples, collate: Collate) -> float:
    return sum(x.nbytes for x in pictures_of(collate([samples[0, 0]])).values())


def step_peak(learner: Learner, samples: Samples, collate: Collate, rows: int, passes: int = 0,
              bf16: bool = False, before: float = 0) -> float:  # fmt: skip
    """Bytes of a forward and backward over so many rows, where gradients are there already. `passes`: of so many one is
    drawn, and the largest counts; 0: a step has all. `before`: what the process took, without a device, when it had not
    computed yet; 0: tensors alone. Leaves weights, statistics and random numbers as they were."""
    random, device = random_state(), learner.device
    drawn: list[tuple[int, ...]] = [(number,) for number in range(passes)] or [()]
    most = 0.0
    try:
        with statistics_stay(learner):
            for one in drawn:
                batch = collate([samples[(0, n % len(samples), *one)] for n in range(rows)])
                batch = send_to_device({k: v for k, v in batch.items() if k not in ("ids", "skipped")}, device)
                step = partial(_learn, learner, batch, bf16)
                if before and device.type == "cpu":
                    taken = process_peak(step) - before
                    most = max(most, taken - sum(p.nbytes for p in learner.parameters() if p.grad is not None))
                else:
                    step()  # makes the gradients
                most = max(most, peak(step, device))
    finally:
        learner.zero_grad(set_to_none=True)
        set_random_state(random)
    return most


def _learn(learner: Learner, batch: dict[str, Any], bf16: bool) -> None:
    def autocast() -> torch.autocast:
        return torch.autocast(learner.device.type, torch.bfloat16, enabled=bf16)

    learner.train()
    ahead = None
    if learner.looks(2):  # as one of several micro-batches
        (ahead,) = look_ahead(learner, [batch], 2, autocast)
        for objective, whole in ahead.whole.items():
            if objective.wants(whole) is not None:
                whole.partners = pictures_of(batch)
    with autocast():
        loss = learner(ahead=ahead, **batch)["loss"]
    loss.backward()
