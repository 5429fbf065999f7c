"""The perturbation as an albumentations transform, so that it composes with any other augmentation.

This is the one module that imports albumentations. The import is slow and looks on the network for a newer version
unless told not to, so it is told not to, and `vlm_calibration.perturbation` does not import this module.
"""

import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from vlm_calibration.perturbation.levels import LinearLevels, check_confidence, nominal_step
from vlm_calibration.perturbation.masks import check_mask
from vlm_calibration.perturbation.noise import ImageArray, add_region_noise
from vlm_calibration.perturbation.regions import RegionShape, region_mask
from vlm_calibration.perturbation.schedules import SCHEDULES, Schedule, schedule_by_name


class RegionNoise(A.ImageOnlyTransform):
    """Noise the pixels under `mask` to a confidence level; leave every other pixel, and the mask, alone.

    Two keys may accompany each call, and win over what is drawn: `confidence`, the level in [0, 1], and `noise_seed`, an
    integer or a sequence of them, of which the noise is then a pure function:

        A.Compose([RegionNoise()])(image=image, mask=mask, confidence=0.3, noise_seed=(seed, epoch, query))

    Without them a level is drawn from `confidences` and a seed from the transform's generator, which
    `A.Compose(..., seed=...)` makes reproducible. What was used is in `params["confidence"]`, `params["step"]` and
    `params["noise_seed"]` of `transform.get_applied_params()`. Serialisable with `A.to_dict` and `A.from_dict`.

    Targets: image (uint8, `(H, W, 3)`); needs `mask` (`(H, W)`, bool or uint8 of 0 and 1, not empty).

    Args:
        schedule: "linear", "cosine" or "sigmoid".
        steps: the schedule's number of steps.
        confidences: levels in [0, 1] to draw from, evenly; the paper's eleven by default.
        shape: "mask" or "box", see `region_mask`.
        dilate: fraction of the region's longer side to grow it by, see `region_mask`.
        seed: with an integer, the noise and level of every call without its own `noise_seed` are a function of this
            seed alone: the same on each call.
        p: probability of applying the transform.

    Raises:
        ValueError: for a parameter, image or mask that is not as above.
    """

    class InitSchema(A.BasicTransform.InitSchema):
        schedule: str
        steps: int
        confidences: Sequence[float] | None
        shape: RegionShape
        dilate: float = Field(ge=0, allow_inf_nan=False)
        seed: int | None = Field(ge=0)

        @field_validator("schedule")
        @classmethod
        def _known_schedule(cls, name: str) -> str:
            if name not in SCHEDULES:
                raise ValueError(f"unknown noise schedule {name!r}; known: {', '.join(SCHEDULES)}")
            return name

        @field_validator("confidences")
        @classmethod
        def _valid_confidences(cls, values: Sequence[float] | None) -> Sequence[float] | None:
            if values is not None and not values:
                raise ValueError("confidences must not be empty")
            return None if values is None else [check_confidence(value) for value in values]

    def __init__(
        self,
        schedule: str = "linear",
        steps: int = 1000,
        confidences: Sequence[float] | None = None,
        shape: RegionShape = "mask",
        dilate: float = 0.0,
        seed: int | None = None,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.schedule = schedule
        self.steps = steps
        levels = LinearLevels(total_steps=steps)
        self.confidences = list(confidences or (levels.confidence(step) for step in levels.steps))
        self.shape = shape
        self.dilate = dilate
        self.noise_seed = seed
        self._noise_schedule: Schedule = schedule_by_name(schedule, steps)

    @property
    def targets_as_params(self) -> list[str]:
        return ["image", "mask"]

    @property
    def available_keys(self) -> set[str]:
        """With the two optional keys of a call, which a strict `Compose` would refuse otherwise."""
        return {*super().available_keys, "confidence", "noise_seed"}

    def get_transform_init_args(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule,
            "steps": self.steps,
            "confidences": self.confidences,
            "shape": self.shape,
            "dilate": self.dilate,
            "seed": self.noise_seed,
        }

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        generator = self.random_generator
        if self.noise_seed is not None:
            generator = np.random.Generator(np.random.PCG64(self.noise_seed))
        confidence, seed = data.get("confidence"), data.get("noise_seed")
        if confidence is None:
            confidence = self.confidences[int(generator.integers(len(self.confidences)))]
        if seed is None:
            seed = int(generator.integers(2**63))
        mask = check_mask(data["mask"], data["image"].shape)
        return {
            "region": region_mask(mask, shape=self.shape, dilate=self.dilate),
            "confidence": check_confidence(confidence),
            "step": nominal_step(confidence, self.steps),
            "noise_seed": seed,
        }

    def apply(
        self,
        img: ImageArray,
        *,
        region: NDArray[np.bool_],
        step: int,
        noise_seed: int | Sequence[int],
        **params: Any,
    ) -> ImageArray:
        return add_region_noise(img, region, step, self._noise_schedule, noise_seed)
