"""MLIM's two halves: which words and cells are hidden together, and how the picture that is drawn again is scored."""

import numpy as np
import pytest
import torch

from interlace.errors import UserError
from interlace.objectives.modality_masking import MODES, Mode, hide_slots, modality_aware, modality_dropout
from interlace.objectives.reconstruct import pixel_losses

ROWS, T, I = 600, 20, 36


def rngs(rows=ROWS, seed=0):
    return [np.random.default_rng([seed, row]) for row in range(rows)]


def slots():
    words, cells = torch.ones(ROWS, T, dtype=torch.bool), torch.ones(ROWS, I, dtype=torch.bool)
    words[:, 0], words[:, 12:] = False, False
    return words, cells


def test_a_third_each_and_the_rates_of_each_mode():
    words, cells = slots()
    read, seen, modes = modality_aware(words, cells, rngs())
    assert not (read & ~words).any()
    for mode, rates in enumerate(MODES):
        rows = modes == mode
        assert abs(rows.float().mean() - 1 / 3) < 0.06
        shares = read[rows].sum() / words[rows].sum(), seen[rows].sum() / cells[rows].sum()
        # one at least of eleven words makes the light rate of words a little more than 0.15
        assert abs(shares[0] - rates.text) < 0.05 and abs(shares[1] - rates.image) < 0.03
    assert not read[modes == 0].any() and not seen[modes == 1].any()


def test_where_a_rate_is_above_0_something_is_hidden_and_not_always_the_same():
    words, cells = slots()
    words[5] = False  # nothing may be hidden, as in an empty text
    read, seen, _ = modality_aware(words, cells, rngs(), [Mode(1e-9, 1e-9)])
    assert (seen.sum(1) == 1).all() and read[5].sum() == 0 and (read.sum(1) == 1).sum() == ROWS - 1
    assert len(set(seen.int().argmax(1).tolist())) == I
    assert not hide_slots(np.ones(9, bool), 0.0, np.random.default_rng(0)).any()


def test_of_a_batch_all_rows_have_one_mode():
    _, _, modes = modality_aware(*slots(), rngs(), scope="batch")
    assert len(modes.unique()) == 1
    few = [part[:2] for part in slots()]
    drawn = [modality_aware(*few, rngs(2, seed=n), scope="batch")[2][0].item() for n in range(12)]
    assert set(drawn) == {0, 1, 2}


def test_a_row_hides_the_same_however_far_its_batch_is_padded_and_whoever_stands_beside_it():
    words, cells = slots()
    read, seen, modes = modality_aware(words, cells, rngs())
    wide = torch.nn.functional.pad(words, (0, 9))
    again, too, _ = modality_aware(wide, cells, rngs())
    assert torch.equal(read, again[:, :T]) and not again[:, T:].any() and torch.equal(seen, too)
    alone = modality_aware(words[7:8], cells[7:8], rngs()[7:8])
    assert torch.equal(alone[0][0], read[7]) and torch.equal(alone[1][0], seen[7]) and alone[2] == modes[7]


def test_dropout_hides_all_of_one_modality_or_nothing():
    words, cells = slots()
    read, seen = modality_dropout(words, cells, rngs(), image=0.5, text=0.2)
    no_image, no_text = seen.all(1), (read == words).all(1)
    assert abs(no_image.float().mean() - 0.5) < 0.06 and abs(no_text.float().mean() - 0.2) < 0.05
    assert not (no_image & no_text).any()
    assert not seen[~no_image].any() and not read[~no_text].any()
    assert not any(part.any() for part in modality_dropout(words, cells, rngs(), image=0, text=0))


@pytest.mark.parametrize("wrong, said", [
    (lambda: modality_aware(*slots(), rngs(), scope="row"), "sample or batch"),
    (lambda: Mode(0.1, 1.2), "between 0 and 1"),
    (lambda: modality_dropout(*slots(), rngs(), 0.7, 0.7), "their sum"),
    (lambda: pixel_losses(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8)), r"grid \* 2"),
    (lambda: pixel_losses(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), "max"), "sum or mean"),
])  # fmt: skip
def test_what_is_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        wrong()


def test_channels_are_summed_and_pixels_averaged():
    predicted, target = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    target[0, :, 1, 2] = torch.tensor([1.0, 0.5, 0.0])  # one of 16 pixels is wrong
    torch.testing.assert_close(pixel_losses(predicted, target), torch.tensor([1.25 / 16, 0.0]))
    torch.testing.assert_close(pixel_losses(predicted, target, "mean"), torch.tensor([1.25 / 48, 0.0]))


def test_the_drawn_picture_s_loss_is_3_mean_squared_errors():
    a, b = torch.rand(2, 5, 3, 8, 8)
    torch.testing.assert_close(pixel_losses(a, b).mean(), 3 * torch.nn.functional.mse_loss(a, b))
