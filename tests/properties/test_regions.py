"""Regions and cells: they have no order of their own, and one that is hidden is not seen."""

import pytest
import torch
from properties.systems import PAIRED, assert_same

from interlace.embed.regions import Regions

REGIONS = [system for system in PAIRED.values() if system.regions]
HIDING = [*REGIONS, *(s for s in PAIRED.values() if getattr(s.model().image, "hides_cells", False))]
by_name = {"ids": lambda system: system.name}


@pytest.mark.parametrize("system", REGIONS, **by_name)
@torch.no_grad()
def test_the_order_of_regions_changes_nothing_but_their_order(system):
    """The first one stays, which is the whole picture in ViLBERT and VL-BERT."""
    model, batch = system.model(), system.batch(2)
    order = torch.tensor([0, 3, 1, 4, 2])
    turned = Regions(*(x if x is None else x[:, order] for x in batch.image))
    a = model(batch.ids, batch.image, batch.mask)
    b = model(batch.ids, turned, batch.mask)
    lead = a.image.shape[1] - len(order)  # VL-BERT's [END]
    assert_same({"image": b.image[:, lead:], "text": b.text[batch.mask]},
                {"image": a.image[:, lead:][:, order], "text": a.text[batch.mask]})  # fmt: skip


@pytest.mark.parametrize("system", HIDING, **by_name)
@torch.no_grad()
def test_what_is_hidden_is_not_seen_and_hiding_is(system):
    model, batch = system.model(), system.batch()
    plain = model.half_image(batch.image, batch.cells)
    lead = getattr(model.image, "lead", 0)
    hidden = torch.zeros(len(batch.ids), plain.states.shape[1] - lead, dtype=torch.bool)
    hidden[:, 2] = True
    if isinstance(batch.image, Regions):
        other = batch.image.features.clone()
        other[:, 2] += 1
        images = batch.image, batch.image._replace(features=other)
    else:  # the third block of the first row of blocks
        size = model.config.image.patch
        other = batch.image.clone()
        other[:, :, :size, 2 * size : 3 * size] += 1
        images = batch.image, other
    text = model.half_text(batch.ids, batch.mask)
    outs = [model.fuse(text, model.half_image(image, batch.cells, hidden=hidden)) for image in images]
    torch.testing.assert_close(outs[0].text, outs[1].text)
    torch.testing.assert_close(outs[0].image, outs[1].image)
    assert (outs[0].text - model.fuse(text, plain).text).abs().max() > 1e-4
