"""What Python callers give a run: lists of texts and of pictures, looked at before a model is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from interlace.data.pictures import BadPicture, to_rgb
from interlace.errors import UserError, shown


def several(items: Any, what: str) -> Any:
    """What was given, where it can be a list. Raises UserError for one thing alone: the letters of a text are texts."""
    if isinstance(items, str | bytes) or not isinstance(items, Iterable):
        fix = "" if items is None else ": put it into a list, [...]"
        raise UserError(f"expected a list of {what}, got {shown(items)}{fix}.")
    return items


def check_questions(questions: list[str]) -> None:
    """Raises UserError for what is no text, and for an empty one."""
    for question in questions:
        if not isinstance(question, str):
            raise UserError(f"expected a question, got {shown(question)}.")
        if not question.strip():
            raise UserError('the question is empty: ask something, such as "what is it?".')


def as_picture(given: Any) -> Image.Image:
    """As opening a file gives it: 8-bit RGB, transparency over white. Raises UserError for what is no picture."""
    if not isinstance(given, Image.Image):
        fix = ": interlace.data.pictures.open_picture opens one" if isinstance(given, str | bytes | Path) else ""
        raise UserError(f"expected a picture (PIL.Image.Image), got {shown(given)}{fix}.")
    try:
        return to_rgb(given)
    except (BadPicture, OSError) as error:  # Pillow reads the file of a picture when its pixels are asked for
        raise UserError(f"a picture cannot be used: {error}.") from None
