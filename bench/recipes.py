"""Every full-size recipe takes its first steps: built as the paper has it, by the trainer, on a few rows of drawn data.

    python -m bench.recipes
    python -m bench.recipes uniter mlim --rows 4 --steps 3

It says that a recipe can start, what it weighs and what a step costs here; only the batch is made smaller (and BLIP's
queue with it). Systems that read regions are given stored ones: 36 of 2048 numbers, with beliefs over 1601
classes, objects and attributes. Each recipe has a process of its own, so that its peak of memory is its own. Nothing is
saved.
"""

from __future__ import annotations

import csv
import json
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.common import Row, keep, load, machine, parser, show
from interlace.data.batches import Collate, Samples
from interlace.data.rows import Source
from interlace.data.sources import open_source
from interlace.embed.regions import RegionEmbedder
from interlace.presets import PRESETS
from interlace.regions.arrays import RegionArrays
from interlace.regions.store import Stamp, Writer
from interlace.settings import Settings, load_settings
from interlace.train import build_passes, make_learner, shape_of, stored_regions, training_arguments
from interlace.trainer import VLTrainer

COLUMNS = ["recipe", "M parameters", "rows", "first loss", "last loss", "seconds a step", "peak GB"]
DETECTOR = {"kind": "given", "name": "drawn at random"}


def draw_data(folder: Path, rows: int) -> Source:
    """Pictures of one colour each, a caption and a question about it."""
    rng, questions = np.random.default_rng(0), []
    with open(folder / "pairs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "caption", "split"])
        for n in range(rows):
            colour = rng.integers(0, 256, 3)
            Image.new("RGB", (96, 80), tuple(colour.tolist())).save(folder / f"{n}.png")
            table.writerow([f"r{n}", f"{n}.png", f"a picture number {n}, {'red' if colour[0] > 127 else 'not red'}",
                            "train"])  # fmt: skip
            questions.append({"pair_id": f"r{n}", "question": "is it red?", "kind": "colour",
                              "answers": ["yes" if colour[0] > 127 else "no"]})  # fmt: skip
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return open_source(folder)


def draw_regions(folder: Path, source: Source, regions: int = 36, features: int = 2048, classes: int = 1601) -> Path:
    """A store of random regions for every row, as a detector of Visual Genome's classes would leave it."""
    folder.mkdir(exist_ok=True)
    writer, rng = Writer(folder, DETECTOR, features, classes), np.random.default_rng(0)
    half = np.full(regions, 0.5, np.float32)
    for pair in source.pairs():
        corners = np.sort(rng.random((regions, 2, 2)), axis=1).reshape(regions, 4).astype(np.float32)
        beliefs = rng.dirichlet(np.full(classes, 0.01), regions).astype(np.float32)
        seen = np.abs(rng.standard_normal((regions, features))).astype(np.float32)
        writer.add([pair.id], Stamp.of(pair.picture), RegionArrays(
            seen, corners, confidence=half, beliefs=beliefs, objects=beliefs[:, 1:].argmax(1), objects_confidence=half,
            attributes=rng.integers(0, 400, regions), attributes_confidence=half))  # fmt: skip
    writer.commit()
    return folder


def reads_regions(recipe: str) -> bool:
    return recipe in PRESETS and isinstance(getattr(PRESETS[recipe].make(), "image", None), RegionEmbedder)


def reduced(recipe: str, source: Path, regions: Path | None, rows: int, steps: int, *more: str) -> Settings:
    """The recipe with a small batch. What else would not fit so few rows: a queue, and half precision on a CPU."""
    settings = load_settings(recipe, [f"data.source={source}", "data.workers=0", f"train.batch={rows}",
                                      "train.accumulate=1", f"train.steps={steps}", "train.warmup=0",
                                      "train.bf16=false", "train.log_every=1", *more])  # fmt: skip
    settings.data.regions = str(regions) if regions is not None else ""
    for one in settings.passes:
        if "itc_momentum" in one:
            one["itc_momentum"]["queue"] = 0
    return settings


def first_steps(recipe: str, settings: Settings, source: Source, out: Path) -> Row:
    """What `train` would do, without saving. Raises RuntimeError for a step that is no number (UserError of the
    trainer) or changes nothing."""
    t = settings.train
    torch.manual_seed(t.seed)
    passes = build_passes(settings, source)
    learner, processor = make_learner(settings, passes)
    arguments = training_arguments(settings, out)
    arguments.save_strategy = "no"  # type: ignore[assignment]
    rows = len(source.indices("train"))
    samples = Samples(source, "train", processor, passes, t.seed, regions=stored_regions(settings, source))
    learner.attach(t.batch, rows)
    collate = Collate(processor, None, passes, learner.cells_to_hide(), shape_of(processor))
    before = next(p for p in learner.parameters() if p.requires_grad).detach().clone()
    trainer = VLTrainer(learner=learner, settings=settings, args=arguments, train_dataset=samples,
                        data_collator=collate, log_file=out / "log.jsonl", progress_seconds=1000)  # fmt: skip
    begun = time.perf_counter()
    trainer.train()
    lasted = time.perf_counter() - begun
    after = next(p for p in learner.parameters() if p.requires_grad).detach()
    if trainer.state.global_step != t.steps or torch.equal(before, after):
        raise RuntimeError(f"{recipe} took {trainer.state.global_step} steps of {t.steps}, or they changed nothing")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB, on macOS bytes
    return {"recipe": recipe, "M parameters": sum(p.numel() for p in learner.parameters()) / 1e6, "rows": t.batch,
            "first loss": losses[0], "last loss": losses[-1], "seconds a step": lasted / t.steps,
            "peak GB": peak / (2**30 if sys.platform == "darwin" else 2**20), "load": load()}  # fmt: skip


def alone(recipe: str, rows: int, steps: int, threads: int, more: list[str]) -> Row:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        source = draw_data(folder / "data", max(8, 2 * rows * steps))
        regions = draw_regions(folder / "regions", source) if reads_regions(recipe) else None
        settings = reduced(recipe, folder / "data", regions, rows, steps, *more)
        return first_steps(recipe, settings, source, folder / "out")


def main(argv: list[str] | None = None) -> list[Row]:
    options = parser(__doc__)
    options.add_argument("recipes", nargs="*", default=list(PRESETS), help=f"default {' '.join(PRESETS)}")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as `interlace train` takes")
    options.add_argument("--rows", type=int, default=2, help="of a step (default 2)")
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--threads", type=int, default=2)
    given = options.parse_args(argv)
    facts = machine("torch", "transformers")
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        asked = [pool.submit(alone, recipe, given.rows, given.steps, given.threads, given.set)
                 for recipe in given.recipes]  # fmt: skip
        rows = [one.result() for one in asked]
    notes = [
        f"{facts['cpu']}, {given.threads} threads, load {facts['load']} at the start, float32; "
        f"torch {facts['packages']['torch']}; {given.steps} steps",
        "peak GB: of the recipe's own process, libraries and all",
    ]
    show("First steps at full size", COLUMNS, rows, notes)
    keep(given.out, {"machine": facts, "threads": given.threads, "steps": given.steps, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
