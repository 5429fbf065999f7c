"""The resolution at which a model sees an image, asked of its processor: perturbing at it, and limiting it by `data.max_pixels`."""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections import defaultdict
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from vlm_calibration.perturbation.images import resize_image
from vlm_calibration.perturbation.noise import ImageArray, check_image
from vlm_calibration.records import DataError

LARGEST_SIDE, PANORAMA = 4096, (16, 1024)
"""Images that `limit_pixels` asks about: the longest side of squares, which no published processor exceeds, and another shape."""


class Seen(NamedTuple):
    """(height, width) after each resize, and the number of pixels after any crop: tiles together, without the overview image."""

    sizes: list[tuple[int, int]]
    pixels: int


def model_resolution(image_processor: Any, height: int, width: int) -> tuple[int, int]:
    """The size (height, width) in pixels of an image after the image processor's resize, before any crop; of all tiles together.

    A DataError if the processor refuses the image, or resizes in a way that cannot be followed (use `resolution: native`).
    """
    return _ask(image_processor, height, width).sizes[-1]


def resize_to_model(image_processor: Any, image: ImageArray) -> ImageArray:
    """Resize an image, uint8 [H, W, 3], to its `model_resolution` with the image processor's own resize."""
    from transformers.image_utils import SizeDict  # deferred: slow to import, and loaded with any processor

    check_image(image)
    # Take the method of the base class: those of Qwen and Pixtral choose the size, which is known.
    resize = next(vars(c)["resize"] for c in reversed(type(image_processor).__mro__) if "resize" in vars(c))
    pixels: Any = image.transpose(2, 0, 1)
    if image_processor.backend != "pil":
        # Left channels-last, which torchvision resizes several times faster than a copy by channels, to the same pixels.
        pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)
    for height, width in _ask(image_processor, *image.shape[:2]).sizes:
        if pixels.shape[1:] != (height, width):
            size = SizeDict(height=height, width=width)
            pixels = resize(image_processor, pixels, size=size, resample=image_processor.resample)
    return np.array(np.asarray(pixels).transpose(1, 2, 0), order="C")


@lru_cache(maxsize=10_000)
def _ask(image_processor: Any, height: int, width: int) -> Seen:
    """Process a black image, and watch the resizes."""
    if not getattr(image_processor, "do_resize", True):
        return Seen([(height, width)], height * width)
    results: list[tuple[int, int]] = []
    steps: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)

    def resize(*args: Any, **settings: Any) -> Any:
        [before] = [v for v in (*args, *settings.values()) if isinstance(v, np.ndarray | torch.Tensor)]
        resized = image_processor.resize(*args, **settings)
        after = resized.shape[-2], resized.shape[-1]
        steps[after] = [*steps[before.shape[-2], before.shape[-1]], after]
        results.append(after)
        return resized

    watched = copy.copy(image_processor)
    watched.resize = resize
    try:
        seen = watched(images=[np.zeros((height, width, 3), np.uint8)], return_tensors="pt")["pixel_values"]
    except ValueError as error:
        raise DataError(f"an image of {width} x {height} pixels: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise _unknown(image_processor) from error
    if not results:
        raise _unknown(image_processor)
    tile = tuple(seen.shape[-2:])
    has_tiles = seen.ndim > 3 and seen.numel() > 3 * math.prod(tile)
    # Neither an image that is shrunk further, nor an overview beside the tiles; a crop leaves only images that are larger.
    targets = [size for size in results if not (has_tiles and size == tile)]
    targets = [size for size in targets if 3 * math.prod(size) <= seen.numel()]
    sizes = steps[max(reversed(targets or results), key=math.prod)]
    return Seen(sizes, min(math.prod(sizes[-1]), seen.numel() // 3))


def check_resolution(processor: Any) -> None:
    """Process textured images with and without `resize_to_model`; a DataError if the results differ (use `resolution: native`)."""
    image_processor = _configured(processor)
    for height, width in ((60, 84), (700, 400)):
        image = _textured(height, width)
        resized = resize_to_model(image_processor, image)
        again = _ask(image_processor, *resized.shape[:2]).sizes
        before, after = (
            image_processor(images=[pixels], return_tensors="pt")["pixel_values"]
            for pixels in (image, resized)
        )
        if (
            before.shape != after.shape
            or again[-1] != resized.shape[:2]
            or (np.array(again) < resized.shape[:2]).any()
            # The overview image beside the tiles, resized twice, differs a little; another crop or order of the pixels by more than 1.
            or (before - after).abs().mean() > 0.1 * (before - before.mean()).abs().mean()
        ):
            raise _unknown(image_processor)
    if before.ndim > 3:
        # Where many tiles are allowed, a square of 2.5 x 2.5 tiles would be resized to 3 x 3, and these again to 4 x 4.
        size = model_resolution(image_processor, *[5 * before.shape[-1] // 2] * 2)
        if model_resolution(image_processor, *size) != size:
            raise _unknown(image_processor)


def _configured(processor: Any) -> Any:
    """The image processor with the settings that the processor passes to it on each call (InternVL's tiling)."""
    image_processor = processor.image_processor
    _ask.cache_clear()
    for name, value in (getattr(processor, "images_kwargs", None) or {}).items():
        if hasattr(image_processor, name):
            setattr(image_processor, name, value)
    return image_processor


def _textured(height: int, width: int) -> ImageArray:
    """A random texture of two scales, uint8 [H, W, 3]."""
    rng = np.random.default_rng(0)
    sizes = ((rows, rows * width // height, 3) for rows in (4, 16))
    layers = [resize_image(rng.integers(0, 256, size, np.uint8), (height, width)) for size in sizes]
    return np.mean(layers, axis=0).astype(np.uint8)


def _unknown(image_processor: Any) -> DataError:
    behind = f"an image behind {type(image_processor).__name__}: set data.noise.resolution to native"
    return DataError(f"cannot tell at which resolution a model sees {behind}")


def limit_pixels(processor: Any, max_pixels: int) -> None:
    """Set a processor so that no image has more pixels after its resize; smaller images keep their size.

    The image processor's bound of tiles, of the longest side or of the area becomes the largest with which a large image keeps to the
    limit; a saved processor carries it, so an adapter is served at that size. A limit above the processor's own changes nothing. Of
    an image that is one patch high or wide, Qwen's processors keep that patch, and so may exceed a low limit.
    A DataError if the smallest image is larger, or no setting bounds the size of images.
    """
    if max_pixels < 1:
        raise DataError(f"data.max_pixels must be at least 1, found {max_pixels}")
    image_processor = _configured(processor)
    size = {k: v for k, v in dict(getattr(image_processor, "size", None) or {}).items() if v is not None}
    tiles = getattr(image_processor, "max_patches", None)
    lowest = getattr(image_processor, "min_patches", 1)
    highest = tiles or size.get("longest_edge")
    side = min(math.isqrt(max_pixels) + 1, LARGEST_SIDE)
    # A square uses up a side or an area, a panorama a number of tiles.
    shapes = [(side, side)] if highest and not tiles else [(side, side), PANORAMA]

    def limited(bound: int) -> dict[str, Any]:
        return {"max_patches": bound} if tiles else {"size": {key: min(v, bound) for key, v in size.items()}}

    def pixels(bound: int) -> list[int]:
        asked = copy.copy(image_processor)
        vars(asked).update(limited(bound) if highest else {})
        return [_ask(asked, *shape).pixels for shape in shapes]

    problem = f"data.max_pixels: {type(image_processor).__name__} cannot be limited to {max_pixels} pixels"
    advice = "leave the setting out, or take another model"
    # The limit itself may be the bound, of an area; else the bound is searched for.
    bounds = range(lowest, max(lowest, min(highest or lowest, max_pixels)) + 1)
    try:
        smallest, largest = pixels(lowest), max(pixels(bounds[-1]))
        is_bounded = highest or len(set(smallest)) == 1
    except DataError:
        is_bounded = False
    if not is_bounded:
        raise DataError(f"{problem}, no setting bounds its images: {advice}")
    if max(smallest) > max_pixels:
        least = f"its smallest image has {max(smallest)} pixels: give at least {max(smallest)}"
        raise DataError(f"{problem}, {least}, {advice}")
    if highest:
        best = len(bounds)
        if largest > max_pixels:
            best = bisect_right(bounds, max_pixels, key=lambda bound: max(pixels(bound)))
        vars(image_processor).update(limited(bounds[best - 1]))
    _ask.cache_clear()
