"""What is padded and how far changes nothing; neither does what else is in the batch."""

import pytest
import torch
from properties.systems import EVERY_PAIRED, EVERY_SYSTEM, Captions, assert_same, one_row, real

from interlace.errors import UserError


@EVERY_SYSTEM
@pytest.mark.parametrize("words,cells", [(3, 0), (10, 0), (0, 3), (0, 10), (3, 10)])
@torch.no_grad()
def test_padding_changes_nothing(system, words, cells):
    model, batch = system.model(), system.batch()
    assert_same(real(system.run(model, system.padded(batch, words, cells))), real(system.run(model, batch)))


@EVERY_SYSTEM
@torch.no_grad()
def test_what_stands_in_padding_changes_nothing(system):
    model, batch = system.model(), system.batch()
    first, second = (real(system.run(model, system.padded(batch, 3, 3, seed=seed))) for seed in (1, 2))
    assert_same(first, second, atol=0 if isinstance(system, Captions) else 1e-6)


@EVERY_SYSTEM
@torch.no_grad()
def test_padding_may_stand_between_regions(system):
    """Regions have no order. The first has a meaning in some systems and stays first; pixels are padded at their edges
    alone, so there the padding stands at the end."""
    model, batch = system.model(), system.batch()
    for at in (1, 3):
        assert_same(real(system.run(model, system.padded(batch, 0, 3, at=at))), real(system.run(model, batch)))


@EVERY_PAIRED
def test_padding_before_words_is_refused(system):
    """Words have an order, so their padding has a side."""
    model, batch = system.model(), system.batch()
    with pytest.raises(UserError, match=r"padding stands before a word.*padding_side"):
        model.half_text(batch.ids.flip(1), batch.mask.flip(1))


@EVERY_SYSTEM
@torch.no_grad()
def test_a_batch_of_one_is_the_row_of_a_batch(system):
    model, batch = system.model(), system.batch(4)
    together = system.run(model, batch)
    for row in range(4):
        alone = system.run(model, system.rows(batch, torch.tensor([row])))
        assert_same(one_row(alone, 0), one_row(together, row))


@EVERY_SYSTEM
@torch.no_grad()
def test_the_inputs_count(system):
    """Else all of the above would hold for a model that reads nothing."""
    model, batch = system.model(), system.batch()
    out, turned = real(system.run(model, batch)), system.rows(batch, torch.tensor([2, 1, 0]))
    other = real(system.run(model, turned))
    for name in out.keys() - {"text", "image", "written"}:
        assert (out[name][0] - other[name][0]).abs().max() > 1e-5, name
