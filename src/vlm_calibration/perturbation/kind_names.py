"""The names of the kinds of perturbation, and their transforms, without importing albumentations before one is used."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from vlm_calibration.perturbation.schedules import Schedule

KIND_NAMES = (
    "noise",
    "blur",
    "motion_blur",
    "pixelation",
    "occlusion",
    "fade",
    "jpeg",
    "darkness",
    "overexposure",
)


@lru_cache(maxsize=64)
def region_perturbation(kind: str, schedule: Schedule) -> Any:
    from vlm_calibration.perturbation.kinds import KINDS  # deferred: imports albumentations, which is slow

    return KINDS[kind](schedule) if kind == "noise" else KINDS[kind]()
