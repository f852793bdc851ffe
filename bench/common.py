"""What every measurement shares: alternate with the rival, take medians, say on what machine and how busy it was."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

Row = dict[str, Any]


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def alternating(sides: Sequence[Callable[[], Any]], repeats: int, clock: str = "wall") -> list[list[float]]:
    """Seconds of each side, `repeats` times, after one untimed round. They take turns, and turns at going first: a busy
    minute of the machine falls on all. `clock`: "cpu" counts what this process worked, on all its threads."""
    for side in sides:
        side()
    times: list[list[float]] = [[] for _ in sides]
    for repeat in range(repeats):
        for which in range(len(sides)):
            which = (which + repeat) % len(sides)
            times[which].append(seconds(sides[which], clock))
    return times


def seconds(work: Callable[[], Any], clock: str = "wall") -> float:
    start = CLOCKS[clock]()
    work()
    return CLOCKS[clock]() - start


def faster(ours: list[float], rival: list[float]) -> tuple[float, str]:
    """The rival's time over ours, above 1 we are faster: the median of the rounds, and their range, "1.9-2.3"."""
    rounds = [b / a for a, b in zip(ours, rival)]
    return median(rounds), f"{min(rounds):.2f}-{max(rounds):.2f}"


def peak_tensors(work: Callable[[], Any]) -> float:
    """Megabytes of tensors that `work` holds at once, beyond those there were before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces its stages otherwise
    now = peak = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":  # in order of time: an allocation is positive, a release negative
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 1e6


def machine(*packages: str) -> dict[str, Any]:
    """What a reader needs to judge the figures. No host name and no paths."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": date.today().isoformat(), "cpu": model, "cores": cores, "system": platform.system(),
        "python": platform.python_version(), "packages": {name: version(name) for name in packages},
        "load": load(),
    }  # fmt: skip


def load() -> float | None:
    """Processes that wanted a core, on average over the last minute. Above the number of cores the figures suffer."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def parser(about: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=5, help="timed rounds of each side (default 5)")
    made.add_argument("--out", type=Path, help="also write the figures as JSON, e.g. docs/bench/search.json")
    return made


def clocked(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """With the choice of threads and clock, for what computes rather than waits."""
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: steadier where others work too")
    return made


def show(title: str, columns: list[str], rows: list[Row], notes: list[str]) -> None:
    """A table for the eye, then the same in markdown to paste."""
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if isinstance(rows[0].get(name) if rows else "", str) else "right")
    for row in rows:
        table.add_row(*(text(row.get(name)) for name in columns))
    console = Console()
    console = Console(width=max(console.width, 130))  # a pipe has 80 columns, too few for the figures
    console.print(table)
    for note in notes:
        console.print(f"  {note}", highlight=False)
    print(markdown(title, columns, rows, notes))


def markdown(title: str, columns: list[str], rows: list[Row], notes: list[str]) -> str:
    lines = [f"\n**{title}**\n", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(text(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def text(value: Any) -> str:
    """Three significant digits, no false precision; a dash where nothing was measured."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def keep(out: Path | None, content: Row, say: bool = True) -> None:
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if say:
        print(f"written: {out}")
