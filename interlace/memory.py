"""How many rows fit into so much memory: measured on a step, not guessed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
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


def largest(batch: int, room: float, measure: Callable[[int], float]) -> tuple[int, float]:
    """The largest divisor of `batch`, from 2 up, of which `measure` (rows -> bytes) says that it fits into `room`
    bytes, and what it said. It is asked for two small ones, for the one where their line meets `room`, and for smaller
    ones as long as that is too much. Raises UserError when not even the smallest fits."""
    sizes = [n for n in range(min(2, batch), batch + 1) if batch % n == 0]
    least, more = sizes[0], next((n for n in sizes if n >= 16), sizes[-1])
    said = {least: measure(least)}
    if said[least] > room:
        raise UserError(f"train.memory leaves {shown(max(room, 0))} for a micro-batch, and one of {least} rows takes "
                        f"{shown(said[least])}: give {shown(said[least] - room)} more, or choose a smaller model, "
                        "model.size or train.gradient_checkpointing=true.")  # fmt: skip
    if more > least:
        said[more] = measure(more)
        slope = max((said[more] - said[least]) / (more - least), 1.0)
        sizes = [n for n in sizes if said[least] + slope * (n - least) <= room or n == least]
    for size in reversed(sizes):
        if size not in said:
            said[size] = measure(size)
        if said[size] <= room:
            return size, said[size]
    return least, said[least]


# ------------------------------------------------------------------------------------------------------------ choosing


def choose_micro_batch(out: Path, t: TrainSettings, learner: Learner, samples: Samples, collate: Collate) -> int:
    """Rows of a micro-batch, so that a step stays within `t.memory`: of the device, or without one of this process. The
    choice is written into the run folder, where a resumed run finds it: other micro-batches would round otherwise.
    Ranks agree on the smallest."""
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
    fixed = in_use(device) + learned * (3 if world() == 1 else 4)  # gradients, AdamW's two, and what ranks exchange
    whole = t.batch * world()
    if any(objective.looks(2) for objective, _ in learner.objectives):
        size = learner.contrast.text.out_features
        fixed += 4 * (8 * whole * size + 8 * min(whole**2, PAIRS))  # all vectors, their derivatives, similarities
    if device.type == "cpu":
        fixed += min(t.batch * _picture_bytes(samples, collate), hold(t, device))
    passes = len(learner.passes) if t.mix != "sum" else 0
    rows, took = largest(t.batch, budget - fixed,
                         lambda n: MARGIN * step_peak(learner, samples, collate, n, passes, t.bf16))  # fmt: skip
    if world() > 1:
        agreed_rows = torch.tensor(rows, device=device)
        dist.all_reduce(agreed_rows, dist.ReduceOp.MIN)
        rows = int(agreed_rows)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"micro-batches of {rows} rows, {t.batch // rows} in a step: about {shown(fixed + took)} of {t.memory}")
        about = {"rows": rows, "in_a_step": t.batch // rows, "bytes": round(fixed + took), "bytes_fixed": round(fixed)}
        file.write_text(json.dumps(about, indent=1) + "\n")
    return rows


def hold(t: TrainSettings, device: torch.device) -> float:
    """Bytes of pictures of a step that may wait in main memory; the rest are read again."""
    return parse_bytes(t.memory) / 4 if t.memory and device.type == "cpu" else 2e9


def _picture_bytes(samples: Samples, collate: Collate) -> float:
    return sum(x.nbytes for x in pictures_of(collate([samples[0, 0]])).values())


def step_peak(learner: Learner, samples: Samples, collate: Collate, rows: int, passes: int = 0,
              bf16: bool = False) -> float:  # fmt: skip
    """Bytes of a forward and backward over so many rows, where gradients are there already. `passes`: of so many one is
    drawn, and the largest counts; 0: a step has all. Leaves weights, statistics and random numbers as they were."""
    random, device = random_state(), learner.device
    drawn: list[tuple[int, ...]] = [(number,) for number in range(passes)] or [()]
    most = 0.0
    try:
        with statistics_stay(learner):
            for one in drawn:
                batch = collate([samples[(0, n % len(samples), *one)] for n in range(rows)])
                batch = send_to_device({k: v for k, v in batch.items() if k not in ("ids", "skipped")}, device)
                _learn(learner, batch, bf16)  # makes the gradients
                most = max(most, peak(lambda batch=batch: _learn(learner, batch, bf16), device))  # type: ignore[misc]
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
