"""Stems that begin aligned. On a few thousand pairs a closed form beats hundreds of steps from a random start, so the
steps begin where the closed form ends: image cells are mapped into the space of the sentence tower before anything is
learned.

    text:   y -> P (y - mean y)          P: the first D principal directions of the captions' mean states
    image:  x -> W' (x - mean x)         W = (X'X + s I)^-1 X'Y: ridge regression of captions' vectors on pictures'
    layers: residual branches end in zeros (Zhang et al. 2019, arXiv:1901.09321), so the first forward is this map

Because W is linear and a picture's vector is the mean over its cells, single cells land in the words' space too, which
is where the fusion layers compare them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn

from interlace.embed.grid import GridTower
from interlace.embed.stem import ImageTower, TextTower
from interlace.layers import Attend, FeedForward
from interlace.objectives.mlm import word_table
from interlace.tasks.baselines import ridge_alignment

if TYPE_CHECKING:
    from interlace.data.processor import Processor
    from interlace.data.rows import Source
    from interlace.data.states import States
    from interlace.model import VLModel

MOST = 20_000  # pairs the map is fitted on


def quiet_branches(module: nn.Module) -> None:
    """Every residual branch of these layers starts by adding nothing."""
    for part in module.modules():
        last = part.out if isinstance(part, Attend) else part.down if isinstance(part, FeedForward) else None
        if last is not None:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)


@torch.no_grad()
def align_stems(model: VLModel, states: States, source: Source, split: str = "train", seed: int = 0) -> float | None:
    """Fits and writes the two projections from kept tower states. Returns the ridge strength chosen by cross-validation
    over groups, or None when there are too few captioned pairs to fit anything."""
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
    # (N, C): over views and cells
    pictures = np.stack([states.images[n].astype(np.float32).mean((0, 1)) for n in places])
    texts = np.stack([_sentence(states, captions[rows[n]]) for n in places])  # (N, Dt)
    strength = ridge_alignment(pictures, texts, pictures[:1], texts[:1], groups=groups, seed=seed).chosen

    project = cast(TextTower, model.text).project  # (D, Dt)
    mean_text, mean_picture = texts.mean(0), pictures.mean(0)
    _, _, directions = np.linalg.svd(texts - mean_text, full_matrices=True)
    wide = min(project.out_features, project.in_features)
    weight = torch.zeros_like(project.weight)
    weight[:wide] = torch.from_numpy(directions[:wide].astype(np.float32))
    project.weight.copy_(weight)
    project.bias.copy_(-weight @ torch.from_numpy(mean_text))
    target = (texts - mean_text) @ weight.numpy().T  # (N, D)

    x = (pictures - mean_picture).astype(np.float64)
    gram = x.T @ x
    solved = np.linalg.solve(gram + strength * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ target)  # (C, D)
    # as long as the words' vectors: ridge shrinks what it cannot predict, and a shrunken stream would speak softly
    solved *= float(np.linalg.norm(target)) / max(float(np.linalg.norm(x @ solved)), 1e-12)
    image = cast(ImageTower, model.image).project
    image.weight.copy_(torch.from_numpy(solved.T.astype(np.float32)))
    image.bias.copy_(-image.weight @ torch.from_numpy(mean_picture))
    return float(strength)


def _sentence(states: States, text: str) -> np.ndarray:
    assert states.words is not None
    n = states.place[text]
    return states.words[states.starts[n] : states.starts[n + 1]].astype(np.float32).mean(0)


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
    x, y = (pictures - pictures.mean(0)).astype(np.float64), words - words.mean(0)
    gram = x.T @ x
    solved = np.linalg.solve(gram + strength * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ y)  # (F, D)
    solved *= float(np.linalg.norm(y)) / max(float(np.linalg.norm(x @ solved)), 1e-12)
    weight.copy_(torch.from_numpy(solved.T.astype(np.float32)))
    bias.copy_(torch.from_numpy((words.mean(0) - pictures.mean(0) @ solved).astype(np.float32)))
    return float(strength)


def feature_projection(model: VLModel) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Weight (D, F) and bias (D,) of what maps a region's feature into the model; views of the parameters."""
    regions = model.image.regions if isinstance(model.image, GridTower) else model.image
    linear = getattr(regions, "features", None)
    return (linear.weight, linear.bias) if isinstance(linear, nn.Linear) else None
