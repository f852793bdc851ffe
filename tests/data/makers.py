"""Small real data to read: every picture has its own pattern, so that none is a duplicate by accident."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def drawing(seed: int, side: int = 48) -> Image.Image:
    """A smooth random picture: distinct at every scale."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def make_pictures(folder: Path, n: int, start: int = 0) -> list[str]:
    """Writes 000.png, 001.png, ... and returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:03d}.png" for i in range(start, start + n)]
    for i, name in enumerate(names, start):
        drawing(i).save(folder / name)
    return names


def same(picture, seed: int) -> bool:
    """Whether the stored picture decodes to `drawing(seed)`."""
    from interlace.data.pictures import open_picture

    return np.array_equal(np.asarray(open_picture(picture)), np.asarray(drawing(seed)))
