"""Where a system writes, later words do not reach earlier states: in its own decoder, and in its schedule when that is
given the visibility of a language model."""

import pytest
import torch
from properties.systems import CAPTIONS, EVERY_PAIRED, PAIRED

from interlace.streams import Visibility, causal, prefix

WRITERS = [system for system in [*PAIRED.values(), CAPTIONS] if "lm" in system.objectives]
LENGTH = 6
ALWAYS_CAUSAL = {"clip"}  # its text encoder sees no later word in whatever task
NEVER_TWICE = {"clip", "blip"}  # their images read no words, so nothing can come back through them


def states(system, batch, see):
    """Text (B, T, D) and image (B, I, D) under this visibility of (words, cells) masks, pre-fusion layers included."""
    model = system.model()
    image = system.image(model, batch)
    see = see(batch.mask, image.mask)
    out = model.fuse(model.half_text(batch.ids, batch.mask, see=see), image, see)
    return out.text, out.image


def changed(system, batch, at):
    ids = batch.ids.clone()
    ids[:, at] = ids[:, at] % 80 + 7
    return type(batch)(ids, *(getattr(batch, name) for name in ("mask", "image", "cells", "extra")))


def assert_reach(before, after, real, first):
    """States from `first` on have changed, in real positions; those before have not."""
    torch.testing.assert_close(before[:, :first], after[:, :first], atol=1e-5, rtol=1e-5)
    assert (before - after).abs().amax(-1)[:, first:][real[:, first:]].gt(1e-5).all()


@pytest.mark.parametrize("system", WRITERS, ids=lambda system: system.name)
@pytest.mark.parametrize("at", [1, 3])
@torch.no_grad()
def test_a_decoder_does_not_see_the_future(system, at):
    """What is written at a place is the word after it (BLIP); VisionEncoderDecoder shifts its labels itself, so there
    the word `at` is first read one place later."""
    model, batch = system.model(), system.batch()
    before, mask = system.run(model, batch)["written"]
    after, _ = system.run(model, changed(system, batch, at))["written"]
    assert_reach(before, after, mask, at + 1 if system is CAPTIONS else at)


@EVERY_PAIRED
@pytest.mark.parametrize("at", [1, 3])
@torch.no_grad()
def test_a_causal_schedule_does_not_see_the_future(system, at):
    batch = system.batch()
    see = lambda text, image: causal(text, image, LENGTH)  # noqa: E731
    (text, image), (text_after, image_after) = (states(system, b, see) for b in (batch, changed(system, batch, at)))
    assert_reach(text, text_after, batch.mask, at)
    torch.testing.assert_close(image, image_after)


@EVERY_PAIRED
@torch.no_grad()
def test_a_prefix_is_read_both_ways_and_never_sees_the_rest(system):
    batch = system.batch()
    given = torch.arange(LENGTH)[None] < 3
    see = lambda text, image: prefix(text, image, given)  # noqa: E731
    before, image = states(system, batch, see)
    rest, image_after = states(system, changed(system, batch, 3), see)
    assert_reach(before, rest, batch.mask, 3)
    torch.testing.assert_close(image, image_after)
    within, _ = states(system, changed(system, batch, 2), see)
    assert_reach(before, within, batch.mask, 2 if system.name in ALWAYS_CAUSAL else 0)


@EVERY_PAIRED
@torch.no_grad()
def test_through_the_image_the_future_would_leak(system):
    """Why the image may not look at words: with that block open, a later word comes back in the next layer."""
    batch = system.batch()

    def see(text, image):
        closed = causal(text, image, LENGTH)
        return Visibility(closed.tt, closed.ti, batch.mask.unsqueeze(1), closed.ii)

    (before, _), (after, _) = (states(system, b, see) for b in (batch, changed(system, batch, 3)))
    leak = (before - after)[:, :3].abs().max()
    assert (leak == 0) if system.name in NEVER_TWICE else (leak > 1e-5)


@EVERY_PAIRED
@torch.no_grad()
def test_cells_that_nobody_may_see_are_not_seen(system):
    """The image's side of the same rule: a masked cell's content reaches no word."""
    model, batch = system.model(), system.batch()
    image = system.image(model, batch)
    mask = torch.ones(image.states.shape[:2], dtype=torch.bool) if image.mask is None else image.mask.bool().clone()
    mask[:, -2:] = False
    noise = image.states.clone()
    noise[:, -2:] = torch.randn_like(noise[:, -2:])
    text = model.half_text(batch.ids, batch.mask)
    a, b = (model.fuse(text, type(image)(states, mask)).text[batch.mask] for states in (image.states, noise))
    torch.testing.assert_close(a, b)
