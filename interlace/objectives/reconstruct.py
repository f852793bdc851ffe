"""The picture, hidden and visible parts alike, from the states of its cells. MLIM (Arici et al. 2021,
arXiv:2109.12178)."""

from __future__ import annotations

from torch import Tensor

from interlace.errors import UserError

REDUCTIONS = ("sum", "mean")


def pixel_losses(predicted: Tensor, target: Tensor, channels: str = "sum") -> Tensor:
    """(B, 3, S, S) twice, both between 0 and 1 -> (B,): the mean over all pixels of the squared error, summed over
    channels as in the paper (`channels` "sum"), or a third of it ("mean", the usual mean squared error).

    The whole picture is scored: what a cell's vector keeps of its visible pixels is worth learning too. Raises
    UserError for shapes that differ and another `channels`.
    """
    if channels not in REDUCTIONS:
        raise UserError(f"squared errors are summed over channels or their mean is taken: sum or mean; got "
                        f"{channels!r}.")  # fmt: skip
    if predicted.shape != target.shape:
        raise UserError(f"a drawn picture of {tuple(predicted.shape[1:])} is compared with one of "
                        f"{tuple(target.shape[1:])}: the pixels head must draw what the model reads, "
                        "grid * 2 ** len(up) pixels.")  # fmt: skip
    losses = (predicted - target).float().square().mean((1, 2, 3))
    return losses * predicted.shape[1] if channels == "sum" else losses
