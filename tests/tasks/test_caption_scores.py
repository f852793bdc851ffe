"""BLEU, ROUGE-L and CIDEr-D give the figures of the COCO caption evaluation, and behave as figures must."""

import numpy as np
import pytest

from interlace.tasks.captions import caption_scores, words

REFERENCES = [["a cat sits on a red sofa", "a cat on a couch"], ["two dogs run in a field", "dogs running on grass"],
              ["a man rides a horse", "a person on a brown horse"]]  # fmt: skip
CAPTIONS = ["a cat sits on a couch", "two dogs run on grass", "a man on a horse"]


def test_the_figures_of_pycocoevalcap():
    scores = caption_scores(CAPTIONS, REFERENCES)
    assert scores.bleu[4] == pytest.approx(0.5896412024, abs=1e-9)
    assert scores.rouge_l.mean() == pytest.approx(0.8015132740, abs=1e-9)
    assert scores.cider.mean() == pytest.approx(3.4203006382, abs=1e-9)


def test_a_perfect_set_and_one_without_a_right_word():
    perfect = caption_scores([refs[0] for refs in REFERENCES], [refs[:1] for refs in REFERENCES])
    assert perfect.bleu[4] == pytest.approx(1) and perfect.rouge_l.mean() == pytest.approx(1)
    assert perfect.cider.mean() == pytest.approx(10)
    wrong = caption_scores(["x y z", "", "u v w"], REFERENCES)
    assert wrong.bleu[4] < 1e-6 and wrong.rouge_l.max() == 0 and wrong.cider.max() == 0


def test_captions_of_other_pictures_score_less_and_order_does_not_matter():
    scores = caption_scores(CAPTIONS, REFERENCES)
    shifted = caption_scores(CAPTIONS[1:] + CAPTIONS[:1], REFERENCES)
    assert shifted.cider.mean() < 0.2 * scores.cider.mean() and shifted.rouge_l.mean() < 0.6 * scores.rouge_l.mean()
    turned = caption_scores(CAPTIONS[::-1], REFERENCES[::-1])
    np.testing.assert_allclose(turned.cider[::-1], scores.cider)
    assert turned.bleu == pytest.approx(scores.bleu)


def test_short_captions_pay_and_long_ones_lose_precision():
    whole = caption_scores(["a cat sits on a red sofa"], [["a cat sits on a red sofa"]]).bleu[2]
    short = caption_scores(["a cat sits"], [["a cat sits on a red sofa"]]).bleu[2]
    assert whole == pytest.approx(1) and short == pytest.approx(np.exp(1 - 7 / 3))


@pytest.mark.parametrize(
    "text,expected",
    [
        ("A man's hat, (red).", "a man 's hat red"),
        ('It doesn\'t say "stop"!', "it does n't say stop"),
        ("two cats -- one black; one white...", "two cats one black one white"),
        ("1,000 well-lit rooms: $5 at 7:30 p.m.", "1,000 well-lit rooms $ 5 at 7:30 p.m"),
        ("they cannot see", "they can not see"),
        ("a [blue] box", "a -lsb- blue -rsb- box"),
        ("", ""),
    ],
)
def test_words(text, expected):
    assert words(text) == expected.split()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="1 of them empty"):
        caption_scores(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="2 captions"):
        caption_scores(["a", "b"], [["a"]])
