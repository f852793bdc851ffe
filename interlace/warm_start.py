"""Stems that begin aligned. On a few thousand pairs a closed form beats hundreds of steps from a random start, so the
steps begin where the closed form ends: image cells are mapped into the space of the sentence tower before anything is
learned.

    text:   y -> P (y - mean y)          P: the first D principal directions of the captions' mean states
    image:  x -> W' (x - mean x)         W = (X'X + s I)^-1 X'Y: ridge regression of captions' vectors on pictures'
    layers: residual branches end in zeros (Zhang et al. 2019, arXiv:1901.09321), so the first forward is this map

Because W is linear and a picture's vector is the mean over its cells, single cells land in the words' space too, which
is where the fusion layers compare them.

Systems have no stems to align. Their picture parts are mapped into the space of the words (`align_regions`). A contrast
head, of either, starts from the canonical correlations (canonical.py) between what the model makes of a text alone and
of a picture before it meets one (`align_contrast`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn

from interlace.align_words import WordMap, align_words
from interlace.bars import bar
from interlace.canonical import canonical
from interlace.embed.grid import GridTower
from interlace.embed.stem import ImageTower, TextTower
from interlace.embed.vl_bert import ElementRegions
from interlace.heads.pair import Standard
from interlace.heads.predict import Tied
from interlace.model import Half
from interlace.objectives.base import Views
from interlace.objectives.mlm import word_table
from interlace.tasks.baselines import ridge_alignment

if TYPE_CHECKING:
    from interlace.data.batches import Collate, Samples
    from interlace.data.processor import Processor
    from interlace.data.rows import Source
    from interlace.data.states import States
    from interlace.learner import Learner
    from interlace.model import VLModel

MOST = 20_000  # pairs the map is fitted on


@torch.no_grad()
def align_stems(model: VLModel, states: States, source: Source, processor: Processor, split: str = "train",
                seed: int = 0) -> float | None:  # fmt: skip
    """Fits and writes the two projections from kept tower states. Returns the ridge strength chosen by cross-validation
    over groups, or None when there are too few captioned pairs to fit anything.

    A model with positions of its own (`model.places`) compares single words with single cells: its map is fitted word
    by cell (align_words.py).
    """
    if states.images is None or states.words is None:
        return None
    rows = np.asarray(source.indices(split))
    captions = source.captions().to_pylist()
    places = [n for n, row in enumerate(rows) if captions[row].strip() and n not in states.unreadable]
    if len(places) > MOST:
        places = sorted(np.random.default_rng(seed).choice(places, MOST, replace=False).tolist())
    groups = [source.group(int(rows[n])) for n in places]
    if len(set(groups)) < 20:
        return None
    if cast(TextTower, model.text).positions is not None:
        return _align_word_by_cell(model, align_words(states, places, [captions[rows[n]] for n in places], groups,
                                                      processor, model.config.text.width.size, seed))  # fmt: skip
    # (N, C): over views and cells
    pictures = np.stack([states.images[n].astype(np.float32).mean((0, 1)) for n in places])
    texts = np.stack([_sentence(states, captions[rows[n]]) for n in places])  # (N, Dt)
    strength = ridge_alignment(pictures, texts, pictures[:1], texts[:1], groups=groups, seed=seed).chosen

    project = cast(TextTower, model.text).project  # (D, Dt)
    mean_text, mean_picture = texts.mean(0), pictures.mean(0)
    _, _, directions = np.linalg.svd(texts - mean_text, full_matrices=True)
    wide = min(project.out_features, project.in_features)
    weight = np.zeros((project.out_features, project.in_features), np.float32)
    weight[:wide] = directions[:wide]
    project.weight.copy_(torch.from_numpy(weight))  # computed here, copied to whatever device the model is on
    project.bias.copy_(torch.from_numpy(-weight @ mean_text))
    target = (texts - mean_text) @ weight.T  # (N, D)

    solved = _ridge(pictures - mean_picture, target, strength).astype(np.float32)  # (C, D)
    image = cast(ImageTower, model.image).project
    image.weight.copy_(torch.from_numpy(solved.T))
    image.bias.copy_(torch.from_numpy(-mean_picture @ solved))
    return float(strength)


def _align_word_by_cell(model: VLModel, found: WordMap) -> float:
    sides = ((cast(TextTower, model.text).project, found.to_word, found.mean_word),
             (cast(ImageTower, model.image).project, found.to_cell, found.mean_cell))  # fmt: skip
    for project, weight, mean in sides:
        project.weight.copy_(torch.from_numpy(weight.T.astype(np.float32)))
        project.bias.copy_(torch.from_numpy((-mean @ weight).astype(np.float32)))
    return found.strength


def _ridge(x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    """Centred x (N, C), y (N, D) -> (C, D), scaled so that what it predicts is as long as y: ridge shrinks what it
    cannot predict, and a shrunken stream would speak softly."""
    x = x.astype(np.float64)
    gram = x.T @ x
    solved = np.linalg.solve(gram + strength * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ y)
    return solved * float(np.linalg.norm(y)) / max(float(np.linalg.norm(x @ solved)), 1e-12)


def _sentence(states: States, text: str) -> np.ndarray:
    return states.text(text).mean(0)


@torch.no_grad()
def align_regions(model: VLModel, means: np.ndarray, places: list[int], source: Source, processor: Processor,
                  split: str = "train", seed: int = 0) -> float | None:  # fmt: skip
    """A system's regions begin where words are: the projection of features starts as the best linear map from a
    picture's mean feature to the mean of its caption's word vectors, so that what looks like a word attends like one
    from the first step. Paper's systems learn this map from millions of pairs.

    means: (N, F), of the pictures at `places` (N,) of the split. Returns the ridge strength chosen by cross-validation
    over groups, or None where there are too few captioned pairs, or the embedder has no projection of features alone.
    """
    linear = feature_projection(model)
    rows, captions = np.asarray(source.indices(split)), source.captions().to_pylist()
    chosen = [n for n, place in enumerate(places) if captions[rows[place]].strip()]
    if len(chosen) > MOST:
        chosen = sorted(np.random.default_rng(seed).choice(chosen, MOST, replace=False).tolist())
    groups = [source.group(int(rows[places[n]])) for n in chosen]
    if linear is None or len(set(groups)) < 20:
        return None
    weight, bias = linear
    table = word_table(model)
    if table.shape[1] != len(weight):
        return None
    texts = []
    for at in range(0, len(chosen), 256):
        told = processor.tokens([captions[rows[places[n]]] for n in chosen[at : at + 256]])
        plain = (told["text_words"] >= 0).unsqueeze(-1).to(table)  # (B, T, 1)
        vectors = table[told["text_ids"].to(table.device)] * plain.to(table.device)
        texts.append((vectors.sum(1) / plain.sum(1).clamp(min=1).to(table.device)).float().cpu().numpy())
    words, pictures = np.concatenate(texts), means[chosen].astype(np.float32)
    strength = ridge_alignment(pictures, words, pictures[:1], words[:1], groups=groups, seed=seed).chosen
    solved = _ridge(pictures - pictures.mean(0), words - words.mean(0), strength)  # (F, D)
    target = words.mean(0)
    if normed(model):  # a ReLU and a norm follow: as loud as the box's numbers, and on both sides of zero
        solved, target = solved / words.std(), 0 * target
    weight.copy_(torch.from_numpy(solved.T.astype(np.float32)))
    bias.copy_(torch.from_numpy((target - pictures.mean(0) @ solved).astype(np.float32)))
    return float(strength)


@torch.no_grad()
def align_contrast(learner: Learner, samples: Samples, collate: Collate, batch: int = 64,
                   seed: int = 0) -> tuple[float, float, int] | None:  # fmt: skip
    """The contrast head begins as the closed form between the two vectors it reads: what a caption's and its picture's
    pooled vectors agree on, their canonical correlations (canonical.py). A system's pooled vectors have nothing to do
    with each other at first, and contrast over a thousand pairs takes hundreds of steps to find what one equation says.

    Returns the ridges of the image and the text side and the power of the correlations, chosen by cross-validation over
    groups; None for a head without two linear projections, with fewer than 20 groups of captions, or where all pictures
    have one vector.
    """
    head = learner.heads["contrast"]
    text_side, image_side = getattr(head, "text", None), getattr(head, "image", None)
    if not (isinstance(text_side, nn.Linear) and isinstance(image_side, nn.Linear)):
        return None
    y, x, groups = over_rows(
        learner, samples, collate, "contrast, start", batch, seed,
        lambda words, picture: (learner.pooled_alone(words, "text"), learner.pooled_alone(picture, "image")),
    )  # (N, Dt), (N, Di)
    if len(set(groups)) < 20:
        return None
    if any(part.std(0).max() <= 1e-4 * np.abs(part).max() for part in (x, y)):  # it says the same of everything but for
        return None  # rounding, as the published VL-BERT's pictures at first
    if (standard := getattr(head, "standard", None)) is not None:
        y, x = _standard(y, standard["text"]), _standard(x, standard["image"])
    away_y, away_x = _away_from_mean(y, text_side), _away_from_mean(x, image_side)
    y0, x0 = (y - y.mean(0)) @ away_y, (x - x.mean(0)) @ away_x
    found = canonical(x0, y0, groups=groups, seed=seed)
    loud = np.linalg.norm(y0)  # both sides: what is mapped is as large as a text was, so that steps turn it as far
    for side, away, mean, mapped, fit in ((text_side, away_y, y.mean(0), y0 @ found.text, found.text),
                                          (image_side, away_x, x.mean(0), x0 @ found.image, found.image)):  # fmt: skip
        wide = min(side.out_features, fit.shape[1])
        weight = away @ fit[:, :wide] * (loud / max(float(np.linalg.norm(mapped)), 1e-12))  # (D, P)
        side.weight.zero_()
        side.weight[:wide] = torch.from_numpy(weight.T.astype(np.float32))
        if side.bias is not None:
            side.bias.copy_(-side.weight @ torch.from_numpy(mean).to(side.weight))
    return found.chosen


@torch.no_grad()
def over_rows(learner: Learner, samples: Samples, collate: Collate, desc: str, batch: int, seed: int,
              read: Callable[[Half, Half], tuple[torch.Tensor, torch.Tensor]]) -> tuple[np.ndarray, np.ndarray, list]:
    """What `read` makes of each training row's caption and picture, (N, Dt) and (N, Di), and the rows' groups (N,);
    of `MOST` rows at the most, in evaluation mode, without rows that say nothing; none where no objective reads whole
    captions."""
    places = np.arange(len(samples))
    if len(places) > MOST:
        places = np.sort(np.random.default_rng(seed).choice(places, MOST, replace=False))
    texts, pictures, groups = [], [], []
    learning = learner.training
    learner.eval()
    for at in bar(range(0, len(places), batch), desc=desc, unit="batch", mininterval=1):
        given = collate([samples[(0, int(place))] for place in places[at : at + batch]])
        given = {k: v.to(learner.device) for k, v in given.items() if isinstance(v, torch.Tensor)}
        if "caption_real" not in given:
            break
        views, real = Views(learner, given), given["caption_real"]
        text, picture = read(views.text("caption"), views.image())
        texts.append(text[real].float().cpu().numpy())
        pictures.append(picture[real].float().cpu().numpy())
        groups += given["group"][real].tolist()
    learner.train(learning)
    y, x = (np.concatenate(part) if part else np.zeros((0, 1), np.float32) for part in (texts, pictures))
    return y, x, groups


def _standard(vectors: np.ndarray, standard: Standard) -> np.ndarray:
    """(N, D) -> (N, D): as the head will see them."""
    pooled = torch.from_numpy(vectors).to(standard.mean)
    standard.expect(pooled)
    return standard(pooled).cpu().numpy()


def _away_from_mean(vectors: np.ndarray, side: nn.Linear) -> np.ndarray:
    """(N, D) -> (D, D): what takes the mean out of vectors. A projection with a bias subtracts it; one without can only
    be blind to its direction."""
    mean = vectors.mean(0).astype(np.float64)
    if side.bias is not None or np.linalg.norm(mean) < 1e-3 * np.sqrt((vectors**2).sum(1).mean()):
        return np.eye(len(mean))  # nothing to be blind to
    return np.eye(len(mean)) - np.outer(mean, mean) / max(float(mean @ mean), 1e-12)


@torch.no_grad()
def start_frequencies(learner: Learner, source: Source, processor: Processor, split: str = "train") -> int:
    """The biases of untrained word heads, of hidden words and of a decoder, begin at the log frequencies of the
    captions' words, each counted once more than it occurs: else hundreds of steps only learn which words there are.
    Returns how many captions were counted."""
    biases = [bias for name, bias in learner.named_parameters() if name in WORD_BIASES and not bias.any()]
    rows, captions = np.asarray(source.indices(split)), source.captions().to_pylist()
    said = [captions[row] for row in rows[: 10 * MOST] if captions[row].strip()]
    if not biases or not said:
        return 0
    counts = torch.zeros(max(len(bias) for bias in biases), dtype=torch.float64)
    for at in range(0, len(said), 256):
        tokens = processor.tokens(said[at : at + 256])
        counts += torch.bincount(tokens["text_ids"][tokens["text_words"] >= 0].flatten(), minlength=len(counts))
    if processor.tokenizer.sep_token_id is not None:
        counts[processor.tokenizer.sep_token_id] += len(said)  # what a text ends with is written once a caption
    for bias in biases:
        shares = (counts[: len(bias)] + 1) / (counts[: len(bias)] + 1).sum()
        bias.copy_(shares.log() - shares.log().mean())
    return len(said)


@torch.no_grad()
def start_features(learner: Learner, mean: np.ndarray) -> bool:
    """An untrained head that guesses features (mrfr) begins with the mean feature (F,) and nothing else, as heads of
    words do at their frequencies. From random weights its guesses differ a third as much as the truth does, at random,
    and a few hundred steps neither undo that nor carry a bias as far as the mean. Returns whether there was one."""
    head = dict(learner.heads.items()).get("mrfr")
    bias: torch.Tensor
    loud: torch.Tensor
    if isinstance(head, Tied):
        bias, loud = head.bias, head.norm.weight  # the table is the embedder's
    elif isinstance(last := getattr(head, "out", None), nn.Linear):
        bias, loud = last.bias, last.weight
    else:
        return False
    if bias.any():  # what has learnt keeps what it learnt
        return False
    bias.copy_(torch.from_numpy(mean.astype(np.float32)))
    loud.zero_()
    return True


WORD_BIASES = ("heads.mlm.bias", "heads.mlm.out.bias", "decoder.head.bias")


def feature_projection(model: VLModel) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Weight (D, F) and bias (D,) of what maps a region's feature, or a cell of a tower, into the model; views of the
    parameters."""
    linear = _projection(model)
    if linear is None:
        return None
    regions = _regions(model)
    if isinstance(regions, ElementRegions):  # one projection of a box's numbers and, after them, the feature
        return linear.weight[:, 4 * regions.spec.geometry :], linear.bias
    return linear.weight, linear.bias


def projection_name(model: VLModel) -> str:
    """What the names of its parameters begin with."""
    return next(f"{name}." for name, part in model.named_modules() if part is _projection(model))


def _projection(model: VLModel) -> nn.Linear | None:
    if isinstance(model.image, ImageTower):
        return model.image.project
    regions = _regions(model)
    linear = regions.project if isinstance(regions, ElementRegions) else getattr(regions, "features", None)
    return linear if isinstance(linear, nn.Linear) else None


def normed(model: VLModel) -> bool:
    """Only the direction of what is projected counts (VL-BERT)."""
    return isinstance(_regions(model), ElementRegions)


def _regions(model: VLModel) -> nn.Module:
    return model.image.regions if isinstance(model.image, GridTower) else model.image
