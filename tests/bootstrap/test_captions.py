"""What is drawn comes from the nucleus, as often as the probabilities say, and by the row's own lot alone."""

import numpy as np
import pytest
import torch

from interlace.bootstrap.captions import Nucleus, likeliest, lots, sampled
from interlace.data.pictures import open_picture
from interlace.generate import describe
from interlace.run import Run


@pytest.mark.parametrize("top_p,kept", [(0.5, 1), (0.75, 2), (0.9, 3), (1.0, 4)])
def test_words_are_drawn_as_often_as_the_nucleus_says(top_p, kept):
    share = torch.tensor([0.5, 0.3, 0.15, 0.05])
    word = torch.tensor([2, 0, 3, 1])  # the likeliest word is number 2
    logits = torch.empty(4)
    logits[word] = share.log()
    n = 1000
    even = (torch.arange(n, dtype=torch.float32)[:, None] + 0.5) / n
    out = Nucleus(even, top_p)(torch.zeros(n, 1, dtype=torch.long), logits.expand(n, -1))
    assert ((out == 0).sum(-1) == 1).all() and torch.isneginf(out).sum() == 3 * n
    got = torch.bincount(out.argmax(-1), minlength=4)[word] / n
    expected = share[:kept] / share[:kept].sum()
    assert torch.allclose(got[:kept], expected, atol=2 / n) and got[kept:].sum() == 0


def test_the_ends_of_the_lot_stay_in_the_nucleus():
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([[0.0], [np.nextafter(np.float32(1), np.float32(0))]])
    out = Nucleus(ends, 0.9)(torch.zeros(2, 1, dtype=torch.long), logits)
    share = logits.softmax(-1)
    for row in range(2):
        order = share[row].sort(descending=True)
        nucleus = order.indices[: int((order.values.cumsum(0) < 0.9).sum()) + 1]
        assert out[row].argmax() in nucleus
    assert out[0].argmax() == share[0].argmax()


@pytest.mark.parametrize("sharp", [0.0, 5.0])
def test_the_nucleus_is_the_same_however_it_is_sorted(sharp):
    share = (torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)) * (1 + sharp)).softmax(-1)
    few, many = likeliest(share, 0.9, most=300), likeliest(share, 0.9, most=3000)
    assert few[0].shape[1] == (300 if sharp else 2000) and many[0].shape[1] == 2000
    n = few[0].shape[1]
    assert (few[0] == many[0][:, :n]).all() and (few[1] == many[1][:, :n]).all()


def test_lots_belong_to_the_row_and_the_seed():
    both = lots(["a", "b"], 7, 5)
    assert (lots(["b"], 7, 5)[0] == both[1]).all() and (both[0] != both[1]).all()
    assert (lots(["a"], 8, 5)[0] != both[0]).all() and both.max() < 1


def test_a_row_writes_the_same_alone_and_among_others(pretrained, noisy):
    run = Run.load(pretrained)
    rows = noisy.indices("train")[:6].tolist()
    pictures = [open_picture(noisy.picture(i)) for i in rows]
    ids = [noisy.pair(i).id for i in rows]
    with torch.inference_mode():
        half = run.half_image(pictures)
        together = sampled(run, half, ids, 0, 0.9)
        alone = [sampled(run, half.rows(torch.tensor([n])), [ids[n]], 0, 0.9)[0] for n in range(6)]
        other = sampled(run, half, ids, 1, 0.9)
    assert together == alone and together != other
    assert all(len(text.split()) < run.processor.max_length for text in together)


def test_what_is_no_word_is_never_written_however_likely(pretrained, noisy):
    run = Run.load(pretrained)
    pictures = [open_picture(noisy.picture(i)) for i in noisy.indices("train")[:3].tolist()]
    tokenizer, decoder = run.processor.tokenizer, run.model.decoder
    none = [id for word, id in tokenizer.get_vocab().items() if word[0] == "[" and id != decoder.config.eos_token_id]
    assert {tokenizer.pad_token_id, tokenizer.mask_token_id, decoder.config.bos_token_id} <= set(none)
    assert set(run.never_written) == set(none)

    def write():
        with torch.inference_mode():
            half = run.half_image(pictures)
            texts = [decoder_texts(run, half, way) for way in ({}, {"beams": 1})]
            return [*texts, run.caption(pictures), run.caption(pictures, sample=True), sampled(run, half, ids, 0, 0.9)]

    ids = [noisy.pair(i).id for i in noisy.indices("train")[:3].tolist()]
    before = write()

    def likely(module, given, out):
        out.logits[..., none] += 100
        return out

    hook = decoder.register_forward_hook(likely)
    plain, greedy, *rest = write()
    hook.remove()
    assert plain != before[0] and greedy != before[1]  # where nobody forbids it, nothing else is written
    assert rest == before[2:]


def decoder_texts(run: Run, half, way) -> list[str]:
    ids = describe(run.model, half, min_length=0, **way)
    return run._texts(ids[:, 1:], run.model.decoder.config.eos_token_id)
