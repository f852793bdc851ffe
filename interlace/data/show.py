"""`interlace data show`: a few rows as a person sees them, and as the model will."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from interlace.data.pictures import BadPicture, open_picture
from interlace.data.rows import Pair, Source
from interlace.data.sources import open_source
from interlace.errors import UserError


def show(
    source: Source | str | Path | list,
    columns: dict[str, str] | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    rows: int = 3,
) -> None:
    """Prints the first rows of the training split (of all, when it is empty) with their questions.

    With a `processor` it also prints the shapes of the batch these rows make and the words left after tokenizing; a
    `tokenizer` alone gives the words. Raises UserError for fewer than one row.
    """
    if rows < 1:
        raise UserError(f"rows: expected at least 1 to show, got {rows}.")
    opened = source if isinstance(source, Source) else open_source(source, columns)
    console = Console(highlight=False)
    console.print(repr(opened), markup=False)
    for line in opened.describe_columns():
        console.print(line, markup=False, style="yellow" if line.startswith("NOTE") else None, soft_wrap=True)
    if missing := opened.left_out():
        console.print(missing, markup=False, soft_wrap=True)
    if opened.problems:
        row, reason = opened.problems[0]
        console.print(f"for example {row}: {reason}", markup=False, soft_wrap=True)
    for doubt in opened.doubts:
        console.print(f"kept, but look at {doubt}", markup=False, soft_wrap=True)
    indices = opened.indices("train")
    chosen = (indices if len(indices) else opened.indices())[:rows].tolist()
    pairs = [opened.pair(i) for i in chosen]
    pictures: list[Image.Image] = []
    owners = opened.question_rows()
    for i, pair in zip(chosen, pairs):
        try:
            picture = open_picture(pair.picture)
            pictures.append(picture)
            size = f"{picture.width} x {picture.height}"
        except BadPicture as bad:
            size = f"not readable: {bad.reason}"
        console.print(_row(pair, size, [opened.question(int(q)) for q in (owners == i).nonzero()[0]]))
    texts = [pair.caption for pair in pairs]
    if processor is not None:
        _as_batch(console, processor, pictures, texts)
    elif tokenizer is not None:
        _words(console, tokenizer, tokenizer(texts)["input_ids"])


def _row(pair: Pair, size: str, questions: list) -> Table:
    table = Table(title=pair.name, show_header=False, title_justify="left", min_width=60)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    cells = {"id": pair.id, "picture": f"{pair.picture} ({size})", "caption": pair.caption or "(none)",
             "split, group": f"{pair.split}, {pair.group}"}  # fmt: skip
    cells |= {name: str(value) for name, value in pair.attributes.items() if value is not None}
    for question in questions:
        answers = ", ".join(answer if weight == 1 else f"{answer} {weight:.2g}" for answer, weight in question.answers)
        cells[f"asked: {question.kind or question.id}"] = f"{question.question} {answers or '(no answer)'}"
    for name, value in cells.items():
        table.add_row(_plain(name), _plain(value))
    return table


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _as_batch(console: Console, processor: Any, pictures: list[Image.Image], texts: list[str]) -> None:
    if pictures:
        pixels = processor.pictures(pictures)
        console.print(f"pixel_values {pixels.dtype} {tuple(pixels.shape)}", markup=False)
    ids, mask = processor.texts(texts)
    console.print(f"caption_ids {ids.dtype} {tuple(ids.shape)}, caption_mask {tuple(mask.shape)}", markup=False)
    _words(console, processor.tokenizer, [row[keep.bool()].tolist() for row, keep in zip(ids, mask)])


def _words(console: Console, tokenizer: Any, ids: list[list[int]]) -> None:
    console.print("the words the model sees:")
    for row in ids:
        console.print(f"  {tokenizer.decode(row)}  ({len(row)} tokens)", markup=False)
