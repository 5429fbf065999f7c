"""Between a region as a file states it (COCO run-length encoding, or a box) and a boolean mask."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco

from vlm_calibration.records import RecordError, Region


def region_to_mask(region: Region, height: int, width: int) -> np.ndarray:
    """The region's pixels in an image of this size, bool [height, width]; a region without a mask is its box.

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


def _decode(region: Region, height: int, width: int) -> np.ndarray:
    assert region.mask is not None
    size, counts = list(region.mask["size"]), region.mask["counts"]
    if size != [height, width]:
        raise RecordError(
            f"the mask of region {region.label!r} has size {size} ([height, width]) but the image is {[height, width]}"
        )
    try:
        rle = {"size": size, "counts": counts.encode("ascii") if isinstance(counts, str) else counts}
        if isinstance(counts, list):
            rle = coco.frPyObjects(rle, height, width)
        return coco.decode(rle).astype(bool)
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise RecordError(f"the mask of region {region.label!r} is not a COCO RLE: {error}") from error


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO RLE of a bool [H, W] mask with `counts` as text, ready for JSON."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}
