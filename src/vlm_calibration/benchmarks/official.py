"""Scores under the benchmarks' own rules by the names that they have in `metrics.json`: `official/...`, apart from ours."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import reduce
from typing import Any, Protocol, Self

OFFICIAL = "official"


class OfficialCounts(Protocol):
    """What is counted of answers, enough for a benchmark's scores."""

    def __add__(self, other: Self, /) -> Self:
        """The counts of both sets of answers."""
        ...

    def scores(self) -> dict[str, float]:
        """The official scores by name, NaN where the benchmark's script has none."""
        ...


def official_scores(parts: Mapping[str, OfficialCounts]) -> dict[str, float]:
    """The scores of one or several sets of questions by flat names.

    Args:
        parts: name -> counts, at least one.

    Returns:
        `official/accuracy` and so on, over all parts together if they are of one benchmark. Of several parts also those of
        each, `official/random/accuracy`: these are what the benchmark's script prints, which takes one file at a time.
    """
    found: dict[str, float] = {}
    counts: list[Any] = list(parts.values())
    if len({type(part) for part in counts}) == 1:
        found |= reduce(operator.add, counts).scores()
    if len(counts) > 1:
        found |= {
            f"{name}/{key}": value for name, part in parts.items() for key, value in part.scores().items()
        }
    return {f"{OFFICIAL}/{key}": value for key, value in found.items()}


def blocks_of(scores: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """What `official_scores` returns, taken apart: "" or "random" or "attribute" -> score by its own name."""
    blocks: dict[str, dict[str, float]] = {}
    for name, value in scores.items():
        block, _, key = name.removeprefix(f"{OFFICIAL}/").rpartition("/")
        blocks.setdefault(block, {})[key] = value
    return blocks
