"""The resolution at which a model sees an image, so that noise means the same on a thumbnail and on a photograph.

Noise on a 12-megapixel photo is averaged away when the processor shrinks it. With `resolution: model` the image is first
brought to the size that the processor would make of it and noised there; the processor's own resize then changes nothing.
Where a processor cuts an image into tiles that is the size of all tiles together; the view of the whole image that some add
is made of the noised image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_calibration.records import DataError

PROBES = ((60, 84), (700, 400))
"""(height, width) of the blank images on which a processor must do what is expected of it."""

QWEN_MAX_RATIO = 200
"""How many times as long as the other one side may be; Qwen's processors refuse more."""


def model_resolution(image_processor: Any, height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels of an image of this size after the image processor's resize, before any crop.

    Args:
        image_processor: a transformers image processor; its settings say how it resizes.

    Raises:
        DataError: settings that this function does not know; use `resolution: native` with such a processor. Or an image
            that the processor refuses.
    """
    if not getattr(image_processor, "do_resize", True):
        return height, width
    size = _as_mapping(getattr(image_processor, "size", None))
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    if grids := _grids(image_processor):
        return _fit_within(height, width, *_best_grid(height, width, grids))
    if getattr(image_processor, "crop_to_patches", False):
        tiles = range(int(image_processor.min_patches), int(image_processor.max_patches) + 1)
        # Cut into more, an image of 3 x 3 tiles would be one of 4 x 4 the next time; and ratios are those of tiles.
        if tiles.stop > 16 or size.get("height") != size.get("width"):
            raise _unknown(image_processor)
        return _fit_canvas(height, width, int(size["height"]), tiles)
    if shortest and longest and hasattr(image_processor, "merge_size"):
        return _fit_pixels(height, width, shortest, longest, _factor(image_processor))
    tile = _split_side(image_processor)
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

    Settings alone do not tell every processor that cuts images into tiles or pads them. Those that a processor passes to its
    image processor on each call (InternVL's has images cut into tiles so) become the image processor's own.

    Args:
        processor: a transformers processor with an `image_processor`.

    Raises:
        DataError: the processor does something else; use `resolution: native` with it.
    """
    image_processor = processor.image_processor
    settings = getattr(processor, "images_kwargs", None) or {}
    for name, value in settings.items():
        if hasattr(image_processor, name):
            setattr(image_processor, name, value)

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


def _split_side(image_processor: Any) -> int:
    """Side of the squares that Idefics 3 and SmolVLM cut an image into, 0 for others."""
    return int(_as_mapping(getattr(image_processor, "max_image_size", None)).get("longest_edge", 0))


def _grids(image_processor: Any) -> list[tuple[int, int]]:
    """The (height, width) of the grids of tiles that LLaVA-NeXT and LLaVA-OneVision choose from, none for others."""
    return [(int(h), int(w)) for h, w in getattr(image_processor, "image_grid_pinpoints", None) or ()]


def _pixels(image_processor: Any, size: tuple[int, int]) -> int:
    """How many pixels of an image of this size reach the model, with the view of the whole image beside its tiles."""
    mapping = _as_mapping(image_processor.size)
    if grids := _grids(image_processor):
        # A tile is as large as the view of the whole; black fills what the image leaves free of the grid.
        height, width = mapping.get("height"), mapping.get("width")
        tile = height * width if height and width else mapping["shortest_edge"] ** 2
        return math.prod(_best_grid(*size, grids)) + int(tile)
    if getattr(image_processor, "do_center_crop", False):
        return math.prod(_sides(image_processor.crop_size))
    pixels, tile = math.prod(size), _split_side(image_processor) ** 2
    if getattr(image_processor, "crop_to_patches", False):
        tile = math.prod(_sides(mapping))
    if tile and pixels > tile:
        pixels += tile
    return pixels * int(getattr(image_processor, "temporal_patch_size", 1))


def _fit_pixels(height: int, width: int, low: int, high: int, factor: int) -> tuple[int, int]:
    """Both sides multiples of `factor`, their product within [low, high], the aspect ratio about kept (Qwen2-VL)."""
    if max(height, width) > QWEN_MAX_RATIO * min(height, width):
        raise DataError(
            f"an image of {width} x {height} pixels: one side may be at most {QWEN_MAX_RATIO} times as long as the other"
        )
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


def _fit_canvas(height: int, width: int, tile: int, tiles: range) -> tuple[int, int]:
    """Squeezed into whole tiles, of the arrangement whose ratio is nearest to the image's (InternVL).

    Of several with that ratio the largest, unless the image covers no more than half of it.
    """
    found = [(c, r) for c in range(1, tiles.stop) for r in range(1, tiles.stop) if c * r in tiles]
    best, nearest = (1, 1), math.inf
    for columns, rows in sorted(found, key=math.prod):
        away = abs(width / height - columns / rows)
        larger = 2 * height * width > tile**2 * columns * rows
        if away < nearest or (away == nearest and larger):
            best, nearest = (columns, rows), away
    columns, rows = best
    return rows * tile, columns * tile


def _best_grid(height: int, width: int, grids: list[tuple[int, int]]) -> tuple[int, int]:
    """The grid that keeps the most of an image's pixels, and of several the one that leaves the least free."""

    def kept_and_free(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - math.prod(grid)

    return max(grids, key=kept_and_free)


def _fit_within(height: int, width: int, grid_height: int, grid_width: int) -> tuple[int, int]:
    """As large as fits into the grid, the aspect ratio kept (LLaVA-NeXT, LLaVA-OneVision)."""
    by_width, by_height = grid_width / width, grid_height / height
    if by_width < by_height:
        return min(math.ceil(height * by_width), grid_height), grid_width
    return grid_height, min(math.ceil(width * by_height), grid_width)
