"""Scores by the benchmarks' own rules, under the keys `official/...` of `metrics.json`."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Self

from vlm_calibration.benchmarks.files import without_confidence
from vlm_calibration.records import Query

OFFICIAL = "official"


@dataclass(frozen=True)
class OfficialCounts(ABC):
    """How often each (category, gold answer, response) occurs."""

    answers: Counter[tuple[str | None, str, str]]

    @classmethod
    def of(cls, queries: Sequence[Query], texts: Sequence[str]) -> Self:
        """Count the answers to yes/no queries, without their stated confidence."""
        responses = (cls.response(without_confidence(text)) for text in texts)
        return cls(Counter((q.category, q.answer, r) for q, r in zip(queries, responses, strict=True)))

    def __add__(self, other: Self) -> Self:
        return type(self)(self.answers + other.answers)

    @staticmethod
    @abstractmethod
    def response(text: str) -> str:
        """What the benchmark's script reads in an answer: "Yes", "No", or "" for neither."""

    @abstractmethod
    def scores(self) -> dict[str, float]:
        """The official scores by name; NaN where the benchmark's script prints none."""


def official_scores(parts: Mapping[str, OfficialCounts]) -> dict[str, float]:
    """The scores of one or several sets of questions (name -> counts), by name.

    `official/accuracy` and so on over all parts, if all belong to one benchmark; with several also of each, `official/random/accuracy`.
    """
    scores: dict[str, float] = {}
    counts: list[Any] = list(parts.values())
    if len({type(part) for part in counts}) == 1:
        scores |= reduce(operator.add, counts).scores()
    if len(counts) > 1:
        for name, part in parts.items():
            scores |= {f"{name}/{key}": value for key, value in part.scores().items()}
    return {f"{OFFICIAL}/{key}": value for key, value in scores.items()}


def blocks_of(scores: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Group the result of `official_scores` by part: "", "random" or "attribute" -> name -> score."""
    blocks: dict[str, dict[str, float]] = {}
    for name, value in scores.items():
        block, _, key = name.removeprefix(f"{OFFICIAL}/").rpartition("/")
        blocks.setdefault(block, {})[key] = value
    return blocks
