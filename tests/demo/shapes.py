"""Sixty drawn pictures, and a run small enough to understand: it knows eight colours and four shapes.

The encoder is a real one: its vectors come from the pixels and the words, so what a search finds can be predicted.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from interlace.data.rows import Pair, Picture

COLOURS = {
    "red": (205, 45, 40),
    "green": (60, 150, 70),
    "blue": (50, 80, 190),
    "yellow": (240, 200, 50),
    "purple": (130, 60, 150),
    "orange": (240, 130, 40),
    "pink": (240, 150, 180),
    "black": (30, 30, 34),
}
SHAPES = ("circle", "square", "triangle", "bar")
FILL = np.array([np.pi / 4, 1.0, 0.5, 1.0])  # the share of its bounding box that each shape covers
HOSTILE = "<img src=x onerror=\"document.title='broken in'\">"


def draw(shape: str, colour: str, size: int = 60, side: int = 110) -> Image.Image:
    image = Image.new("RGB", (side, side), "white")
    pen, low, high = ImageDraw.Draw(image), (side - size) // 2, (side + size) // 2
    fill = COLOURS[colour]
    if shape == "circle":
        pen.ellipse((low, low, high, high), fill=fill)
    elif shape == "square":
        pen.rectangle((low, low, high, high), fill=fill)
    elif shape == "triangle":
        pen.polygon([(side // 2, low), (low, high), (high, high)], fill=fill)
    else:
        pen.rectangle((low, side // 2 - size // 8, high, side // 2 + size // 8), fill=fill)
    return image


def pairs(folder: Path) -> list[Pair]:
    """Every shape in every colour, twice. Ids have slashes and signs; one row's words try to be markup."""
    made = []
    for shape in SHAPES:
        for n, colour in enumerate(COLOURS):
            for size in (45, 75):
                path = folder / f"{colour}-{shape}-{size}.png"
                draw(shape, colour, size).save(path)
                made.append(
                    Pair(
                        id=f"shapes/{shape}#{colour} {size}",
                        picture=Picture(path=str(path)),
                        caption=f"a {'large' if size > 60 else 'small'} {colour} {shape}",
                        group=f"{colour} {shape}",
                        split="train",
                        attributes={
                            "shape": shape,
                            "colour": colour,
                            "size": float(size),
                            "warm": n in (0, 3, 5, 6),
                            "price": 4.5 * n or None,
                        },
                        name=f"{colour.capitalize()} {shape}",
                    )
                )
    made[0].name = made[0].caption = made[0].attributes["colour"] = HOSTILE
    return made


class Shapes:
    """A run: 12 dimensions, eight for the colours and four for the shapes, half of the length each."""

    fingerprint = "shapes"
    dim = 12
    can_match = can_answer = True
    match_weight = 1e4
    picture_size = 64
    answers = [*COLOURS, *SHAPES, "yes", "no"]  # noqa: RUF012

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        known = [*COLOURS, *SHAPES]
        return unit(np.array([[float(w in re.findall(r"\w+", text.lower())) for w in known] for text in texts]) + 1e-3)

    def encode_pictures(self, pictures: list[Image.Image]) -> np.ndarray:
        return unit(np.array([self._look(picture) for picture in pictures]))

    def _look(self, picture: Image.Image) -> np.ndarray:
        pixels = np.asarray(picture.convert("RGB").resize((64, 64)), dtype=np.float32)
        ink = (pixels < 235).any(-1)
        if not ink.any():
            return np.full(12, 0.1)
        distance = np.linalg.norm(np.array([*COLOURS.values()]) - np.median(pixels[ink], axis=0), axis=1)
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        fill, flat = ink.sum() / (height * width), 4.0 * (width > 2 * height)
        shape = np.abs(FILL - fill) * 6 + np.array([flat, flat, flat, 4.0 - flat])
        return np.concatenate([soft(-distance / 20), soft(-shape * 3)])

    def match(self, text: str, pictures: list[Image.Image]) -> np.ndarray:
        cosine = self.encode_pictures(pictures) @ self.encode_texts([text])[0]
        return 1 / (1 + np.exp(-12 * (cosine - 0.6)))

    def answer(self, picture: Image.Image, question: str, allowed: list[str] | None = None) -> list[tuple[str, float]]:
        seen = dict(zip(self.answers, [*self._look(picture), 0.05, 0.05]))
        part = COLOURS if "colour" in question else SHAPES if "shape" in question else self.answers
        chance = {a: seen[a] + 1e-4 for a in allowed or self.answers if a in part or allowed}
        chance |= {a: 1e-4 for a in allowed or self.answers if a not in chance}
        total = sum(chance.values())
        return sorted(((a, p / total) for a, p in chance.items()), key=lambda pair: -pair[1])


def soft(scores: np.ndarray) -> np.ndarray:
    exp = np.exp(scores - scores.max())
    return exp / exp.sum()


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
