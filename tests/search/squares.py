"""A small real encoder, pictures of coloured squares, and sources made of them."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
from PIL import Image

from interlace.data.rows import Pair, Picture

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (30, 50, 220),
    "yellow": (230, 220, 40),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
    "purple": (130, 30, 160),
    "orange": (240, 140, 20),
}
ROOMS = ["Kitchen", "Living room", "Garden"]


COLUMNS = {"room": "text", "width_cm": "number", "foldable": "boolean"}


class ColourEncoder:
    """A retrieval model of 1991 (Swain & Ballard, colour indexing): a picture is its colour histogram, a colour word is
    the histogram of its colour, any other word a small random direction. Both are projected to 64 dimensions."""

    dim = 64
    can_match = False
    match_weight = 0.0
    picture_size = 16

    def __init__(self, folder: Path, seed: int = 0):
        self.folder = folder
        self.fingerprint = hashlib.sha256(f"colours {seed}".encode()).hexdigest()
        self.project = np.random.default_rng(seed).normal(size=(64, self.dim)).astype(np.float32)
        self.pictures_encoded = 0

    def encode_pictures(self, pictures):
        self.pictures_encoded += len(pictures)
        return self._unit(np.stack([self._histogram(picture) for picture in pictures]))

    def encode_texts(self, texts):
        rows = np.zeros((len(texts), 64), dtype=np.float32)
        for row, text in zip(rows, texts):
            for word in text.lower().split():
                if word in COLOURS:
                    row += self._histogram(Image.new("RGB", (8, 8), COLOURS[word]))
                else:
                    seed = int.from_bytes(
                        hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=4).digest(), "little"
                    )
                    row += 0.05 * np.random.default_rng(seed).normal(size=64)
        return self._unit(rows)

    def match(self, text, pictures):
        cosines = self.encode_pictures(pictures) @ self.encode_texts([text])[0]
        return 1 / (1 + np.exp(-10 * (cosines - 0.5)))

    def _histogram(self, picture) -> np.ndarray:
        pixels = np.asarray(picture.convert("RGB").resize((16, 16))).reshape(-1, 3) // 64  # four levels a channel
        return np.sqrt(np.bincount(pixels @ np.array([16, 4, 1]), minlength=64) / 256).astype(np.float32)

    def _unit(self, rows: np.ndarray) -> np.ndarray:
        vectors = rows @ self.project
        return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)).astype(np.float32)


class MatchingEncoder(ColourEncoder):
    can_match = True
    match_weight = 1e4  # its matching decides, as where validation found it reliable


class ListSource:
    """A source over a list of pairs, with the parts of `interlace.data.rows.Source` that an index reads."""

    licence = "CC0"

    def __init__(self, pairs: list[Pair], name: str = "squares"):
        self.columns = dict(COLUMNS)
        self.rows, self.name = pairs, name
        self.fingerprint = hashlib.sha256(repr((pairs, time.perf_counter_ns())).encode()).hexdigest()

    def __len__(self):
        return len(self.rows)

    def indices(self, split=None):
        return np.array([i for i, p in enumerate(self.rows) if split in (None, p.split)], dtype=np.int64)

    def pair(self, i):
        return self.rows[i]


def square(folder: Path, n: int) -> Pair:
    """Pair number n: a square of one colour, a little lighter or darker than the last of that colour."""
    names = list(COLOURS)
    colour = names[n % len(names)]
    path = folder / f"{n}.png"
    if not path.exists():
        shade = np.clip(np.array(COLOURS[colour]) + (n * 7) % 19 - 9, 0, 255)
        half = np.clip(np.array(COLOURS[names[(n * 3 + 1) % 8]]), 0, 255)
        pixels = np.tile(shade, (16, 16, 1)).astype(np.uint8)
        pixels[: n % 5] = half
        Image.fromarray(pixels, "RGB").save(path)
    return Pair(
        id=f"item {n}",
        picture=Picture(path=str(path)),
        caption=f"a {colour} square with number{n}",
        group=f"g{n}",
        split="train" if n % 4 else "test",
        attributes={"room": ROOMS[n % 3], "width_cm": float(n) if n % 7 else None, "foldable": n % 2 == 0},
        name=f"{colour} {n}",
    )
