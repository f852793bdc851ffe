"""Its own losses reach every parameter that is meant to learn, and eight examples are learnt by heart."""

import pytest
import torch
from properties.systems import EVERY_SYSTEM

# A softmax does not change when all its scores do, and a key's bias is the same for all.
BLIND = ("key.bias",)
# What no pre-training loss ever reaches, and why.
UNREACHED = {
    "mlim": {"poolers.text.dense.weight", "poolers.text.dense.bias"},  # for fine-tuning: it compares items
}
# What none reaches in the first step alone.
ASLEEP = {
    # its norms of visual features start at zero, as in the release: what lies below them waits
    "vl_bert": {"image.project.weight", "image.project.bias", "image.hidden_feature", "schedule.meet.0.no_picture"},
}
STEPS = 80
LEFT = 0.15  # of each loss's start
DRAWN = 0.5  # of the picture drawn again: thousands of numbers, through a head that starts grey
SMOOTHED = 0.3  # of a smoothed one: with 0.1 over 99 words it ends at 0.17 of log 99
FOLLOWED = 0.4  # of a contrast whose targets are what a slower copy finds similar: they move as it learns
ALIGNED = ("wra", "wpa")  # distances of true pairs less those of wrong ones: below zero once it tells them apart


def silent(model):
    return {name for name, p in model.named_parameters()
            if not name.endswith(BLIND) and (p.grad is None or not p.grad.any())}  # fmt: skip


@EVERY_SYSTEM
def test_gradient_reaches_every_parameter_but_those_named(system):
    model = system.build()
    step = system.learning(model, system.batch(8))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    never = UNREACHED.get(system.name, set())
    for expected in (never | ASLEEP.get(system.name, set()), never):
        optimiser.zero_grad()
        sum(step().values()).backward()
        assert silent(model) == expected
        optimiser.step()


@EVERY_SYSTEM
def test_each_loss_has_a_gradient_of_its_own(system):
    """None of them is constant: each alone moves something."""
    model, fresh = system.build(), system.build()
    step = system.learning(model, system.batch(8))
    for name in system.objectives:
        model.zero_grad()
        step()[name].backward()
        assert len(silent(model)) < len(silent(fresh)), name


@EVERY_SYSTEM
def test_eight_examples_are_learnt_by_heart(system):
    model = system.build()  # in evaluation, so without dropout
    step = system.learning(model, system.batch(8))
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    curve = []
    for _ in range(STEPS):
        losses = step()
        curve.append({name: loss.item() for name, loss in losses.items()})
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
    assert all(torch.tensor(list(losses.values())).isfinite().all() for losses in curve)
    for name, start in curve[0].items():
        end = curve[-1][name]
        if name in ALIGNED:
            assert end < min(0, start), (name, start, end)
        else:
            left = {("blip", "lm"): SMOOTHED, ("blip", "itc_momentum"): FOLLOWED, ("mlim", "recon"): DRAWN}
            left = left.get((system.name, name), LEFT)
            assert end < left * start, (name, start, end)


@EVERY_SYSTEM
def test_the_same_seed_gives_the_same_losses(system):
    batch = system.batch(8)
    a, b = (system.learning(system.build(), batch)() for _ in range(2))
    assert {name: loss.item() for name, loss in a.items()} == pytest.approx({n: loss.item() for n, loss in b.items()})
