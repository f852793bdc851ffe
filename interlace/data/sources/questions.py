"""questions.jsonl beside a table of pairs: one question a line, pointing at its pair by id."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interlace.data.rows import Problems

EXAMPLE = '{"pair_id": "a.jpg", "question": "what is it?", "answers": ["lamp"]}'


def weighted(answers: Any) -> list[tuple[str, float]]:
    """[(answer, weight)] from a word, a list of words (repeated ones weigh more), or pairs whose weights are kept.

    Raises ValueError, in words for a person, for anything else and for a weight that is no soft score from 0 to 1."""
    if answers is None:
        return []
    if isinstance(answers, (str, int, float, bool)):
        answers = [answers]
    if isinstance(answers, dict):
        return [(str(answer), _weight(weight)) for answer, weight in answers.items()]
    if answers and all(isinstance(item, (list, tuple)) and len(item) == 2 for item in answers):
        return [(str(answer), _weight(weight)) for answer, weight in answers]
    words = Counter(_word(item["answer"] if isinstance(item, dict) and "answer" in item else item) for item in answers)
    return [(word, count / len(answers)) for word, count in words.items()]


def _weight(given: Any) -> float:
    try:
        weight = float(given)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight <= 1:
        hint = " (to weigh by counts, repeat the word in a list)" if weight > 1 else ""
        raise ValueError(f"not a weight: an answer's weight is from 0 to 1, got {_short(given)}{hint}")
    return weight


def _word(answer: Any) -> str:
    if answer is None or isinstance(answer, (list, tuple, dict)):
        raise ValueError(f"not an answer: expected words, or pairs of word and weight, got {_short(answer)}")
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    return " ".join(str(answer).split())


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def read_questions(file: Path, problems: Problems) -> Iterator[dict[str, Any]]:
    """Lines need pair_id, question, and answers (or answer); id and kind may be there. Others are listed and
    skipped."""
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _question(line)
            except ValueError as error:
                problems.add_question(f"{file.name} line {number}", str(error))


def _question(line: str) -> dict[str, Any]:
    """Raises ValueError, in words for a person."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not readable as JSON: {error}") from None
    if not isinstance(record, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(record), "a number or a boolean")
        raise ValueError(f"not an object: expected {EXAMPLE}, got {kind}")
    for key in ("pair_id", "question"):
        if record.get(key) is None or not str(record[key]).strip():
            raise ValueError(f"no `{key}`: expected {EXAMPLE}, got {_short(record)}")
    answers = weighted(record.get("answers", record.get("answer")))
    return {
        "pair_id": record["pair_id"],
        "question": record["question"],
        "answers": answers,
        "id": record.get("id", record.get("question_id")),
        "kind": record.get("kind"),
    }
