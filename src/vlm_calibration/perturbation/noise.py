"""The semantic perturbation itself: diffusion noise on the pixels of one region, and nowhere else.

`x_t = sqrt(abar_t) * x_0 + sqrt(1 - abar_t) * eps` on pixels scaled to [-1, 1], `v = m * x_t + (1 - m) * x_0`
(Zhao et al., arXiv 2504.14848). It runs for every training sample in the loader's workers, so noise is drawn for
the masked pixels only and the arithmetic is in-place float32.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_calibration.perturbation.levels import nominal_step
from vlm_calibration.perturbation.masks import bounding_box, check_mask
from vlm_calibration.perturbation.schedules import Schedule, schedule_by_name

ImageArray = NDArray[np.uint8]
Seed = int | Sequence[int] | np.random.SeedSequence


def perturb(
    image: ImageArray,
    mask: NDArray[Any],
    confidence: float,
    *,
    schedule: Schedule | str = "linear",
    seed: Seed,
) -> ImageArray:
    """The image with its region noised to the level that stands for `confidence` (the paper's linear levels).

    Args:
        image: `(H, W, 3)` uint8.
        mask: `(H, W)` bool (or uint8 of 0 and 1); the region.
        confidence: in [0, 1]; 1 leaves the image as it is, 0 goes to the schedule's last step.
        schedule: a schedule or the name of one ("linear", "cosine", "sigmoid"; 1000 steps).
        seed: what the noise is a function of: a non-negative integer, or several, such as (seed, epoch, query).

    Returns:
        A new `(H, W, 3)` uint8 array; see `add_region_noise`.

    Raises:
        TypeError, ValueError: for an image, mask, confidence or seed that is not as above; says which.
    """
    if isinstance(schedule, str):
        schedule = schedule_by_name(schedule)
    return add_region_noise(image, mask, nominal_step(confidence, schedule.steps), schedule, seed)


def add_region_noise(
    image: ImageArray, mask: NDArray[Any], step: int, schedule: Schedule, seed: Seed
) -> ImageArray:
    """Noise the masked pixels to diffusion step `step`.

    The noise is a pure function of the seed and the mask: the same on every call, process and machine, and the same
    `eps` at every step, so that one seed gives a nested series of images from clean to noise. Values are rounded to
    the nearest integer and clipped to [0, 255].

    Args:
        image: `(H, W, 3)` uint8.
        mask: `(H, W)` bool (or uint8 of 0 and 1) with at least one pixel.
        step: in [0, schedule.steps].
        schedule: how much signal each step leaves.
        seed: a non-negative integer, a sequence of them (zeros at its end do not count), or a `SeedSequence`.

    Returns:
        A new array, never the input itself, bit-identical to it outside the mask, and everywhere at step 0.

    Raises:
        TypeError: if the image is not a uint8 array, the mask not bool, the step or the seed not an integer.
        ValueError: if the shapes disagree, the mask is empty, the step is outside the schedule, or a seed is negative.
    """
    check_image(image)
    mask = check_mask(mask, image.shape)
    alpha_bar = schedule.alpha_bar(step)
    generator = np.random.Generator(np.random.PCG64(_seed_sequence(seed)))
    noisy = np.array(image, order="C")
    if step == 0:
        return noisy
    box = bounding_box(mask).slices
    region = mask[box]
    # One three-byte item a pixel: a boolean index then moves whole pixels, several times faster than (n, 3) rows.
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
    """Raise TypeError or ValueError, saying why, unless the image is an `(H, W, 3)` uint8 array."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        found = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"image must be a uint8 array, got {found}")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must have shape (height, width, 3), got {image.shape}")


def _seed_sequence(seed: Seed) -> np.random.SeedSequence:
    """Not `default_rng`, whose generator may change between numpy versions, and never entropy of the machine."""
    if isinstance(seed, np.random.SeedSequence):
        return seed
    entropy = (
        [seed] if isinstance(seed, int | np.integer) else list(seed) if isinstance(seed, Sequence) else []
    )
    if (
        not entropy
        or isinstance(seed, str | bytes)
        or not all(isinstance(s, int | np.integer) for s in entropy)
    ):
        raise TypeError(f"seed must be a non-negative integer or a sequence of them, got {seed!r}")
    if min(entropy) < 0:
        raise ValueError(f"seed must not be negative, got {seed!r}")
    return np.random.SeedSequence([int(s) for s in entropy])
