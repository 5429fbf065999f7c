"""The resolution at which a model sees an image, so that noise means the same on a thumbnail and on a photograph.

Noise on a 12-megapixel photo is averaged away when the processor shrinks it. With `resolution: model` the image is first
brought to the size that the processor would make of it and noised there; the processor's own resize then changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_calibration.records import DataError

PROBES = ((60, 84), (700, 400))
"""(height, width) of the blank images on which a processor must do what is expected of it."""


def model_resolution(image_processor: Any, height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels of an image of this size after the image processor's resize, before any crop.

    Args:
        image_processor: a transformers image processor; its settings say how it resizes.

    Raises:
        DataError: settings that this function does not know; use `resolution: native` with such a processor.
    """
    if not getattr(image_processor, "do_resize", True):
        return height, width
    size = _as_mapping(getattr(image_processor, "size", None))
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    if shortest and longest and hasattr(image_processor, "merge_size"):
        return _fit_pixels(height, width, shortest, longest, _factor(image_processor))
    tile = _tile(image_processor)
    if longest and not shortest and tile and longest % tile == 0:
        return _fit_tiles(height, width, longest, tile, bool(image_processor.do_image_splitting))
    if longest and not shortest and hasattr(image_processor, "patch_size"):
        return _fit_patches(height, width, longest, *_sides(image_processor.patch_size))
    if size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    if shortest and not longest:
        # transformers cuts the fraction off, it does not round.
        if height <= width:
            return shortest, int(shortest * width / height)
        return int(shortest * height / width), shortest
    raise _unknown(image_processor)


def check_resolution(processor: Any) -> None:
    """Let the processor process two blank images, and compare what comes out with `model_resolution`.

    Settings alone do not tell every processor that cuts images into tiles or pads them.

    Args:
        processor: a transformers processor with an `image_processor`.

    Raises:
        DataError: the processor does something else; use `resolution: native` with it.
    """
    image_processor = processor.image_processor
    settings = getattr(processor, "images_kwargs", None) or {}

    def seen(height: int, width: int) -> Any:
        blank = np.full((height, width, 3), 255, dtype=np.uint8)
        return image_processor(images=[blank], return_tensors="pt", **settings).get("pixel_values")

    for probe in PROBES:
        size = model_resolution(image_processor, *probe)
        before, after = seen(*probe), seen(*size)
        if (
            before is None
            or before.numel() != 3 * _pixels(image_processor, size)
            or before.shape != after.shape
            or (before - after).abs().max() > 0.02
        ):
            raise _unknown(image_processor)


def _unknown(image_processor: Any) -> DataError:
    return DataError(
        f"cannot tell at which resolution a model sees an image behind {type(image_processor).__name__}: set "
        "data.noise.resolution to native"
    )


def _as_mapping(size: Any) -> Mapping[str, Any]:
    if size is None:
        return {}
    if isinstance(size, int):
        return {"shortest_edge": size}
    return {k: v for k, v in dict(size).items() if v is not None}


def _sides(size: Any) -> tuple[int, int]:
    """(height, width) of a patch or crop, which may be stated as one number."""
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _factor(image_processor: Any) -> int:
    return int(image_processor.patch_size) * int(image_processor.merge_size)


def _tile(image_processor: Any) -> int:
    """Side of the squares that an image is cut into, 0 if it is not."""
    return int(_as_mapping(getattr(image_processor, "max_image_size", None)).get("longest_edge", 0))


def _pixels(image_processor: Any, size: tuple[int, int]) -> int:
    """How many pixels of an image of this size reach the model."""
    if getattr(image_processor, "do_center_crop", False):
        return math.prod(_sides(image_processor.crop_size))
    pixels, tile = math.prod(size), _tile(image_processor) ** 2
    if tile and pixels > tile:
        pixels += tile  # a view of the whole image, beside its tiles
    return pixels * int(getattr(image_processor, "temporal_patch_size", 1))


def _fit_pixels(height: int, width: int, low: int, high: int, factor: int) -> tuple[int, int]:
    """Both sides multiples of `factor`, their product within [low, high], the aspect ratio about kept (Qwen2-VL)."""
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > high:
        scale = math.sqrt(height * width / high)
        h = max(factor, math.floor(height / scale / factor) * factor)
        w = max(factor, math.floor(width / scale / factor) * factor)
    elif h * w < low:
        scale = math.sqrt(low / (height * width))
        h = math.ceil(height * scale / factor) * factor
        w = math.ceil(width * scale / factor) * factor
    return h, w


def _fit_tiles(height: int, width: int, longest: int, tile: int, splitting: bool) -> tuple[int, int]:
    """The longest side brought to `longest`, then both up to whole tiles; one tile without splitting (Idefics 3, SmolVLM)."""
    if not splitting:
        return tile, tile
    ratio = width / height
    h, w = (int(longest / ratio), longest) if ratio >= 1 else (longest, int(longest * ratio))
    h, w = max(1, h + h % 2), max(1, w + w % 2)
    ratio = w / h
    if ratio >= 1:
        w = math.ceil(w / tile) * tile
        h = int(w / ratio)
    else:
        h = math.ceil(h / tile) * tile
        w = int(h * ratio)
    return math.ceil(h / tile) * tile, math.ceil(w / tile) * tile


def _fit_patches(
    height: int, width: int, longest: int, patch_height: int, patch_width: int
) -> tuple[int, int]:
    """Shrunk, never enlarged, to a longest side of `longest`, then up to whole patches (Pixtral)."""
    shrink = max(height / longest, width / longest, 1.0)
    rows = math.ceil(math.floor(height / shrink) / patch_height)
    columns = math.ceil(math.floor(width / shrink) / patch_width)
    return rows * patch_height, columns * patch_width
