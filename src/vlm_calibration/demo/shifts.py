"""Distribution shifts of the test, changes of the whole image; not blur and occlusion, with which training may perturb regions."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image


def low_contrast(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Move every pixel towards the image's mean colour; `strength` 0 is the identity, 1 gives a uniform image."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    return np.rint(mean + (image - mean) * (1.0 - strength)).astype(np.uint8)


def jpeg(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """JPEG at quality 100 - `strength`."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=round(100 - strength))
    return np.array(Image.open(buffer).convert("RGB"))


def shrink(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Shrink by the factor `strength` and enlarge to the original size."""
    picture = Image.fromarray(image)
    width, height = (max(1, round(side / strength)) for side in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BOX)
    return np.array(resized.resize(picture.size, Image.Resampling.BILINEAR))


def glare(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """White light that falls off from a random point; `strength` is its share of the pixel's colour where it is brightest."""
    height, width = image.shape[:2]
    y, x = rng.uniform(0, height), rng.uniform(0, width)
    rows, columns = np.mgrid[:height, :width]
    distance = ((rows - y) / height) ** 2 + ((columns - x) / width) ** 2
    light = strength * np.exp(-distance / 0.5)[..., None]
    return np.rint(image * (1 - light) + 255.0 * light).astype(np.uint8)


def coloured_light(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The image under light of a random hue; at `strength` 1 the light is of one pure colour."""
    hue = rng.uniform(0, 6)
    light = np.clip(np.abs((hue + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return np.rint(image * (1 - strength * (1 - light))).astype(np.uint8)


Change = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
"""uint8 [H, W, 3], strength and generator to uint8 [H, W, 3]."""
SHIFTS: dict[str, tuple[Change, tuple[float, ...]]] = {
    "low_contrast": (low_contrast, (0.7, 0.8, 0.9)),
    "jpeg": (jpeg, (96, 98, 99)),
    "shrink": (shrink, (5, 7, 10)),
    "glare": (glare, (0.6, 0.75, 0.9)),
    "coloured_light": (coloured_light, (0.25, 0.35, 0.4)),
}
"""Name -> the change and its strengths in the test."""


def draw_shift(rng: np.random.Generator) -> tuple[str, float]:
    """Sample one of the shifts and one of its strengths."""
    name = list(SHIFTS)[int(rng.integers(len(SHIFTS)))]
    return name, float(rng.choice(SHIFTS[name][1]))
