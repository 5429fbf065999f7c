"""Scores by the benchmarks' own rules, under the keys `official/...` of `metrics.json`."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import reduce
from typing import Any, Protocol, Self

OFFICIAL = "official"


class OfficialCounts(Protocol):
    """Counts of answers from which a benchmark's scores are computed; those of two sets of answers can be added."""

    def __add__(self, other: Self, /) -> Self: ...

    def scores(self) -> dict[str, float]:
        """The official scores by name; NaN where the benchmark's script prints none."""
        ...


def official_scores(parts: Mapping[str, OfficialCounts]) -> dict[str, float]:
    """The scores of one or several sets of questions (at least one; name -> counts), as flat names.

    Returns:
        `official/accuracy` and so on over all parts, if all belong to one benchmark. With several parts also the scores of
        each part, `official/random/accuracy`, which the benchmark's script prints for one file.
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
    """Group the result of `official_scores` by part: "", "random" or "attribute" -> score name -> score."""
    blocks: dict[str, dict[str, float]] = {}
    for name, value in scores.items():
        block, _, key = name.removeprefix(f"{OFFICIAL}/").rpartition("/")
        blocks.setdefault(block, {})[key] = value
    return blocks
