"""The resolution at which a model sees an image, asked of its processor: perturbing at it, and limiting it by `data.max_pixels`."""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from typing import Any

import numpy as np
import torch

from vlm_calibration.perturbation.images import resize_image
from vlm_calibration.perturbation.noise import ImageArray, check_image
from vlm_calibration.records import DataError

MAX_PROBE_DIFFERENCE = 0.1
"""Largest mean absolute difference of the pixels, relative to the mean absolute contrast of the probe. The overview image beside
the tiles is resized twice; another crop or order of the pixels differs by more than 1."""


def resize_to_model(image_processor: Any, image: ImageArray) -> ImageArray:
    """Resize an image, uint8 [H, W, 3], as the image processor does before any crop; of tiles, all together.

    Noise on a 12-megapixel photo is averaged away when the processor shrinks it, so images are resized before they are noised.

    Raises:
        DataError: the processor refuses the image, or resizes in a way that cannot be followed (use `resolution: native`).
    """
    return _process(image_processor, image)[0]


def _process(image_processor: Any, image: ImageArray) -> tuple[ImageArray, int, bool]:
    """Let the processor process an image, and watch its resizes; tiles count together, without the overview image beside them.

    Returns:
        The image after the resizes, its number of pixels after any crop, and whether a resize made it smaller than it was given.
    """
    check_image(image)
    if not getattr(image_processor, "do_resize", True):
        return image, image.size // 3, False
    results = [image]

    def resize(*args: Any, **settings: Any) -> Any:
        resized = image_processor.resize(*args, **settings)
        [given] = [v for v in (*args, *settings.values()) if isinstance(v, np.ndarray | torch.Tensor)]
        # Of the whole image, not of a part.
        if any(given.shape[-2:] == whole.shape[:2] for whole in results):
            first, *_ = np.asarray(resized.reshape(-1, *resized.shape[-3:]))
            results.append(first.transpose(1, 2, 0))
        return resized

    watched = copy.copy(image_processor)
    watched.resize = resize
    try:
        outputs = watched(images=[image], return_tensors="pt")
        seen = outputs["pixel_values"]
    except ValueError as error:
        raise DataError(f"an image of {image.shape[1]} x {image.shape[0]} pixels: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise _unknown(image_processor) from error
    others = [name for name in outputs if name.endswith("_pixel_values")]  # of another resolution
    if others or len(results) == 1 or results[1].dtype != np.uint8:
        raise _unknown(image_processor)
    tile = tuple(seen.shape[-2:])
    has_tiles = seen.ndim > 3 and seen.numel() > 3 * math.prod(tile)
    views = [r for r in results[1:] if not (has_tiles and r.shape[:2] == tile)] or results[1:]
    # Not an image that is shrunk further; a crop leaves only images that are larger.
    shown = [i for i, view in enumerate(views) if view.size <= seen.numel()] or range(len(views))
    last = max(reversed(shown), key=lambda i: views[i].size)
    shrinks = any(np.less(view.shape, image.shape).any() for view in views[: last + 1])
    return np.array(views[last], order="C"), min(views[last].size, seen.numel()) // 3, shrinks


def check_resolution(processor: Any) -> None:
    """Process textured images with and without `resize_to_model`; a DataError if the results differ (use `resolution: native`)."""
    image_processor = _configured(processor)
    rng = np.random.default_rng(0)
    for height, width in ((60, 84), (700, 400)):
        image = resize_image(rng.integers(0, 256, (16, 16, 3), np.uint8), (height, width))
        resized = resize_to_model(image_processor, image)
        again, _, shrinks = _process(image_processor, resized)
        before, after = (
            image_processor(images=[pixels], return_tensors="pt")["pixel_values"]
            for pixels in (image, resized)
        )
        if (
            before.shape != after.shape
            or again.shape != resized.shape
            or shrinks
            or (before - after).abs().mean() > MAX_PROBE_DIFFERENCE * (before - before.mean()).abs().mean()
        ):
            raise _unknown(image_processor)
    if before.ndim > 3:
        # Where many tiles are allowed, a square of 2.5 x 2.5 tiles would be resized to 3 x 3, and these again to 4 x 4.
        side = 5 * before.shape[-1] // 2
        resized = resize_to_model(image_processor, np.zeros((side, side, 3), np.uint8))
        if resize_to_model(image_processor, resized).shape != resized.shape:
            raise _unknown(image_processor)


def _configured(processor: Any) -> Any:
    """The image processor with the settings that the processor passes to it on each call (InternVL's tiling)."""
    image_processor = processor.image_processor
    for name, value in (getattr(processor, "images_kwargs", None) or {}).items():
        if hasattr(image_processor, name):
            setattr(image_processor, name, value)
    return image_processor


def _unknown(image_processor: Any) -> DataError:
    return DataError(
        f"cannot tell at which resolution a model sees an image behind {type(image_processor).__name__}: set "
        "data.noise.resolution to native"
    )


def limit_pixels(processor: Any, max_pixels: int) -> None:
    """Set a processor so that no image has more pixels after its resize; smaller images keep their size.

    Its image processor bounds the tiles, the longest side or the area of images. This setting becomes the largest with which a large
    image keeps to the limit. A saved processor carries it: an adapter is served at the size that it was trained at. A limit above
    the processor's own changes nothing. Of an image that is one patch high or wide, Qwen's processors keep that patch, and so may
    exceed a low limit.

    Raises:
        DataError: the smallest image is larger, or no setting bounds the size of images.
    """
    image_processor = _configured(processor)
    size = {k: v for k, v in dict(getattr(image_processor, "size", None) or {}).items() if v is not None}
    tiles = getattr(image_processor, "max_patches", None)
    lowest, highest = getattr(image_processor, "min_patches", 1), tiles or size.get("longest_edge")
    # A square uses up a side, which no published processor allows above 4096, or an area; a panorama uses up a number of tiles.
    side = min(math.isqrt(max_pixels) + 1, 4096)
    shapes = [(side, side)] if highest and not tiles else [(side, side), (16, 1024)]

    def limited(bound: int) -> dict[str, Any]:
        if not highest:
            return {}
        return {"max_patches": bound} if tiles else {"size": {key: min(v, bound) for key, v in size.items()}}

    def pixels(bound: int) -> list[int]:
        asked = copy.copy(image_processor)
        vars(asked).update(limited(bound))
        return [_process(asked, np.zeros((*shape, 3), np.uint8))[1] for shape in shapes]

    problem = f"data.max_pixels: {type(image_processor).__name__} cannot be limited to {max_pixels} pixels"
    try:
        smallest = pixels(lowest)
    except DataError:
        smallest = []
    if not smallest or (not highest and len(set(smallest)) > 1):
        raise DataError(
            f"{problem}, no setting bounds its images: leave the setting out, or take another model"
        )
    if max(smallest) > max_pixels:
        raise DataError(
            f"{problem}, its smallest image has {max(smallest)} pixels: give at least {max(smallest)}, leave the setting out, or "
            "take another model"
        )
    # The limit itself may be the bound, of an area; else the bound is searched for.
    best = max(lowest, min(highest or lowest, max_pixels))
    if max(pixels(best)) > max_pixels:
        bounds = range(lowest, best + 1)
        best = lowest - 1 + bisect_right(bounds, max_pixels, key=lambda bound: max(pixels(bound)))
    vars(image_processor).update(limited(best))
