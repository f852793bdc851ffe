"""Writing: the search against trying every text, and what transformers does with our decoder."""

import itertools

import pytest
import torch

from interlace import generate
from interlace.decoder import Decoder, TextDecoder
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.layers import READ, TEXT, Width
from interlace.model import Half
from interlace.objectives.lm import answers_loss, next_word, text_losses, written

START, END, PAD, WORDS = 1, 2, 0, 7


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    width = Width(16, heads=2, dropout=0.0, attention_dropout=0.0)
    spec = Decoder({"write": [TEXT, READ]}, start=START, end=END)
    decoder = TextDecoder(spec, Words(width, vocabulary=WORDS, positions=10, types=0), Width(24, heads=2)).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.7)
    return decoder


@pytest.fixture(scope="module")
def read():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    return Half(torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(2)), mask)


@torch.no_grad()
def total(decoder, half, ids):
    """log-probability of the words after the first."""
    logits = decoder(torch.tensor([ids]), *half[:2]).logits[0].log_softmax(-1)
    return sum(float(logits[n, word]) for n, word in enumerate(ids[1:]))


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_wide_beams_find_the_best_of_all_texts(decoder, read, penalty):
    longest = 4
    found = generate.write(decoder, read, beams=400, max_length=longest, min_length=0, length_penalty=penalty)
    others = [w for w in range(WORDS) if w != END]
    for row in range(3):
        half = read.rows(torch.tensor([row]))
        best = {}
        for n in range(longest):
            for middle in itertools.product(others, repeat=n):
                ids = [START, *middle]
                ended = ids if len(ids) == longest else [*ids, END]
                # the total counts [SEP], the length does not
                best[tuple(ended)] = total(decoder, half, ended) / len(ids) ** penalty
        expected = max(best, key=best.get)
        assert tuple(found[row].tolist())[: len(expected)] == expected


def test_several_of_the_beams_come_back_best_first(decoder, read):
    options = {"max_length": 5, "min_length": 0, "length_penalty": 1.0}
    one = generate.write(decoder, read, beams=6, **options)
    several = generate.write(decoder, read, beams=6, num_return_sequences=4, **options).view(3, 4, -1)
    assert torch.equal(several[:, 0, : one.shape[1]], one)
    for row in range(3):
        half, found = read.rows(torch.tensor([row])), [ids.tolist() for ids in several[row]]
        assert len({tuple(ids) for ids in found}) == 4
        # the total counts [SEP], the length does not
        texts = [ids[: ids.index(END) + 1] if END in ids else ids for ids in found]
        scores = [total(decoder, half, text) / (len(text) - (text[-1] == END)) for text in texts]
        assert scores == sorted(scores, reverse=True)


def test_a_prompt_counts_in_the_length(decoder, read):
    prompt = torch.tensor([START, 4, 5])
    ids = generate.write(decoder, read, prompt, max_length=6, min_length=6)
    assert ids.shape == (3, 6) and (ids[:, :3] == prompt).all() and not (ids == END).any()


def test_what_follows_the_end_is_padding(decoder, read):
    for beams in (1, 4):
        for row in generate.write(decoder, read, beams=beams, max_length=10, min_length=0).tolist():
            if END in row:
                assert set(row[row.index(END) + 1 :]) <= {PAD}


@pytest.mark.parametrize("cached", [True, False])
def test_sampling_is_transformers_own(decoder, read, cached):
    draw = {"beams": 1, "do_sample": True, "top_p": 0.9, "repetition_penalty": 1.1, "use_cache": cached}
    torch.manual_seed(3)
    one = generate.write(decoder, read, max_length=8, **draw)
    torch.manual_seed(3)
    assert torch.equal(one, generate.write(decoder, read, max_length=8, **draw))
    torch.manual_seed(4)
    assert not torch.equal(one, generate.write(decoder, read, max_length=8, **draw))


def test_answers_are_scored_by_their_whole_text(decoder, read):
    ids = torch.tensor([[START, 3, 4, END], [START, 5, END, PAD], [START, 6, END, PAD]])
    with torch.no_grad():
        logits = decoder(ids, *read[:2]).logits
    labels = written(ids)
    each = text_losses(logits, labels, smoothing=0.0)
    for row, length in enumerate((4, 3, 3)):
        expected = -total(decoder, read.rows(torch.tensor([row])), ids[row, :length].tolist())
        assert float(each[row]) == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(next_word(logits, labels, smoothing=0.0), each.sum() / 7)
    weight = torch.tensor([0.5, 0.3, 0.2])
    expected = (text_losses(logits, labels) * weight).sum() / 2
    torch.testing.assert_close(answers_loss(logits, labels, weight, 2), expected)


def test_more_words_than_positions_are_explained(decoder, read):
    with pytest.raises(UserError, match="10 positions"):
        generate.write(decoder, read, max_length=12, min_length=12)
