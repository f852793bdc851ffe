"""How good written captions are: BLEU, ROUGE-L and CIDEr-D as the COCO caption evaluation defines them.

Shares between 0 and 1, except CIDEr, between 0 and 10; papers print all of them times 100. METEOR and SPICE are Java
programs and are not here. The definitions are those of the `pycocoevalcap` package 1.2, whose figures the tests hold.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LONGEST = 4  # n-grams
SIGMA = 6.0  # of CIDEr-D's length penalty
BETA = 1.2  # of ROUGE-L: recall counts more
DROPPED = {"''", "'", "``", "`", "-lrb-", "-rrb-", "-lcb-", "-rcb-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}

# Penn Treebank conventions, in the order in which they apply
_RULES = [(re.compile(pattern), to) for pattern, to in (
    (r'^"', "`` "),
    (r'([ (\[{<])("|\'\')', r"\1 `` "),
    (r"([:,])(?!\d)", r" \1 "),
    (r"\.\.\.", " ... "),
    (r"[;@#$%&]", r" \g<0> "),
    (r"([^.])(\.)([\])}>\"']*)\s*$", r"\1 \2\3 "),
    (r"[?!]", r" \g<0> "),
    (r"([^'])' ", r"\1 ' "),
    (r"[\]\[(){}<>]", r" \g<0> "),
    (r"--", " -- "),
    (r'"', " '' "),
    (r"([^' ])('s|'m|'d|') ", r"\1 \2 "),
    (r"([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),
    (r"\b(can)(not)\b", r"\1 \2"),
    (r"\b(gon|got|wan)(na|ta)\b", r"\1 \2"),
    (r"\b(gim|lem)(me)\b", r"\1 \2"),
)]  # fmt: skip
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def words(text: str) -> list[str]:
    """Lower case, cut as the Penn Treebank cuts words, without punctuation: "A man's hat, (red)." -> a man 's hat red.

    The evaluation's own tokenizer is a Java program; on ordinary captions this gives the same words. It leaves -lsb-
    and -rsb- of square brackets in, so they are left in here."""
    text = " ".join(text.lower().split()) + " "
    for pattern, to in _RULES:
        text = pattern.sub(to, text)
    return [word for word in (_BRACKETS.get(w, w) for w in text.split()) if word not in DROPPED]


@dataclass(frozen=True)
class CaptionScores:
    """bleu: n -> corpus BLEU-n. rouge_l, cider: (N,) per picture; their means are the figures papers print."""

    bleu: dict[int, float]
    rouge_l: np.ndarray
    cider: np.ndarray


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """captions: (N,) one per picture. references: (N,) of one or more each. Score a whole set at once: CIDEr weighs
    words by how few of the pictures they belong to, and one picture alone scores 0.

    Raises ValueError when the lengths differ or a picture has no reference.
    """
    if len(captions) != len(references) or not all(references):
        raise ValueError(f"expected references for each of {len(captions)} captions, got {len(references)} lists, "
                         f"{sum(not r for r in references)} of them empty")  # fmt: skip
    said, given = [words(c) for c in captions], [[words(r) for r in refs] for refs in references]
    rouge = np.array([rouge_l(s, g) for s, g in zip(said, given)])
    return CaptionScores(bleu(said, given), rouge, cider_d(said, given))


def bleu(said: Sequence[list[str]], given: Sequence[Sequence[list[str]]]) -> dict[int, float]:
    """Papineni et al. 2002 (doi 10.3115/1073083.1073135): the geometric mean of the clipped n-gram precisions of the
    whole corpus, times exp(1 - reference length / length) where the captions are shorter. Of several references the one
    closest in length counts. No smoothing but a guard against 0 / 0."""
    tiny, small = 1e-15, 1e-9  # the package's guards
    right, tried, length, wanted = np.zeros(LONGEST), np.zeros(LONGEST), 0, 0
    for caption, references in zip(said, given):
        length += len(caption)
        wanted += min((abs(len(r) - len(caption)), len(r)) for r in references)[1]
        counts, allowed = ngrams(caption), Counter[tuple[str, ...]]()
        for reference in references:
            allowed |= ngrams(reference)
        for gram, count in counts.items():
            right[len(gram) - 1] += min(count, allowed[gram])
        for n in range(LONGEST):
            tried[n] += max(0, len(caption) - n)
    ratio = (length + tiny) / (wanted + small)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    logs = np.log((right + tiny) / (tried + small)).cumsum() / np.arange(1, LONGEST + 1)
    return {n + 1: float(brevity * math.exp(logs[n])) for n in range(LONGEST)}


def rouge_l(said: list[str], given: Sequence[list[str]]) -> float:
    """Lin 2004: the longest common subsequence as precision and recall. The best precision and the best recall may come
    from different references, as in the COCO evaluation."""
    common = [_longest_common(said, reference) for reference in given]
    precision = max(c / max(len(said), 1) for c in common)
    recall = max(c / max(len(r), 1) for c, r in zip(common, given))
    if not precision or not recall: return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def cider_d(said: Sequence[list[str]], given: Sequence[Sequence[list[str]]]) -> np.ndarray:
    """Vedantam et al. 2015 (arXiv:1411.5726), section 5, CIDEr-D -> (N,): the clipped cosine of tf-idf n-gram vectors,
    times a Gaussian penalty of the difference in length, mean over n = 1..4 and references, times 10. The length is the
    number of bigrams, as in the release."""
    shown: Counter[tuple[str, ...]] = Counter()
    for references in given:
        shown.update({gram for reference in references for gram in ngrams(reference)})
    pictures = math.log(max(len(given), 1))

    def vector(counts: Counter[tuple[str, ...]]) -> tuple[dict[tuple[str, ...], float], np.ndarray, int]:
        weights = {gram: count * (pictures - math.log(max(1, shown[gram]))) for gram, count in counts.items()}
        squares = np.zeros(LONGEST)
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight**2
        return weights, np.sqrt(squares), sum(count for gram, count in counts.items() if len(gram) == 2)

    scores = np.zeros(len(said))
    for n, (caption, references) in enumerate(zip(said, given)):
        own, own_norm, own_length = vector(ngrams(caption))
        for reference in references:
            other, norm, length = vector(ngrams(reference))
            dot = np.zeros(LONGEST)
            for gram, weight in own.items():
                dot[len(gram) - 1] += min(weight, other.get(gram, 0.0)) * other.get(gram, 0.0)
            product = own_norm * norm
            cosine = np.divide(dot, product, out=dot, where=product > 0)
            scores[n] += cosine.mean() * math.exp(-((own_length - length) ** 2) / (2 * SIGMA**2))
        scores[n] *= 10 / len(references)
    return scores


def ngrams(text: list[str]) -> Counter[tuple[str, ...]]:
    """All n-grams, n = 1..4, with their counts."""
    return Counter(tuple(text[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(text) - n + 1))


def _longest_common(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        before = row[:]
        for j, other in enumerate(b):
            row[j + 1] = before[j] + 1 if word == other else max(before[j + 1], row[j])
    return row[-1]
