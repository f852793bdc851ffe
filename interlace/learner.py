"""A model together with what it learns by: one forward per step, every loss logged by its name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interlace.config import VLConfig
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Others, Views


class Learner(VLModel):
    """A `VLModel` whose forward takes a batch and gives its loss; saved and loaded, it is the plain model.

    The losses are summed with their weights; what each logs comes back beside the sum, still on the device, so that a
    step never waits for a number.
    """

    def __init__(self, config: VLConfig):
        super().__init__(config)
        self.objectives: list[tuple[Objective, float]] = []

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

    def forward(self, others: Others | None = None, **batch: Any) -> dict[str, Any]:  # type: ignore[override]
        views = Views(self, batch)
        views.others = others
        if others is not None:  # dropout is replayed from the pass that made the constants: the order must be its own
            views.vector("image"), views.vector("caption")
        total = torch.zeros((), device=batch["group"].device)
        logs: dict[str, Tensor] = {}
        for objective, weight in self.objectives:
            scored = objective.loss(self, batch, views)
            total = total + weight * scored.loss
            logs |= {name: value.detach().float() for name, value in scored.logs.items()}
        return {"loss": total, "losses": logs}
