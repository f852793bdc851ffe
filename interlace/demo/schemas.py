"""The shapes of the demo's JSON answers. FastAPI writes the API description at /openapi.json from them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

Value = str | float | bool | None


class Failure(BaseModel):
    error: str = Field(description="What was expected, what came instead, and the likely fix.")


class ValueCount(BaseModel):
    value: str | bool
    count: int


class Column(BaseModel):
    """What a filter needs to know about one attribute."""

    name: str
    type: Literal["text", "number", "boolean"]
    distinct: int | None = Field(None, description="Different values among the rows looked at (text and boolean).")
    values: list[ValueCount] = Field([], description="The most frequent values, most frequent first (text and boolean).")
    minimum: float | None = Field(None, description="Smallest value (number).")
    maximum: float | None = Field(None, description="Largest value (number).")


class Limits(BaseModel):
    max_bytes: int
    max_pixels: int
    max_k: int
    max_text: int


class Info(BaseModel):
    run: str
    count: int = Field(description="Pictures in the index.")
    metrics: dict[str, float] = Field({}, description="The run's own evaluation, as it was written at training time.")
    columns: list[Column]
    can_match: bool = Field(description="The run can score how well words and one picture match (re-ranking).")
    can_answer: bool
    answers: list[str] = Field(description="The closed list an answer comes from; the first 500 when it is longer.")
    n_answers: int
    examples: list[str] = Field(description="Queries to try.")
    questions: list[str] = Field(description="Questions to try.")
    limits: Limits


class Item(BaseModel):
    id: str
    name: str
    caption: str
    attributes: dict[str, Value]


class Hit(Item):
    score: float = Field(description="Similarity of query and picture. Compare it within one search only.")
    match: float | None = Field(None, description="Probability, by the matching head, that words and picture belong together.")


class Items(BaseModel):
    items: list[Item]
    count: int


class Found(BaseModel):
    hits: list[Hit]
    count: int = Field(description="Pictures in the index.")
    milliseconds: float
    reranked: bool
    hint: str | None = Field(None, description="Why nothing or nothing convincing was found, and what to try.")


class AnswerChance(BaseModel):
    answer: str
    probability: float


class Answered(BaseModel):
    question: str
    answers: list[AnswerChance] = Field(description="The most probable answers, most probable first, at most 20.")
    rest: float = Field(description="Probability of all the other answers together.")
    n_answers: int = Field(description="How many answers were possible.")
    milliseconds: float
