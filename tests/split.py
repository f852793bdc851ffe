"""Training with weights split over ranks, as `accelerate launch` starts it where its config says FSDP2:

    accelerate launch --config_file fsdp.yaml -m tests.split config.yaml OUT [STEP]

accelerate splits on accelerators alone and quietly leaves a CPU's ranks with whole weights, though torch can split
there; here it is told that it may. With STEP every rank dies in that step.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate import state
from accelerate.utils import DistributedType

from interlace import train as module
from interlace.settings import load_settings
from tests.objectives.ranks import without_dropout

PLAIN = state.AcceleratorState.__init__


def on_a_cpu_too(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    PLAIN(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP


class Watched(module.VLTrainer):
    dies_in = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        from torch.distributed.tensor import DTensor

        split = [p for group in self.optimizer.param_groups for p in group["params"]]
        assert self.accelerator.is_fsdp2 and all(isinstance(p, DTensor) for p in split)
        if self.state.global_step + 1 == self.dies_in:
            raise SystemExit(3)
        return super().training_step(*args, **kwargs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    state.AcceleratorState.__init__ = on_a_cpu_too
    Watched.dies_in = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    module.VLTrainer = Watched  # type: ignore[misc]
    module.train(load_settings(sys.argv[1], [f"train.out={sys.argv[2]}"]), make=without_dropout)
    dist.barrier()  # a rank that leaves early takes gloo's connections from under the other
    dist.destroy_process_group()
