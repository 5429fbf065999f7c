"""The level table, levels, image and mask that several tests share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from vlm_calibration.perturbation.level_table import AnswerTypeCounts, LevelCount, LevelTable
from vlm_calibration.perturbation.levels import AnchoredLevels

from ..level_tables import noise_counts

COUNTS = {
    "yes_no": noise_counts((0, 200, 190), (0.5, 200, 150), (1, 200, 104)),
    # By chance the accuracy at strength 1 is higher than at 0.5.
    "short": noise_counts((0, 100, 97), (0.5, 100, 20), (1, 300, 90)),
}
PROVENANCE = {"model": "tiny", "schedule": "linear", "seed": 0, "weights": "abc", "prompt": "{question}"} | {
    "max_pixels": None
}
KINDS = {"noise": (0.0, 0.3, 0.7, 1.0), "blur": (0.0, 0.5, 1.0)}
"""Strengths at which `instance_counts` has counts."""


def instance_counts(floor: float = 0.5, ease: Sequence[float] = (0.55, 0.8, 0.98)) -> AnswerTypeCounts:
    """Counts of two kinds in three bins of the likelihood, whose accuracies fall from `ease` to `floor`, blur's by half."""

    def row(kind: str, strength: float) -> LevelCount:
        share = strength if kind == "noise" else 0.5 * strength
        return LevelCount(
            strength, (400,) * 3, tuple(round(400 * (top - share * (top - floor))) for top in ease)
        )

    kinds = {kind: tuple(row(kind, s) for s in strengths) for kind, strengths in KINDS.items()}
    return AnswerTypeCounts(kinds, (0.625, 0.875))


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    """An ellipse within the image."""
    y, x = np.mgrid[:60, :80]
    return ((y - 30) / 20) ** 2 + ((x - 35) / 25) ** 2 < 1


@pytest.fixture
def levels() -> AnchoredLevels:
    return AnchoredLevels.fit(COUNTS, provenance=PROVENANCE)


def instance_table(provenance: Mapping[str, Any] = PROVENANCE) -> LevelTable:
    """A table of two answer types whose accuracies depend on the likelihood."""
    counts = {"yes_no": instance_counts(), "short": instance_counts(0.1, ease=(0.4, 0.7, 0.95))}
    return LevelTable(counts, provenance)
