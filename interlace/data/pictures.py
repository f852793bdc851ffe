"""Opening pictures that come from anywhere: right side up, in RGB, or not at all.

A picture that cannot be trusted is refused with a short reason, never replaced by a grey square: a loader that fills
the missing half of a truncated file teaches the model grey. One limit is known: damage in the middle of a JPEG's data
usually decodes without an error in Pillow and goes unnoticed here too.
"""

from __future__ import annotations

import io
import re
import warnings
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from interlace.data.rows import Picture

MAX_PIXELS = 64_000_000
# Only raster formats: EPS would start an interpreter, PSD and FITS are rarely what a table of photographs means.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "PPM", "ICO", "JPEG2000", "HEIF")
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".ppm",
    ".pgm", ".jp2",
)  # fmt: skip
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")

# Oddities of metadata are no news to a user; what matters is judged below. A filter per call would not be thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadPicture(Exception):
    """This picture cannot be used. `reason` is a few words that make sense beside a file name."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # not kept: HEIF enters while other threads decode


@cache
def _heic_ready() -> bool:
    try:
        import pillow_heif  # type: ignore[import-not-found]
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _refuse_by_first_bytes(head: bytes) -> None:
    if not head:
        raise BadPicture("empty file")
    if head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS and b"avif" not in head[8:40] and not _heic_ready():
        raise BadPicture("HEIC, which needs `pip install interlace[heic]`")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        raise BadPicture("not a picture (HTML)")
    if start.startswith((b"<svg", b"<?xml")):
        raise BadPicture("not a picture we read (SVG or XML)")
    if start.startswith((b"{", b"[")) and b"\x00" not in head:
        raise BadPicture("not a picture (JSON)")
    if head.startswith(b"version https://git-lfs"):
        raise BadPicture("not a picture (a Git LFS pointer)")
    if not head.strip(b"\x00"):
        raise BadPicture("not a picture (zeros)")


def _too_many(pixels: int, max_pixels: int) -> BadPicture:
    return BadPicture(f"too many pixels ({pixels / 1e6:,.0f} Mpx > {max_pixels / 1e6:,.0f} Mpx)")


def open_picture(
    ref: Picture | str | Path | bytes, size_hint: int | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The picture as 8-bit RGB, upright, first frame, transparency over white.

    `size_hint` is the side in pixels it will be shown at: a larger file is decoded at a fraction of its size, leaving
    the shortest side at least twice the hint (so a later resize still averages) unless the file has fewer pixels.
    `max_pixels` is checked against the header, before anything is decoded.

    Raises BadPicture with a short reason for whatever cannot be read in full. Pillow's own limit against decompression
    bombs stays in force above `max_pixels`.
    """
    if isinstance(ref, (str, Path)):
        ref = Picture(path=str(ref))
    elif isinstance(ref, (bytes, bytearray, memoryview)):
        ref = Picture(data=bytes(ref))
    try:
        file: IO[bytes]
        if ref.data is None and ref.path is not None and ref.offset is None:
            file = open(ref.path, "rb")  # noqa: SIM115 (closed below; Pillow reads only what it needs)
        else:
            file = io.BytesIO(ref.read())
    except FileNotFoundError:
        raise BadPicture("missing file") from None
    except IsADirectoryError:
        raise BadPicture("a folder, not a file") from None
    except OSError as error:
        raise BadPicture(f"cannot be read ({error.strerror or error})") from None
    with file:
        _refuse_by_first_bytes(file.read(512))
        file.seek(0)
        return _decode(file, size_hint, max_pixels)


def _decode(file: IO[bytes], size_hint: int | None, max_pixels: int) -> Image.Image:
    try:
        with Image.open(file, formats=_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _too_many(width * height, max_pixels)
            if width * height == 0:
                raise BadPicture("no pixels")
            if size_hint:
                image.draft("RGB", (2 * size_hint, 2 * size_hint))
            image.load()
            return to_rgb(_upright(_reduced(image, size_hint)))
    except BadPicture:
        raise
    except Image.DecompressionBombError as error:
        number = re.search(r"\((\d+) pixels\)", str(error))
        raise (_too_many(int(number[1]), max_pixels) if number else BadPicture("too many pixels")) from None
    except UnidentifiedImageError:
        raise BadPicture("not a picture (unknown format)") from None
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's decoders raise nearly anything on broken data (struct, zlib, value, syntax errors)
        raise BadPicture(_why(error)) from None


def _why(error: Exception) -> str:
    text = str(error).lower()
    if isinstance(error, EOFError) or any(
        sign in text for sign in ("truncated", "not enough", "unexpected end", "eof")
    ):
        return "truncated"
    if not text:
        return f"broken ({type(error).__name__})"
    return f"broken ({str(error).splitlines()[0][:80]})"


def _reduced(image: Image.Image, size_hint: int | None) -> Image.Image:
    """Averages whole blocks while the shortest side stays at least twice the hint: what Pillow calls a reducing gap."""
    if not size_hint or image.mode in ("P", "PA", "1") or image.mode.startswith("I;") or "transparency" in image.info:
        return image
    factor = min(image.size) // (2 * size_hint)
    return image.reduce(factor) if factor >= 2 else image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image  # broken metadata says nothing about the pixels


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode: 16-bit grey scaled (Pillow would clip it), transparency over white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bit(image))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode in ("RGBa", "La"):
            image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(image: Image.Image) -> np.ndarray:
    """(H, W) uint8. 16-bit values use their whole range, 0..65535; wider integers and floats their own least and
    most."""
    values = np.asarray(image).astype(np.float64)
    low, high = 0.0, 65535.0
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        finite = values[np.isfinite(values)]
        if not finite.size:
            raise BadPicture("no finite pixel values")
        low, high = float(finite.min()), float(finite.max())
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return np.round((values - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8)
