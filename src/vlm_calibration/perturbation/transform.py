"""A perturbation of a region as an albumentations transform, and the paper's diffusion noise as one.

`RegionPerturbation` does what all kinds share: it reads the keys of a call, cuts the region out with the context that the kind
needs, and writes back the pixels under the mask and no others. A kind implements `perturb_crop`; the other kinds are in
`vlm_calibration.perturbation.kinds`. Importing albumentations is slow, so these modules are imported when an image is
perturbed (`vlm_calibration.perturbation.by_kind`), and albumentations must not look for updates on the network.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, field_validator

from vlm_calibration.perturbation.masks import BoolMask, MaskBox, bounding_box, check_mask
from vlm_calibration.perturbation.noise import ImageArray, Seed, add_region_noise, check_image, seed_sequence
from vlm_calibration.perturbation.regions import RegionShape, region_mask
from vlm_calibration.perturbation.schedules import SCHEDULES, Schedule, schedule_by_name
from vlm_calibration.perturbation.surroundings import mixed, surroundings

STRENGTHS = tuple(i / 10 for i in range(11))
"""The strengths that are drawn by default: those of the paper's eleven levels."""

FADE_POWER = 8
"""A kind that `fades` is mixed with the surroundings by `strength ** FADE_POWER`: 0.4% at 0.5, 43% at 0.9, all at 1."""


class Crop(NamedTuple):
    """A region with its context.

    Attributes:
        image: uint8 [h, w, 3], C-contiguous.
        region: bool [h, w], not empty.
        size: square root of the number of the region's pixels; what a kind does to the region is proportional to it.
    """

    image: ImageArray
    region: BoolMask
    size: float


class RegionPerturbation(A.ImageOnlyTransform):
    """Perturb the pixels under `mask`; leave all other pixels, and the mask, unchanged.

    A call may pass further keys, which take precedence over random values: `strength` in [0, 1] or `confidence`, which means
    strength `1 - confidence`, and `seed`, an integer or a sequence of integers. The result is a pure function of image, mask,
    strength and seed:

        A.Compose([RegionBlur()])(image=image, mask=mask, strength=0.3, seed=(seed, epoch, query))

    Strength 0 leaves the image unchanged; at strength 1 the result does not depend on the pixels under the mask.

    Without these keys the strength is drawn from `strengths`, and the seed from the transform's generator, which
    `A.Compose(..., seed=...)` makes reproducible. `transform.get_applied_params()` has the values used: "strength" and "seed".
    `A.to_dict` and `A.from_dict` serialise the transform, to JSON as well.

    Targets: image, uint8 [H, W, 3]; requires `mask`, bool [H, W] or uint8 of 0 and 1, not empty.

    Args:
        strengths: strengths in [0, 1] to draw from with equal probability; by default 0, 0.1, ..., 1.
        shape: "mask" or "box", see `region_mask`.
        dilate: growth of the region as a fraction of its longer side, see `region_mask`.
        seed: an integer makes the strength and the perturbation of every call without `seed` the same.
        p: probability of applying the transform.

    Raises:
        TypeError, ValueError: an invalid parameter, image, mask, strength or seed; named.
    """

    context: ClassVar[float] = 0.0
    """Width of the context around the region's bounding box, as a multiple of `Crop.size`."""

    fades: ClassVar[bool] = False
    """Whether the result fades into the surroundings, because the kind alone leaves a trace of the object at strength 1."""

    class InitSchema(A.BasicTransform.InitSchema):
        model_config = ConfigDict(arbitrary_types_allowed=True)

        strengths: Sequence[float]
        shape: RegionShape
        dilate: float = Field(ge=0, allow_inf_nan=False)
        seed: int | None = Field(ge=0)

        def model_dump(self, **kwargs: Any) -> dict[str, Any]:
            """The values themselves; pydantic would turn a schedule, a dataclass, into a dict."""
            return dict(self)

        @field_validator("strengths")
        @classmethod
        def _valid_strengths(cls, values: Sequence[float]) -> Sequence[float]:
            if not values:
                raise ValueError("strengths must not be empty")
            return [_check_share("strength", value) for value in values]

    def __init__(
        self,
        strengths: Sequence[float] = STRENGTHS,
        shape: RegionShape = "mask",
        dilate: float = 0.0,
        seed: int | None = None,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.strengths = list(strengths)
        self.shape = shape
        self.dilate = dilate
        self.fixed_seed = seed  # `self.seed` belongs to albumentations

    def perturb_crop(self, crop: Crop, strength: float, seed: np.random.SeedSequence) -> ImageArray:
        """Perturb a region; what it returns outside the region is not used.

        Args:
            crop: the region with the context that the kind asks for, cut off at the image's border. Not to be changed.
            strength: in (0, 1].
            seed: the only source of randomness.

        Returns:
            uint8 [h, w, 3], C-contiguous.
        """
        raise NotImplementedError

    @property
    def targets_as_params(self) -> list[str]:
        return ["image", "mask"]

    @property
    def available_keys(self) -> set[str]:
        """Includes the optional keys of a call, which a strict `Compose` would refuse otherwise."""
        return {*super().available_keys, "strength", "confidence", "seed"}

    def get_transform_init_args(self) -> dict[str, Any]:
        return {
            "strengths": self.strengths,
            "shape": self.shape,
            "dilate": self.dilate,
            "seed": self.fixed_seed,
        }

    def strength_of(self, data: Mapping[str, Any]) -> float | None:
        """The strength that the keys of a call ask for; None: to be drawn.

        Raises:
            ValueError: more than one key, or a value outside its range.
        """
        strength, confidence = data.get("strength"), data.get("confidence")
        if strength is not None and confidence is not None:
            raise ValueError(
                f"pass strength or confidence, not both, got strength {strength!r} and confidence {confidence!r}"
            )
        if confidence is not None:
            return 1.0 - _check_share("confidence", confidence)
        return None if strength is None else _check_share("strength", strength)

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        generator = self.random_generator
        if self.fixed_seed is not None:
            generator = np.random.Generator(np.random.PCG64(self.fixed_seed))
        strength, seed = self.strength_of(data), data.get("seed")
        if strength is None:
            strength = self.strengths[int(generator.integers(len(self.strengths)))]
        if seed is None:
            seed = int(generator.integers(2**63))
        region = data["mask"]
        if self.shape != "mask" or self.dilate:
            region = region_mask(region, shape=self.shape, dilate=self.dilate)
        return {"region": region, "strength": strength, "seed": seed}

    def apply(
        self, img: ImageArray, *, region: NDArray[Any], strength: float, seed: Seed, **params: Any
    ) -> ImageArray:
        check_image(img)
        region = check_mask(region, img.shape)
        sequence = seed_sequence(seed)
        result = np.array(img, order="C")
        if strength == 0:
            return result
        size = float(np.sqrt(np.count_nonzero(region)))
        box = _grown(bounding_box(region), int(np.ceil(self.context * size)), img.shape).slices
        crop = Crop(np.ascontiguousarray(img[box]), region[box], size)
        perturbed = self.perturb_crop(crop, strength, sequence)
        weight = strength**FADE_POWER
        if self.fades and 255 * weight >= 0.5:  # less changes no value
            perturbed = mixed(perturbed, surroundings(crop.image, crop.region), weight)
        # As one three-byte item per pixel, boolean indexing is several times faster than on rows of three.
        result.view("V3")[..., 0][box][crop.region] = perturbed.view("V3")[..., 0][crop.region]
        return result


class RegionNoise(RegionPerturbation):
    """Add diffusion noise of step `round(strength * schedule.steps)`, see `add_region_noise`.

    The last step leaves what the schedule leaves of the image: nothing visible with "linear" and "cosine", more with "sigmoid".

    A call may pass the noise `step`, an integer, instead of the strength; `get_applied_params()` has it. `A.to_dict` writes the
    schedules of `SCHEDULES` as their name and parameters.

    Args:
        schedule: a schedule, its name ("linear", "cosine" or "sigmoid"), or its name and parameters as a mapping such as
            {"name": "cosine", "steps": 500}.
        strengths, shape, dilate, seed, p: see `RegionPerturbation`.
    """

    class InitSchema(RegionPerturbation.InitSchema):
        schedule: Schedule | str | Mapping[str, Any]

    def __init__(
        self,
        schedule: Schedule | str | Mapping[str, Any] = "linear",
        strengths: Sequence[float] = STRENGTHS,
        shape: RegionShape = "mask",
        dilate: float = 0.0,
        seed: int | None = None,
        p: float = 1.0,
    ) -> None:
        super().__init__(strengths=strengths, shape=shape, dilate=dilate, seed=seed, p=p)
        if not isinstance(schedule, Schedule):
            schedule = schedule_by_name(**({"name": schedule} if isinstance(schedule, str) else schedule))
        self.schedule = schedule

    @property
    def available_keys(self) -> set[str]:
        return {*super().available_keys, "step"}

    def get_transform_init_args(self) -> dict[str, Any]:
        names = {kind: name for name, kind in SCHEDULES.items()}
        name = names.get(type(self.schedule))
        schedule = {"name": name, **asdict(self.schedule)} if name else self.schedule  # type: ignore[call-overload]
        return {"schedule": schedule, **super().get_transform_init_args()}

    def strength_of(self, data: Mapping[str, Any]) -> float | None:
        strength, step = super().strength_of(data), data.get("step")
        if step is None:
            return strength
        if strength is not None:
            raise ValueError(f"pass step, strength or confidence, not two of them, got step {step!r}")
        self.schedule.alpha_bar(step)  # raises for a step that is not of the schedule
        return int(step) / self.schedule.steps

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        applied = super().get_params_dependent_on_data(params, data)
        return {**applied, "step": self._step(applied["strength"])}

    def perturb_crop(self, crop: Crop, strength: float, seed: np.random.SeedSequence) -> ImageArray:
        return add_region_noise(crop.image, crop.region, self._step(strength), self.schedule, seed)

    def _step(self, strength: float) -> int:
        return round(strength * self.schedule.steps)


def _check_share(name: str, value: float) -> float:
    """Convert to float; ValueError if the value is outside [0, 1] or NaN."""
    share = float(value)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return share


def _grown(box: MaskBox, margin: int, shape: tuple[int, ...]) -> MaskBox:
    """The box with a margin, cut off at the border of an image of this shape [H, W, ...]."""
    return MaskBox(
        max(0, box.top - margin),
        min(shape[0], box.bottom + margin),
        max(0, box.left - margin),
        min(shape[1], box.right + margin),
    )
