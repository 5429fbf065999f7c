"""The resolution at which a model sees an image, so that noise has the same effect on a thumbnail and on a photograph.

Noise on a 12-megapixel photo is averaged away when the processor shrinks it. With `resolution: model` the image is first
resized to the processor's target size, with the processor's own filter and steps, and then noised. The processor's resize then
changes nothing, so pixels without noise are the same as in use. For a processor that cuts images into tiles, the target size is
that of all tiles together; the overview image that some add is computed from the noised image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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

QWEN_MAX_RATIO = 200
"""Largest ratio of the sides; Qwen's processors refuse larger ones."""


def model_resolution(image_processor: Any, height: int, width: int) -> tuple[int, int]:
    """The size (height, width) of an image after the image processor's resize, before any crop.

    Args:
        image_processor: a transformers image processor.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Raises:
        DataError: as `resize_steps`.
    """
    return resize_steps(image_processor, height, width)[-1]


def resize_to_model(image_processor: Any, image: ImageArray) -> ImageArray:
    """Resize an image to its `model_resolution` with the image processor's own resize.

    Args:
        image_processor: a transformers image processor with the torchvision or PIL backend.
        image: uint8 [H, W, 3].

    Raises:
        DataError: as `resize_steps`.
    """
    from transformers.image_utils import SizeDict  # deferred: slow to import, and loaded with any processor

    check_image(image)
    # Take the method of the base class: those of Qwen and Pixtral choose the size, which `resize_steps` did.
    resize = next(vars(c)["resize"] for c in reversed(type(image_processor).__mro__) if "resize" in vars(c))
    pixels: Any = image.transpose(2, 0, 1)
    if image_processor.backend != "pil":
        # Left channels-last, which torchvision resizes several times faster than a copy by channels, to the same pixels.
        pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)
    for height, width in resize_steps(image_processor, *image.shape[:2]):
        if pixels.shape[1:] != (height, width):
            size = SizeDict(height=height, width=width)
            pixels = resize(image_processor, pixels, size=size, resample=image_processor.resample)
    return np.array(np.asarray(pixels).transpose(1, 2, 0), order="C")


def resize_steps(image_processor: Any, height: int, width: int) -> list[tuple[int, int]]:
    """The sizes (height, width) of the image processor's successive resizes; the last one is the target size.

    Args:
        image_processor: a transformers image processor; its settings define the resizes.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Raises:
        DataError: unknown settings (use `resolution: native` with such a processor), or an image that the processor refuses.
    """
    if not getattr(image_processor, "do_resize", True):
        return [(height, width)]
    size = as_mapping(getattr(image_processor, "size", None))
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    if grids := tile_grids(image_processor):
        return [_fit_within(height, width, *_best_grid(height, width, grids))]
    if getattr(image_processor, "crop_to_patches", False):
        tiles = range(int(image_processor.min_patches), int(image_processor.max_patches) + 1)
        # With more tiles, a resized image of 3 x 3 tiles would become 4 x 4; and aspect ratios assume square tiles.
        if tiles.stop > 16 or size.get("height") != size.get("width"):
            raise _unknown(image_processor)
        return [_fit_canvas(height, width, int(size["height"]), tiles)]
    if shortest and longest and hasattr(image_processor, "merge_size"):
        return [_fit_pixels(height, width, shortest, longest, merge_factor(image_processor))]
    tile = split_side(image_processor)
    if longest and not shortest and tile and longest % tile == 0:
        return _fit_tiles(height, width, longest, tile, bool(image_processor.do_image_splitting))
    if longest and not shortest and hasattr(image_processor, "patch_size"):
        return [_fit_patches(height, width, longest, *patch_sides(image_processor.patch_size))]
    if size.get("height") and size.get("width"):
        return [(int(size["height"]), int(size["width"]))]
    if shortest and not longest:
        # transformers truncates and does not round.
        if height <= width:
            return [(shortest, int(shortest * width / height))]
        return [(int(shortest * height / width), shortest)]
    raise _unknown(image_processor)


def check_resolution(processor: Any) -> None:
    """Process two textured images with and without `resize_to_model`, and compare the results.

    Settings alone do not identify every processor that cuts or pads images. Settings that a processor passes to its image
    processor on each call (InternVL's tiling) are copied to the image processor.

    Args:
        processor: a transformers processor with an `image_processor`.

    Raises:
        DataError: the results differ; use `resolution: native` with this processor.
    """
    image_processor = processor.image_processor
    settings = getattr(processor, "images_kwargs", None) or {}
    for name, value in settings.items():
        if hasattr(image_processor, name):
            setattr(image_processor, name, value)

    def pixel_values(image: ImageArray) -> Any:
        return image_processor(images=[image], return_tensors="pt", **settings).get("pixel_values")

    for probe in PROBES:
        image = _textured(*probe)
        resized = resize_to_model(image_processor, image)
        before, after = pixel_values(image), pixel_values(resized)
        if (
            before is None
            or before.numel() != 3 * _pixels(image_processor, resized.shape[:2])
            or before.shape != after.shape
            or _mean_abs(before - after) > MAX_PROBE_DIFFERENCE * _mean_abs(before - before.mean())
        ):
            raise _unknown(image_processor)


def _mean_abs(values: torch.Tensor) -> float:
    return float(values.abs().mean())


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


def as_mapping(size: Any) -> Mapping[str, Any]:
    if size is None:
        return {}
    if isinstance(size, int):
        return {"shortest_edge": size}
    return {k: v for k, v in dict(size).items() if v is not None}


def patch_sides(size: Any) -> tuple[int, int]:
    """(height, width) of a patch or crop, which may be set as one number."""
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def merge_factor(image_processor: Any) -> int:
    return int(image_processor.patch_size) * int(image_processor.merge_size)


def split_side(image_processor: Any) -> int:
    """Side of the square tiles of Idefics 3 and SmolVLM; 0 for other processors."""
    return int(as_mapping(getattr(image_processor, "max_image_size", None)).get("longest_edge", 0))


def tile_grids(image_processor: Any) -> list[tuple[int, int]]:
    """The sizes (height, width) of the tile grids of LLaVA-NeXT and LLaVA-OneVision; empty for other processors."""
    return [(int(h), int(w)) for h, w in getattr(image_processor, "image_grid_pinpoints", None) or ()]


def _pixels(image_processor: Any, size: tuple[int, int]) -> int:
    """Number of pixels that the model receives for an image of this size, the overview image included."""
    mapping = as_mapping(image_processor.size)
    if grids := tile_grids(image_processor):
        # A tile is as large as the overview; the rest of the grid is filled with black.
        height, width = mapping.get("height"), mapping.get("width")
        tile = height * width if height and width else mapping["shortest_edge"] ** 2
        return math.prod(_best_grid(*size, grids)) + int(tile)
    if getattr(image_processor, "do_center_crop", False):
        return math.prod(patch_sides(image_processor.crop_size))
    pixels, tile = math.prod(size), split_side(image_processor) ** 2
    if getattr(image_processor, "crop_to_patches", False):
        tile = math.prod(patch_sides(mapping))
    if tile and pixels > tile:
        pixels += tile
    return pixels * int(getattr(image_processor, "temporal_patch_size", 1))


def _fit_pixels(height: int, width: int, low: int, high: int, factor: int) -> tuple[int, int]:
    """Sides rounded to multiples of `factor`, area within [low, high], aspect ratio kept approximately (Qwen2-VL)."""
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


def _fit_tiles(height: int, width: int, longest: int, tile: int, splitting: bool) -> list[tuple[int, int]]:
    """Longest side `longest`, then both sides rounded up to whole tiles; one tile without splitting (Idefics 3, SmolVLM)."""
    ratio = width / height
    h, w = (int(longest / ratio), longest) if ratio >= 1 else (longest, int(longest * ratio))
    first = h, w = max(1, h + h % 2), max(1, w + w % 2)
    if not splitting:
        return [first, (tile, tile)]
    ratio = w / h
    if ratio >= 1:
        w = math.ceil(w / tile) * tile
        h = int(w / ratio)
    else:
        h = math.ceil(h / tile) * tile
        w = int(h * ratio)
    return [first, (math.ceil(h / tile) * tile, math.ceil(w / tile) * tile)]


def _fit_patches(
    height: int, width: int, longest: int, patch_height: int, patch_width: int
) -> tuple[int, int]:
    """Longest side at most `longest`, never enlarged, then both sides rounded up to whole patches (Pixtral)."""
    shrink = max(height / longest, width / longest, 1.0)
    rows = math.ceil(math.floor(height / shrink) / patch_height)
    columns = math.ceil(math.floor(width / shrink) / patch_width)
    return rows * patch_height, columns * patch_width


def _fit_canvas(height: int, width: int, tile: int, tiles: range) -> tuple[int, int]:
    """Whole tiles, in the arrangement whose aspect ratio is nearest to the image's (InternVL).

    Of several arrangements with that ratio the largest, unless the image covers at most half of its area.
    """
    arrangements = [(c, r) for c in range(1, tiles.stop) for r in range(1, tiles.stop) if c * r in tiles]
    best, nearest = (1, 1), math.inf
    for columns, rows in sorted(arrangements, key=math.prod):
        difference = abs(width / height - columns / rows)
        larger = 2 * height * width > tile**2 * columns * rows
        if difference < nearest or (difference == nearest and larger):
            best, nearest = (columns, rows), difference
    columns, rows = best
    return rows * tile, columns * tile


def _best_grid(height: int, width: int, grids: list[tuple[int, int]]) -> tuple[int, int]:
    """The grid that preserves the most pixels of an image; of several, the one with the least padding."""

    def pixels_and_padding(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - math.prod(grid)

    return max(grids, key=pixels_and_padding)


def _fit_within(height: int, width: int, grid_height: int, grid_width: int) -> tuple[int, int]:
    """The largest size that fits into the grid, aspect ratio kept (LLaVA-NeXT, LLaVA-OneVision)."""
    by_width, by_height = grid_width / width, grid_height / height
    if by_width < by_height:
        return min(math.ceil(height * by_width), grid_height), grid_width
    return grid_height, min(math.ceil(width * by_height), grid_width)
