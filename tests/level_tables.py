"""Level tables that say they were measured on the model and with the data that a test uses them for."""

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
"""An accuracy of its own for every step and answer type."""


def measured(model: str, counts: Mapping[str, Sequence[StepCount]] = FALLING, **data: Any) -> AnchoredLevels:
    """ConfidenceLevels of the model in this folder, as measured on data with these settings."""
    provenance = provenance_of(BaseModel(model), PerturbedQueryDataModule(model, **data), counts)
    return AnchoredLevels.fit(counts, provenance=provenance)
