"""The perturbation as an albumentations transform: the path of training, which composes with other augmentations.

This is the only module that imports albumentations. The import is slow, so it is deferred until an image is perturbed, and it
must not look for updates on the network.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, field_validator

from vlm_calibration.perturbation.levels import LinearLevels, check_confidence, nominal_step
from vlm_calibration.perturbation.noise import ImageArray, add_region_noise
from vlm_calibration.perturbation.regions import RegionShape, region_mask
from vlm_calibration.perturbation.schedules import SCHEDULES, Schedule, schedule_by_name


class RegionNoise(A.ImageOnlyTransform):
    """Add noise to the pixels under `mask`; leave all other pixels, and the mask, unchanged.

    A call may pass further keys, which take precedence over random values: the level as `confidence` in [0, 1] or as the
    noise `step`, and `noise_seed`, an integer or a sequence of integers. The noise is a pure function of the seed:

        A.Compose([RegionNoise()])(image=image, mask=mask, confidence=0.3, noise_seed=(seed, epoch, query))

    Otherwise the level is drawn from `confidences`, and the seed from the transform's generator, which `A.Compose(...,
    seed=...)` makes reproducible. `transform.get_applied_params()` has the values used: "confidence" (None if `step` was
    passed), "step" and "noise_seed". `A.to_dict` and `A.from_dict` serialise the transform, to JSON as well for the
    schedules of `SCHEDULES`.

    Targets: image, uint8 [H, W, 3]; requires `mask`, bool [H, W] or uint8 of 0 and 1, not empty.

    Args:
        schedule: a schedule, its name ("linear", "cosine" or "sigmoid"), or its name and parameters as a mapping such as
            {"name": "cosine", "steps": 500}.
        confidences: levels in [0, 1] to draw from with equal probability; by default the paper's eleven.
        shape: "mask" or "box", see `region_mask`.
        dilate: growth of the region as a fraction of its longer side, see `region_mask`.
        seed: an integer makes the level and noise of every call without `noise_seed` the same.
        p: probability of applying the transform.

    Raises:
        ValueError: an invalid parameter, image or mask.
    """

    class InitSchema(A.BasicTransform.InitSchema):
        model_config = ConfigDict(arbitrary_types_allowed=True)

        schedule: Schedule | str | Mapping[str, Any]
        confidences: Sequence[float] | None
        shape: RegionShape
        dilate: float = Field(ge=0, allow_inf_nan=False)
        seed: int | None = Field(ge=0)

        def model_dump(self, **kwargs: Any) -> dict[str, Any]:
            """The values themselves; pydantic would turn a schedule, a dataclass, into a dict."""
            return dict(self)

        @field_validator("confidences")
        @classmethod
        def _valid_confidences(cls, values: Sequence[float] | None) -> Sequence[float] | None:
            if values is not None and not values:
                raise ValueError("confidences must not be empty")
            return None if values is None else [check_confidence(value) for value in values]

    def __init__(
        self,
        schedule: Schedule | str | Mapping[str, Any] = "linear",
        confidences: Sequence[float] | None = None,
        shape: RegionShape = "mask",
        dilate: float = 0.0,
        seed: int | None = None,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        if not isinstance(schedule, Schedule):
            schedule = schedule_by_name(**({"name": schedule} if isinstance(schedule, str) else schedule))
        self.schedule = schedule
        levels = LinearLevels()
        self.confidences = list(confidences or map(levels.confidence, levels.steps))
        self.shape = shape
        self.dilate = dilate
        self.noise_seed = seed

    @property
    def targets_as_params(self) -> list[str]:
        return ["image", "mask"]

    @property
    def available_keys(self) -> set[str]:
        """Includes the optional keys of a call, which a strict `Compose` would refuse otherwise."""
        return {*super().available_keys, "confidence", "step", "noise_seed"}

    def get_transform_init_args(self) -> dict[str, Any]:
        names = {kind: name for name, kind in SCHEDULES.items()}
        name = names.get(type(self.schedule))
        return {
            "schedule": {"name": name, **asdict(self.schedule)} if name else self.schedule,  # type: ignore[call-overload]
            "confidences": self.confidences,
            "shape": self.shape,
            "dilate": self.dilate,
            "seed": self.noise_seed,
        }

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        generator = self.random_generator
        if self.noise_seed is not None:
            generator = np.random.Generator(np.random.PCG64(self.noise_seed))
        confidence, step, seed = (data.get(key) for key in ("confidence", "step", "noise_seed"))
        if step is None:
            if confidence is None:
                confidence = self.confidences[int(generator.integers(len(self.confidences)))]
            step = nominal_step(confidence, self.schedule.steps)
        if seed is None:
            seed = int(generator.integers(2**63))
        region = data["mask"]
        if self.shape != "mask" or self.dilate:
            region = region_mask(region, shape=self.shape, dilate=self.dilate)
        return {"region": region, "confidence": confidence, "step": step, "noise_seed": seed}

    def apply(
        self,
        img: ImageArray,
        *,
        region: NDArray[np.bool_],
        step: int,
        noise_seed: int | Sequence[int],
        **params: Any,
    ) -> ImageArray:
        return add_region_noise(img, region, step, self.schedule, noise_seed)
