"""Searching: recall by the contrastive vectors or by words, then re-rank by the matching head where the run has one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from interlace.data.pictures import BadPicture, open_picture
from interlace.data.rows import Attribute, Picture
from interlace.errors import UserError, suggest
from interlace.search.embed import SIZE_HINT, Encoder, threads
from interlace.search.filters import And, Compare, Filter, OneOf, leaves, parse
from interlace.search.index import Index
from interlace.search.rows import Item

Mode = Literal["vector", "text", "hybrid"]
MAX_TEXT = 2_000  # characters: some 400 words, several times what a text encoder reads; more is a pasted document
MAX_K = 1_000
RERANK = 50  # at least this many candidates are re-ranked
THUMBNAIL_SERVES = 224  # pixels; thumbnails are 256 on their longer side
UNLIKELY = 0.2  # when even the best re-ranked hit has a lower probability, nothing was found
RRF = 60  # the constant of reciprocal rank fusion; Cormack, Clarke & Buettcher, SIGIR 2009


@dataclass
class Hit:
    """One result. `score` is the cosine of query and picture, in -1..1; compare it within one search only."""

    id: str
    name: str
    caption: str
    score: float
    match: float | None  # ITM probability that the text and the picture belong together; None: not re-ranked
    attributes: dict[str, Attribute]
    picture: Picture
    words: float | None = None  # BM25 of the text in name and caption; None: not found by words


@dataclass
class Result(Sequence[Hit]):
    """The hits, best first (it is a sequence of them), and what to say about them."""

    hits: list[Hit] = field(default_factory=list)
    note: str = ""  # one sentence for the person searching, or empty
    hopeless: bool = False  # nothing in the index resembles the query: show the note before the hits
    seconds: float = 0.0

    def __getitem__(self, i):  # type: ignore[no-untyped-def]
        return self.hits[i]

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)


def search(
    index: Index,
    run: Encoder,
    text: str | None = None,
    picture: Image.Image | str | Path | bytes | None = None,
    where: str | None = None,
    k: int = 20,
    weight: float = 0.5,
    mode: Mode = "vector",
    rerank: bool | None = None,
    like: str | None = None,
) -> Result:
    """Finds pictures by a text, by a picture, by an item of the index (`like`, its id), or by a text and one of those.

    Args:
        picture: an opened picture, or a file to open.
        where: a filter, such as `category = Kitchen and width_cm < 80`; see filters.py.
        weight: share of the picture (or `like`) when there is also a text: the query is the normalised weighted sum of
            both unit vectors.
        mode: "vector" ranks by cosine; "text" by the words in name and caption (BM25); "hybrid" fuses both rankings by
            reciprocal rank.
        rerank: order the best max(k, 50) by cosine + w * logit(p), p being the run's probability that text
            and picture belong together and w the weight that served best on the run's validation split; where w is 0,
            by p alone. None: when there is a text, the run can, and w is not 0.

    Raises UserError: nothing to search for, a text over 2,000 characters, `k`, `weight` or `mode` out of range, a
    filter that does not parse, an unknown `like`, a picture that cannot be read, another run than the index's.
    """
    started = time.perf_counter()
    text = _checked(index, run, text, picture, like, k, weight, mode, rerank)
    tree = parse(where, index.filter_columns) if where is not None and where.strip() else None
    total = len(index)
    if not total:
        return Result(note="The index is empty: nothing has been added to it.", hopeless=True)
    if tree is not None and not (total := index.count(tree)):
        return Result(note=_nothing_passes(index, tree), hopeless=True, seconds=time.perf_counter() - started)

    query = _query(index, run, text, picture, like, weight)
    wanted = k + (like is not None)
    reranks = bool(text) and run.can_match and run.match_weight > 0 if rerank is None else rerank
    candidates = max(wanted, RERANK) if reranks or mode == "hybrid" else wanted
    hits = _candidates(index, query, text, tree, candidates, mode)
    hits = [hit for hit in hits if hit.id != like]
    if reranks and text:
        _match(index, run, text, hits)
        w = run.match_weight
        # without a weight nobody re-ranks unless asked, and then for the order of matching, not for that of the cosine
        hits.sort(key=lambda hit: (hit.match is not None, hit.score + w * _logit(hit.match) if w else hit.match or 0.0),
                  reverse=True)  # fmt: skip
    trusted = run.match_weight > 0
    result = _judged(index, hits[:k], text, picture is not None or like is not None, weight, mode, tree, total, trusted)
    result.seconds = time.perf_counter() - started
    return result


def _checked(
    index: Index, run: Encoder, text: str | None, picture: object, like: str | None, k: int, weight: float, mode: str,
    rerank: bool | None,
) -> str | None:  # fmt: skip
    """The text without surrounding blanks, or None; UserError for whatever cannot be searched."""
    if index.manifest.run != run.fingerprint:
        raise UserError(
            f"The index at {index.folder} was built with another run than {run.folder}, and vectors of two runs cannot "
            f"be compared. Build it again: interlace index {run.folder} SOURCE --rebuild"
        )
    text = (text or "").strip() or None
    if picture is not None and like is not None:
        raise UserError("Expected a picture or an item of the index (like), got both. Leave one out.")
    if text is None and picture is None and like is None:
        raise UserError("Nothing to search for: give a text, a picture, or both.")
    if text is not None and len(text) > MAX_TEXT:
        raise UserError(f"The text has {len(text):,} characters; at most {MAX_TEXT:,} are searched for. Shorten it.")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_K:
        raise UserError(f"k, the number of results, is a whole number from 1 to {MAX_K:,}, got {k}.")
    if not 0 <= weight <= 1:
        raise UserError(f"weight, the share of the picture, is from 0 to 1, got {weight}.")
    if mode not in get_args(Mode):
        raise UserError(f"mode is one of {', '.join(get_args(Mode))}, got {mode!r}.{suggest(mode, get_args(Mode))}")
    if mode != "vector" and text is None:
        raise UserError(f"mode {mode} looks for words, and there is no text. Give one, or use mode vector.")
    if rerank and not run.can_match:
        raise UserError(f"{run.folder} has no matching head, so it cannot re-rank. Leave rerank out.")
    if rerank and text is None:
        raise UserError(
            "Re-ranking compares a text with pictures, and there is no text. Give one, or leave rerank out."
        )
    return text


def _query(
    index: Index, run: Encoder, text: str | None, picture: Image.Image | str | Path | bytes | None, like: str | None,
    weight: float,
) -> np.ndarray:  # fmt: skip
    """(D,) float32, unit length."""
    by_text = _unit(run.encode_texts([text])[0]) if text is not None else None
    by_picture = None
    if like is not None:
        by_picture = index.vector(like)
        if by_picture is None:
            raise UserError(f"No item {like!r} in the index at {index.folder}.")
    elif picture is not None:
        try:
            image = picture if isinstance(picture, Image.Image) else open_picture(picture)
        except BadPicture as error:
            raise UserError(f"The picture cannot be searched with: {error.reason}.") from None
        by_picture = _unit(run.encode_pictures([image])[0])
    if by_text is None or by_picture is None:
        found = by_picture if by_text is None else by_text
        assert found is not None
        return found
    return _unit((1 - weight) * by_text + weight * by_picture)


def _unit(vector: np.ndarray) -> np.ndarray:
    vector = np.asarray(vector, dtype=np.float32)
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length < 1e-9:
        raise UserError("The run gave no usable vector for this query. Try other words or another picture.")
    return vector / np.float32(length)


def _candidates(
    index: Index, query: np.ndarray, text: str | None, tree: Filter | None, n: int, mode: Mode
) -> list[Hit]:
    by_vector = index.nearest(query, n, tree) if mode != "text" else []
    by_words = index.words(text, n, tree) if mode != "vector" and text else []
    hits = {item.id: _hit(item, score) for item, score in by_vector}
    fused = {item.id: 1 / (RRF + rank) for rank, (item, _) in enumerate(by_vector, 1)}
    for rank, (item, bm25, vector) in enumerate(by_words, 1):
        hits.setdefault(item.id, _hit(item, float(vector @ query))).words = bm25
        fused[item.id] = fused.get(item.id, 0.0) + 1 / (RRF + rank)
    return sorted(hits.values(), key=lambda hit: fused[hit.id], reverse=True)[:n]  # of one ranking alone: its order


def _hit(item: Item, score: float) -> Hit:
    return Hit(item.id, item.name, item.caption, score, None, item.attributes, item.picture)


def _match(index: Index, run: Encoder, text: str, hits: list[Hit]) -> None:
    """Fills in `match`. The index's thumbnail serves where it is as large as what the model sees; else the original, or
    the thumbnail again when the original has moved. Without either, a hit goes last."""

    def pixels(hit: Hit) -> Image.Image | None:
        if run.picture_size <= THUMBNAIL_SERVES and (item := index.get(hit.id)) and item.thumbnail:
            return open_picture(item.thumbnail)
        try:
            return open_picture(hit.picture, size_hint=SIZE_HINT)
        except (BadPicture, OSError):
            item = index.get(hit.id)
            return open_picture(item.thumbnail) if item and item.thumbnail else None

    with ThreadPoolExecutor(threads()) as pool:
        seen = [(hit, image) for hit, image in zip(hits, pool.map(pixels, hits)) if image is not None]
    if seen:
        for (hit, _), probability in zip(seen, run.match(text, [image for _, image in seen])):
            hit.match = float(probability)


def _logit(probability: float | None) -> float:
    p = min(max(probability if probability is not None else 0.5, 1e-6), 1 - 1e-6)
    return math.log(p / (1 - p))


def _judged(
    index: Index, hits: list[Hit], text: str | None, with_picture: bool, weight: float, mode: Mode,
    tree: Filter | None, total: int, trusted: bool,
) -> Result:  # fmt: skip
    """The hits with an honest sentence: by the probability of a match where it was asked, else by the calibrated
    cosine."""
    among = f" among the {total:,} that pass the filter" if tree is not None else ""
    if not hits:
        if mode == "text":
            return Result(
                [], f"No name or caption{among} has any of these words. Try other words, or mode vector.", True
            )
        return Result([], f"There is nothing else{among}.", True)
    nearest = max(hit.score for hit in hits)
    # a head that validation gave no weight has no say in whether anything was found either
    probable = max((hit.match for hit in hits if hit.match is not None and trusted), default=None)
    if probable is not None and probable < UNLIKELY:
        chance = f"the most probable one has {probable:.0%}"
        return Result(hits, f"Nothing{among} seems to show this; {chance}. These are the nearest.", True)
    needed = _needed(index, text, with_picture, weight)
    if mode != "text" and probable is None and needed is not None and nearest < needed:
        return Result(
            hits, f"Nothing similar{among}: the best score, {nearest:.2f}, is what nonsense would reach.", True
        )
    return Result(hits)


def _needed(index: Index, text: str | None, with_picture: bool, weight: float) -> float | None:
    """The cosine from which a hit means something, see `calibrate.similar_enough`."""
    similar = index.manifest.similar
    by_text, by_picture = similar.get("text"), similar.get("picture")
    if text is not None and with_picture:
        return None if by_text is None or by_picture is None else (1 - weight) * by_text + weight * by_picture
    return by_text if text is not None else by_picture


def _nothing_passes(index: Index, tree: Filter) -> str:
    """Why a filter matched nothing: the part that nothing passes by itself, and the value that was perhaps meant."""
    note = f"Nothing passes the filter {tree}."
    for part in tree.parts if isinstance(tree, And) else (tree,):
        if isinstance(tree, And) and index.count(part):
            continue
        if isinstance(tree, And):
            note = f"Nothing passes the filter, because of: {part}."
        for leaf in leaves(part):
            if isinstance(leaf, (Compare, OneOf)) and leaf.column.type == "text":
                values = index.values(leaf.column.name)
                asked = [str(v) for v in (leaf.values if isinstance(leaf, OneOf) else (leaf.value,))]
                for value in asked:
                    if value not in values:
                        return note + _meant(value, [str(v) for v, _ in values.most_common()])
        return note
    return note + " Each part alone passes something, but nothing passes all." if isinstance(tree, And) else note


def _meant(value: str, known: list[str]) -> str:
    same = [v for v in known if v.lower() == value.lower()]  # text is compared exactly, the commonest surprise
    if same:
        return f" Did you mean {same[0]!r}?"
    return suggest(value, known) or (f" Its values are, for example: {', '.join(known[:5])}." if known else "")
