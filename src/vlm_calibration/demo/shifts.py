"""Distribution shifts of the demo's *shifted* test images, none of which occurs in training with region noise.

They test whether calibration learned on Gaussian noise generalises: blur, occlusion, low contrast, JPEG and shrinking, each at
several strengths. The demo model was pre-trained with the same functions at `MILD` strengths, as real models are on imperfect
photographs.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter


def blur(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur; `strength` is the radius in pixels."""
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(strength)))


def occlusion(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Uniform rectangles at random positions until they cover a share `strength` of the image."""
    out = image.copy()
    height, width = image.shape[:2]
    covered = np.zeros((height, width), dtype=bool)
    while covered.mean() < strength:
        h, w = rng.integers(height // 10, height // 4, size=2)
        top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        out[top : top + h, left : left + w] = rng.integers(0, 256, size=3)
        covered[top : top + h, left : left + w] = True
    return out


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
    small = (max(1, round(picture.width / strength)), max(1, round(picture.height / strength)))
    resized = picture.resize(small, Image.Resampling.BOX)
    return np.array(resized.resize(picture.size, Image.Resampling.BILINEAR))


SHIFTS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "blur": blur,
    "occlusion": occlusion,
    "low_contrast": low_contrast,
    "jpeg": jpeg,
    "shrink": shrink,
}
STRENGTHS: dict[str, tuple[float, ...]] = {
    "blur": (2.5, 3.5, 5.0),
    "occlusion": (0.3, 0.45, 0.6),
    "low_contrast": (0.7, 0.8, 0.9),
    "jpeg": (96, 98, 99),
    "shrink": (5, 7, 10),
}
MILD: dict[str, tuple[float, float]] = {
    "blur": (0.3, 1.2),
    "occlusion": (0.02, 0.2),
    "low_contrast": (0.1, 0.6),
    "jpeg": (20, 85),
    "shrink": (1.2, 2.2),
}


def draw_shift(rng: np.random.Generator) -> tuple[str, float]:
    """Sample one of the shifts and one of its test strengths."""
    name = list(SHIFTS)[int(rng.integers(len(SHIFTS)))]
    return name, float(rng.choice(STRENGTHS[name]))


def mild_degradation(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply a random shift at a random strength well below the test strengths; uint8 [H, W, 3] in and out."""
    name = list(SHIFTS)[int(rng.integers(len(SHIFTS)))]
    return SHIFTS[name](image, float(rng.uniform(*MILD[name])), rng)
