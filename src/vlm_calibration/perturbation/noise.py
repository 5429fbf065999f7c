"""The paper's perturbation: diffusion noise on the pixels of a region (Zhao et al., arXiv 2504.14848)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_calibration.perturbation.masks import bounding_box, check_mask
from vlm_calibration.perturbation.schedules import Schedule

ImageArray = NDArray[np.uint8]
Seed = int | Sequence[int] | np.random.SeedSequence


def add_region_noise(
    image: ImageArray, mask: NDArray[Any], step: int, schedule: Schedule, seed: Seed
) -> ImageArray:
    """Add noise of diffusion step `step` to the masked pixels: `sqrt(abar) * x_0 + sqrt(1 - abar) * eps`, with `x_0` in [-1, 1].

    `eps` is a pure function of the seed and the mask: the same at every step and on every machine. Values are rounded to the nearest
    integer and clipped to [0, 255].

    Args:
        image: uint8 [H, W, 3].
        mask: bool [H, W], or uint8 of 0 and 1, with at least one marked pixel.
        step: in [0, schedule.steps].
        schedule: the noise schedule.
        seed: a non-negative integer, a sequence of them (trailing zeros do not count), or a `SeedSequence`.

    Returns:
        A new array, bit-identical to the image outside the mask, and everywhere at step 0.

    Raises:
        TypeError, ValueError: an invalid image, mask, step or seed; named.
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
    is_array = isinstance(image, np.ndarray)
    if not is_array or image.dtype != np.uint8:
        raise TypeError(
            f"image must be a uint8 array, got {image.dtype if is_array else type(image).__name__}"
        )
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
