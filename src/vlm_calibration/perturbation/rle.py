"""Between a region as a file states it (COCO run-length encoding, or a box) and a boolean mask."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco

from vlm_calibration.records import RecordError, Region


def region_to_mask(region: Region, height: int, width: int) -> np.ndarray:
    """The region's pixels in an image of this size, bool [height, width]; a region without a mask is its box within the image.

    Raises:
        RecordError: the mask was made for another image size, its counts cannot be decoded, or nothing of the
            region lies within the image.
    """
    if region.mask is None:
        x0, y0, x1, y1 = region.box
        mask = np.zeros((height, width), dtype=bool)
        mask[max(0, round(y0)) : max(0, round(y1)), max(0, round(x0)) : max(0, round(x1))] = True
    else:
        mask = _decode(region, height, width)
    if not mask.any():
        raise RecordError(
            f"the region {region.label!r} (box {list(region.box)}) covers no pixel of the {width} x {height} image"
        )
    return mask


def leaves_image(region: Region, height: int, width: int) -> bool:
    """Whether a part of the region, which has a box and no mask, lies outside an image of this size."""
    x0, y0, x1, y1 = map(round, region.box)
    return region.mask is None and (x0 < 0 or y0 < 0 or x1 > width or y1 > height)


def _decode(region: Region, height: int, width: int) -> np.ndarray:
    assert region.mask is not None
    size, counts = region.mask["size"], region.mask["counts"]
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise RecordError(
            f"the mask of region {region.label!r} has size {size} ([height, width]) but the image is {[height, width]}"
        )
    try:
        text = counts.decode("ascii") if isinstance(counts, bytes) else counts
        runs = _run_lengths(text) if isinstance(text, str) else text
        if not isinstance(runs, list) or not all(type(n) is int and n >= 0 for n in runs):
            raise ValueError("counts must be a text or a list of whole numbers of at least 0")
        if sum(runs) != height * width:
            # pycocotools would leave the rest of the mask as it finds the memory.
            raise ValueError(f"counts cover {sum(runs)} pixels of {height * width}")
    except ValueError as error:
        raise RecordError(f"the mask of region {region.label!r} is not a COCO RLE: {error}") from error
    marked = np.arange(len(runs)) % 2 == 1
    return np.repeat(marked, runs).reshape(width, height).T


def _run_lengths(counts: str) -> list[int]:
    """The runs behind COCO's compressed text: 5 bits a character, from the fourth run on the difference to two runs before."""
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"unexpected character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("counts end within a number")
    return runs


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO RLE of a bool [H, W] mask with `counts` as text, ready for JSON."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}
