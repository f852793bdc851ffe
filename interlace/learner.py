"""A model together with what it learns by: one forward per step, every loss logged by its name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interlace.config import VLConfig
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Others, Views


class Learner(VLModel):
    """A `VLModel` whose forward takes a batch and gives its loss; saved and loaded, it is the plain model.

    The losses are summed with their weights. What they log is kept as running sums on the device and read out with
    `pop_logs`, so that a step never waits for a number.
    """

    def __init__(self, config: VLConfig):
        super().__init__(config)
        self.objectives: list[tuple[Objective, float]] = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def learn_by(self, objectives: list[tuple[Objective, float]]) -> Learner:
        """Raises UserError when an objective needs a part the model lacks."""
        for objective, _ in objectives:
            objective.check(self)
        self.objectives = objectives
        return self

    def vectors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Image and caption vectors (B, P) of a batch, in the order in which `forward` computes them first."""
        views = Views(self, batch)
        return views.vector("image"), views.vector("caption")

    def forward(self, others: Others | None = None, **batch: Any) -> dict[str, Tensor]:  # type: ignore[override]
        views = Views(self, batch)
        views.others = others
        if others is not None:  # dropout is replayed from the pass that made the constants, so the order must be its own
            views.vector("image"), views.vector("caption")
        total = torch.zeros((), device=batch["group"].device)
        for objective, weight in self.objectives:
            scored = objective.loss(self, batch, views)
            total = total + weight * scored.loss
            self._log(scored.logs)
        return {"loss": total}

    def _log(self, logs: Mapping[str, Tensor]) -> None:
        for name, value in logs.items():
            value = value.detach().float().to(self.device)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] += 1

    def pop_logs(self) -> dict[str, float]:
        """The means since the last call."""
        logs = {name: (total / self._counts[name]).item() for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return logs
