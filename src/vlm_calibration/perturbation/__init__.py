"""Semantic perturbation: kinds and strengths, levels (the confidence after a perturbation), noise schedules, and regions.

The albumentations transforms are in `vlm_calibration.perturbation.kinds`, which is not imported here, since importing
albumentations is slow; `region_perturbation` imports it when it is called.
"""

from vlm_calibration.perturbation.by_kind import KIND_NAMES, perturb, region_perturbation
from vlm_calibration.perturbation.images import ImageError, load_image, resize_image, resize_mask
from vlm_calibration.perturbation.level_table import AnswerTypeCounts, LevelCount, LevelTable
from vlm_calibration.perturbation.levels import (
    CLEAN,
    AnchoredLevels,
    ConfidenceLevels,
    LinearLevels,
    Perturbation,
)
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
    "CLEAN",
    "KIND_NAMES",
    "AnchoredLevels",
    "AnswerTypeCounts",
    "ConfidenceLevels",
    "CosineSchedule",
    "ImageError",
    "LevelCount",
    "LevelTable",
    "LinearLevels",
    "LinearSchedule",
    "Perturbation",
    "RegionChoice",
    "Schedule",
    "SigmoidSchedule",
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
