"""What it saves that objectives share one forward: time and memory of a training step, against a forward for each.

    python -m bench.passes --out docs/bench/passes.json
    python -m bench.passes vl_bert-small --set model.layers=12 --set model.width=768

shared    a pass of the recipe as it stands: what one objective hides, all of the pass see hidden
separate  each of its objectives as a pass of its own; the picture is encoded once for all that did not change it

Both are the same model on the same rows: forward, losses, backward, AdamW. Passes of a single objective are left out.
Frozen towers are asked once, before the first step, as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.common import Row, alternating, clocked, faster, keep, load, machine, parser, peak_tensors, show
from interlace.data.batches import Collate, Samples
from interlace.data.rows import Source
from interlace.data.sources import open_source
from interlace.learner import Learner
from interlace.objectives import Pass
from interlace.settings import Settings, load_settings
from interlace.train import build_passes, make_learner

RECIPES = ["lxmert-small", "visual_bert-small", "vl_bert-small", "vilt-small"]
COLUMNS = ["recipe", "pass", "shared ms", "separate ms", "faster", "range", "shared MB", "separate MB"]


def measure(recipe: str, settings: Settings, source: Source, rows: int, repeats: int,
            clock: str = "wall") -> list[Row]:  # fmt: skip
    """One row of figures for each pass that has several objectives."""
    # objectives carry the name they have in their pass, so each side has objects of its own
    together, apart = build_passes(settings, source), build_passes(settings, source)
    torch.manual_seed(settings.train.seed)
    learner, processor = make_learner(settings, together)
    learner.train()
    figures = []
    for one, same in zip(together, apart):
        if len(one.objectives) == 1:
            continue
        each = [Pass([pair], image=same.image) for pair in same.objectives]
        losses = [loss(learner, passes, source, processor, rows) for passes in ([one], each)]
        before, times = load(), alternating([step(learner, side) for side in losses], repeats, clock)
        ratio, spread = faster(*times)
        figures.append({
            "recipe": recipe, "pass": " + ".join(objective.key for objective, _ in one.objectives),
            "shared ms": 1000 * median(times[0]), "separate ms": 1000 * median(times[1]),
            "faster": ratio, "range": spread,
            "shared MB": peak_tensors(losses[0]), "separate MB": peak_tensors(losses[1]),
            "load": before, "seconds": {"shared": times[0], "separate": times[1]},
        })  # fmt: skip
    return figures


def loss(learner: Learner, passes: list[Pass], source: Source, processor: Any, rows: int) -> Callable[[], Tensor]:
    """The loss of the first rows of the training split, as these passes prepare them."""
    batch = batch_of(learner, passes, source, processor, rows)

    def run() -> Tensor:
        learner.passes = passes
        return learner(**batch)["loss"]

    return run


def step(learner: Learner, loss: Callable[[], Tensor]) -> Callable[[], None]:
    learning = [p for p in learner.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=1e-6)  # so slow that hardly a weight changes

    def run() -> None:
        loss().backward()
        optimiser.step()
        optimiser.zero_grad()

    return run


def batch_of(learner: Learner, passes: list[Pass], source: Source, processor: Any, rows: int) -> dict[str, Any]:
    samples = Samples(source, "train", processor, passes, seed=0, augment=False)
    collate = Collate(processor, None, passes, learner.cells_to_hide())
    batch = collate([samples[0, position] for position in range(min(rows, len(samples)))])
    if "image" in learner.frozen:
        with torch.no_grad():
            batch["image_states"] = learner.image.states(learner.normalise(batch["pixel_values"]))  # type: ignore
    return batch


def main(argv: list[str] | None = None) -> list[Row]:
    options = clocked(parser(__doc__))
    options.add_argument("recipes", nargs="*", default=RECIPES, help=f"files or names; default {' '.join(RECIPES)}")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as `interlace train` takes")
    options.add_argument("--rows", type=int, default=16, help="of a batch (default 16)")
    given = options.parse_args(argv)
    torch.set_num_threads(given.threads)
    facts, rows = machine("torch", "transformers"), []
    for recipe in given.recipes:
        settings = load_settings(recipe, given.set)
        source = open_source(settings.data.source, columns=settings.data.columns or None)
        rows += measure(recipe, settings, source, given.rows, given.repeats, given.clock)
    notes = [
        f"{facts['cpu']}, {given.threads} threads, load {facts['load']} at the start; "
        f"torch {facts['packages']['torch']}; {given.clock} time, median of {given.repeats} alternating rounds, "
        f"{given.rows} rows a step",
        "faster: the time with separate passes over that with shared ones, with the range over the rounds",
        "MB: what the forward and its losses hold for the backward; weights, gradients and optimiser are the same",
    ]
    show("Objectives in one forward", COLUMNS, rows, notes)
    content = {"machine": facts, "threads": given.threads, "clock": given.clock, "rows of a step": given.rows}
    keep(given.out, {**content, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
