"""Steps of the real trainer, the last one's gradients and the weights after it kept. Run by torchrun for two ranks,
and in the test's own process for one:

    torchrun --nproc-per-node 2 -m tests.objectives.ranks job.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import TrainerCallback

from interlace import train as module
from interlace.compose import Composition
from interlace.data.processor import Augment
from interlace.settings import Settings, load_settings

ROWS = 8  # of the optimiser step, over all micro-batches and ranks


class Keep(TrainerCallback):
    """What the optimiser is about to see."""

    def __init__(self, trainer: module.VLTrainer):
        self.trainer, self.gradients = trainer, dict[str, torch.Tensor]()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        named = self.trainer.learner.named_parameters()
        self.gradients = {f"gradient {n}": p.grad.clone() for n, p in named if p.grad is not None}


class Watched(module.VLTrainer):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.kept = Keep(self)
        self.add_callback(self.kept)


def settings(case: dict[str, Any], ranks: int, accumulate: int, out: Path) -> Settings:
    """A recipe at toy size, all its passes in the step, and an optimiser that is smooth in the gradient: AdamW's first
    step is its sign otherwise, and a rounding error as large as the learning rate."""
    made = load_settings(case["recipe"])
    if "passes" in case:  # the recipe's system, other objectives
        made.passes, made.objectives = case["passes"], {}
    image = "patches" if made.model.image == "patches" else case["image"]
    made.model = Composition(system=made.model.system, text=case["text"], image=image, width=32, heads=4, layers=2,
                             size=64, patch=16, dropout=0.0, max_length=16, align=False)  # fmt: skip
    made.data.source, made.data.regions, made.data.workers = case["source"], case["regions"], 0
    made.data.keep_states_gb = 0.0
    for objectives in [made.objectives, *made.passes]:
        if objectives.get("itm", {}).get("negatives") in ("hard", "both"):
            objectives["itm"]["among"] = "batch"  # else it depends on the micro-batch by what it says
    t = made.train
    t.out, t.steps, t.batch, t.accumulate = str(out), case.get("steps", 1), ROWS // ranks, accumulate
    if any("binding" in objectives for objectives in made.passes):  # which refuses cropped and mirrored pictures
        made.augment = Augment(smallest_crop=1, flip=False)
    t.mix, t.evaluate = "sum", False
    t.eps, t.clip, t.warmup, t.schedule, t.weight_decay, t.bf16, t.log_every = 1e-3, 0.0, 0.0, "constant", 0.0, False, 1
    return made


def without_dropout(given: Settings, passes: list) -> module.Made:
    """Dropout falls elsewhere where rows stand elsewhere."""
    learner, processor = module.make_learner(given, passes)
    for part in learner.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return learner, processor


def step(case: dict[str, Any], ranks: int, accumulate: int, out: Path) -> None:
    """Writes `out.safetensors` (gradients, weights, what objectives keep beside them) and `out.json` (losses)."""

    def keep(_out, _settings, learner, _processor, _source, trainer, *_more) -> None:
        weights = {f"weight {n}": p.detach().clone() for n, p in learner.named_parameters() if p.requires_grad}
        beside = {f"beside {n}": x.clone() for n, x in learner.beside_tensors().items()}
        save_file({**trainer.kept.gradients, **weights, **beside}, out.with_suffix(".safetensors"))
        logged = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
        out.with_suffix(".json").write_text(json.dumps(logged))

    before = module.VLTrainer, module.finish
    module.VLTrainer, module.finish = Watched, keep
    try:
        module.train(settings(case, ranks, accumulate, out), make=without_dropout)
    finally:
        module.VLTrainer, module.finish = before


if __name__ == "__main__":
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    for name, given in job["cases"].items():
        step(given, 2, job["accumulate"], Path(job["out"]) / name)
    dist.barrier()  # a rank that leaves early takes gloo's connections from under the other
    dist.destroy_process_group()
