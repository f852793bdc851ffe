"""How good a run is on held-out rows, and whether it looks at the picture: every score with its interval, its chance
level, and the same score blind.

Blind is the same model with pictures that say nothing about the row. Search is scored with every row holding the
picture of a row of another group; one white picture for all would tie all scores, which is no test. Answers, captions
and hidden words are scored with such a picture and with a white one, and the higher counts: a white one may mislead
less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from interlace.data.pictures import BadPicture, open_picture
from interlace.data.rows import Pair, Source
from interlace.errors import UserError
from interlace.model import Half
from interlace.run import Run, chunks
from interlace.tasks.captions import caption_scores
from interlace.tasks.metrics import (
    Cosine,
    SameGroup,
    bootstrap_interval,
    chance_recall,
    mean_average_precision,
    recall_at_k,
)
from interlace.tasks.vqa_score import chance_vqa, listed_accuracy

KS = (1, 5, 10)
RERANKED = 20  # candidates the fusion layers see per query
MOST_RERANKED = 2000  # rows: halves of all pictures are held in memory for it
CAPTIONED = 1000  # pictures a caption is written for: a word costs a forward
GUESSED = 100  # rows whose words are hidden one after the other
MATCHED = 100  # rows of a search by matching alone: every text with every picture, so that costs grow with the square
PROVENANCE = ("source", "creator", "author", "provider", "photographer", "licence", "license")
FEWEST_PER_CATEGORY, MOST_CATEGORIES = 2, 60  # an attribute is a category when its values repeat


@dataclass
class Held:
    """The readable rows of one split with their vectors; pictures are decoded once."""

    pairs: list[Pair]
    rows: np.ndarray  # (N,) positions in the source
    images: np.ndarray  # (N, D)
    texts: np.ndarray  # (N, D)
    halves: Half | None  # image halves (N, I, D), when few enough to hold
    unreadable: int

    @property
    def groups(self) -> list[str]:
        return [p.group for p in self.pairs]


def _read(source: Source, rows: np.ndarray, size: int, title: str):
    """(position, pair, picture) of the rows that can be read, with a bar."""
    for row in tqdm(rows, desc=title, unit="picture", leave=False, disable=None if len(rows) > 200 else True):
        pair = source.pair(int(row))
        try:
            yield int(row), pair, open_picture(pair.picture, size_hint=size)
        except BadPicture:
            continue


def sample_rows(rows: np.ndarray, limit: int, seed: int = 0) -> np.ndarray:
    """All of them, or a seeded sample of `limit` in order: an evaluation is quadratic in its rows."""
    if len(rows) <= limit:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))


@torch.inference_mode()
def hold(run: Run, source: Source, split: str, limit: int = 10_000) -> Held:
    """Encodes a split, its image halves too where something will be fused with them. Raises UserError when it is empty
    or nothing in it can be read."""
    rows = sample_rows(np.asarray(source.indices(split)), limit)
    if not len(rows):
        raise UserError(f"{source.name} has no rows in its {split!r} split.")
    pairs, kept, images, halves = [], [], [], []
    keep_halves = (run.can_match or "mlm" in run.model.heads) and len(rows) <= MOST_RERANKED
    for chunk in chunks(_read(source, rows, run.processor.size, f"encoding {split}"), 32):
        half = run.model.half_image(run._pixels([picture for _, _, picture in chunk]))
        if run.dim:
            images.append(run.model.alone(half, "image").float().cpu().numpy())
        if keep_halves:
            halves.append(half.states)
        kept += [row for row, _, _ in chunk]
        pairs += [pair for _, pair, _ in chunk]
    if not pairs:
        raise UserError(f"none of the {len(rows)} pictures in the {split!r} split of {source.name} can be read: run "
                        "`interlace data check`.")  # fmt: skip
    vectors = np.concatenate(images) if images else np.zeros((len(pairs), 0), np.float32)
    texts = run.encode_texts([p.caption for p in pairs]) if run.dim else np.zeros((len(pairs), 0), np.float32)
    return Held(pairs, np.array(kept), vectors, texts, Half(torch.cat(halves), None) if halves else None,
                len(rows) - len(pairs))  # fmt: skip


def evaluate(run: Run, source: Source, split: str = "test", limit: int = 10_000, blind: bool = True) -> dict[str, Any]:
    """Retrieval both ways, image-to-image by category, answers, captions; what the run cannot do is left out, and said
    under "cannot".

    The result is plain numbers: {"value", "low", "high" (95% cluster bootstrap by group), "chance", "blind"}. Each such
    score is a `Score`, which keeps its rows for paired tests.
    """
    needs_rows = run.dim or run.can_match
    held = hold(run, source, split, limit if run.dim else min(limit, MATCHED)) if needs_rows else None
    rows = len(held.pairs) if held else min(limit, len(source.indices(split)))
    result: dict[str, Any] = {"split": split, "rows": rows, "unreadable": held.unreadable if held else 0,
                              "source": source.name, "data_fingerprint": source.fingerprint}  # fmt: skip
    if held is not None:
        captioned = np.array([n for n, p in enumerate(held.pairs) if p.caption.strip()], dtype=np.int64)
        if len(captioned) > 1:
            result["retrieval" if run.dim else "matching"] = (retrieval if run.dim else matching)(
                run, held, captioned, blind)  # fmt: skip
        if run.dim:
            result["image_to_image"] = by_category(held.images, held.pairs, source, held.rows, blind)
    if run.can_answer and len(source.question_indices(split)):
        result["vqa"] = answering(run, source, split, limit, blind)
    if "mlm" in run.model.heads:
        result |= guessing(run, source, split, min(limit, GUESSED), blind)
    if getattr(run, "can_caption", False):
        result |= captioning(run, source, split, min(limit, CAPTIONED), blind)
    return result | {"cannot": cannot(run, source, split)}


def cannot(run: Run, source: Source, split: str) -> list[str]:
    """What is missing from the scores, and why, a sentence each."""
    out = []
    if not run.dim:
        instead = f"; searched by matching, among {MATCHED} rows at the most" if run.can_match else ""
        out.append(f"search by vectors: no contrast head, train with the itc objective{instead}")
    if not run.can_match:
        out.append("match a text with a picture: no match head, train with the itm objective")
    if not run.can_answer:
        out.append("answer questions: no answer list, train with the vqa objective")
    elif not len(source.question_indices(split)):
        out.append(f"be scored on answers: {source.name} has no questions in its {split!r} split")
    if not getattr(run, "can_caption", False):
        out.append("write captions: nothing in it writes")
    return out


# ----------------------------------------------------------------------------------------------------------- retrieval


@dataclass(frozen=True)
class Kept:
    """The value of each query, what it is the query of, and its group: what a paired test of two runs needs."""

    values: np.ndarray  # (Q,) float64, nan where skipped
    ids: np.ndarray  # (Q,) positions of rows or questions in the source
    groups: np.ndarray  # (Q,) str


class Score(dict[str, Any]):
    """Plain numbers, written as JSON like any dict; `kept` is not among them and does not survive a file."""

    kept: Kept | None = None


def scored(values: np.ndarray, groups: Sequence[str], chance: float | None = None, blind: float | None = None,
           ids: np.ndarray | None = None) -> Score:  # fmt: skip
    interval = bootstrap_interval(values, groups=groups)
    out = Score(value=interval.mean, low=interval.low, high=interval.high, queries=interval.values)
    out.update({k: v for k, v in (("chance", chance), ("blind", blind)) if v is not None})
    if ids is not None:
        out.kept = Kept(np.asarray(values, np.float64), np.asarray(ids), np.array(groups, dtype=np.str_))
    return out


def two_way(scores: Any, groups: list, blind: Any = None, ids: np.ndarray | None = None) -> dict[str, Any]:
    """Scores (N text, N image) -> {"t2i": {"R@1": {...}}, "i2t": ...}."""
    same = SameGroup(groups, groups)
    chance = chance_recall(same.counts(), len(groups), KS)
    out: dict[str, Any] = {}
    for name, turned in (("t2i", False), ("i2t", True)):
        recall = recall_at_k(scores.T if turned else scores, same, KS)
        dark = None if blind is None else recall_at_k(blind.T if turned else blind, same, KS)
        out[name] = {f"R@{k}": scored(recall.hits(k), groups, chance[k], dark.at[k] if dark else None, ids) for k in KS}
        out[name]["median_rank"] = recall.median_rank
    return out


def retrieval(run: Run, held: Held, rows: np.ndarray, blind: bool) -> dict[str, Any]:
    images, texts, ids = held.images[rows], held.texts[rows], held.rows[rows]
    groups = [held.groups[r] for r in rows]
    other = shuffled(groups)
    scores = Cosine(texts, images)
    result = two_way(scores, groups, Cosine(texts, images[other]) if blind else None, ids)
    if run.can_match and held.halves is not None:
        cosine = np.asarray(scores)
        mixed = reranked(cosine, match_logits(run, held, rows, best(cosine)), run.match_weight)
        # who is a candidate of whom goes with the picture, so what the other picture would be told is known already
        result["reranked"] = two_way(mixed, groups, mixed[:, other] if blind else None, ids)
        result["reranked"] |= {"candidates": RERANKED, "match_weight": run.match_weight}
    return result


def matching(run: Run, held: Held, rows: np.ndarray, blind: bool) -> dict[str, Any]:
    """Retrieval by the match logit of every text with every picture: all there is without a contrast head, and how
    single-stream systems search (UNITER, arXiv:1909.11740, section 4.2; ViLT)."""
    groups = [held.groups[r] for r in rows]
    logits = match_logits(run, held, rows, np.ones((len(rows), len(rows)), bool))
    return two_way(logits, groups, logits[:, shuffled(groups)] if blind else None, held.rows[rows])


def shuffled(groups: Sequence[Any], seed: int = 0) -> np.ndarray:
    """(N,) for each row another row whose picture it gets, each picture once: of another group, wherever no group has
    more than half of the rows; of another row at least (N > 1)."""
    n = len(groups)
    members: dict[Any, list[int]] = {}
    for row in np.random.default_rng(seed).permutation(n):
        members.setdefault(groups[row], []).append(int(row))
    order = np.array([row for rows in members.values() for row in rows], dtype=np.int64)  # a group stands together
    out = np.empty(n, dtype=np.int64)
    out[order] = np.roll(order, max(1, min(max(map(len, members.values())), n // 2)))
    return out


def best(scores: np.ndarray) -> np.ndarray:
    """(N, N) -> (N, N) bool: the RERANKED highest of each row and of each column."""
    k = min(RERANKED, len(scores))
    out = np.zeros(scores.shape, bool)
    np.put_along_axis(out, np.argpartition(-scores, k - 1, axis=1)[:, :k], True, axis=1)
    np.put_along_axis(out, np.argpartition(-scores, k - 1, axis=0)[:k], True, axis=0)
    return out


@torch.inference_mode()
def match_logits(run: Run, held: Held, rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """wanted (N, N) bool, text by picture -> (N, N) logit of the match probability, nan where not wanted."""
    n = len(rows)
    out = np.full((n, n), np.nan, np.float32)
    model, texts = run.model, [held.pairs[r].caption for r in rows]
    for t in tqdm(range(n), desc="re-ranking", unit="query", leave=False, disable=None if n > 200 else True):
        columns = np.flatnonzero(wanted[t])
        half = model.half_text(*run._words([texts[t]])).rows(torch.zeros(len(columns), dtype=torch.long))
        fused = model.fuse(half, held.halves.rows(torch.from_numpy(rows[columns])))  # type: ignore[union-attr]
        logits = model.heads["match"](fused.pooled_text, fused.pooled_image).float()
        out[t, columns] = (logits[:, 1] - logits[:, 0]).cpu().numpy()
    return out


def reranked(scores: np.ndarray, logits: np.ndarray, weight: float) -> np.ndarray:
    """Candidates by cosine + weight * match logit, above all others (BLIP's second stage, arXiv:2201.12086, section
    5.1, which adds the two with weight 1; a model trained on few pairs deserves less trust in its matching)."""
    seen = ~np.isnan(logits)
    return np.where(seen, 1e3 + scores + weight * np.nan_to_num(logits), scores)


WEIGHTS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def fit_match_weight(run: Run, source: Source) -> float:
    """The weight of the match logit with the best mean reciprocal rank, both directions, on the validation split: 0
    where matching does not help, so that re-ranking never makes a search worse than it was there."""
    held = hold(run, source, "val", MOST_RERANKED)
    rows = np.array([n for n, p in enumerate(held.pairs) if p.caption.strip()])
    if not run.can_match or held.halves is None or len(rows) < 2:
        return 0.0
    groups = [held.groups[r] for r in rows]
    scores = np.asarray(Cosine(held.texts[rows], held.images[rows]))
    logits, same = match_logits(run, held, rows, best(scores)), SameGroup(groups, groups)

    def reciprocal(weight: float) -> float:
        mixed = reranked(scores, logits, weight)
        ranks = np.concatenate([recall_at_k(m, same, KS).ranks for m in (mixed, mixed.T)])
        return float(np.nanmean(1 / ranks))

    return max(WEIGHTS, key=lambda w: (round(reciprocal(w), 6), -w))


# ------------------------------------------------------------------------------------------------------ image to image


def categories(source: Source, pairs: list[Pair]) -> list[str]:
    """Text attributes whose values repeat often enough to be categories, and say what is in the picture rather than
    where the row comes from."""
    found = []
    for name, kind in source.columns.items():
        if kind != "text" or name.lower() in PROVENANCE:
            continue
        values = [p.attributes.get(name) for p in pairs]
        known = [v for v in values if v is not None]
        distinct = len(set(known))
        if known and 2 <= distinct <= min(MOST_CATEGORIES, len(known) // FEWEST_PER_CATEGORY):
            found.append(name)
    return found


def by_category(images: np.ndarray, pairs: list[Pair], source: Source, rows: np.ndarray | None = None,
                blind: bool = False) -> dict[str, Any]:  # fmt: skip
    """mAP of picture-to-picture search, for each attribute that is a category. A row's own group (the same thing again)
    is left out of its gallery. `rows`: (N,) positions in the source, kept with the scores."""
    out: dict[str, Any] = {}
    groups = [p.group for p in pairs]
    others = images[shuffled(groups)] if blind else None
    for name in categories(source, pairs):
        labels = [p.attributes.get(name) for p in pairs]
        found = mean_average_precision(Cosine(images, images), labels, groups=groups)
        if np.isnan(found.value):
            continue
        dark = None if others is None else mean_average_precision(Cosine(others, others), labels, groups=groups).value
        out[name] = {"mAP": scored(found.per_query, groups, found.chance, dark, rows),
                     "values": len(set(labels) - {None})}  # fmt: skip
    return out


# ----------------------------------------------------------------------------------------------------------- questions


def answer_logits(run: Run, source: Source, split: str, limit: int,
                  picture: str = "own") -> tuple[list, np.ndarray, np.ndarray]:  # fmt: skip
    """Questions of a split (Q,), their positions in the source (Q,) and logits (Q, A). `picture`: "own", "shuffled"
    (another group's) or "blank" (white)."""
    indices = np.asarray(sample_rows(source.question_indices(split), limit))
    questions = [source.question(int(i)) for i in indices]
    of = another_group(questions) if picture == "shuffled" else range(len(questions))
    shown = [questions[n].picture for n in of]
    kept, logits, places = [], [], []
    blank = Image.new("RGB", (run.processor.size, run.processor.size), "white")
    cached: tuple[Any, Image.Image | None] = (None, None)

    def readable():
        nonlocal cached
        for place, question, ref in zip(indices, questions, shown):
            if picture == "blank":
                yield place, question, blank
                continue
            if ref != cached[0]:  # the questions about one picture follow each other
                try:
                    cached = (ref, open_picture(ref, size_hint=run.processor.size))
                except BadPicture:
                    cached = (ref, None)
            if cached[1] is not None:
                yield place, question, cached[1]

    bar = tqdm(total=len(questions), desc=f"answering {split}, {picture} picture", unit="question", leave=False,
               disable=None if len(questions) > 200 else True, mininterval=1)  # fmt: skip
    for chunk in chunks(readable(), 64):
        places += [place for place, _, _ in chunk]
        kept += [question for _, question, _ in chunk]
        logits.append(run.answer_logits([p for _, _, p in chunk], [q.question for _, q, _ in chunk]).cpu().numpy())
        bar.update(len(chunk))
    bar.close()
    found = np.concatenate(logits) if logits else np.zeros((0, len(run.answers)), np.float32)
    return kept, np.array(places, dtype=np.int64), found


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


def answering(run: Run, source: Source, split: str, limit: int, blind: bool) -> dict[str, Any]:
    """Accuracy, by kind, beside chance (the training majority, by kind) and the same model on a shuffled and a blank
    picture. A question whose answer is not in the list counts as wrong."""
    asked, ids, logits = answer_logits(run, source, split, limit)
    said = [run.answers[n] for n in logits.argmax(-1)]
    kinds, answers, groups = [q.kind for q in asked], [q.answers for q in asked], [q.group for q in asked]
    score = listed_accuracy(said, answers, kinds)
    train = list(source.questions("train")) if source.n_questions <= 2_000_000 else []
    chance = chance_vqa([q.answers for q in train], [q.kind for q in train], answers, kinds) if train else None
    majority = chance.majority_by_kind.overall if chance else None
    out: dict[str, Any] = {"accuracy": scored(score.per_question, groups, majority, ids=ids)}
    dark = {}
    if blind:
        for picture in ("shuffled", "blank"):
            same, _, blind_logits = answer_logits(run, source, split, limit, picture)
            guessed = [run.answers[n] for n in blind_logits.argmax(-1)]
            dark[picture] = listed_accuracy(guessed, [q.answers for q in same], [q.kind for q in same])
        out["accuracy"]["blind"] = max(s.overall for s in dark.values())
        out["accuracy"] |= {picture: s.overall for picture, s in dark.items()}
    out["by_kind"] = {}
    for kind in score.by_kind:
        of = np.array([k == kind for k in kinds])
        part = scored(score.per_question[of], [g for g, mine in zip(groups, of) if mine],
                      chance.majority_by_kind.by_kind.get(kind) if chance else None, ids=ids[of])  # fmt: skip
        known = {picture: s.by_kind[kind] for picture, s in dark.items() if kind in s.by_kind}
        part.update(known, **({"blind": max(known.values())} if known else {}))
        out["by_kind"][kind] = part
    listed = set(run.answers)
    out["not_in_list"] = sum(not any(a in listed for a, _ in given) for given in answers)
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
    for chunk in chunks(_read(source, rows, run.processor.size, f"captioning {split}"), 32):
        ids += [row for row, _, _ in chunk]
        pairs += [pair for _, pair, _ in chunk]
        said += run.caption([picture for _, _, picture in chunk])  # type: ignore[attr-defined]
    if len(pairs) < 2:
        return {}
    groups = [p.group for p in pairs]
    right = [references[g] for g in groups]
    dark = []
    if blind:
        white = run.caption([Image.new("RGB", (run.processor.size, run.processor.size), "white")])[0]  # type: ignore[attr-defined]
        dark = [caption_scores(other, right) for other in ([said[n] for n in shuffled(groups)], [white] * len(said))]
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
        with torch.inference_mode():
            size = run.processor.size
            white = run.model.half_image(run._pixels([Image.new("RGB", (size, size), "white")]))
        for images in (own.rows(torch.from_numpy(shuffled(groups))), white.rows(torch.zeros(len(rows)).long())):
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
        out = run.model.fuse(text, images.rows(torch.full((len(hidden),), n, device=ids.device)))
        wrong = word_logits(run.model, out.text[hidden]).argmax(-1) != ids[hidden]  # type: ignore[index]
        pieces = torch.zeros(len(hidden), device=ids.device).index_add(0, hidden.nonzero()[:, 0], wrong.float())
        shares[n] = float((pieces == 0).double().mean())
    return shares


# --------------------------------------------------------------------------------------------------------- temperature


def fit_temperature(run: Run, source: Source) -> float:
    """The temperature that makes validation probabilities honest: least negative log-likelihood of the right answer.
    Guo et al. 2017 (arXiv:1706.04599), section 4.2; searched on a grid, since it is one number."""
    asked, _, logits = answer_logits(run, source, "val", 5000)
    place = {a: n for n, a in enumerate(run.answers)}
    target = np.array([place.get(max(q.answers, key=lambda a: a[1])[0], -1) if q.answers else -1 for q in asked])
    known = torch.from_numpy(target >= 0)
    if not known.any():
        return 1.0
    x, y = torch.from_numpy(logits)[known], torch.from_numpy(target)[known]
    grid = torch.logspace(-1, 1, 81)
    losses = torch.stack([torch.nn.functional.cross_entropy(x / t, y) for t in grid])
    return round(float(grid[losses.argmin()]), 4)


# ----------------------------------------------------------------------------------------------------------- for people


def rows_of(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Flat (name, score) rows in reading order."""
    out: list[tuple[str, dict[str, Any]]] = []
    found = metrics.get("retrieval", {})
    ways = {"": found, f" re-ranked top {RERANKED}": found.get("reranked", {}),
            " by matching": metrics.get("matching", {})}  # fmt: skip
    for title, part in ways.items():
        for key, name in (("t2i", "text to image"), ("i2t", "image to text")):
            out += [(f"{name} R@{k}{title}", part[key][f"R@{k}"]) for k in KS if key in part]
    out += [(f"image to image mAP by {name}", v["mAP"]) for name, v in metrics.get("image_to_image", {}).items()]
    if "vqa" in metrics:
        out.append(("answers, accuracy", metrics["vqa"]["accuracy"]))
        out += [(f"answers: {kind or 'all'}", v) for kind, v in metrics["vqa"]["by_kind"].items()]
    if "hidden_words" in metrics:
        out.append(("hidden words guessed", metrics["hidden_words"]))
    out += [(f"captions, {name}", v) for name, v in metrics.get("captions", {}).items()]
    return out


def blind_of(score: dict[str, Any]) -> float | None:
    """The score blind; files of older versions hold only the two it is the higher of."""
    if "blind" in score:
        return score["blind"]
    return max((score[k] for k in ("shuffled", "blank") if score.get(k) is not None), default=None)


def markdown(metrics: dict[str, Any]) -> str:
    """The scores as a table; without any, nothing."""

    def number(x: float | None) -> str:
        return "" if x is None or x != x else f"{100 * x:.1f}"

    lines = ["| measure | score | 95% interval | chance | blind |", "| --- | ---: | :---: | ---: | ---: |"]
    for name, s in rows_of(metrics):
        spread = f"{number(s['low'])} to {number(s['high'])}" if "low" in s else ""
        cells = (number(s["value"]), spread, number(s.get("chance")), number(blind_of(s)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def notes(metrics: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know, a line each: what blind is, and what this run cannot do."""
    said = ["Blind: the same model on pictures of other rows; for answers, captions and hidden words also on a white "
            "one, and the higher counts."] if rows_of(metrics) else []  # fmt: skip
    return said + [f"This run cannot {what}." for what in metrics.get("cannot", [])]


def print_metrics(metrics: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    lines = markdown(metrics).splitlines()
    if lines:
        table = Table(title=f"{metrics['source']}, {metrics['split']} split: {metrics['rows']} rows")
        for column in lines[0].strip("| ").split(" | "):
            table.add_column(column, justify="left" if column == "measure" else "right")
        for line in lines[2:]:
            table.add_row(*[cell.strip() for cell in line.strip("|").split("|")])
        Console().print(table)
    for note in notes(metrics):
        print(note)
