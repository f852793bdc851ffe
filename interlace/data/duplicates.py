"""Which pictures are the same: byte for byte, or near enough that a person would call it the same picture.

Two signs must agree for a near duplicate: a perceptual hash (64 bits of the picture's low frequencies) and an 8x8
colour thumbnail. The hash alone is not enough for products on white: among 820 furniture icons a bookcase and an iron
railing, or a sofa in grey and in red, differ by 4 bits, and so may a re-encoded copy. Looking
at the pairs of the sample sets, 6 bits together with a mean colour difference of 4 (of 255) kept the re-drawn sedan,
the look-alike wall sockets and windows, and dropped the rest; in 463 food photographs it found none, rightly.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

NEAR_BITS = 6  # with a thumbnail to confirm
NEAR_BITS_ALONE = 2  # when only hashes are known
NEAR_COLOUR = 4.0  # mean absolute difference of the thumbnails, 0..255
NEAR_SHARE = 0.25  # and at most this share of what the thumbnails themselves contain, for small things on white
THUMB = 8 * 8 * 3
CROWD = 2000  # rows under one key that each row is compared with: more of them are blank pages, not copies

_SIDE = 32
_k = np.arange(_SIDE)
_COSINES = np.cos(np.pi * (2 * _k[None] + 1) * _k[:9, None] / (2 * _SIDE)).astype(np.float32)  # (9, 32) DCT-II rows
# 64 low frequencies: the 8x8 block without its constant term, which is only brightness, and one more to make 64
_ROWS = np.array([i for i in range(8) for j in range(8) if i + j] + [8])
_COLUMNS = np.array([j for i in range(8) for j in range(8) if i + j] + [0])


@dataclass(frozen=True)
class Signature:
    """`sha`: SHA-256 of the file's bytes. `bits`: 64-bit perceptual hash. `thumb`: (192,) uint8, 8x8 RGB."""

    sha: str
    bits: int
    thumb: np.ndarray


def signature(image: Image.Image, data: bytes) -> Signature:
    """The three signs of one picture: `image` decoded to RGB, `data` its encoded bytes."""
    return Signature(hashlib.sha256(data).hexdigest(), perceptual_hash(image), thumbnail(image))


def perceptual_hash(image: Image.Image) -> int:
    """64 bits: which low frequencies of the 32x32 grey picture lie above their median (a DCT hash, Zauner 2010)."""
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), np.float32)
    spectrum = _COSINES @ grey @ _COSINES.T  # (9, 9)
    low = spectrum[_ROWS, _COLUMNS]
    bits = np.packbits(low > np.median(low))
    return int.from_bytes(bits.tobytes(), "big")


def thumbnail(image: Image.Image) -> np.ndarray:
    """(192,) uint8: the picture averaged to 8x8 RGB."""
    return np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BILINEAR), np.uint8).reshape(-1)


def near_pairs(hashes: np.ndarray, thumbs: np.ndarray | None = None, bits: int | None = None) -> np.ndarray:
    """(M, 2) int64 pairs of near-equal pictures, enough to connect every group of them; rows with equal hashes are
    chained.

    `hashes` is (N,) uint64, `thumbs` (N, 192) uint8 or None, which lowers the distance allowed. Multi-index hashing
    (Norouzi et al. 2012): cut into limit + 3 blocks of bits, two hashes within the limit agree entirely in at least
    three of them, so it is enough to sort by every choice of three blocks and compare neighbours with equal keys. At 6
    bits that is 84 sorts and about N * N / 50,000 comparisons.
    """
    limit = bits if bits is not None else NEAR_BITS if thumbs is not None else NEAR_BITS_ALONE
    if not 0 <= limit <= 7:
        raise ValueError(f"bits={limit}: expected 0 to 7; beyond that pictures differ")
    hashes = np.asarray(hashes, np.uint64)
    if len(hashes) < 2:
        return np.zeros((0, 2), np.int64)
    found = [_confirmed(candidates, hashes, thumbs, limit) for candidates in _candidates(hashes, thumbs, limit)]
    return np.unique(np.concatenate([np.zeros((0, 2), np.int64), *found]), axis=0)


def _candidates(hashes: np.ndarray, thumbs: np.ndarray | None, limit: int) -> Iterator[np.ndarray]:
    order = np.argsort(hashes, kind="stable")
    equal = hashes[order][1:] == hashes[order][:-1]
    if thumbs is None:
        yield np.stack([order[:-1][equal], order[1:][equal]], axis=1)
    else:  # equal hashes may hide different colours: chain those with equal thumbnails, then compare the rest
        yield from _equal_hash_candidates(order, equal, thumbs)
    distinct = order[np.concatenate([[True], ~equal])]  # one row stands for each hash
    if limit == 0 or len(distinct) < 2:
        return
    values = hashes[distinct]
    edges = np.linspace(0, 64, limit + 4).astype(int)
    blocks = [((1 << int(end)) - (1 << int(begin))) for begin, end in itertools.pairwise(edges)]
    for three in itertools.combinations(blocks, 3):
        yield from _meetings(distinct, values & np.uint64(sum(three)))


def _equal_hash_candidates(order: np.ndarray, equal: np.ndarray, thumbs: np.ndarray) -> Iterator[np.ndarray]:
    edges = np.flatnonzero(np.concatenate([[True], ~equal, [True]]))
    for start, end in itertools.pairwise(edges.tolist()):
        if end - start < 2:
            continue
        rows = order[start:end]
        _, first, inverse = np.unique(thumbs[rows], axis=0, return_index=True, return_inverse=True)
        inverse = inverse.reshape(-1)
        yield np.stack([rows[first][inverse], rows], axis=1)
        leaders = rows[np.sort(first)]
        for i in range(0, len(leaders) - 1):
            others = leaders[i + 1 : i + 65]  # a window: hundreds of looks under one hash are noise, not copies
            yield np.stack([np.full(len(others), leaders[i]), others], axis=1)


def _meetings(rows: np.ndarray, keys: np.ndarray, chunk: int = 4_000_000) -> Iterator[np.ndarray]:
    """Pairs of rows with equal keys, about `chunk` at a time."""
    order = np.argsort(keys, kind="stable")
    ends = np.flatnonzero(np.concatenate([keys[order][1:] != keys[order][:-1], [True]])) + 1
    runs = np.diff(ends, prepend=0)
    after = np.repeat(ends, runs) - np.arange(len(rows)) - 1  # how many rows of the same key follow each
    here = np.flatnonzero(after)
    counts = np.minimum(after[here], CROWD)
    total = np.cumsum(counts)
    first = 0
    while first < len(here):
        done = total[first - 1] if first else 0
        last = max(int(np.searchsorted(total, done + chunk, side="right")), first + 1)
        n = counts[first:last]
        left = np.repeat(here[first:last], n)
        step = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n) + 1
        yield np.stack([rows[order[left]], rows[order[left + step]]], axis=1)
        first = last


def _confirmed(pairs: np.ndarray, hashes: np.ndarray, thumbs: np.ndarray | None, limit: int) -> np.ndarray:
    pairs = pairs[pairs[:, 0] != pairs[:, 1]].astype(np.int64)
    pairs = pairs[np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]) <= limit]
    if thumbs is not None and len(pairs):
        a, b = thumbs[pairs[:, 0]].astype(np.float32), thumbs[pairs[:, 1]].astype(np.float32)  # (M, 192)
        difference = np.abs(a - b).mean(axis=1)
        content = np.abs(a - a.reshape(-1, 64, 3).mean(axis=1).repeat(64, axis=0).reshape(a.shape)).mean(axis=1)
        pairs = pairs[(difference <= NEAR_COLOUR) & (difference <= np.maximum(NEAR_SHARE * content, 1.0))]
    return np.sort(pairs, axis=1)


def equal_pairs(keys: np.ndarray) -> np.ndarray:
    """(M, 2) int64 pairs chaining rows whose keys are equal: exact duplicates when the keys are content hashes."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    return np.stack([order[:-1][same], order[1:][same]], axis=1)


def connected(n: int, pairs: np.ndarray) -> np.ndarray:
    """(n,) int64: for every row the least row of its group, groups being the connected components of `pairs`."""
    parent = np.arange(n)

    def root(x: int) -> int:
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = int(parent[x])
        return x

    for a, b in pairs.tolist():
        a, b = root(a), root(b)
        if a != b:
            parent[max(a, b)] = min(a, b)
    while True:  # flatten: every row points at its root
        above = parent[parent]
        if (above == parent).all():
            return parent
        parent = above
