"""Batches that no model can read: one clear error, whatever the system."""

from dataclasses import replace

import pytest
import torch
from properties.systems import CAPTIONS, EVERY_PAIRED

from interlace.errors import UserError
from interlace.model import VLModel


@EVERY_PAIRED
@pytest.mark.parametrize("wrong", [-1, 99_999])
def test_words_that_the_model_does_not_have(system, wrong):
    model, batch = system.model(), system.batch()
    ids = batch.ids.clone()
    ids[1, 2] = wrong
    with pytest.raises(UserError, match=f"word {wrong}, but the model knows words 0 to {model.vocabulary - 1}:"):
        system.run(model, replace(batch, ids=ids))


@EVERY_PAIRED
def test_another_number_of_texts_than_of_pictures(system):
    model, batch = system.model(), system.batch(3)
    fewer = system.rows(batch, torch.tensor([0, 1]))
    with pytest.raises(UserError, match="3 texts and 2 pictures: row n"):
        VLModel.forward(model, batch.ids, fewer.image, batch.mask)


@pytest.mark.parametrize("wrong", [-1, 99])
def test_words_that_a_captioner_does_not_have(wrong):
    model, batch = CAPTIONS.model(), CAPTIONS.batch()
    ids = batch.ids.clone()
    ids[0, 2] = wrong
    with pytest.raises(UserError, match=f"word {wrong}, but the model knows words 0 to 98:"):
        CAPTIONS.run(model, replace(batch, ids=ids))


def test_another_number_of_captions_than_of_pictures():
    model, batch = CAPTIONS.model(), CAPTIONS.batch(3)
    with pytest.raises(UserError, match="3 texts and 2 pictures: row n"):
        CAPTIONS.run(model, replace(batch, image=batch.image[:2]))
