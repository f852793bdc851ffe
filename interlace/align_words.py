"""Stems that begin aligned word by cell, not text by picture: for models that must know what stands where.

A map between means (warm_start.py) makes pictures and captions alike as wholes. A word that is to find its cells among
the others' needs more: cells that show a chair must look like "chair" and not like "lamp", each measured from the
middle of all things, not from that of a whole page. Which cells a word is about is not said; like the translation of a
word in a pair of sentences (IBM model 1, Brown et al. 1993, section 4.2) it is guessed from the map so far, and the map
fitted again on the guess:

    first       rare words' mean  ~  mean over the picture's cells           ridge regression
    each round  a rare word  ~  mean over the cells that are like it so far, softmax(cos / 0.1), ridge regression

Rare: in fewer than one caption in e. A word counts by its rarity, log(captions / captions that have it).
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from interlace.tasks.baselines import ridge_alignment

if TYPE_CHECKING:
    from interlace.data.processor import Processor
    from interlace.data.states import States

ROUNDS = 2
SHARP = 0.1  # of the softmax over cells
FIRM = 1.0  # at least, of the ridge: a thing comes again in scenes of other groups, so held-out groups choose too weak
RARE = 1.0  # rarity from which a word is looked for among the cells
MOST = 4_000  # captions whose words are


class WordMap(NamedTuple):
    """word -> (word - mean_word) @ to_word, cell -> (cell - mean_cell) @ to_cell: both (D,), of deviation 1."""

    mean_word: np.ndarray  # (Ct,)
    to_word: np.ndarray  # (Ct, D)
    mean_cell: np.ndarray  # (Ci,)
    to_cell: np.ndarray  # (Ci, D)
    strength: float  # of the ridge: by cross-validation over groups, at least FIRM


def align_words(states: States, places: list[int], texts: list[str], groups: list[str], processor: Processor,
                width: int, seed: int = 0) -> WordMap:  # fmt: skip
    """`places`: positions in the split of the pairs, `texts` and `groups`: theirs. `width`: D."""
    assert states.images is not None
    rare = rarity(texts, processor)
    words = np.stack([_mean(states.text(text), rare[text]) for text in texts])  # (N, Ct)
    cells = np.stack([_cells(states, n).mean(0) for n in places])  # (N, Ci)
    strength = float(ridge_alignment(cells, words, cells[:1], words[:1], groups=groups, seed=seed).chosen)
    strength = max(strength, FIRM)
    found = _fit(words, cells, np.ones(len(words)), strength, width)
    chosen = np.random.default_rng(seed).permutation(len(texts))[:MOST]
    for _ in range(ROUNDS):
        told, shown, weights = [], [], []
        for n in chosen:
            weight = rare[texts[n]]
            asked = weight > RARE
            if asked.any():
                word, cell = states.text(texts[n])[asked], _cells(states, places[n])
                told.append(word)
                shown.append(_like(word, cell, found) @ cell)
                weights.append(weight[asked])
        if len(told) < 20:
            break
        found = _fit(np.concatenate(told), np.concatenate(shown), np.concatenate(weights), strength, width)
    return found


def rarity(texts: list[str], processor: Processor) -> dict[str, np.ndarray]:
    """Text -> (T,): for each token the logarithm of how many texts there are for one that has it (Sparck Jones 1972).
    What every caption says, "a", "the", says nothing of a picture."""
    ids: dict[str, np.ndarray] = {}
    for at in range(0, len(texts), 256):
        given, mask = processor.texts(texts[at : at + 256])
        ids |= {t: row[real.bool()].numpy() for t, row, real in zip(texts[at : at + 256], given, mask)}
    count = Counter(token for t in texts for token in set(ids[t].tolist()))
    return {t: np.array([math.log(len(texts) / count[token]) for token in row.tolist()]) for t, row in ids.items()}


def _mean(words: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ words / weights.sum() if weights.sum() > 0 else words.mean(0)


def _cells(states: States, place: int) -> np.ndarray:
    return states.images[place, 0].astype(np.float64)  # type: ignore[index]  # (I, C)


def _like(words: np.ndarray, cells: np.ndarray, found: WordMap) -> np.ndarray:
    """(T, Ct), (I, Ci) -> (T, I), rows sum to 1: which cells each word is about, as far as the map can tell."""
    word, cell = (words - found.mean_word) @ found.to_word, (cells - found.mean_cell) @ found.to_cell
    for side in (word, cell):
        side /= np.linalg.norm(side, axis=1, keepdims=True) + 1e-12
    scores = np.exp((word @ cell.T - 1) / SHARP)
    return scores / scores.sum(1, keepdims=True)


def _fit(words: np.ndarray, cells: np.ndarray, weights: np.ndarray, strength: float, width: int) -> WordMap:
    """Ridge regression of the first `width` principal directions of the words (N, Ct) on cells (N, Ci)."""
    share = weights / weights.sum()
    mean_word, mean_cell, root = share @ words, share @ cells, np.sqrt(weights / weights.mean())[:, None]
    y, x = (words - mean_word) * root, (cells - mean_cell) * root
    _, _, directions = np.linalg.svd(y, full_matrices=False)
    wide = min(width, len(directions))
    to_word = np.zeros((y.shape[1], width))
    to_word[:, :wide] = directions[:wide].T
    target, gram = y @ to_word, x.T @ x
    to_cell = np.linalg.solve(gram + strength * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ target)
    deviation = [max(float(side.std()), 1e-12) for side in (target, x @ to_cell)]
    return WordMap(mean_word, to_word / deviation[0], mean_cell, to_cell / deviation[1], strength)
