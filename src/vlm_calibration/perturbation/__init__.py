"""Semantic perturbation: noise schedules, levels (confidence <-> noise step), regions, and kinds of perturbation.

The albumentations transforms are in `vlm_calibration.perturbation.kinds`, which is not imported here, since importing
albumentations is slow; `region_perturbation` imports it when it is called.
"""

from vlm_calibration.perturbation.by_kind import KIND_NAMES, perturb, region_perturbation
from vlm_calibration.perturbation.images import ImageError, load_image, resize_image, resize_mask
from vlm_calibration.perturbation.level_table import LevelTable, StepCount
from vlm_calibration.perturbation.levels import AnchoredLevels, ConfidenceLevels, LinearLevels
from vlm_calibration.perturbation.noise import add_region_noise
from vlm_calibration.perturbation.regions import RegionChoice, choose_region, region_mask
from vlm_calibration.perturbation.schedules import (
    CosineSchedule,
    LinearSchedule,
    Schedule,
    SigmoidSchedule,
    schedule_by_name,
)

__all__ = [
    "KIND_NAMES",
    "AnchoredLevels",
    "ConfidenceLevels",
    "CosineSchedule",
    "ImageError",
    "LevelTable",
    "LinearLevels",
    "LinearSchedule",
    "RegionChoice",
    "Schedule",
    "SigmoidSchedule",
    "StepCount",
    "add_region_noise",
    "choose_region",
    "load_image",
    "perturb",
    "region_mask",
    "region_perturbation",
    "resize_image",
    "resize_mask",
    "schedule_by_name",
]
