"""The resolution at which a model sees an image: perturbing at it, and limiting it by `data.max_pixels`."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from vlm_calibration.perturbation.images import resize_image
from vlm_calibration.perturbation.noise import ImageArray, check_image
from vlm_calibration.records import DataError

PROBES = ((60, 84), (700, 400))
"""(height, width) of the images that `check_resolution` processes."""
MAX_PROBE_DIFFERENCE = 0.1
"""Largest mean absolute difference of the pixels, relative to the mean absolute contrast of the probe. The overview image beside
the tiles is resized twice; another crop or order of the pixels differs by more than 1."""
MAX_TILES = 15
"""Of InternVL: with more, an image of 3 x 3 tiles would become 4 x 4 when it is resized again."""


def model_resolution(image_processor: Any, height: int, width: int) -> tuple[int, int]:
    """The size (height, width) in pixels of an image after the image processor's resize, before any crop; of all tiles together.

    Noise on a 12-megapixel photo is averaged away when the processor shrinks it, so images are resized before they are noised.

    Raises:
        DataError: the processor refuses the image, or resizes in a way that cannot be followed (use `resolution: native`).
    """
    return _resizes(image_processor, height, width)[-1]


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
    for height, width in _resizes(image_processor, *image.shape[:2]):
        if pixels.shape[1:] != (height, width):
            size = SizeDict(height=height, width=width)
            pixels = resize(image_processor, pixels, size=size, resample=image_processor.resample)
    return np.array(np.asarray(pixels).transpose(1, 2, 0), order="C")


@lru_cache(maxsize=10_000)
def _resizes(image_processor: Any, height: int, width: int) -> list[tuple[int, int]]:
    """The sizes of the image processor's successive resizes: it processes a black image, and its resize is watched."""
    if not getattr(image_processor, "do_resize", True):
        return [(height, width)]
    results: list[tuple[int, int]] = []
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def resize(*args: Any, **settings: Any) -> Any:
        [before] = [v for v in (*args, *settings.values()) if isinstance(v, np.ndarray | torch.Tensor)]
        resized = image_processor.resize(*args, **settings)
        after = resized.shape[-2], resized.shape[-1]
        steps[after] = [*steps.get((before.shape[-2], before.shape[-1]), []), after]
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
    targets = [
        size for size in results if 3 * math.prod(size) <= seen.numel() and not (has_tiles and size == tile)
    ]
    return steps[max(reversed(targets or results), key=math.prod)]


def check_resolution(processor: Any) -> None:
    """Process two textured images with and without `resize_to_model`; a DataError if the results differ (use `resolution: native`).

    Settings that a processor passes to its image processor on each call (InternVL's tiling) are copied to the image processor.
    """
    image_processor = processor.image_processor
    _resizes.cache_clear()
    for name, value in (getattr(processor, "images_kwargs", None) or {}).items():
        if hasattr(image_processor, name):
            setattr(image_processor, name, value)
    if getattr(image_processor, "crop_to_patches", False):
        size = _sizes(image_processor.size)
        if image_processor.max_patches > MAX_TILES or size.get("height") != size.get("width"):
            raise _unknown(image_processor)
    for probe in PROBES:
        image = _textured(*probe)
        resized = resize_to_model(image_processor, image)
        again = _resizes(image_processor, *resized.shape[:2])
        before, after = (
            image_processor(images=[pixels], return_tensors="pt")["pixel_values"]
            for pixels in (image, resized)
        )
        if (
            before.shape != after.shape
            or again[-1] != resized.shape[:2]
            or (np.array(again) < resized.shape[:2]).any()
            or (before - after).abs().mean() > MAX_PROBE_DIFFERENCE * (before - before.mean()).abs().mean()
        ):
            raise _unknown(image_processor)


def _textured(height: int, width: int) -> ImageArray:
    """A random texture of two scales, uint8 [H, W, 3], in which no two parts or channels are alike."""
    rng = np.random.default_rng(0)
    layers = [
        resize_image(
            rng.integers(0, 256, (rows, max(1, rows * width // height), 3), np.uint8), (height, width)
        )
        for rows in (4, 16)
    ]
    return np.mean(layers, axis=0).astype(np.uint8)


def _unknown(image_processor: Any) -> DataError:
    return DataError(
        f"cannot tell at which resolution a model sees an image behind {type(image_processor).__name__}: set "
        "data.noise.resolution to native"
    )


def limit_pixels(processor: Any, max_pixels: int) -> None:
    """Set a processor so that no image has more pixels after its resize; smaller images keep their size.

    Each family bounds the size by another setting of its image processor, which a saved processor carries: an adapter is served at
    the size that it was trained at. Of an image that is cut into tiles the pixels of all tiles count, without the overview image.
    A limit above the processor's own changes nothing. Of an image that is one patch high or wide, Qwen's processors keep that
    patch, and so may exceed a low limit.

    Raises:
        DataError: the processor gives all images one larger size, its smallest image is larger, or its settings are unknown.
    """
    if max_pixels < 1:
        raise DataError(f"data.max_pixels must be at least 1, found {max_pixels}")
    _resizes.cache_clear()
    image_processor = processor.image_processor
    size = _sizes(getattr(image_processor, "size", None))
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    tile = _sizes(getattr(image_processor, "max_image_size", None)).get("longest_edge")
    patch = _sides(getattr(image_processor, "patch_size", None) or 0)
    # InternVL's processor asks for its tiles on each call of its image processor.
    settings = getattr(processor, "images_kwargs", None) or {}
    kind = type(image_processor).__name__

    def check(smallest: int) -> None:
        if max_pixels < smallest:
            raise DataError(
                f"data.max_pixels: the smallest image of {kind} has {smallest} pixels, found {max_pixels}: give at least {smallest}"
            )

    def unlimited(reason: str) -> DataError:
        return DataError(
            f"data.max_pixels: {kind} cannot be limited to {max_pixels} pixels, {reason}: leave the setting out, or take another model"
        )

    if getattr(image_processor, "image_grid_pinpoints", None):
        raise unlimited("its grids of tiles are also part of the model's configuration")
    if settings.get("crop_to_patches", getattr(image_processor, "crop_to_patches", False)):
        pixels = math.prod(_sides(size))
        check(int(image_processor.min_patches) * pixels)
        image_processor.max_patches = min(int(image_processor.max_patches), max_pixels // pixels)
    elif shortest and longest and hasattr(image_processor, "merge_size"):  # areas, of Qwen
        check((int(image_processor.patch_size) * int(image_processor.merge_size)) ** 2)
        limits = {"longest_edge": min(longest, max_pixels), "shortest_edge": min(shortest, max_pixels)}
        image_processor.size = {**size, **limits}
    elif longest and not shortest and (step := tile if tile and longest % tile == 0 else max(patch)):
        # Idefics 3 and SmolVLM have tiles, Pixtral patches, of which both sides are multiples.
        check(step**2)
        image_processor.size = {**size, "longest_edge": min(longest, math.isqrt(max_pixels) // step * step)}
    else:
        if getattr(image_processor, "do_center_crop", False):
            pixels = math.prod(_sides(image_processor.crop_size))
        elif size.get("height") and size.get("width"):
            pixels = int(size["height"]) * int(size["width"])
        else:
            raise unlimited("it has no setting for the size of its images")
        if pixels > max_pixels:
            raise unlimited(f"it gives every image {pixels} pixels")


def _sizes(size: Any) -> Mapping[str, Any]:
    """A size as its set keys; one number is the shortest edge."""
    if isinstance(size, int):
        return {"shortest_edge": size}
    return {key: value for key, value in dict(size or {}).items() if value is not None}


def _sides(size: Any) -> tuple[int, int]:
    """(height, width) of a patch or crop, which may be set as one number."""
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))
