"""Tables of questions: LAVIS rows (image, question, answer), and the question and annotation files of VQAv2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interlace.data.rows import Picture
from interlace.data.sources.build import Batch, Raw, batched_dicts
from interlace.data.sources.columns import QUESTION_ALIASES, resolve
from interlace.data.sources.json_files import load_json
from interlace.data.sources.questions import weighted
from interlace.errors import UserError

# Official accuracy of an answer that n of the ten annotators gave: each annotator is compared with the nine others.
# METER's training targets are the same table (spec of VQA v2, Goyal et al. 2017).
SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)


def is_question_table(raw: Raw, wanted: dict[str, str] | None) -> bool:
    roles = resolve(raw.columns, wanted, raw.where, (), QUESTION_ALIASES)
    return "question" in roles and "image" in roles


def as_questions(raw: Raw, wanted: dict[str, str] | None) -> Raw:
    """A table of questions as pairs, one per distinct picture and without captions, and the questions about them."""
    roles = resolve(raw.columns, wanted, raw.where, ("image", "question"), QUESTION_ALIASES)

    def pairs() -> Iterator[Batch]:
        known: set[str] = set()
        for places, cells in raw.batches():
            labels = cells.get("__label__")
            keep = []
            for i, cell in enumerate(cells[roles["image"]]):
                key = labels[i] if labels and isinstance(cell, Picture) else _key(cell)
                if key not in known:
                    known.add(key)
                    keep.append((i, key))
            out: dict[str, list[Any]] = {
                "image": [cells[roles["image"]][i] for i, _ in keep],
                "__label__": [key for _, key in keep],
                "split": [cells[roles["split"]][i] if "split" in roles else None for i, _ in keep],
            }
            yield [places[i] for i, _ in keep], out

    def questions() -> Iterator[dict[str, Any]]:
        raw.problems.again = True
        for places, cells in raw.batches():
            labels = cells.get("__label__")
            for i, cell in enumerate(cells[roles["image"]]):
                answers = cells[roles["answer"]][i] if "answer" in roles else None
                try:
                    answers = weighted(answers) if answers not in (None, "") else []
                except ValueError as error:
                    raw.problems.add_question(places[i], str(error))
                    continue
                yield {
                    "pair_id": labels[i] if labels and isinstance(cell, Picture) else _key(cell),
                    "question": cells[roles["question"]][i] or "",
                    "answers": answers,
                    "id": cells[roles["question_id"]][i] if "question_id" in roles else places[i],
                    "kind": cells[roles["kind"]][i] if "kind" in roles else None,
                }

    return Raw(
        name=raw.name,
        where=raw.where,
        columns=["image", "split"],
        roles=roles,
        batches=pairs,
        root=raw.root,
        total=raw.total,
        questions=questions,
        split=raw.split,
        stamp=raw.stamp,
        problems=raw.problems,
    )


def _key(cell: Any) -> str:
    return str(cell.get("path")) if isinstance(cell, dict) else str(cell).strip()


def soft_scores(answers: list[str]) -> list[tuple[str, float]]:
    """[(answer, soft score)]: 0.3, 0.6, 0.9, 1 for an answer given by 1, 2, 3, at least 4 of the annotators."""
    return [(answer, SOFT_SCORES[min(count, 4)]) for answer, count in Counter(answers).items()]


def read_vqa2(file: Path, name: str, pictures: Path | None, annotations: Path | None = None) -> Raw:
    """`v2_OpenEnded_mscoco_train2014_questions.json` with its annotations beside it (none for the test split).

    Pictures are `COCO_train2014_000000000009.jpg` (or `000000000009.jpg`) in the folder `pictures`, or in one named
    like the split, such as train2014/, beside the questions. Kinds are the answer types: yes/no, number, other.
    """
    content = load_json(file)
    asked = content.get("questions") if isinstance(content, dict) else None
    if not isinstance(asked, list) or not asked or "image_id" not in asked[0]:
        raise UserError(
            f"{file}: expected VQAv2 questions, {{'questions': [{{'image_id', 'question', 'question_id'}}]}}."
        )
    part = str(content.get("data_subtype") or _part(file))
    annotations = annotations or _annotations(file, part)
    given = load_json(annotations).get("annotations", []) if annotations else []
    answers = {
        annotation["question_id"]: (
            soft_scores([str(answer["answer"]).strip() for answer in annotation["answers"]]),
            annotation.get("answer_type", ""),
        )
        for annotation in given
    }
    root, template = _template([item["image_id"] for item in asked[:200]], file.parent, pictures, part)
    images = list(dict.fromkeys(item["image_id"] for item in asked))
    records = [(f"image {i}", {"image": template.format(part=part, id=int(i)), "id": str(i)}) for i in images]

    def questions() -> Iterator[dict[str, Any]]:
        for item in asked:
            scores, kind = answers.get(item["question_id"], ([], ""))
            yield {
                "pair_id": str(item["image_id"]),
                "question": item["question"],
                "answers": scores,
                "id": item["question_id"],
                "kind": kind,
            }

    split = next((word for word in ("train", "val", "test") if part.lower().startswith(word)), None)
    return Raw(
        name=name,
        where=str(file),
        columns=["image", "id"],
        batches=lambda: batched_dicts(records, ["image", "id"]),
        root=root,
        total=len(records),
        questions=questions,
        split=split,
    )


def _part(file: Path) -> str:
    return next((word for word in file.stem.split("_") if word.startswith(("train", "val", "test"))), "train2014")


def _annotations(file: Path, part: str) -> Path | None:
    found = sorted(other for other in file.parent.glob("*annotations*.json") if part in other.name)
    return found[0] if found else None


def _template(ids: list[int], beside: Path, pictures: Path | None, part: str) -> tuple[Path, str]:
    """(folder, name template) under which most of the first pictures exist."""
    folders = (
        [pictures, pictures / part] if pictures else [beside / part, beside, beside / "images", beside / "pictures"]
    )
    names = ("COCO_{part}_{id:012d}.jpg", "{id:012d}.jpg", "{id}.jpg")
    options = [(folder, name) for folder in folders if folder is not None for name in names]
    return max(
        options, key=lambda option: sum((option[0] / option[1].format(part=part, id=int(i))).exists() for i in ids)
    )
