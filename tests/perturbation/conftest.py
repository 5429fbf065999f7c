"""The level table and levels that several tests share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from vlm_calibration.perturbation.level_table import AnswerTypeCounts, LevelCount, LevelTable
from vlm_calibration.perturbation.levels import AnchoredLevels

Rows = Sequence[Sequence[float]]


def noise_counts(rows: Rows) -> AnswerTypeCounts:
    """Counts of noise alone: rows (strength, n, n_correct)."""
    return AnswerTypeCounts.of_kinds({"noise": rows})


COUNTS = {
    "yes_no": noise_counts([(0, 200, 190), (0.5, 200, 150), (1, 200, 104)]),
    # By chance the accuracy at strength 1 is higher than at 0.5.
    "short": noise_counts([(0, 100, 97), (0.5, 100, 20), (1, 300, 90)]),
}

PROVENANCE = {"model": "tiny", "schedule": "linear", "seed": 0, "weights": "abc", "prompt": "{question}"} | {
    "max_pixels": None
}

KINDS = {"noise": (0.0, 0.3, 0.7, 1.0), "blur": (0.0, 0.5, 1.0)}
"""Strengths at which `instance_counts` has counts."""

EASE = (0.55, 0.8, 0.98)
"""Accuracy on untouched images in each bin of the likelihood in `instance_counts`."""

EDGES = (0.625, 0.875)


def instance_counts(floor: float = 0.5, n: int = 400, ease: Sequence[float] = EASE) -> AnswerTypeCounts:
    """Counts of two kinds in three bins of the likelihood, whose accuracies fall from `ease` to `floor`, blur's by half."""

    def rows(top: float, kind: str) -> tuple[LevelCount, ...]:
        share = 1.0 if kind == "noise" else 0.5
        return tuple(LevelCount(s, n, round(n * (top - share * s * (top - floor)))) for s in KINDS[kind])

    return AnswerTypeCounts(tuple({kind: rows(top, kind) for kind in KINDS} for top in ease), EDGES)


@pytest.fixture
def levels() -> AnchoredLevels:
    return AnchoredLevels.fit(COUNTS, provenance=PROVENANCE)


def instance_table(provenance: Mapping[str, Any] = PROVENANCE) -> LevelTable:
    """A table of two answer types whose accuracies depend on the likelihood."""
    counts = {"yes_no": instance_counts(), "short": instance_counts(0.1, ease=(0.4, 0.7, 0.95))}
    return LevelTable(counts, provenance)
