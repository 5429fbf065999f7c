"""The ways in which a photograph loses the evidence of an object, and the albumentations transform that applies one to a region."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no look for updates on the network

import albumentations as A
import cv2
import numpy as np
from albumentations.augmentations.blur import functional as blurs
from albumentations.augmentations.pixel import functional as pixels
from numpy.typing import NDArray
from scipy.special import ndtri

from vlm_calibration.perturbation.levels import NOISE
from vlm_calibration.perturbation.masks import BoolMask, bounding_box, check_mask
from vlm_calibration.perturbation.noise import (
    ImageArray,
    LinearSchedule,
    Schedule,
    Seed,
    add_region_noise,
    check_image,
    check_share,
    seeded,
)

ELECTRONS = 1000.0  # electrons of a white pixel
READ_NOISE = 4.0  # standard deviation of the noise of reading out, in electrons

GREY = 128  # value of the surroundings if there is no pixel outside the region

# 256 equally probable values of a standard normal variable.
_QUANTILES = ndtri((np.arange(256, dtype=np.float32) + 0.5) / 256)


class Crop(NamedTuple):
    """A region with its context; functions do not change it.

    Attributes:
        image: uint8 [h, w, 3], C-contiguous.
        region: bool [h, w], not empty.
        size: square root of the number of the region's pixels, to which a kind's effect is proportional.
    """

    image: ImageArray
    region: BoolMask
    size: float


def blur(crop: Crop, strength: float, generator: np.random.Generator) -> NDArray[Any]:
    """Gaussian blur, as of an object out of focus; sigma is `0.35 * strength` times the region's size."""
    sigma = 0.35 * strength * crop.size

    def blurred(image: NDArray[Any], scale: float) -> NDArray[Any]:
        # Shrinking and enlarging blur as well: by a box of `scale` pixels and a triangle of twice that.
        rest = np.sqrt((sigma / scale) ** 2 - 0.25) if scale > 1 else sigma
        return pixels.separable_convolve(image, blurs.create_gaussian_kernel_1d(rest))

    # A kernel of more than 31 pixels is applied to a smaller image, which takes less time and looks the same.
    return _at_size(crop.image, 7 * sigma / 31, blurred)


def motion_blur(crop: Crop, strength: float, generator: np.random.Generator) -> NDArray[Any]:
    """The mean along lines of a random direction; their length is `1.8 * strength` times the region's size."""
    angle = float(generator.uniform(0, 180))
    length = 1.8 * strength * crop.size

    def moved(image: NDArray[Any], scale: float) -> NDArray[Any]:
        # A line of constant weight is a box filter of the turned image, whose time does not depend on the length.
        height, width = image.shape[:2]
        side = int(np.ceil(np.hypot(height, width)))
        turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1)
        turn[:, 2] += (side - width) / 2, (side - height) / 2
        turned = cv2.warpAffine(image, turn, (side, side), borderMode=cv2.BORDER_REFLECT_101)
        odd = 2 * round((length / scale - 1) / 2) + 1
        filtered = cv2.blur(turned, (max(1, odd), 1))
        back = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(filtered, turn, (width, height), flags=back)

    return _at_size(crop.image, min(length / 12, crop.size / 100), moved)


def pixelation(crop: Crop, strength: float, generator: np.random.Generator) -> NDArray[Any]:
    """Square blocks of one colour, as in a mosaic; their side is `0.8 * strength` times the region's size."""
    block = 0.8 * strength * crop.size
    scale = min(1.0, max(1 / block, 1 / min(crop.region.shape)))
    return pixels.downscale(crop.image, scale, cv2.INTER_AREA, cv2.INTER_NEAREST)


def occlusion(crop: Crop, strength: float, generator: np.random.Generator) -> NDArray[Any]:
    """Opaque rectangles of random colours that cover the share `strength` of the region's pixels, to the pixel.

    The sides have 0.2 to 0.5 times the length of those of the region's bounding box. With the same seed, a stronger occlusion
    contains the weaker ones.
    """
    result = crop.image.copy()
    uncovered = crop.region.copy()
    places = np.flatnonzero(uncovered)
    missing = round(strength * places.size)
    shape = np.array(uncovered.shape)
    while missing > 0:
        # A rectangle starts from an uncovered pixel, so that each covers something.
        for attempt in range(9):
            if attempt == 8:
                places = np.flatnonzero(uncovered)
            index = int(places[generator.integers(places.size)])
            if uncovered.flat[index]:
                break
        place = np.array(divmod(index, uncovered.shape[1]))
        sides = np.maximum(1, np.rint(generator.uniform(0.2, 0.5, 2) * shape)).astype(int)
        start = np.maximum(0, place - (generator.random(2) * sides).astype(int))
        colour = generator.integers(0, 256, 3, dtype=np.uint8)
        box = tuple(slice(a, a + n) for a, n in zip(start, sides, strict=True))
        new = uncovered[box].copy()
        if (surplus := np.count_nonzero(new) - missing) > 0:
            new.ravel()[np.flatnonzero(new)[-surplus:]] = False
        result[box][new] = colour
        uncovered[box] &= ~new
        missing -= int(np.count_nonzero(new))
    return result


def fade(crop: Crop, strength: float, generator: np.random.Generator) -> NDArray[Any]:
    """Fade into the surroundings, as in haze or behind a dirty window: `(1 - strength) * image + strength * surroundings`."""
    return cv2.addWeighted(crop.image, 1 - strength, surroundings(crop.image, crop.region), strength, 0)


def jpeg(crop: Crop, strength: float, generator: np.random.Generator) -> NDArray[Any]:
    """JPEG of the image reduced to a region's size of `10 / strength` pixels, since its blocks have 8."""
    quality = round(1 + 30 * (1 - strength) ** 3)
    shrink = crop.size * strength / 10
    return _at_size(crop.image, shrink, lambda image, _: pixels.image_compression(image, quality, ".jpg"))


def darkness(crop: Crop, strength: float, generator: np.random.Generator) -> NDArray[Any]:
    """Less light, as at dusk, and the noise of a sensor that makes up for most of it.

    A pixel of value `v` has collected `ELECTRONS * (v / 255) ** 2` electrons. Each is kept with the probability
    `exposure = (1 - strength) ** 3`; reading out adds noise; and the camera multiplies what is left by `exposure ** -0.75`, three
    quarters of the stops, up to 32. Nothing but amplified noise is left at strength 1.
    """
    exposure = (1 - strength) ** 3
    gain = min(exposure**-0.75, 32.0) if exposure else 32.0
    light = (np.arange(256, dtype=np.float32)[:, None] / 255) ** 2
    electrons = ELECTRONS * exposure * light
    # The variance of light that is lost (binomial), not of all light: nothing changes where nothing is lost.
    spread = np.sqrt((1 - exposure) * (electrons + READ_NOISE**2))
    seen = np.clip(gain / ELECTRONS * (electrons + spread * _QUANTILES), 0, 1)
    # A random byte is one of 256 quantiles of the noise, so a table has the result for each value and byte.
    table = np.rint(255 * np.sqrt(seen)).astype(np.uint8).ravel()
    noise = np.frombuffer(generator.bytes(crop.image.size), np.uint8).reshape(crop.image.shape)
    return table[crop.image.astype(np.uint16) << 8 | noise]


def overexposure(crop: Crop, strength: float, generator: np.random.Generator) -> NDArray[Any]:
    """Too much light, as against the sun: a gain and a veil, growing until every pixel is white."""
    light = (np.arange(256) / 255) ** 2 * (1 + 4 * strength**2.5) + strength**8
    return np.rint(255 * np.sqrt(np.minimum(light, 1))).astype(np.uint8)[crop.image]


class Kind(NamedTuple):
    """A kind of perturbation, scaled so that the evidence is lost over the whole range of strengths and not by 0.2.

    Attributes:
        perturb: function of a crop, a strength in (0, 1] and the only source of randomness; of the uint8 [h, w, 3] that it returns,
            the region is used.
        context: width of the context around the region's bounding box, as a multiple of `Crop.size`.
        fades: whether the result is mixed with the surroundings by `strength ** 8` (0.4% at 0.5, 43% at 0.9, all at 1), because the
            kind alone leaves a trace of the object at strength 1.
    """

    perturb: Callable[[Crop, float, np.random.Generator], NDArray[Any]]
    context: float = 0.0
    fades: bool = False


KINDS = {
    "blur": Kind(blur, 1.0, fades=True),
    "motion_blur": Kind(motion_blur, 0.9, fades=True),
    "pixelation": Kind(pixelation, 0.25, fades=True),
    "occlusion": Kind(occlusion),
    "fade": Kind(fade, 0.25),
    "jpeg": Kind(jpeg, 0.25, fades=True),
    "darkness": Kind(darkness),
    "overexposure": Kind(overexposure),
}
"""Name -> kind, beside diffusion noise."""


class RegionPerturbation(A.ImageOnlyTransform):
    """Perturb the pixels under `mask`; leave all other pixels, and the mask, unchanged.

    The result is a pure function of the keys of the call: `image`, uint8 [H, W, 3]; `mask`, bool [H, W] or uint8 of 0 and 1, not
    empty; `strength` in [0, 1]; and `seed`, an integer or a sequence of integers:

        A.Compose([RegionPerturbation("blur")])(image=image, mask=mask, strength=0.3, seed=(seed, epoch, query))

    Strength 0 leaves the image unchanged; at strength 1 the result does not depend on the pixels under the mask, except for what the
    schedule of noise leaves.

    Args:
        kind: "noise" of step `round(strength * schedule.steps)`, see `add_region_noise`; or one of `KINDS`.
        schedule: the schedule of noise.
        p: probability of applying the transform.

    Raises:
        TypeError, ValueError: an invalid image, mask, strength or seed; named.
    """

    def __init__(self, kind: str = NOISE, schedule: Schedule = LinearSchedule(), p: float = 1.0) -> None:  # noqa: B008  (frozen)
        super().__init__(p=p)
        self.kind, self.schedule = kind, schedule

    @property
    def targets_as_params(self) -> list[str]:
        return ["image", "mask", "strength", "seed"]

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        return {"region": data["mask"], "strength": data["strength"], "seed": data["seed"]}

    def apply(
        self, img: ImageArray, *, region: NDArray[Any], strength: float, seed: Seed, **params: Any
    ) -> ImageArray:
        strength = check_share("strength", strength)
        if self.kind == NOISE:
            return add_region_noise(img, region, round(strength * self.schedule.steps), self.schedule, seed)
        kind = KINDS[self.kind]
        check_image(img)
        region = check_mask(region, img.shape)
        generator = seeded(seed)
        result = np.array(img, order="C")
        if strength == 0:
            return result
        size = float(np.sqrt(np.count_nonzero(region)))
        box = bounding_box(region).grown(int(np.ceil(kind.context * size)), img.shape).slices
        crop = Crop(np.ascontiguousarray(img[box]), region[box], size)
        perturbed = kind.perturb(crop, strength, generator)
        weight = strength**8
        if kind.fades and 255 * weight >= 0.5:  # less changes no value
            faded = surroundings(crop.image, crop.region)
            perturbed = cv2.addWeighted(perturbed, 1 - weight, faded, weight, 0)
        # As one three-byte item per pixel, boolean indexing is several times faster than on rows of three.
        new = np.ascontiguousarray(perturbed).view("V3")[..., 0]
        result.view("V3")[..., 0][box][crop.region] = new[crop.region]
        return result


def _at_size(
    image: ImageArray, shrink: float, function: Callable[[NDArray[Any], float], NDArray[Any]]
) -> NDArray[Any]:
    """Apply a function of an image and its scale to the image shrunk by the factor `shrink`, if above 1; and enlarge the result."""
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
    small = cv2.resize(small, size, interpolation=cv2.INTER_AREA)
    return cv2.resize(function(small, shrink), full, interpolation=cv2.INTER_LINEAR)[:height, :width]


def surroundings(image: ImageArray, region: BoolMask) -> NDArray[Any]:
    """Estimate the image, uint8 [H, W, 3], without the content of a region, bool [H, W].

    Pixels outside the region are averaged to ever coarser grids, and the region is filled from the finest grid that knows something about
    a place ("push-pull" interpolation; Gortler et al., The Lumigraph, 1996). The result, uint8 [H, W, 3], is the same whatever the region's
    pixels are: smoothed outside it; `GREY` if the region is the whole image.
    """
    height, width = region.shape
    outside = (~region).view(np.uint8) * np.uint8(255)
    if not (count := np.count_nonzero(outside)):
        return np.full_like(image, GREY)
    known = cv2.bitwise_and(image, image, mask=outside)
    # Bytes would be too coarse for so few known pixels, and floats take longer.
    if count < 0.05 * outside.size:
        known, outside = known.astype(np.float32), outside.astype(np.float32)
    # The estimate is smooth: a grid of at most 64 cells a side is enlarged.
    cell = -(-max(height, width) // 64)
    # Whole cells: OpenCV averages them several times faster. The last ones of each row and column are the region's.
    bottom, right = -height % cell, -width % cell
    size = ((width + right) // cell, (height + bottom) // cell)
    padded = (cv2.copyMakeBorder(a, 0, bottom, 0, right, cv2.BORDER_CONSTANT) for a in (known, outside))
    known, weight = (cv2.resize(a, size, interpolation=cv2.INTER_AREA).astype(np.float32) for a in padded)
    fill = np.clip(np.rint(_push_pull(known, weight / 255)), 0, 255).astype(np.uint8)
    return cv2.resize(fill, (width + right, height + bottom), interpolation=cv2.INTER_LINEAR)[:height, :width]


def _push_pull(known: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Fill in float32 [h, w, 3], from values multiplied by their weights, the known share of each cell in [0, 1]."""
    height, width = weight.shape
    if height == width == 1:
        return known / weight[..., None]
    half = ((width + 1) // 2, (height + 1) // 2)
    coarse = _push_pull(*(cv2.resize(a, half, interpolation=cv2.INTER_AREA) for a in (known, weight)))
    fill = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    return known + (1 - weight)[..., None] * fill
