"""Level tables whose provenance matches the model and data of a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.perturbation.levels import AnchoredLevels, StepCount
from vlm_calibration.stages.provenance import provenance_of

FALLING = {
    kind: [StepCount(step, 100, top - step // 25) for step in range(0, 1001, 100)]
    for kind, top in (("yes_no", 95), ("short", 88))
}
"""Counts with a different accuracy for every step and answer type."""


def measured(model: str, counts: Mapping[str, Sequence[StepCount]] = FALLING, **data: Any) -> AnchoredLevels:
    """Levels with the provenance of the model in folder `model` and of data with these settings."""
    provenance = provenance_of(BaseModel(model), PerturbedQueryDataModule(model, **data), counts)
    return AnchoredLevels.fit(counts, provenance=provenance)
