"""Semantic perturbation: kinds and strengths, levels (the confidence after a perturbation), noise schedules, and regions."""

from vlm_calibration.perturbation.by_kind import KIND_NAMES, perturb, region_perturbation
from vlm_calibration.perturbation.images import load_image, resize_image
from vlm_calibration.perturbation.levels import AnchoredLevels, LinearLevels, Perturbation
from vlm_calibration.perturbation.masks import region_mask, resize_mask
from vlm_calibration.perturbation.noise import (
    CosineSchedule,
    LinearSchedule,
    SigmoidSchedule,
    schedule_by_name,
)

__all__ = [
    "KIND_NAMES",
    "AnchoredLevels",
    "CosineSchedule",
    "LinearLevels",
    "LinearSchedule",
    "Perturbation",
    "SigmoidSchedule",
    "load_image",
    "perturb",
    "region_mask",
    "region_perturbation",
    "resize_image",
    "resize_mask",
    "schedule_by_name",
]
