"""A model together with what it learns by: its passes, and every loss logged by its name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interlace.config import VLConfig
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Others, Pass, Views


class Learner(VLModel):
    """A `VLModel` whose forward takes a batch and gives its loss; saved and loaded, it is the plain model.

    The losses are summed with their weights; what each logs comes back beside the sum, still on the device, so that a
    step never waits for a number.
    """

    def __init__(self, config: VLConfig):
        super().__init__(config)
        self.passes: list[Pass] = []

    @property
    def objectives(self) -> list[tuple[Objective, float]]:
        return [pair for one in self.passes for pair in one.objectives]

    def learn_by(self, passes: list[Pass] | list[tuple[Objective, float]]) -> Learner:
        """Objectives given one by one have a pass each. Raises UserError when one needs a part the model lacks."""
        self.passes = [one if isinstance(one, Pass) else Pass([one]) for one in passes]
        for objective, _ in self.objectives:
            objective.check(self)
        return self

    def cells_to_hide(self) -> Tensor:
        """(I,) bool: which cells of a picture may be hidden; none where pictures differ in how many they have."""
        spec: Any = self.config.image
        if hasattr(spec, "cells"):
            return torch.tensor([False] * getattr(spec, "whole", False) + [True] * spec.cells)
        if hasattr(spec, "patch"):
            return torch.ones((spec.size // spec.patch) ** 2, dtype=torch.bool)
        return torch.zeros(0, dtype=torch.bool)

    def vectors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Image and caption vectors (B, P) of a batch, in the order in which `forward` computes them first."""
        views = Views(self, batch)
        return views.vector("image"), views.vector("caption")

    def forward(self, others: Others | None = None, **batch: Any) -> dict[str, Any]:  # type: ignore[override]
        shared = Views(self, batch)
        shared.others = others
        if others is not None:  # dropout is replayed from the pass that made the constants: the order must be its own
            shared.vector("image"), shared.vector("caption")
        total = torch.zeros((), device=batch["group"].device)
        logs: dict[str, Tensor] = {}
        parts = batch.get("parts") or [{}] * len(self.passes)
        for plan, part in zip(self.passes, parts):
            if part is None:  # another pass was drawn
                continue
            views = Views(self, batch, part, plan, shared)
            for objective, weight in plan.objectives:
                scored = objective.loss(self, batch, views)
                total = total + weight * scored.loss
                name = f"{plan.name}/" if plan.name else ""
                logs |= {name + key: value.detach().float() for key, value in scored.logs.items()}
        return {"loss": total, "losses": logs}
