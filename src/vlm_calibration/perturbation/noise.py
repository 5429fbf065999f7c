"""The paper's perturbation: diffusion noise on the pixels of a region (Zhao et al., arXiv 2504.14848)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_calibration.perturbation.masks import bounding_box, check_mask

REFERENCE_STEPS = 1000  # of the published beta ranges
MAX_BETA = 0.999  # Nichol & Dhariwal, section 3.2


@dataclass(frozen=True)
class Schedule(ABC):
    """Variance-preserving forward process `x_t = sqrt(abar_t) * x_0 + sqrt(1 - abar_t) * eps`.

    Step 0 is the clean image, `steps` the noisiest. Step `t` is `t - 1` in libraries that index betas from 0 (diffusers).

    Args:
        steps: number of steps `T`.

    Raises:
        ValueError: `steps` is not a positive integer, or a beta is outside (0, 0.999].
    """

    steps: int = REFERENCE_STEPS

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a positive integer, got {self.steps!r}")
        betas = self.betas()
        if not 0 < betas.min() <= betas.max() <= MAX_BETA:
            found = f"got {betas.min():g} to {betas.max():g}"
            raise ValueError(f"{self}: betas must be in (0, {MAX_BETA}], {found}; use more steps")

    @abstractmethod
    def betas(self) -> NDArray[np.float64]:
        """The share of variance that each step replaces by noise, float64 [steps] in (0, 0.999]."""

    def alpha_bar(self, step: int) -> float:
        """Share of the signal's variance left after `step` steps, an integer in [0, steps]: exactly 1.0 at 0, strictly decreasing."""
        if isinstance(step, bool) or not isinstance(step, int | np.integer):
            raise TypeError(f"step must be an integer, got {step!r}")
        if not 0 <= step <= self.steps:
            raise ValueError(f"step must be in [0, {self.steps}], got {step!r}")
        return float(_alpha_bars(self)[step])


@lru_cache(maxsize=32)
def _alpha_bars(schedule: Schedule) -> NDArray[np.float64]:
    """The values of all steps, float64 [steps + 1]; cached by value, so schedules have no state."""
    return np.concatenate([[1.0], np.cumprod(1.0 - schedule.betas())])


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """The linear schedule of DDPM (Ho et al., arXiv 2006.11239): betas increase linearly.

    `alpha_bar(T) = 4.0e-5`, an invisible amplitude of 0.6%. Both betas are scaled by `1000 / steps`, as in Nichol & Dhariwal's
    implementation, so that the last step has the same amount of noise.

    Args:
        steps: number of steps `T`.
        beta_start: variance replaced by the first step, *for 1000 steps*.
        beta_end: variance replaced by the last step, *for 1000 steps*.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta_start > self.beta_end:
            raise ValueError(f"betas must not fall, got {self.beta_start:g} to {self.beta_end:g}")

    def betas(self) -> NDArray[np.float64]:
        scale = REFERENCE_STEPS / self.steps
        return np.linspace(self.beta_start * scale, self.beta_end * scale, self.steps, dtype=np.float64)


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """The cosine schedule of Nichol & Dhariwal (arXiv 2102.09672, equation 17).

    `alpha_bar(t) = f(t) / f(0)` with `f(t) = cos(pi/2 * (t/T + offset) / (1 + offset))^2`, betas clipped at 0.999.
    `alpha_bar(T) = 2.4e-9`.

    Args:
        steps: number of steps `T`.
        offset: keeps the first betas from vanishing, >= 0.
    """

    offset: float = 0.008

    def __post_init__(self) -> None:
        if not self.offset >= 0:
            raise ValueError(f"offset must be at least 0, got {self.offset}")
        super().__post_init__()

    def betas(self) -> NDArray[np.float64]:
        t = np.arange(self.steps + 1, dtype=np.float64) / self.steps
        f = np.cos(np.pi / 2 * (t + self.offset) / (1 + self.offset)) ** 2
        return np.minimum(1 - f[1:] / f[:-1], MAX_BETA)


@dataclass(frozen=True)
class SigmoidSchedule(Schedule):
    """The sigmoid schedule of visual contrastive decoding (Leng et al., arXiv 2311.16922; `vcd_add_noise.py`).

    `beta = sigmoid(linspace(-6, 6, T)) * (0.5e-2 - 1e-5) + 1e-5`, scaled as in `LinearSchedule`, for at least 6 steps.
    `alpha_bar(T) = 0.081`, an amplitude of 28%: large objects stay faintly visible at "0%". Use it to compare with that work.
    """

    def betas(self) -> NDArray[np.float64]:
        ramp = 1 / (1 + np.exp(-np.linspace(-6, 6, self.steps, dtype=np.float64)))
        return (ramp * (0.5e-2 - 1e-5) + 1e-5) * (REFERENCE_STEPS / self.steps)


SCHEDULES: dict[str, type[Schedule]] = {
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "sigmoid": SigmoidSchedule,
}


def schedule_by_name(name: str, steps: int = REFERENCE_STEPS) -> Schedule:
    """Create a schedule by its name: "linear", "cosine" or "sigmoid"; ValueError if there is no such schedule."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {name!r}; known: {', '.join(SCHEDULES)}")
    return SCHEDULES[name](steps=steps)


ImageArray = NDArray[np.uint8]
Seed = int | Sequence[int] | np.random.SeedSequence


def add_region_noise(
    image: ImageArray, mask: NDArray[Any], step: int, schedule: Schedule, seed: Seed
) -> ImageArray:
    """Add noise of diffusion step `step` to the masked pixels: `sqrt(abar) * x_0 + sqrt(1 - abar) * eps`, with `x_0` in [-1, 1].

    `eps` is a pure function of the seed and the mask: the same at every step and on every machine. Values are rounded to the nearest
    integer and clipped to [0, 255]. The result is a new array, bit-identical to the image outside the mask, and everywhere at step 0.

    A TypeError or ValueError names an invalid image, mask, step or seed.

    Args:
        image: uint8 [H, W, 3].
        mask: bool [H, W], or uint8 of 0 and 1, with at least one marked pixel.
        step: in [0, schedule.steps].
        seed: a non-negative integer, a sequence of them (trailing zeros do not count), or a `SeedSequence`.
    """
    check_image(image)
    mask = check_mask(mask, image.shape)
    alpha_bar = schedule.alpha_bar(step)
    generator = seeded(seed)
    noisy = np.array(image, order="C")
    if step == 0:
        return noisy
    # Noise is drawn for the masked pixels only, with arithmetic in place, since this runs for every training sample.
    box = bounding_box(mask).slices
    region = mask[box]
    # As one three-byte item per pixel, boolean indexing is several times faster than on rows of three.
    pixels = noisy.view("V3")[..., 0][box]
    values = generator.standard_normal(3 * np.count_nonzero(region), dtype=np.float32)
    # In 0..255: 127.5 * (sqrt(abar) * (v / 127.5 - 1) + sqrt(1 - abar) * eps + 1), constants folded.
    signal = np.sqrt(alpha_bar)
    values *= np.float32(127.5 * np.sqrt(1 - alpha_bar))
    values += np.float32(127.5 * (1 - signal))
    values += pixels[region].view(np.uint8) * np.float32(signal)
    np.rint(values, out=values)
    np.clip(values, 0, 255, out=values)
    pixels[region] = values.astype(np.uint8).view("V3")
    return noisy


def check_image(image: NDArray[Any]) -> None:
    """Raise a TypeError or ValueError unless the image is uint8 [H, W, 3]."""
    kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
    if kind != np.uint8:
        raise TypeError(f"image must be a uint8 array, got {kind}")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must have shape (height, width, 3), got {image.shape}")


def check_share(name: str, value: float, most: float = 1.0) -> float:
    """Convert to float; ValueError if the value is outside [0, `most`] or NaN."""
    share = float(value)
    if not 0.0 <= share <= most:
        raise ValueError(f"{name} must be in [0, {most:g}], got {value!r}")
    return share


def seeded(seed: Seed) -> np.random.Generator:
    """The generator of a seed: PCG64, since `default_rng` may change its own between numpy versions."""
    try:
        if seed is None or isinstance(seed, str | bytes) or (isinstance(seed, Sequence) and not seed):
            raise TypeError("no integer")
        return np.random.Generator(np.random.PCG64(seed))
    except (TypeError, ValueError) as error:
        message = f"seed must be a non-negative integer or a sequence of them, got {seed!r}"
        raise type(error)(message) from error
