"""The ways in which a photograph loses the evidence of an object, beside the noise of `RegionNoise`.

Each kind is an albumentations transform on the region alone, built on albumentations' functions without its random stream.
What a kind does is proportional to the region's size, so that a strength takes about as much from a small object as from a
large one, and the strength is scaled so that the evidence is lost over the whole range and not by 0.2. `KINDS` names them.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from albumentations.augmentations.blur import functional as blurs
from albumentations.augmentations.pixel import functional as pixels
from numpy.typing import NDArray
from scipy.special import ndtri

from vlm_calibration.perturbation.noise import ImageArray
from vlm_calibration.perturbation.surroundings import mixed, surroundings
from vlm_calibration.perturbation.transform import Crop, RegionNoise, RegionPerturbation

_QUANTILES = ndtri((np.arange(256, dtype=np.float32) + 0.5) / 256)
"""256 equally probable values of a standard normal variable."""

_LONGEST_KERNEL = 31
"""In pixels; a wider kernel is applied to a smaller image, which takes less time and looks the same."""


class RegionBlur(RegionPerturbation):
    """Gaussian blur, as of an object out of focus; sigma is `sigma(strength)` times the region's size."""

    context = 1.0
    fades = True

    @staticmethod
    def sigma(strength: float) -> float:
        """Standard deviation as a share of the region's size."""
        return 0.35 * strength

    def perturb_crop(self, crop: Crop, strength: float, seed: np.random.SeedSequence) -> ImageArray:
        sigma = self.sigma(strength) * crop.size

        def blur(image: ImageArray, scale: float) -> ImageArray:
            # Shrinking and enlarging blur as well: by a box of `scale` pixels and a triangle of twice that.
            rest = np.sqrt((sigma / scale) ** 2 - 0.25) if scale > 1 else sigma
            return pixels.separable_convolve(image, blurs.create_gaussian_kernel_1d(rest))

        return _at_size(crop.image, 7 * sigma / _LONGEST_KERNEL, blur)


class RegionMotionBlur(RegionPerturbation):
    """Motion blur along a line of random direction; its length is `length(strength)` times the region's size."""

    context = 0.9
    fades = True

    @staticmethod
    def length(strength: float) -> float:
        """Length of the movement as a share of the region's size."""
        return 1.8 * strength

    def perturb_crop(self, crop: Crop, strength: float, seed: np.random.SeedSequence) -> ImageArray:
        angle = float(_generator(seed).uniform(0, 180))
        length = self.length(strength) * crop.size
        # A line of constant weight is a box filter of the turned image, whose time does not depend on the length.
        shrink = min(length / 12, crop.size / 100)
        return _at_size(crop.image, shrink, lambda image, scale: _moved(image, length / scale, angle))


class RegionPixelation(RegionPerturbation):
    """Square blocks of one colour, as in a mosaic; their side is `block(strength)` times the region's size."""

    context = 0.25
    fades = True

    @staticmethod
    def block(strength: float) -> float:
        """Side of a block as a share of the region's size."""
        return 0.8 * strength

    def perturb_crop(self, crop: Crop, strength: float, seed: np.random.SeedSequence) -> ImageArray:
        block = self.block(strength) * crop.size
        scale = min(1.0, max(1 / block, 1 / min(crop.region.shape)))
        return pixels.downscale(crop.image, scale, cv2.INTER_AREA, cv2.INTER_NEAREST)


class RegionOcclusion(RegionPerturbation):
    """Opaque rectangles of random colours that cover the share `strength` of the region's pixels, to the pixel.

    With the same seed, a stronger occlusion contains the weaker ones.
    """

    sides = (0.2, 0.5)
    """Range of the sides of a rectangle as a share of those of the region's bounding box."""

    def perturb_crop(self, crop: Crop, strength: float, seed: np.random.SeedSequence) -> ImageArray:
        generator = _generator(seed)
        result = crop.image.copy()
        uncovered = crop.region.copy()
        places = np.flatnonzero(uncovered)
        missing = round(strength * places.size)
        shape = np.array(uncovered.shape)
        while missing > 0:
            index, places = self._draw(uncovered, places, generator)
            place = np.array(divmod(index, uncovered.shape[1]))
            sides = np.maximum(1, np.rint(generator.uniform(*self.sides, 2) * shape)).astype(int)
            start = np.maximum(0, place - (generator.random(2) * sides).astype(int))
            colour = generator.integers(0, 256, 3, dtype=np.uint8)
            box = tuple(slice(a, a + n) for a, n in zip(start, sides, strict=True))
            new = uncovered[box].copy()
            surplus = np.count_nonzero(new) - missing
            if surplus > 0:
                new.ravel()[np.flatnonzero(new)[-surplus:]] = False
            result[box][new] = colour
            uncovered[box] &= ~new
            missing -= int(np.count_nonzero(new))
        return result

    @staticmethod
    def _draw(
        uncovered: np.ndarray, places: np.ndarray, generator: np.random.Generator
    ) -> tuple[int, np.ndarray]:
        """Draw an uncovered pixel, from which a rectangle starts, so that each covers something; and where to draw the next."""
        for _ in range(8):
            place = int(places[generator.integers(places.size)])
            if uncovered.flat[place]:
                return place, places
        places = np.flatnonzero(uncovered)
        return int(places[generator.integers(places.size)]), places


class RegionFade(RegionPerturbation):
    """Fade into the surroundings, as in haze or behind a dirty window: `(1 - w) * image + w * surroundings`."""

    context = 0.25

    @staticmethod
    def weight(strength: float) -> float:
        """The share `w` of the surroundings."""
        return strength

    def perturb_crop(self, crop: Crop, strength: float, seed: np.random.SeedSequence) -> ImageArray:
        return mixed(crop.image, surroundings(crop.image, crop.region), self.weight(strength))


class RegionJpeg(RegionPerturbation):
    """JPEG compression of a reduced image, as of pictures that are shared again and again.

    The image is reduced until the region's size is `10 / strength` pixels, since the blocks of JPEG have 8 pixels on any image.
    """

    context = 0.25
    fades = True

    def perturb_crop(self, crop: Crop, strength: float, seed: np.random.SeedSequence) -> ImageArray:
        quality = round(1 + 30 * (1 - strength) ** 3)
        return _at_size(
            crop.image,
            crop.size * strength / 10,
            lambda image, _: pixels.image_compression(image, quality, ".jpg"),
        )


class RegionDarkness(RegionPerturbation):
    """Less light, as at dusk, and the noise of a sensor that makes up for most of it.

    A pixel of value `v` has collected `ELECTRONS * (v / 255) ** 2` electrons. Each is kept with probability
    `exposure(strength)`; reading out adds noise; and the camera multiplies what is left by `exposure ** -0.75`, three quarters of
    the stops, up to `MAX_GAIN`. Nothing but amplified noise is left at strength 1. The noise is independent for each pixel, so
    that a large object bears more of it, as with `RegionNoise`.
    """

    ELECTRONS = 1000.0
    """Electrons of a white pixel."""
    READ_NOISE = 4.0
    """Standard deviation of the noise of reading out, in electrons."""
    MAX_GAIN = 32.0

    @staticmethod
    def exposure(strength: float) -> float:
        """The share of the light that is left."""
        return (1 - strength) ** 3

    def perturb_crop(self, crop: Crop, strength: float, seed: np.random.SeedSequence) -> ImageArray:
        # A random byte is one of 256 quantiles of the noise, so a table has the result for each value and byte.
        noise = np.frombuffer(_generator(seed).bytes(crop.image.size), np.uint8).reshape(crop.image.shape)
        index = crop.image.astype(np.uint16)
        index <<= 8
        index |= noise
        return self._table(strength)[index]

    def _table(self, strength: float) -> np.ndarray:
        """The value seen for each original value and each of 256 quantiles of the noise, uint8 [65536]."""
        exposure = self.exposure(strength)
        gain = min(exposure**-0.75, self.MAX_GAIN) if exposure else self.MAX_GAIN
        light = (np.arange(256, dtype=np.float32)[:, None] / 255) ** 2
        electrons = self.ELECTRONS * exposure * light
        # The variance of light that is lost (binomial), not of all light: nothing changes where nothing is lost.
        spread = np.sqrt((1 - exposure) * (electrons + self.READ_NOISE**2))
        seen = np.clip(gain / self.ELECTRONS * (electrons + spread * _QUANTILES), 0, 1)
        return np.rint(255 * np.sqrt(seen)).astype(np.uint8).ravel()


class RegionOverexposure(RegionPerturbation):
    """Too much light, as against the sun: a gain and a veil, growing until every pixel is white."""

    def perturb_crop(self, crop: Crop, strength: float, seed: np.random.SeedSequence) -> ImageArray:
        light = (np.arange(256) / 255) ** 2 * (1 + 4 * strength**2.5) + strength**8
        table = np.rint(255 * np.sqrt(np.minimum(light, 1))).astype(np.uint8)
        return table[crop.image]


KINDS: dict[str, type[RegionPerturbation]] = {
    "noise": RegionNoise,
    "blur": RegionBlur,
    "motion_blur": RegionMotionBlur,
    "pixelation": RegionPixelation,
    "occlusion": RegionOcclusion,
    "fade": RegionFade,
    "jpeg": RegionJpeg,
    "darkness": RegionDarkness,
    "overexposure": RegionOverexposure,
}
"""Name -> transform."""


def _generator(seed: np.random.SeedSequence) -> np.random.Generator:
    """PCG64, since `default_rng` may change its generator between numpy versions."""
    return np.random.Generator(np.random.PCG64(seed))


def _at_size(
    image: ImageArray, shrink: float, function: Callable[[ImageArray, float], ImageArray]
) -> ImageArray:
    """Apply a function of an image and its scale to the image shrunk by the factor `shrink`, if above 1, and enlarge it again."""
    if shrink <= 1:
        return function(image, 1.0)
    height, width = image.shape[:2]
    # By a whole factor first, which OpenCV does several times faster.
    whole = int(shrink)
    bottom, right = -height % whole, -width % whole
    padded = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_REFLECT)
    full = (width + right, height + bottom)
    small = cv2.resize(padded, (full[0] // whole, full[1] // whole), interpolation=cv2.INTER_AREA)
    size = (max(1, round(full[0] / shrink)), max(1, round(full[1] / shrink)))
    small = _uint8(cv2.resize(small, size, interpolation=cv2.INTER_AREA))
    enlarged = cv2.resize(function(small, shrink), full, interpolation=cv2.INTER_LINEAR)
    return _uint8(enlarged[:height, :width])


def _moved(image: ImageArray, length: float, angle: float) -> ImageArray:
    """The mean of an image along lines of `length` pixels in direction `angle`, in degrees."""
    height, width = image.shape[:2]
    side = int(np.ceil(np.hypot(height, width)))
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1)
    turn[:, 2] += (side - width) / 2, (side - height) / 2
    turned = cv2.warpAffine(image, turn, (side, side), borderMode=cv2.BORDER_REFLECT_101)
    odd = 2 * round((length - 1) / 2) + 1
    moved = cv2.blur(turned, (max(1, odd), 1))
    return _uint8(cv2.warpAffine(moved, turn, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP))


def _uint8(image: NDArray[Any]) -> ImageArray:
    """A C-contiguous image of the type that OpenCV's signatures leave open."""
    return np.ascontiguousarray(image, dtype=np.uint8)
