"""Two measurements after a build: what the approximate index misses, and what a score must reach to mean anything."""

from __future__ import annotations

import random
import string

import numpy as np
from PIL import Image

from interlace.search.embed import Encoder
from interlace.search.index import Index

ENOUGH = 0.95  # recall@10 below this doubles the partitions looked into


def recall_against_exact(
    index: Index, n: int = 200, k: int = 10, queries: np.ndarray | None = None, seed: int = 0
) -> float:
    """The share of the true `k` nearest that the approximate index finds, over `n` queries; 1.0 for an exact index.

    Queries are `queries` (N, D), or else `n` of the stored vectors, each without itself. A hit which is as near as the
    k-th true one counts, so that equal pictures, which may stand in any order, are not called misses.
    """
    if index.manifest.vector_index is None or len(index) == 0:
        return 1.0
    own = queries is None
    if queries is None:
        queries = np.stack(index.sample(n, ["vector"], seed)["vector"].to_pylist()).astype(np.float32)
    exact, fast = (index.cosines(queries[:n], k + own, exact=e)[:, own:] for e in (True, False))  # (N, k)
    real = np.isfinite(exact)
    last = np.min(exact, axis=1, where=real, initial=np.inf)  # (N,) the k-th, or the last there is
    return float((fast >= last[:, None] - 1e-5).sum() / max(real.sum(), 1))


def tune(index: Index, run: Encoder, n: int = 100) -> float:
    """Measures recall@10 with captions and with stored pictures as queries (captions lie farther from all pictures, and
    are harder), looks into more partitions until it is enough, and records both in the manifest."""
    ann = index.manifest.vector_index
    if ann is None:
        return 1.0
    texts = [text for text in index.sample(n, ["caption"])["caption"].to_pylist() if text.strip()]
    asked = run.encode_texts(texts) if texts else None
    while True:
        measured = [recall_against_exact(index, n)]
        if asked is not None:
            measured.append(recall_against_exact(index, n, queries=asked))
        ann.recall = min(measured)
        if ann.recall >= ENOUGH or ann.nprobes >= ann.partitions:
            return ann.recall
        ann.nprobes = min(ann.partitions, 2 * ann.nprobes)


def similar_enough(index: Index, run: Encoder, n: int = 64) -> dict[str, float]:
    """The cosine that the best hit must reach for a search to have found something: {"text": ..., "picture": ...}.

    Above what noise reaches: the 90th percentile of the best scores of `n` nonsense queries (random letters; random
    pixels). But never so high that real queries fail: at most the 2nd percentile of the best scores of names and
    captions from the index, or of its pictures with themselves left out. Where a run cannot tell noise from sense the
    second bound applies, and the signal is rare rather than wrong.
    """
    rng = np.random.default_rng(0)
    stored = index.sample(n, ["name", "caption", "vector"])
    texts = [t for column in ("name", "caption") for t in stored[column].to_pylist() if t.strip()]
    pictures = np.asarray(stored["vector"].to_pylist(), dtype=np.float32)
    result = {}
    if texts:
        result["text"] = _between(_best(index, run.encode_texts(nonsense(n))), _best(index, run.encode_texts(texts)))
    if len(pictures) > 1:
        static = run.encode_pictures([noise(rng, side) for side in (2, 8, 64, 224) for _ in range(4)])
        result["picture"] = _between(_best(index, static), _best(index, pictures, skip=1))
    return result


def _between(of_noise: np.ndarray, of_sense: np.ndarray) -> float:
    return float(min(np.quantile(of_noise, 0.9), np.quantile(of_sense, 0.02)))


def _best(index: Index, queries: np.ndarray, skip: int = 0) -> np.ndarray:
    """(N,) the best cosine of each query, shape (N, D), leaving out the `skip` best."""
    return index.cosines(queries, 1 + skip)[:, skip]


def nonsense(n: int) -> list[str]:
    rng = random.Random(0)
    return [
        " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 9))) for _ in range(rng.randint(1, 4)))
        for _ in range(n)
    ]


def noise(rng: np.random.Generator, side: int) -> Image.Image:
    """Random colours, from four large patches (side 2) to a value for each pixel (side 224)."""
    pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels, "RGB").resize((224, 224), Image.Resampling.NEAREST)
