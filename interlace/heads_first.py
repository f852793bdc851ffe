"""Heads that first learn alone: over what the rest of the model says of the training rows, before anything of it moves.

A head that starts untrained sends noise into a pre-trained model for as long as it knows nothing (Kumar et al. 2022,
arXiv:2202.10054: linear probing, then fine-tuning). And it learns slowly there: what a model that learnt to tell pairs
apart says of a pair differs along few directions, and a few dozen steps do not find the rest, though it holds more than
before. Here the rest is asked once, and the head makes hundreds of cheap steps over its answers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from interlace.bars import bar
from interlace.data.batches import Collate, Samples
from interlace.learner import Learner
from interlace.objectives.base import Objective, Pairs, Views

MOST, VISITS = 20_000, 2  # rows that are asked, times each
HELD_OUT = 0.15  # of their groups: where the head has to get better
SHRINK = 1e-3  # of the mean variance, added to each direction's: what varies less than that is noise
LEAST = 20  # groups, below which nothing is fitted


@dataclass
class Fitted:
    """Loss on the held-out groups, before and after."""

    before: float
    after: float


def fit_heads(learner: Learner, samples: Samples, collate: Collate, *, visits: int = VISITS, batch: int = 64,
              lr: float = 1e-3, epochs: int = 60, patience: int = 6, bf16: bool = False,
              seed: int = 0) -> dict[str, Fitted]:  # fmt: skip
    """Every head whose objective scores pooled pairs (matching, answers from a list) learns over `visits` visits of the
    rows, from where it stands, until the held-out groups got no better for `patience` epochs; the best is kept, so
    that no head gets worse there. Returns what each objective's loss did; nothing with fewer than 20 groups."""
    found = gather_pairs(learner, samples, collate, visits, batch, bf16, seed)
    fitted = {}
    for objective, (pairs, group) in found.items():
        names = torch.unique(group)
        if len(names) < LEAST:
            continue
        chosen = np.random.default_rng(seed).choice(len(names), max(1, round(HELD_OUT * len(names))), replace=False)
        held = torch.isin(group, names[torch.from_numpy(chosen).to(names.device)])
        fitted[objective.key] = fit(learner.heads[objective.head], objective, pairs, held, lr, epochs, patience, seed)
    if fitted:
        told = ", ".join(f"{name} {one.before:.3g} -> {one.after:.3g}" for name, one in fitted.items())
        print(f"heads first, loss on held-out groups: {told}")
    return fitted


@torch.no_grad()
def gather_pairs(learner: Learner, samples: Samples, collate: Collate, visits: int, batch: int, bf16: bool,
                 seed: int) -> dict[Objective, tuple[Pairs, Tensor]]:  # fmt: skip
    """Each objective's pairs over the training rows, without those that weigh nothing, and the group of each (N,)."""
    places = np.arange(len(samples))
    if len(places) > MOST:
        places = np.sort(np.random.default_rng(seed).choice(places, MOST, replace=False))
    asked = [(visit, at) for visit in range(visits) for at in range(0, len(places), batch)]
    parts: dict[Objective, list[tuple[Pairs, Tensor]]] = {}
    learning = learner.training
    learner.eval()
    for visit, at in bar(asked, desc="heads first", unit="batch", mininterval=1):
        given = collate([samples[(visit, int(place))] for place in places[at : at + batch]])
        given = send_to_device(given, learner.device)
        shared = Views(learner, given)
        for plan, part in zip(learner.passes, given.get("parts") or [{}] * len(learner.passes)):
            for objective, _ in plan.objectives if part is not None else []:
                with torch.autocast(learner.device.type, torch.bfloat16, enabled=bf16):
                    pairs = objective.pairs(learner, given, Views(learner, given, part, plan, shared))
                if pairs is not None:
                    real = pairs.weight > 0
                    kept = Pairs(*(getattr(pairs, f.name)[real].detach() for f in fields(Pairs)))
                    kept.text, kept.image = kept.text.float(), kept.image.float()
                    parts.setdefault(objective, []).append((kept, given["group"][kept.row]))
    learner.train(learning)
    return {objective: (Pairs(*(torch.cat([getattr(p, f.name) for p, _ in some]) for f in fields(Pairs))),
                        torch.cat([group for _, group in some])) for objective, some in parts.items()}  # fmt: skip


def fit(head: nn.Module, objective: Objective, pairs: Pairs, held: Tensor, lr: float, epochs: int, patience: int,
        seed: int) -> Fitted:  # fmt: skip
    """`held` (N,) bool: pairs that are not learnt from. Once over the vectors as they are and once over whitened ones:
    where they differ along few directions the second finds what the first does not, where it is noise that is loud then
    the first is better; the held-out groups say which."""
    start = copy.deepcopy(head.state_dict())
    one = learn(head, objective, pairs, held, lr, epochs, patience, seed, white=False)
    plain = copy.deepcopy(head.state_dict())
    head.load_state_dict(start)
    other = learn(head, objective, pairs, held, lr, epochs, patience, seed, white=True)
    if one.after <= other.after:
        head.load_state_dict(plain)
    return min(one, other, key=lambda fitted: fitted.after)


def learn(head: nn.Module, objective: Objective, pairs: Pairs, held: Tensor, lr: float, epochs: int, patience: int,
          seed: int, white: bool) -> Fitted:  # fmt: skip
    trained = [p for p in head.parameters() if p.requires_grad]
    unwhiten = whiten(head, pairs) if white else None
    learnt, watched = held.logical_not().nonzero()[:, 0], held.nonzero()[:, 0]

    def loss(which: Tensor) -> Tensor:
        logits = head(pairs.text[which], pairs.image[which]).float()
        return objective.score(logits, pairs.target[which], pairs.weight[which]).loss

    @torch.no_grad()
    def watch() -> float:
        head.eval()
        blocks = watched.split(1024)
        total = sum(float(loss(block)) * len(block) for block in blocks)
        head.train()
        return total / len(watched)

    learning = head.training
    best, kept, since = watch(), copy.deepcopy(head.state_dict()), 0
    before = best
    steps = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    order = torch.Generator().manual_seed(seed)
    for _ in bar(range(epochs), desc=f"heads first, {objective.name}", unit="epoch", leave=False):
        for block in learnt[torch.randperm(len(learnt), generator=order).to(learnt.device)].split(256):
            steps.zero_grad()
            loss(block).backward()
            steps.step()
        now = watch()
        if now < best - 1e-4 * abs(best):
            best, kept, since = now, copy.deepcopy(head.state_dict()), 0
        else:
            since += 1
            if since >= patience:
                break
    head.load_state_dict(kept)
    if unwhiten is not None:
        unwhiten()
    head.train(learning)
    steps.zero_grad()
    return Fitted(before, best)


@torch.no_grad()
def whiten(head: nn.Module, pairs: Pairs) -> Callable[[], None]:
    """The head's first linears read whitened vectors, with weights that say the same as before. Returns what undoes it:
    weights that say of plain vectors what these have learnt to say. Pooled vectors differ much along a few directions
    and little along the rest, and steps of one size for all would not reach what the rest has to tell."""
    found: list[tuple[nn.Linear, Tensor]] = []
    few = [(x[:2], x) for x in (pairs.text, pairs.image)]  # two rows say as well which linears read them
    watching = [part.register_forward_pre_hook(
        lambda part, given: found.extend((part, whole) for one, whole in few if given[0] is one))
        for part in head.modules() if isinstance(part, nn.Linear) and part.bias is not None]  # fmt: skip
    learning = head.training
    head.eval()
    head(*(one for one, _ in few))
    head.train(learning)
    for hook in watching:
        hook.remove()
    undo = []
    for part, x in found:
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(x.T.double()))
        roots = (values.clamp(min=0) + SHRINK * values.mean()).sqrt().clamp(min=1e-12)
        away, back = (vectors / roots @ vectors.T).to(x), (vectors * roots @ vectors.T).to(x)  # (D, D), symmetric
        part.bias.add_(part.weight @ mean)
        part.weight.copy_(part.weight @ back)
        hook = part.register_forward_pre_hook(lambda part, given, mean=mean, away=away: ((given[0] - mean) @ away,))
        undo.append((part, mean, away, hook))

    @torch.no_grad()
    def unwhiten() -> None:
        for part, mean, away, hook in undo:
            hook.remove()
            part.weight.copy_(part.weight @ away)
            part.bias.sub_(part.weight @ mean)

    return unwhiten
