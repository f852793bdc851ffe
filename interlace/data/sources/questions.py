"""questions.jsonl beside a table of pairs: one question a line, pointing at its pair by id."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interlace.data.rows import Problems


def weighted(answers: Any) -> list[tuple[str, float]]:
    """[(answer, weight)] from a word, a list of words (repeated ones weigh more), or pairs which are kept as given."""
    if answers is None:
        return []
    if isinstance(answers, (str, int, float, bool)):
        answers = [answers]
    if isinstance(answers, dict):
        return [(str(answer), float(weight)) for answer, weight in answers.items()]
    if answers and all(isinstance(item, (list, tuple)) and len(item) == 2 for item in answers):
        return [(str(answer), float(weight)) for answer, weight in answers]
    words = Counter(_word(item["answer"] if isinstance(item, dict) else item) for item in answers)
    return [(word, count / len(answers)) for word, count in words.items()]


def _word(answer: Any) -> str:
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    return " ".join(str(answer).split())


def read_questions(file: Path, problems: Problems) -> Iterator[dict[str, Any]]:
    """Lines need pair_id, question, and answers (or answer); id and kind may be there. Others are listed and
    skipped."""
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                answers = weighted(record.get("answers", record.get("answer")))
                question = {"pair_id": record["pair_id"], "question": record["question"], "answers": answers}
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                problems.add(f"{file.name} line {number}", f"not a question: {type(error).__name__} {error}")
                continue
            yield {**question, "id": record.get("id", record.get("question_id")), "kind": record.get("kind")}
