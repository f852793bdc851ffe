"""What a contrast over a large batch costs: one graph over all rows against cached gradients of micro-batches.

Measured are the peak of tensors in a step beyond weights, gradients and the batch itself, and its time. Both sides have
the same loss and gradient (tests/objectives/test_whole.py); how far they differ here is shown too. The towers are toys:
in a real one a row's graph takes far more beside its vector, and a micro-batch is not over before it has begun.

    python -m bench.cached --clock cpu
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.common import Row, alternating, clocked, faster, keep, machine, parser, peak_tensors, show
from interlace.config import VLConfig
from interlace.embed.patches import Patches
from interlace.embed.words import Words
from interlace.layers import Width
from interlace.learner import Learner
from interlace.objectives import build_objective
from interlace.objectives.whole import look_ahead, set_random_state

COLUMNS = ["objective", "rows", "at once", "whole MB", "cached MB", "less memory", "time of whole", "range", "differs"]


def learner(objective: str, width: int = 32, layers: int = 2) -> Learner:
    """16 patches and 12 words a row, each through 2 layers of its own."""
    torch.manual_seed(0)
    size = Width(width, heads=2, norm="pre", dropout=0.0, attention_dropout=0.0)
    one = build_objective(objective, {"size": width})
    words, patches = Words(size, vocabulary=1000, positions=16), Patches(size, size=32, patch=8)
    config = VLConfig(words, patches, fusion="late", layers=layers, heads={one.head: one.head_options()})
    return Learner(config).learn_by([(one, 1.0)])


def batch(rows: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {
        "caption_ids": torch.randint(5, 1000, (rows, 12), generator=g), "caption_mask": torch.ones(rows, 12),
        "caption_real": torch.ones(rows, dtype=torch.bool), "group": torch.arange(rows),
        "pixel_values": torch.randint(0, 256, (rows, 3, 32, 32), generator=g, dtype=torch.uint8),
    }  # fmt: skip


def whole(model: Learner, full: dict[str, Any]) -> Callable[[], None]:
    return lambda: model(**full)["loss"].backward()


def cached(model: Learner, full: dict[str, Any], at_once: int) -> Callable[[], None]:
    """As the trainer does it."""
    rows = len(full["group"])
    micro = [{k: v[n : n + at_once] for k, v in full.items()} for n in range(0, rows, at_once)]

    def step() -> None:
        if len(micro) == 1:
            return model(**full)["loss"].backward()
        for one, ahead in zip(micro, look_ahead(model, micro, len(micro))):
            set_random_state(ahead.random)
            (model(ahead=ahead, **one)["loss"] / len(micro)).backward()

    return step


def gradient(model: Learner, step: Callable[[], None]) -> Tensor:
    model.zero_grad(set_to_none=True)
    step()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def measure(objective: str, rows: int, at_once: int, repeats: int, clock: str) -> Row:
    model, full = learner(objective), batch(rows)
    sides = whole(model, full), cached(model, full, at_once)
    one, other = (gradient(model, side) for side in sides)  # gradients are there from here on
    held = [peak_tensors(side) for side in sides]
    times = alternating(sides, repeats, clock)
    ratio, spread = faster(times[1], times[0])
    return {"objective": objective, "rows": rows, "at once": min(at_once, rows), "whole MB": held[0],
            "cached MB": held[1], "less memory": f"{held[0] / held[1]:.1f}x", "time of whole": f"{1 / ratio:.2f}x",
            "range": "-".join(f"{1 / float(x):.2f}" for x in reversed(spread.split("-"))),
            "differs": float((one - other).norm() / one.norm())}  # fmt: skip


def main(argv: list[str] | None = None) -> list[Row]:
    made = clocked(parser(__doc__))
    made.add_argument("--rows", type=int, nargs="+", default=[64, 512, 4096])
    made.add_argument("--at-once", type=int, default=64, help="rows of a micro-batch (default 64)")
    made.add_argument("--objectives", nargs="+", default=["itc", "itc_sigmoid"])
    made.set_defaults(repeats=3)
    given = made.parse_args(argv)
    torch.set_num_threads(given.threads)
    facts = machine("torch", "transformers")
    rows = [measure(objective, n, given.at_once, given.repeats, given.clock)
            for objective in given.objectives for n in given.rows]  # fmt: skip
    notes = [f"load {facts['load']} on {facts['cores']} cores, {given.clock} clock, {given.threads} threads",
             "less memory, time of whole: cached against one graph over all rows; differs: norm of the gradients' "
             "difference over that of the gradient"]  # fmt: skip
    show("Contrast over large batches", COLUMNS, rows, notes)
    keep(given.out, {"machine": facts, "clock": given.clock, "threads": given.threads, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
