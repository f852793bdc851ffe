"""What is hidden of words and regions."""

import torch

from interlace.objectives.mlm import hide_words
from interlace.objectives.mvm import hide_regions


def words(share=0.15, **options):
    ids = torch.randint(10, 50, (400, 30), generator=torch.Generator().manual_seed(1))
    may = torch.ones_like(ids, dtype=torch.bool)
    may[:, 0], may[:, 20:] = False, False
    return ids, may, *hide_words(ids, may, 4, (50, 99), torch.Generator().manual_seed(0), share, **options)


def test_a_share_of_the_words_that_may_be_hidden_is_scored():
    ids, may, seen, labels = words()
    scored = labels >= 0
    assert not (scored & ~may).any() and torch.equal(labels[scored], ids[scored])
    assert torch.equal(seen[~scored], ids[~scored])
    assert abs(scored.sum() / may.sum() - 0.15) < 0.02


def test_four_fifths_are_masked_a_tenth_random_a_tenth_kept():
    ids, _, seen, labels = words(share=0.5)
    seen, ids = seen[labels >= 0], ids[labels >= 0]
    masked, kept = seen == 4, seen == ids
    random = ~masked & ~kept
    for part, share in ((masked, 0.8), (kept, 0.1), (random, 0.1)):
        assert abs(part.float().mean() - share) < 0.03
    assert seen[random].min() >= 50 and seen[random].max() <= 99


def test_each_row_hides_at_least_one_unless_told_otherwise():
    _, _, _, labels = words(share=0.0)
    assert torch.equal((labels >= 0).sum(1), torch.ones(400, dtype=torch.long)) and (labels[:, 1] >= 0).all()
    assert (words(share=0.0, at_least_one=False)[3] < 0).all()


def test_the_same_draw_hides_the_same():
    assert torch.equal(words()[2], words()[2])


def test_regions():
    may = torch.ones(400, 10)
    may[:, 0], may[:, 8:], may[3] = 0, 0, 0
    hidden = hide_regions(may, torch.Generator().manual_seed(0), 0.15)
    assert not (hidden & ~may.bool()).any() and hidden.any(1).sum() == 399
    loose = hide_regions(may, torch.Generator().manual_seed(0), 0.15, at_least_one=False)
    assert abs(loose.sum() / may.sum() - 0.15) < 0.03
