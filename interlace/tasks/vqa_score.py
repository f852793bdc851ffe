"""What an answer is worth: the official VQA accuracy for free text, soft scores for a fixed answer list, and chance."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WeightedAnswers = Sequence[tuple[str, float]]  # one question's answers and what each is worth, 0..1
Rules = Callable[[str, Sequence[str]], tuple[str, list[str]]]


@dataclass(frozen=True)
class AnswerScore:
    """overall: mean over questions, 0..1. by_kind: the mean within each kind of question (and by_answer_type, where the
    data knows yes/no, number, other). per_question: (Q,), for `bootstrap_interval`."""

    overall: float
    by_kind: dict[str, float]
    by_answer_type: dict[str, float]
    per_question: np.ndarray

    @property
    def percent(self) -> float:
        """As leaderboards print it: 100 * overall, two decimals."""
        return round(100 * self.overall, 2)


# -------------------------------------------------------------------------------------------- official VQA accuracy
def vqa_accuracy(
    predictions: Sequence[str],
    human_answers: Sequence[Sequence[str]],
    kinds: Sequence[str] | None = None,
    answer_types: Sequence[str] | None = None,
    rules: Rules | None = None,
) -> AnswerScore:
    """Official VQA accuracy (Antol et al. 2015, arXiv:1505.00468; averaging over annotators: visualqa.org/evaluation):

        acc(q) = mean over annotators i of min(1, |{j != i : answer_j == prediction}| / 3)

    With 10 annotators, n identical answers give n = 0, 1, 2, 3, >= 4 -> 0, 0.3, 0.6, 0.9, 1. It is not min(n / 3, 1).

    predictions: (Q,) free text. human_answers: (Q,) of usually 10 strings each, raw. kinds, answer_types: (Q,) names to
    report by. rules: how texts are made comparable; `rules_2016` (the default: what the published numbers of the
    vendored evaluators use) or `rules_2021`. Say which beside the figure.
    """
    if len(predictions) != len(human_answers):
        raise ValueError(f"expected one list of answers for each of {len(predictions)}, got {len(human_answers)}")
    rules = rules or rules_2016
    scores = np.empty(len(predictions))
    for q, (prediction, answers) in enumerate(zip(predictions, human_answers)):
        if not answers:
            raise ValueError(f"question {q} has no human answers; leave such questions out")
        said, humans = rules(prediction, answers)
        same = sum(answer == said for answer in humans)
        # an annotator who agrees is not his own witness: he sees one supporter fewer than the others do
        scores[q] = (same * min(1, (same - 1) / 3) + (len(humans) - same) * min(1, same / 3)) / len(humans)
    return _score(scores, kinds, answer_types)


def rules_2016(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    """As the evaluator stood from 2015 to 2021, and as LAVIS, BLIP and others still carry it. The prediction is always
    cleaned: punctuation, then digits, articles and contractions. Human answers lose their punctuation only, and only
    when they are not all the same string. The asymmetry is a known oddity ("two" said by all ten can never be hit, for
    the prediction turns into "2"); scores are comparable only if it is kept."""
    said = strip_articles(strip_punctuation(_one_line(prediction)))
    return said, [strip_punctuation(a) for a in answers] if len(set(answers)) > 1 else list(answers)


def rules_2021(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    """As the organisers' repository has stood since March 2021 (GT-Vision-Lab/VQA, "Fixed processing answers bug"):
    both sides are cleaned alike when the annotators disagree, neither when all of them gave the same string."""
    said, humans = _one_line(prediction), [_one_line(a) for a in answers]
    if len(set(humans)) > 1:
        said, humans = strip_articles(strip_punctuation(said)), [strip_articles(strip_punctuation(a)) for a in humans]
    return said, humans


def strip_punctuation(text: str) -> str:
    """The evaluator's processPunctuation. A mark that touches a space anywhere in the text is deleted, and so is every
    mark once a number like 1,000 occurs; otherwise the mark becomes a space. Then full stops go, unless a digit
    follows.

    Two slips of the original are kept, because scores depend on them: whether a mark touches a space is asked of the
    text as it came, not as cleaned so far, and only the first 32 full stops go (the value of re.UNICODE, passed where
    a count was expected)."""
    has_thousands = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        touches_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if touches_space or has_thousands else " ")
    return re.sub(r"\.(?!\d)", "", cleaned, count=32)


def strip_articles(text: str) -> str:
    """The evaluator's processDigitArticle: lower case; number words to digits ("none" is 0); a, an, the dropped;
    apostrophes put back into contractions; single spaces."""
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


_NUMBERS = "zero one two three four five six seven eight nine ten"
DIGITS = {word: str(n) for n, word in enumerate(_NUMBERS.split())} | {"none": "0"}

# The evaluator's table maps a contraction that lost exactly one of its apostrophes to the full form ("dont", and both
# "couldnt've" and "couldn'tve"), so the full forms are enough to state it. Its entries with capitals (Im, Ive) can
# never match lower-cased words and are left out: "im" stays "im".
_FULL_FORMS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    full[:at] + full[at + 1 :]: full for full in _FULL_FORMS.split() for at, letter in enumerate(full) if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round in the original as well


# ---------------------------------------------------------------------------------------------------- fixed answer list
def soft_score(count: int) -> float:
    """What an answer that `count` of 10 annotators gave is worth: 0, 0.3, 0.6, 0.9, 1, the official accuracy in closed
    form. Soft targets of ViLT and METER (METER: meter/utils/write_vqa.py)."""
    return min(1.0, 0.3 * count) if count < 4 else 1.0


def soft_score_thirds(count: int) -> float:
    """min(count / 3, 1): the soft targets of bottom-up attention (Teney et al. 2018, arXiv:1708.02711) and LXMERT."""
    return min(1.0, count / 3)


def soft_targets(
    human_answers: Sequence[str], answer_ids: Mapping[str, int], score: Callable[[int], float] = soft_score
) -> dict[int, float]:
    """One question's targets over a fixed list: {answer id: worth}. Answers that are not on the list are dropped, so a
    question may come back empty: it can only be scored 0, and still counts in the mean."""
    counts = Counter(answer for answer in human_answers if answer in answer_ids)
    return {answer_ids[answer]: score(n) for answer, n in counts.items()}


def listed_accuracy(
    predictions: Sequence[str], answers: Sequence[WeightedAnswers], kinds: Sequence[str] | None = None
) -> AnswerScore:
    """Accuracy of answers chosen from a list: acc(q) = the worth of the chosen answer, 0 if nobody gave it. With soft
    targets this is the local VQA score of ViLT and METER; with one answer of worth 1 it is plain accuracy.

    predictions: (Q,) strings from the list. answers: (Q,) of [(answer, worth), ...]. kinds: (Q,) to report by.
    """
    if len(predictions) != len(answers):
        raise ValueError(f"expected one list of answers per prediction, got {len(answers)} and {len(predictions)}")
    return _score(np.array([dict(given).get(said, 0.0) for said, given in zip(predictions, answers)]), kinds, None)


# ------------------------------------------------------------------------------------------------------------- chance
@dataclass(frozen=True)
class AnswerChance:
    """What needs no picture. majority: always the training set's most valuable answer. majority_by_kind: the same
    within each kind of question. prior: answers drawn by their training frequency within the kind (expected value)."""

    majority: AnswerScore
    majority_by_kind: AnswerScore
    prior: AnswerScore


def majority_answer(answers: Sequence[WeightedAnswers]) -> str:
    """The single answer worth most over these questions: argmax over a of the sum of worth(q, a). Ties: the first in
    the alphabet, so that two runs agree."""
    worth = _worth(answers)
    if not worth:
        raise ValueError("expected questions with at least one answer, got none")
    return min(worth, key=lambda answer: (-worth[answer], answer))


def chance_vqa(
    train_answers: Sequence[WeightedAnswers],
    train_kinds: Sequence[str],
    test_answers: Sequence[WeightedAnswers],
    test_kinds: Sequence[str],
) -> AnswerChance:
    """Chance levels, learned from the training questions only. prior(q) = sum over answers a of
    P(a | kind) * worth(q, a), P the share of a in the training worth of that kind. A kind the training set lacks falls
    back to all kinds."""
    by_kind: dict[str, list[WeightedAnswers]] = defaultdict(list)
    for given, kind in zip(train_answers, train_kinds, strict=True):
        by_kind[kind].append(given)
    overall = majority_answer(train_answers)
    best = {kind: majority_answer(given) for kind, given in by_kind.items() if _worth(given)}
    share_of_all = _shares(train_answers)
    shares = {kind: _shares(given) for kind, given in by_kind.items() if kind in best}
    expected = np.array(
        [
            sum(shares.get(kind, share_of_all).get(answer, 0.0) * worth for answer, worth in given)
            for given, kind in zip(test_answers, test_kinds, strict=True)
        ]
    )
    return AnswerChance(
        listed_accuracy([overall] * len(test_answers), test_answers, test_kinds),
        listed_accuracy([best.get(kind, overall) for kind in test_kinds], test_answers, test_kinds),
        _score(expected, test_kinds, None),
    )


def _worth(answers: Sequence[WeightedAnswers]) -> dict[str, float]:
    worth: dict[str, float] = defaultdict(float)
    for given in answers:
        for answer, value in given:
            worth[answer] += value
    return {answer: value for answer, value in worth.items() if value > 0}


def _shares(answers: Sequence[WeightedAnswers]) -> dict[str, float]:
    worth = _worth(answers)
    total = sum(worth.values())
    return {answer: value / total for answer, value in worth.items()}


def _score(values: np.ndarray, kinds: Sequence[str] | None, answer_types: Sequence[str] | None) -> AnswerScore:
    overall = float(values.mean()) if len(values) else float("nan")
    return AnswerScore(overall, _means(values, kinds), _means(values, answer_types), values)


def _means(values: np.ndarray, names: Sequence[str] | None) -> dict[str, float]:
    if names is None: return {}
    parts: dict[str, list[float]] = defaultdict(list)
    for value, name in zip(values, names, strict=True):
        parts[name].append(float(value))
    return {name: float(np.mean(part)) for name, part in sorted(parts.items())}
