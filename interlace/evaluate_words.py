"""What a run says in words, scored: answers from its list, captions it writes, words it guesses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from interlace.data.pictures import BadPicture
from interlace.data.rows import Source
from interlace.held import Score, hold, readable, sample_rows, scored, shuffled
from interlace.model import Half
from interlace.run import Run, Seen, chunks
from interlace.tasks.captions import caption_scores
from interlace.tasks.vqa_score import AnswerScore, chance_vqa, listed_accuracy

WRITTEN = 300  # questions answered in the run's own words, word by word
CAPTIONED = 1000  # pictures a caption is written for: a word costs a forward
BLIND = ("shuffled", "blank")  # pictures that say nothing about a question
GUESSED = 100  # rows whose words are hidden one after the other


# ----------------------------------------------------------------------------------------------------------- questions


Answerer = Callable[[list[Seen], list[str]], list[str]]  # pictures, questions -> answers


def asked_of(run: Run, source: Source, split: str, limit: int, picture: str,
             say: Callable[[list[Seen], list[str]], Iterable]) -> tuple[list, np.ndarray, list]:  # fmt: skip
    """Questions of a split (Q,), their positions in the source (Q,) and what `say` answers, a batch at a time (Q,).
    `picture`: "own", "shuffled" (another group's) or "blank" (white)."""
    indices = np.asarray(sample_rows(source.question_indices(split), limit))
    questions = [source.question(int(i)) for i in indices]
    of = another_group(questions) if picture == "shuffled" else np.arange(len(questions))
    order = np.argsort(of, kind="stable")  # questions that are shown one picture follow each other: it is encoded once
    kept: list[Any] = []
    said: list[Any] = []
    places: list[int] = []
    blank = Image.new("RGB", (run.processor.size, run.processor.size), "white")
    cached: tuple[Any, Seen | None] = (None, None)

    def with_pictures():
        nonlocal cached
        for n in order:
            place, question, of_whom = indices[n], questions[n], questions[of[n]]
            if picture == "blank":
                yield place, question, blank
                continue
            if (ref := (of_whom.pair_id, of_whom.picture)) != cached[0]:
                try:
                    cached = (ref, run.see(*ref))
                except BadPicture:
                    cached = (ref, None)
            if cached[1] is not None:
                yield place, question, cached[1]

    bar = tqdm(total=len(questions), desc=f"answering {split}, {picture} picture", unit="question", leave=False,
               disable=None if len(questions) > 200 else True, mininterval=1)  # fmt: skip
    for chunk in chunks(with_pictures(), 64):
        places += [place for place, _, _ in chunk]
        kept += [question for _, question, _ in chunk]
        said.extend(say([shown for _, _, shown in chunk], [question.question for _, question, _ in chunk]))
        bar.update(len(chunk))
    bar.close()
    return kept, np.array(places, dtype=np.int64), said


def answer_logits(run: Run, source: Source, split: str, limit: int) -> tuple[list, np.ndarray]:
    """Questions of a split (Q,) and logits (Q, A) over the run's answers."""
    asked, _, logits = asked_of(run, source, split, limit, "own",
                                lambda pictures, texts: run.answer_logits(pictures, texts).cpu().numpy())  # fmt: skip
    return asked, np.array(logits) if logits else np.zeros((0, len(run.answers)), np.float32)


def another_group(questions: list) -> np.ndarray:
    """(Q,) for each question one about a picture of another group (its own where there is but one group)."""
    rng, n = np.random.default_rng(0), len(questions)
    groups = [q.group for q in questions]
    out = np.arange(n)
    for q in range(n):
        for other in rng.integers(0, n, 50):
            if groups[other] != groups[q]:
                out[q] = other
                break
    return out


def listed(run: Run) -> Answerer:
    """Answers by the likeliest of the list."""
    return lambda pictures, texts: [run.answers[n] for n in run.answer_logits(pictures, texts).argmax(-1).tolist()]


def own_words(run: Run) -> Answerer:
    """Answers as the decoder writes them."""
    return lambda pictures, texts: [said.strip().lower() for said in run.write_answers(pictures, texts)]


def answering(run: Run, source: Source, split: str, limit: int, blind: bool, say: Answerer,
              choices: Sequence[str] = ()) -> dict[str, Any]:  # fmt: skip
    """Accuracy, by kind, beside chance (the training majority, by kind) and the same model on a shuffled and a blank
    picture (on a shuffled one alone where it cannot look at new pictures). What is not among a question's answers,
    letter by letter but for capitals, counts as wrong. `choices`: the list it answers from; how many questions have no
    answer in it is said, too."""

    def score_of(picture: str) -> tuple[list, np.ndarray, AnswerScore]:
        asked, ids, said = asked_of(run, source, split, limit, picture, say)
        right = [[(a.lower(), worth) for a, worth in q.answers] for q in asked]
        return asked, ids, listed_accuracy([s.lower() for s in said], right, [q.kind for q in asked])

    asked, ids, score = score_of("own")
    if not asked:
        return {}
    kinds, answers, groups = [q.kind for q in asked], [q.answers for q in asked], [q.group for q in asked]
    train = list(source.questions("train")) if source.n_questions <= 2_000_000 else []
    chance = chance_vqa([q.answers for q in train], [q.kind for q in train], answers, kinds) if train else None
    majority = chance.majority_by_kind.overall if chance else None
    out: dict[str, Any] = {"accuracy": scored(score.per_question, groups, majority, ids=ids), "by_kind": {}}
    dark = {picture: score_of(picture)[2] for picture in BLIND[: 1 + run.can_look]} if blind else {}
    if dark:
        out["accuracy"]["blind"] = max(s.overall for s in dark.values())
        out["accuracy"].update({picture: s.overall for picture, s in dark.items()})
    for kind in score.by_kind:
        of = np.array([k == kind for k in kinds])
        part = scored(score.per_question[of], [g for g, mine in zip(groups, of) if mine],
                      chance.majority_by_kind.by_kind.get(kind) if chance else None, ids=ids[of])  # fmt: skip
        known = {picture: s.by_kind[kind] for picture, s in dark.items() if kind in s.by_kind}
        part.update(known, **({"blind": max(known.values())} if known else {}))
        out["by_kind"][kind] = part
    if choices:
        known_answers = set(choices)
        out["not_in_list"] = sum(not any(a in known_answers for a, _ in given) for given in answers)
    return out


# ------------------------------------------------------------------------------------------------------------ captions


def captioning(run: Run, source: Source, split: str, limit: int, blind: bool) -> dict[str, Any]:
    """A caption for each picture, scored against all captions of its group. Blind: the captions written for pictures of
    other groups, and the one written for a white picture. Nothing where no row has both a picture and a caption."""
    places = np.asarray(source.indices(split))
    references: dict[str, list[str]] = {}
    first: dict[Any, int] = {}  # one row of each picture, however many captions it has
    for place in places:
        pair = source.pair(int(place))
        if pair.caption.strip():
            references.setdefault(pair.group, []).append(pair.caption)
            first.setdefault((pair.group, hash(pair.picture)), int(place))
    rows = sample_rows(np.array(sorted(first.values()), dtype=np.int64), limit)
    ids, pairs, said = [], [], []
    for chunk in chunks(readable(run, source, rows, f"captioning {split}"), 32):
        ids += [row for row, _, _ in chunk]
        pairs += [pair for _, pair, _ in chunk]
        said += run.caption([picture for _, _, picture in chunk])
    if len(pairs) < 2:
        return {}
    groups = [p.group for p in pairs]
    right = [references[g] for g in groups]
    dark = []
    if blind:
        others = [[said[n] for n in shuffled(groups)]]
        if run.can_look:
            white = run.caption([Image.new("RGB", (run.processor.size, run.processor.size), "white")])[0]
            others.append([white] * len(said))
        dark = [caption_scores(other, right) for other in others]
    found, places = caption_scores(said, right), np.array(ids)
    scores = {name: scored(getattr(found, part), groups, ids=places,
                           blind=max((float(getattr(d, part).mean()) for d in dark), default=None))
              for name, part in (("CIDEr", "cider"), ("ROUGE-L", "rouge_l"))}  # fmt: skip
    scores["BLEU-4"] = Score(value=found.bleu[4], queries=len(said))  # of the whole set, so there is no value per row
    if dark:
        scores["BLEU-4"]["blind"] = max(d.bleu[4] for d in dark)
    examples = [{"id": p.id, "written": c, "reference": r[0]} for p, c, r in list(zip(pairs, said, right))[:8]]
    return {"captions": scores, "captions_written": examples}


# -------------------------------------------------------------------------------------------------------- hidden words


def guessing(run: Run, source: Source, split: str, limit: int, blind: bool) -> dict[str, Any]:
    """Each word of a caption hidden in turn: the share that is guessed right from the others and the picture, beside
    the share of the training captions' most frequent word. Blind: what the others alone tell."""
    held = hold(run, source, split, limit)
    rows = np.array([n for n, p in enumerate(held.pairs) if p.caption.strip()], dtype=np.int64)
    if len(rows) < 2 or held.halves is None:
        return {}
    captions, groups = [held.pairs[n].caption for n in rows], [held.groups[n] for n in rows]
    own = held.halves.rows(torch.from_numpy(rows))
    right = words_guessed(run, captions, own)
    dark = None
    if blind:
        others = [own.rows(torch.from_numpy(shuffled(groups)))]
        if run.can_look:
            with torch.inference_mode():
                size = run.processor.size
                white = run.half_image([Image.new("RGB", (size, size), "white")])
            others.append(white.rows(torch.zeros(len(rows)).long()))
        for images in others:
            dark = max(dark or 0.0, float(np.nanmean(words_guessed(run, captions, images))))
    train = sample_rows(np.asarray(source.indices("train")), 2000)
    frequent = Counter(w for n in train for w in source.pair(int(n)).caption.lower().split()).most_common(1)
    given = [caption.lower().split() for caption in captions]
    chance = float(np.mean([words.count(frequent[0][0]) / len(words) for words in given])) if frequent else None
    return {"hidden_words": scored(right, groups, chance, dark, held.rows[rows])}


@torch.inference_mode()
def words_guessed(run: Run, captions: list[str], images: Half) -> np.ndarray:
    """(N,) share of each caption's words that are guessed right when hidden alone, all pieces of a word together; nan
    for a caption without words. images: (N, I, D)."""
    from interlace.objectives.mlm import word_logits

    shares = np.full(len(captions), np.nan)
    for n, caption in enumerate(tqdm(captions, desc="hiding words", leave=False, disable=None)):
        tokens = {name: values.to(run.model.device) for name, values in run.processor.tokens([caption]).items()}
        words = tokens["text_words"].unique()
        hidden = tokens["text_words"] == words[words >= 0][:, None]  # (W, T)
        if not len(hidden):
            continue
        ids = tokens["text_ids"].expand(len(hidden), -1)
        text = run.model.half_text(ids.masked_fill(hidden, run.processor.mask_id), tokens["text_mask"].expand_as(ids))
        image = images.rows(torch.full((len(hidden),), n, device=ids.device))
        wrong = word_logits(run.model, run.model.words_where(text, image, hidden)).argmax(-1) != ids[hidden]
        pieces = torch.zeros(len(hidden), device=ids.device).index_add(0, hidden.nonzero()[:, 0], wrong.float())
        shares[n] = float((pieces == 0).double().mean())
    return shares
