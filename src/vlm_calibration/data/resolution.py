"""The resolution at which a model sees an image, so that noise means the same on a thumbnail and on a photograph.

Noise on a 12-megapixel photo is averaged away when the processor shrinks it. With `resolution: model` the image is first
brought to the size that the processor would make of it and noised there; the processor's own resize then changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlm_calibration.records import DataError


def model_resolution(image_processor: Any, height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels of an image of this size after the image processor's resize, before any crop.

    Args:
        image_processor: a transformers image processor; its `size` says how it resizes.

    Raises:
        DataError: a `size` that this function does not know; use `resolution: native` with such a processor.
    """
    if not getattr(image_processor, "do_resize", True):
        return height, width
    size = _as_mapping(getattr(image_processor, "size", None))
    low, high = _pixel_range(image_processor, size)
    if low is not None and high is not None:
        return _fit_pixels(height, width, low, high, _factor(image_processor))
    if size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    if size.get("longest_edge"):
        scale = size["longest_edge"] / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))
    if size.get("shortest_edge"):
        scale = size["shortest_edge"] / min(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))
    raise DataError(
        f"cannot tell the input resolution of {type(image_processor).__name__} from its size {dict(size)}: "
        "set `resolution: native`"
    )


def _as_mapping(size: Any) -> Mapping[str, Any]:
    if size is None:
        return {}
    if isinstance(size, int):
        return {"shortest_edge": size}
    return {k: v for k, v in dict(size).items() if v is not None}


def _factor(image_processor: Any) -> int:
    return int(image_processor.patch_size) * int(getattr(image_processor, "merge_size", 1))


def _pixel_range(image_processor: Any, size: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Bounds on the number of pixels, for processors of the Qwen-VL kind; (None, None) for all others.

    Those state them as `min_pixels` and `max_pixels`, or as `shortest_edge` and `longest_edge` of `size`, which then
    are pixel counts and not lengths: told apart by the presence of a patch merging factor.
    """
    if not hasattr(image_processor, "merge_size"):
        return None, None
    low = getattr(image_processor, "min_pixels", None) or size.get("shortest_edge")
    high = getattr(image_processor, "max_pixels", None) or size.get("longest_edge")
    return low, high


def _fit_pixels(height: int, width: int, low: int, high: int, factor: int) -> tuple[int, int]:
    """Both sides multiples of `factor`, their product within [low, high], the aspect ratio about kept (Qwen2-VL)."""
    h, w = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if h * w > high:
        scale = math.sqrt(height * width / high)
        h = max(factor, math.floor(height / scale / factor) * factor)
        w = max(factor, math.floor(width / scale / factor) * factor)
    elif h * w < low:
        scale = math.sqrt(low / (height * width))
        h = math.ceil(height * scale / factor) * factor
        w = math.ceil(width * scale / factor) * factor
    return h, w
