"""A model together with what it learns by: its passes, and every loss logged by its name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interlace.config import VLConfig
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Pass, Views
from interlace.objectives.whole import Ahead


class Learner(VLModel):
    """A `VLModel` whose forward takes a batch and gives its loss; saved and loaded, it is the plain model.

    The losses are summed with their weights; what each logs comes back beside the sum, still on the device, so that a
    step never waits for a number.
    """

    def __init__(self, config: VLConfig):
        super().__init__(config)
        self.passes: list[Pass] = []
        self.beside: dict[Objective, nn.Module] = {}  # what objectives keep; a plain dict, so no part of the model

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

    # ---------------------------------------------------------------------------- what objectives keep beside the model

    def attach(self, batch: int, rows: int) -> Learner:
        """Once, on the device where it trains, before the first step: optimiser steps of `batch` rows over all ranks,
        out of `rows`. Only objectives that keep something (itc_momentum) need it."""
        for objective, _ in self.objectives:
            state = objective.attach(self, batch, rows)
            if state is not None:
                self.beside[objective] = state.to(self.device).requires_grad_(False)
        return self

    def beside_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold beside the model; names as "0.itc_momentum.text"."""
        return {f"{number}.{objective.key}.{name}": tensor for number, one in enumerate(self.passes)
                for objective, _ in one.objectives if objective in self.beside
                for name, tensor in self.beside[objective].state_dict().items()}  # fmt: skip

    @torch.no_grad()
    def load_beside(self, tensors: dict[str, Tensor]) -> None:
        """Raises KeyError for one that is missing."""
        for name, tensor in self.beside_tensors().items():
            tensor.copy_(tensors[name])

    def before_step(self, epoch: float) -> None:
        for objective, _ in self.objectives:
            objective.before_step(self, epoch)

    def after_step(self) -> None:
        for objective, _ in self.objectives:
            objective.after_step(self)

    # ---------------------------------------------------------------------------------------------------- a micro-batch

    def looks(self, parts: int) -> bool:
        """Whether some objective must know all `parts` micro-batches before the first is learned from."""
        return any(objective.looks(parts) for objective, _ in self.objectives)

    def look(self, batch: Batch, parts: int) -> tuple[dict[Objective, dict[str, Tensor]], list[str]]:
        """What each objective says of these rows to the other micro-batches, and the order in which the vectors were
        computed for it."""
        shared = Views(self, batch)
        said = {objective: objective.look(self, batch, views) for plan, views in self._drawn(batch, shared)
                for objective, _ in plan.objectives if objective.looks(parts)}  # fmt: skip
        return said, shared.order

    def _drawn(self, batch: Batch, shared: Views) -> list[tuple[Pass, Views]]:
        """The passes of this step."""
        parts = batch.get("parts") or [{}] * len(self.passes)
        return [(plan, Views(self, batch, part, plan, shared)) for plan, part in zip(self.passes, parts)
                if part is not None]  # fmt: skip

    def forward(self, ahead: Ahead | None = None, **batch: Any) -> dict[str, Any]:  # type: ignore[override]
        shared = Views(self, batch)
        shared.ahead = ahead
        for name in ahead.order if ahead else []:
            shared.vector(name)
        total = torch.zeros((), device=batch["group"].device)
        logs: dict[str, Tensor] = {}
        for plan, views in self._drawn(batch, shared):
            for objective, weight in plan.objectives:
                scored = objective.loss(self, batch, views)
                total = total + weight * scored.loss
                name = f"{plan.name}/" if plan.name else ""
                logs |= {name + key: value.detach().float() for key, value in scored.logs.items()}
        return {"loss": total, "losses": logs}
