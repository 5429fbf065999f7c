"""Level tables whose provenance matches the model and data of a test, and levels at chosen strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.perturbation.level_table import AnswerTypeCounts, Measured
from vlm_calibration.perturbation.levels import AnchoredLevels, LinearLevels, Perturbation
from vlm_calibration.stages.provenance import provenance_of


def noise_counts(*rows: Sequence[float]) -> AnswerTypeCounts:
    """Counts of noise alone: rows (strength, n, n_correct)."""
    return AnswerTypeCounts({"noise": rows})


FALLING = {
    answer_type: noise_counts(*((i / 10, 100, top - 4 * i) for i in range(11)))
    for answer_type, top in (("yes_no", 95), ("short", 88))
}
"""Counts with a different accuracy for every strength and answer type."""


def measured(model: str, counts: Mapping[str, AnswerTypeCounts] = FALLING, **data: Any) -> AnchoredLevels:
    """Levels with the provenance of the model in folder `model` and of data with these settings."""
    provenance = provenance_of(BaseModel(model), PerturbedQueryDataModule(model, **data), counts)
    return AnchoredLevels.fit(counts, provenance=provenance)


def measured_likelihoods(likelihoods: Mapping[str, float]) -> dict[str, Measured]:
    """Likelihoods by query id, measured on some content."""
    return {query_id: Measured(value, 0) for query_id, value in likelihoods.items()}


@dataclass(frozen=True)
class OnlyAt(LinearLevels):
    """Linear levels of which only these strengths are drawn."""

    drawn: tuple[float, ...] = (1.0,)

    def strengths(self, kind: str = "noise") -> tuple[float, ...]:
        return self.drawn

    def confidence(
        self, perturbation: Perturbation, answer_type: str = "", query_id: str | None = None
    ) -> float:
        return LinearLevels(self.n_levels).confidence(perturbation)

    def confidences(self, answer_type: str = "") -> tuple[float, ...]:
        return LinearLevels(self.n_levels).confidences()
