"""A folder of pictures, each with its text beside it: 00001.jpg, 00001.txt, and perhaps 00001.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from interlace.data.pictures import SUFFIXES
from interlace.data.rows import Problems
from interlace.data.sources.build import SPLIT_WORDS, Raw, batched_dicts
from interlace.errors import UserError

LOOKED_AT = 1000  # pictures whose .json keys become the columns


def read_pictures(folder: Path, name: str) -> Raw:
    """All pictures below the folder. A text is the caption, JSON keys are attributes, and a picture without a text has
    an empty caption: enough to search, not to train. Subfolders named train, val and test are the splits; other
    subfolders become the attribute `folder`.

    Raises UserError when there is no picture.
    """
    problems = Problems()
    first = list(islice(_records(folder, Problems()), LOOKED_AT))
    if not first:
        raise UserError(
            f"{folder}: no pictures in this folder, and no table that names any. Expected "
            f"{', '.join(SUFFIXES[:6])}, ... or a .csv, .tsv, .json, .jsonl, .parquet or .tar file."
        )
    columns = list(dict.fromkeys(["image", "caption", *(key for _, record in first for key in record)]))
    return Raw(
        name=name,
        where=str(folder),
        columns=columns,
        batches=lambda: batched_dicts(_records(folder, problems), columns),
        root=folder,
        problems=problems,
    )


def _records(folder: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    with os.scandir(folder) as entries:
        tops = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    split_folders = bool(tops) and all(top.lower() in SPLIT_WORDS for top in tops)
    for place, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith("."))
        below = os.path.relpath(place, folder)
        parts = [] if below == "." else below.split(os.sep)
        split = parts.pop(0) if split_folders and parts else None
        names = set(files)
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix.lower() not in SUFFIXES or file.startswith("."):
                continue
            image = file if below == "." else os.path.join(below, file)
            record: dict[str, Any] = {"image": image}
            if parts:
                record["folder"] = "/".join(parts)
            if stem + ".json" in names:
                record.update(_beside(os.path.join(place, stem + ".json"), image, problems))
                record["image"] = image
            if stem + ".txt" in names:
                record["caption"] = _text(os.path.join(place, stem + ".txt"), image, problems)
            if split:
                record["split"] = split
            yield image, record


def _text(file: str, image: str, problems: Problems) -> str:
    try:
        with open(file, encoding="utf-8-sig") as text:
            return text.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        problems.add(image, f"its text is not readable: {error}")
        return ""


def _beside(file: str, image: str, problems: Problems) -> dict[str, Any]:
    try:
        with open(file, encoding="utf-8-sig") as text:
            record = json.load(text)
        if isinstance(record, dict):
            return record
        problems.add(image, "its .json is not an object")
    except (OSError, ValueError) as error:
        problems.add(image, f"its .json is not readable: {error}")
    return {}
