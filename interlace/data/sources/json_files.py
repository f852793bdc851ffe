"""JSON and JSONL tables: LAVIS lists of `image`, `caption`, `image_id`, and the caption files of COCO and Karpathy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from interlace.data.rows import Problems
from interlace.data.sources.build import Raw, batched_dicts
from interlace.errors import UserError

LOOKED_AT = 10_000  # lines whose keys become the columns


def read_jsonl(file: Path, name: str) -> Raw:
    """One object a line. Its columns are the keys of the first ten thousand lines; later new keys are ignored."""
    columns = _keys(record for _, record in islice(_lines(file, Problems()), LOOKED_AT))
    if not columns:
        raise UserError(f"{file}: no line of it is a JSON object. Expected one object a line, such as {EXAMPLE}.")
    problems = Problems()
    return Raw(
        name=name,
        where=str(file),
        columns=columns,
        batches=lambda: batched_dicts(_lines(file, problems), columns),
        root=file.parent,
        problems=problems,
    )


EXAMPLE = '{"image": "a.jpg", "caption": "a red chair"}'


def _lines(file: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                problems.add(number, f"not readable as JSON: {error}")
                continue
            if isinstance(record, dict):
                yield number, record
            else:
                problems.add(number, f"not a JSON object: {line.strip()[:60]}")


def read_json(file: Path, name: str) -> Raw:
    """A list of objects. Also COCO's {"images", "annotations"} and Karpathy's {"images": [{"sentences"}]} captions."""
    records = _records(file, load_json(file))
    columns = _keys(record for record in records if isinstance(record, dict))
    if not columns:
        raise UserError(f"{file}: the list holds no objects. Expected items such as {EXAMPLE}.")
    problems = Problems()

    def numbered() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, record in enumerate(records, 1):
            if isinstance(record, dict):
                yield number, record
            else:
                problems.add(number, f"not a JSON object: {str(record)[:60]}")

    return Raw(
        name=name,
        where=str(file),
        columns=columns,
        batches=lambda: batched_dicts(numbered(), columns),
        root=file.parent,
        total=len(records),
        problems=problems,
    )


def load_json(file: Path) -> Any:
    """Raises UserError with the place of the error when the file is not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8.") from None
    except ValueError as error:
        hint = " It may be JSONL (one object a line): name it .jsonl." if "Extra data" in str(error) else ""
        raise UserError(f"{file} is not valid JSON: {error}.{hint}") from None


def _records(file: Path, content: Any) -> list[Any]:
    if isinstance(content, list):
        if not content:
            raise UserError(f"{file} is an empty list: expected items such as {EXAMPLE}.")
        return content
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        if isinstance(content.get("annotations"), list):
            return _coco(content["images"], content["annotations"])
        if any("sentences" in image for image in content["images"][:10]):
            return [_karpathy(image) for image in content["images"]]
    for key in ("data", "rows", "annotations", "items"):
        if isinstance(content, dict) and isinstance(content.get(key), list):
            return content[key]
    found = (
        f"an object with the keys {', '.join(map(repr, list(content)[:8]))}" if isinstance(content, dict) else "a value"
    )
    raise UserError(f"{file}: expected a list of objects such as {EXAMPLE}, found {found}.")


def _coco(images: list[dict], annotations: list[dict]) -> list[dict[str, Any]]:
    captions: dict[Any, list[str]] = {}
    for annotation in annotations:
        if "caption" in annotation:
            captions.setdefault(annotation.get("image_id"), []).append(annotation["caption"])
    return [
        {"image": image.get("file_name"), "id": image.get("id"), "caption": captions.get(image.get("id"), [])}
        for image in images
    ]


def _karpathy(image: dict[str, Any]) -> dict[str, Any]:
    folder, file = image.get("filepath", ""), image.get("filename", "")
    captions = [sentence.get("raw", "") for sentence in image.get("sentences", [])]
    path = f"{folder}/{file}" if folder else file
    return {"image": path, "id": image.get("imgid"), "caption": captions, "split": image.get("split")}


def _keys(records: Iterator[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record))
