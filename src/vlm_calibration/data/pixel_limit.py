"""The largest image that a model is shown: `data.max_pixels`, applied to a processor's own settings.

A photograph of 12 megapixels is 16,000 tokens of a Qwen2.5-VL, so the size of images decides how much memory a model takes. Each
family bounds it by another setting of its image processor. Setting that one, instead of shrinking images beforehand, has the
advantage that a saved processor carries the limit: an adapter is served at the size that it was trained at.
"""

from __future__ import annotations

import math
from typing import Any

from vlm_calibration.data.resolution import (
    as_mapping,
    merge_factor,
    model_resolution,
    patch_sides,
    split_side,
    tile_grids,
)
from vlm_calibration.records import DataError

PROBE_SIDE = 448
"""Side of a square image in pixels, whose size tells that of every image if the processor gives all images one size."""


def limit_pixels(processor: Any, max_pixels: int) -> None:
    """Set a processor so that no image has more pixels after its resize; smaller images keep their size.

    Of an image that is cut into tiles the pixels of all tiles together count, without the overview image that some families
    add. A limit above the processor's own changes nothing. Of an image that is one patch high or wide, Qwen's processors keep that patch,
    and so may exceed a low limit.

    Args:
        processor: a transformers processor with an `image_processor`; changed in place, and `save_pretrained` keeps the change.
        max_pixels: height times width, at least 1.

    Raises:
        DataError: the processor gives all images one larger size, its smallest image is larger, or its settings are unknown.
    """
    if max_pixels < 1:
        raise DataError(f"data.max_pixels must be at least 1, found {max_pixels}")
    image_processor = processor.image_processor
    size = as_mapping(getattr(image_processor, "size", None))
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    tile = split_side(image_processor)
    if tile_grids(image_processor):
        raise _unlimited(
            image_processor, max_pixels, "its grids of tiles are also part of the model's configuration"
        )
    if _cuts_to_patches(processor):
        smallest = int(image_processor.min_patches) * math.prod(patch_sides(size))
        _check(image_processor, max_pixels, smallest)
        image_processor.max_patches = min(
            int(image_processor.max_patches), max_pixels // math.prod(patch_sides(size))
        )
    elif shortest and longest and hasattr(image_processor, "merge_size"):
        _check(image_processor, max_pixels, merge_factor(image_processor) ** 2)
        image_processor.size = {
            **size,
            "longest_edge": min(longest, max_pixels),
            "shortest_edge": min(shortest, max_pixels),
        }
    elif longest and not shortest and tile and longest % tile == 0:
        _check(image_processor, max_pixels, tile**2)
        image_processor.size = {**size, "longest_edge": _longest(longest, max_pixels, tile)}
    elif longest and not shortest and hasattr(image_processor, "patch_size"):
        side = max(patch_sides(image_processor.patch_size))
        _check(image_processor, max_pixels, side**2)
        image_processor.size = {**size, "longest_edge": _longest(longest, max_pixels, side)}
    else:
        _check_fixed(image_processor, size, max_pixels)


def _cuts_to_patches(processor: Any) -> bool:
    """Whether images are cut into tiles as in InternVL, whose processor says so on each call of its image processor."""
    settings = getattr(processor, "images_kwargs", None) or {}
    return bool(settings.get("crop_to_patches", getattr(processor.image_processor, "crop_to_patches", False)))


def _longest(longest: int, max_pixels: int, step: int) -> int:
    """The largest multiple of `step` up to `longest` whose square has at most `max_pixels`."""
    return min(longest, math.isqrt(max_pixels) // step * step)


def _check(image_processor: Any, max_pixels: int, smallest: int) -> None:
    if max_pixels < smallest:
        raise DataError(
            f"data.max_pixels: the smallest image of {type(image_processor).__name__} has {smallest} pixels, found "
            f"{max_pixels}: give at least {smallest}"
        )


def _check_fixed(image_processor: Any, size: Any, max_pixels: int) -> None:
    """Accept a limit that a processor with one size for all images keeps anyway."""
    if getattr(image_processor, "do_center_crop", False):
        pixels = math.prod(patch_sides(image_processor.crop_size))
    elif size.get("height") and size.get("width"):
        pixels = math.prod(model_resolution(image_processor, PROBE_SIDE, PROBE_SIDE))
    else:
        raise _unlimited(image_processor, max_pixels, "it has no setting for the size of its images")
    if pixels > max_pixels:
        raise _unlimited(image_processor, max_pixels, f"it gives every image {pixels} pixels")


def _unlimited(image_processor: Any, max_pixels: int, reason: str) -> DataError:
    return DataError(
        f"data.max_pixels: {type(image_processor).__name__} cannot be limited to {max_pixels} pixels, {reason}: leave the setting "
        "out, or take another model"
    )
