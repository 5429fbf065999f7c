"""Semantic perturbation: kinds and strengths, levels (the confidence after a perturbation), noise schedules, and regions.

The albumentations transform is in `vlm_calibration.perturbation.transform` and is not imported here, since importing
albumentations is slow.
"""

from vlm_calibration.perturbation.images import ImageError, load_image, resize_image, resize_mask
from vlm_calibration.perturbation.level_table import AnswerTypeCounts, LevelCount, LevelTable
from vlm_calibration.perturbation.levels import (
    CLEAN,
    AnchoredLevels,
    ConfidenceLevels,
    LinearLevels,
    Perturbation,
)
from vlm_calibration.perturbation.noise import add_region_noise, perturb
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
    "resize_image",
    "resize_mask",
    "schedule_by_name",
]
