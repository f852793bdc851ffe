"""Losses that compare every row of an optimiser step with every other, in memory for a few of them.

A contrast cannot be summed over micro-batches as it is. Gradient caching (Gao et al. 2021, arXiv:2101.06983, section 3)
cuts it in three: encode all micro-batches without a graph (`look_ahead`); compute the loss of all their vectors and its
derivative by each vector (`cached`); encode every micro-batch again with the same random numbers, and hand its vectors
their derivatives (`Cached.loss`). The gradient is that of the whole batch, dropout included; the price is one more
forward of the halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from interlace.learner import Learner
    from interlace.objectives.base import Batch, Objective

PAIRS = 2**22  # similarities computed at once: 16 MB in float32, a few such at a time
RandomState = tuple[Tensor, list[Tensor]]


@dataclass
class Whole:
    """What an objective asked to know of all rows of the optimiser step, in the sampler's order, whatever the number of
    micro-batches and ranks."""

    rows: dict[str, Tensor]  # (N, ...) what its `look` said of each row
    own: Tensor  # (B,) where this micro-batch's rows stand among them
    shares: int = 1  # micro-batches times ranks: a loss is averaged over so many
    settled: Any = None  # what its `settle` made of all rows, once
    partners: Batch | None = None  # the pictures of the rows it `wants` (B of them), as a batch


@dataclass
class Ahead:
    """What a micro-batch must know before its forward."""

    random: RandomState  # it was encoded with
    order: list[str]  # in which its vectors were computed: they must be again, for dropout to be the same
    whole: dict[Objective, Whole] = field(default_factory=dict)


@torch.no_grad()
def look_ahead(learner: Learner, batches: Iterable[Batch], parts: int,
               autocast: Callable[[], AbstractContextManager] = nullcontext) -> list[Ahead]:  # fmt: skip
    """Reads the `parts` micro-batches of one optimiser step, one at a time. All ranks must have as many rows."""
    learner.train()
    ahead, looked, own = [], [], []
    start = 0
    with statistics_stay(learner):
        for batch in batches:
            random = random_state()
            with autocast():
                seen, order = learner.look(batch, parts)
            ahead.append(Ahead(random, order))
            looked.append({o: {k: gather(v) for k, v in _even(rows).items()} for o, rows in seen.items()})
            size = len(batch["group"])
            mine = start + rank() * size
            own.append(torch.arange(mine, mine + size, device=learner.device))
            start += world() * size
    for objective in looked[0] if looked else []:
        columns = {name: _join([one[objective][name] for one in looked]) for name in looked[0][objective]}
        settled = objective.settle(learner, columns)
        for one, places in zip(ahead, own):
            one.whole[objective] = Whole(columns, places, len(ahead) * world(), settled)
    return ahead


# ------------------------------------------------------------------------------------------------- cached gradients


@dataclass
class Cached:
    """The loss of the whole batch and its derivatives."""

    value: Tensor  # scalar
    text: Tensor  # (N, P)
    image: Tensor  # (N, P)
    head: list[Tensor]  # by the head's scalars
    sums: dict[str, Tensor]  # what the blocks counted, for logs

    def loss(self, own: Tensor, shares: int, text: Tensor, image: Tensor, head: list[Tensor]) -> Tensor:
        """A scalar with the value of the whole loss and, averaged over `shares` micro-batches and ranks, its gradient.
        `text`, `image` (B, P): this micro-batch's, that stand at `own` (B,)."""
        mine = (text * self.text[own]).sum() + (image * self.image[own]).sum()
        # every micro-batch has its own vectors, and all have the same head
        slope = mine * shares + sum((one * by for one, by in zip(head, self.head)), torch.zeros_like(mine))
        return slope - slope.detach() + self.value


Share = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def cached(share: Share, text: Tensor, image: Tensor, head: list[Tensor]) -> Cached:
    """text, image (N, P), equal on all ranks. `share(rows, text, image, *head)` -> the part of the loss that the slice
    `rows` gives, and counts to sum. Blocks of rows are computed one after another, and shared out among ranks, so that
    memory does not grow with the square of N."""
    leaves = [t.detach().float().requires_grad_() for t in (text, image, *head)]
    n = len(text)
    block = max(1, min(PAIRS // n, -(-n // world())))
    value, sums = torch.zeros((), device=text.device), None
    with torch.enable_grad():
        for start in range(rank() * block, n, world() * block):
            loss, counts = share(slice(start, start + block), *leaves)
            loss.backward()
            value = value + loss.detach()
            sums = counts if sums is None else {k: v + counts[k] for k, v in sums.items()}
    if sums is None:  # fewer blocks than ranks
        sums = {k: torch.zeros_like(v) for k, v in share(slice(0, 0), *(leaf.detach() for leaf in leaves))[1].items()}
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    for tensor in (value, *grads, *sums.values()):
        add_up(tensor)
    return Cached(value, grads[0], grads[1], grads[2:], sums)


# ------------------------------------------------------------------------------------------------------------ ranks


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def add_up(x: Tensor) -> Tensor:
    """In place: the sum over ranks."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def gather(x: Tensor, with_gradient: bool = False) -> Tensor:
    """(B, ...) of every rank -> (W * B, ...). Every rank then holds the whole loss; the backward of the gather sums the
    ranks' gradients and data-parallel averaging divides by W, which leaves the gradient of one process with the whole
    batch. Ranks must have equally many rows."""
    if world() == 1:
        return x
    if with_gradient:
        from torch.distributed.nn.functional import all_gather

        return torch.cat(list(all_gather(x.contiguous())))
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _even(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Texts padded to the longest of all ranks."""
    if world() == 1:
        return rows
    out = {}
    for name, x in rows.items():
        if x.ndim > 1:
            longest = torch.tensor(x.shape[1], device=x.device)
            dist.all_reduce(longest, dist.ReduceOp.MAX)
            x = _pad(x, int(longest))
        out[name] = x
    return out


def _join(parts: list[Tensor]) -> Tensor:
    """Micro-batches one under the other, texts padded to the longest of all."""
    if parts[0].ndim > 1:
        longest = max(x.shape[1] for x in parts)
        parts = [_pad(x, longest) for x in parts]
    return torch.cat(parts)


def _pad(x: Tensor, long: int) -> Tensor:
    """(B, T, ...) -> (B, long, ...), with zeros."""
    return F.pad(x, [0] * (2 * (x.ndim - 2)) + [0, long - x.shape[1]])


# ----------------------------------------------------------------------------------------------------- random numbers


def random_state() -> RandomState:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def set_random_state(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


@contextmanager
def statistics_stay(module: nn.Module) -> Iterator[None]:
    """Batch norms that learn their running statistics see each row once, not twice."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]
    kept = [(b, b.clone()) for m in norms for b in m.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)
