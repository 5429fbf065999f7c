"""Perturbing by the name of a kind; albumentations, which takes two seconds to import, is imported when it is needed."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from vlm_calibration.perturbation.levels import NOISE, Perturbation
from vlm_calibration.perturbation.noise import (
    ImageArray,
    Schedule,
    Seed,
    add_region_noise,
    check_share,
    schedule_by_name,
)

if TYPE_CHECKING:
    from vlm_calibration.perturbation.kinds import RegionPerturbation

KIND_NAMES = (
    *(NOISE, "blur", "motion_blur", "pixelation", "occlusion"),
    *("fade", "jpeg", "darkness", "overexposure"),
)
"""The names of all kinds: noise, and the keys of `kinds.KINDS`."""


@lru_cache(maxsize=32)
def region_perturbation(kind: str, schedule: Schedule) -> RegionPerturbation:
    """The transform of a kind in `KIND_NAMES`, ValueError for another; `schedule` is that of noise."""
    if kind not in KIND_NAMES:
        raise ValueError(f"unknown kind of perturbation {kind!r}; known: {', '.join(KIND_NAMES)}")
    from vlm_calibration.perturbation.kinds import RegionPerturbation  # deferred: slow to import

    return RegionPerturbation(kind, schedule)


def perturb(
    image: ImageArray,
    mask: NDArray[Any],
    confidence: float,
    *,
    schedule: Schedule | str = "linear",
    seed: Seed,
    kind: str = NOISE,
) -> ImageArray:
    """Perturb a region at the level of `confidence`, by the paper's linear levels.

    The result is a new uint8 [H, W, 3], bit-identical to the image outside the region; see `add_region_noise` and `kinds`. A TypeError or
    ValueError names an invalid image, mask, confidence, seed or kind.

    Args:
        image: uint8 [H, W, 3].
        mask: bool [H, W], or uint8 of 0 and 1; the region.
        confidence: in [0, 1]; 1 leaves the image unchanged, 0 nothing of the region.
        schedule: the schedule of noise, or its name with 1000 steps: "linear", "cosine" or "sigmoid".
        seed: a non-negative integer, or several such as (seed, epoch, query).
        kind: one of `KIND_NAMES`.
    """
    perturbation = Perturbation(kind, 1.0 - check_share("confidence", confidence))
    schedule = schedule_by_name(schedule) if isinstance(schedule, str) else schedule
    return perturb_region(image, mask, perturbation, schedule, seed)


def perturb_region(
    image: ImageArray, mask: NDArray[Any], perturbation: Perturbation, schedule: Schedule, seed: Seed
) -> ImageArray:
    """The image with a perturbed region, see `RegionPerturbation`; noise does not import albumentations."""
    kind, strength = perturbation
    if kind == NOISE:
        return add_region_noise(image, mask, round(strength * schedule.steps), schedule, seed)
    return region_perturbation(kind, schedule)(image=image, mask=mask, strength=strength, seed=seed)["image"]
