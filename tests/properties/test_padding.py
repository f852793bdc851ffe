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
@pytest.mark.parametrize("side", ["left", "both"])
@torch.no_grad()
def test_words_may_be_padded_on_any_side(system, side):
    model, batch = system.model(), system.batch()
    assert not batch.mask.all()
    more = {"left": (4, 0), "both": (2, 3)}[side]
    places = torch.stack([torch.cat([row.nonzero()[:, 0], (~row).nonzero()[:, 0]]) for row in batch.mask])
    if side == "left":  # each text ends at the last place
        places = torch.stack([p.roll(int((~row).sum())) for p, row in zip(places, batch.mask)])
    ids, mask = batch.ids.gather(1, places), batch.mask.gather(1, places)
    noise = [torch.randint(5, 90, (len(ids), n), generator=torch.Generator().manual_seed(n)) for n in more]
    ids = torch.cat([noise[0], ids, noise[1]], 1)
    mask = torch.nn.functional.pad(mask, more)
    one, other = (model(i, batch.image, m, batch.cells) for i, m in ((ids, mask), (batch.ids, batch.mask)))
    assert_same({"text": (one.pooled_text, None), "image": (one.pooled_image, None)},
                {"text": (other.pooled_text, None), "image": (other.pooled_image, None)})  # fmt: skip
    if "contrast" in model.heads:
        torch.testing.assert_close(model.encode_text(ids, mask), model.encode_text(batch.ids, batch.mask))
    if one.text.shape[1] == mask.shape[1]:
        for row in range(len(ids)):
            torch.testing.assert_close(one.text[row][mask[row]], other.text[row][: int(batch.mask[row].sum())],
                                       atol=1e-4, rtol=1e-4)  # fmt: skip


@EVERY_PAIRED
def test_halves_are_padded_on_the_right_alone(system):
    """What they return has the places of its words, and is mixed with other halves."""
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
