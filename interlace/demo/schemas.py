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
    distinct: int | None = Field(
        default=None, description="Different values among the rows looked at (text and boolean)."
    )
    values: list[ValueCount] = Field(
        default=[], description="The most frequent values (text and boolean), in that order."
    )
    minimum: float | None = Field(default=None, description="Smallest value (number).")
    maximum: float | None = Field(default=None, description="Largest value (number).")


class Score(BaseModel):
    name: str
    value: float = Field(description="A share: 0 to 1.")
    low: float | None = Field(default=None, description="Lower end of the 95 % interval.")
    high: float | None = None
    chance: float | None = Field(default=None, description="What guessing would reach.")


class Limits(BaseModel):
    max_bytes: int
    max_pixels: int
    max_k: int
    max_text: int


class Info(BaseModel):
    run: str
    count: int = Field(description="Pictures in the index.")
    metrics: list[Score] = Field(default=[], description="The run's own evaluation, as it was written after training.")
    columns: list[Column]
    exact_counts: bool = Field(description="Whether the columns' counts are of all rows or of a random sample.")
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
    match: float | None = Field(default=None, description="Probability that words and picture belong together.")


class Items(BaseModel):
    items: list[Item]
    count: int


class Found(BaseModel):
    hits: list[Hit]
    count: int = Field(description="Pictures in the index.")
    milliseconds: float
    reranked: bool
    hint: str | None = Field(default=None, description="Why nothing or nothing convincing was found, and what to try.")
    hopeless: bool = Field(default=False, description="Nothing resembles the query; the hits are only the nearest.")


class AnswerChance(BaseModel):
    answer: str
    probability: float


class Answered(BaseModel):
    question: str
    answers: list[AnswerChance] = Field(description="The most probable answers, most probable first, at most 20.")
    rest: float = Field(description="Probability of all the other answers together.")
    n_answers: int = Field(description="How many answers were possible.")
    milliseconds: float
