"""Weights split over ranks (FSDP2, through accelerate): what a model needs before it is split, and how it comes back.

`fully_shard` takes no parameter without a dimension, and a split parameter is a piece on each rank. So a temperature is
a vector of one while the model is split, and is read as a number by whoever reads it (`one_number`).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from interlace.learner import Learner


def one_number(parameter: Tensor) -> Tensor:
    """() or (1,) -> ()."""
    return parameter.reshape(())


def widen_scalars(model: nn.Module) -> None:
    """In place: every parameter without a dimension becomes a vector of one."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.ndim == 0:
                module._parameters[name] = nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad)


def on_one_rank(tensor: Tensor) -> Tensor:
    """All of a split tensor; any other as it is. All ranks call it together."""
    whole = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


@torch.no_grad()
def gathered(split: Learner) -> Learner:
    """The learner as it was before it was split, with the weights it has now, on every rank, which call this together.
    """
    tensors = {name: on_one_rank(tensor).detach() for name, tensor in split.state_dict().items()}
    cls = next(base for base in type(split).__mro__ if not base.__name__.startswith("FSDP"))
    whole: Learner = cls(copy.deepcopy(split.config)).to(split.device)
    learns = {name: parameter.requires_grad for name, parameter in split.named_parameters()}
    for name, tensor in whole.state_dict().items():
        tensor.copy_(tensors[name].reshape(tensor.shape))
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(learns[name])
    whole.passes, whole.beside = split.passes, split.beside
    whole.frozen, whole.started, whole.anew = split.frozen, split.started, split.anew
    whole.train(split.training)
    return whole
