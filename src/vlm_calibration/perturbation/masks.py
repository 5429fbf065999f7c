"""Binary masks: checks, bounding boxes, and conversion from and to COCO run-length encoding (RLE)."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from vlm_calibration.records import RecordError, Region

BoolMask = NDArray[np.bool_]


class MaskBox(NamedTuple):
    """Bounding box in pixels: rows `top` to `bottom` - 1, columns `left` to `right` - 1."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of the box in an array [H, W, ...]."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def grown(self, margin: int, shape: tuple[int, ...]) -> "MaskBox":
        """The box with a margin, cut off at the border of an image of this shape [H, W, ...]."""
        return MaskBox(
            max(0, self.top - margin),
            min(shape[0], self.bottom + margin),
            max(0, self.left - margin),
            min(shape[1], self.right + margin),
        )


def check_mask(mask: NDArray[Any], image_shape: tuple[int, ...], *, allow_empty: bool = False) -> BoolMask:
    """A mask as bool [H, W], not a copy; a TypeError or ValueError unless it is one of an image of `image_shape`, [H, W, ...].

    It may be bool, or uint8 of 0 and 1 as pycocotools decodes; the meaning of other values is ambiguous.
    """
    if not isinstance(mask, np.ndarray) or mask.dtype not in (np.bool_, np.uint8):
        found = f"dtype {mask.dtype}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise TypeError(f"mask must be a bool array, or uint8 with values 0 and 1, got {found}")
    if mask.shape != (expected := tuple(image_shape[:2])):
        raise ValueError(f"mask has shape {mask.shape}, but the image has {expected} (height, width)")
    if mask.dtype == np.uint8:
        if mask.size and mask.max() > 1:
            raise ValueError(
                f"mask is uint8 with values up to {mask.max()}; expected 0 and 1 (or a bool array: use mask > 127)"
            )
        mask = mask.view(np.bool_)
    if not allow_empty and not mask.any():
        raise ValueError("mask is empty: no pixel is marked, so there is nothing to perturb")
    return mask


def bounding_box(mask: BoolMask) -> MaskBox:
    """The smallest box that contains every marked pixel of a mask [H, W]; a ValueError if there is none."""
    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size == 0:
        raise ValueError("an empty mask has no bounding box")
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    return MaskBox(top, bottom, int(columns[0]), int(columns[-1]) + 1)


def region_to_mask(region: Region, height: int, width: int) -> np.ndarray:
    """The mask of a region, or else its box: bool [height, width]. A RecordError if none of it is inside."""
    if region.mask is None:
        x0, y0, x1, y1 = region.box
        mask = np.zeros((height, width), dtype=bool)
        mask[max(0, round(y0)) : max(0, round(y1)), max(0, round(x0)) : max(0, round(x1))] = True
    else:
        mask = _decode_mask(region, height, width)
    if not mask.any():
        raise RecordError(
            f"the region {region.label!r} (box {list(region.box)}) covers no pixel of the {width} x {height} image"
        )
    return mask


def leaves_image(region: Region, height: int, width: int) -> bool:
    """Whether a region without a mask has a box that is partly outside the image."""
    x0, y0, x1, y1 = map(round, region.box)
    return region.mask is None and (x0 < 0 or y0 < 0 or x1 > width or y1 > height)


def _decode_mask(region: Region, height: int, width: int) -> np.ndarray:
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
            # pycocotools would leave the rest of the mask uninitialised.
            raise ValueError(f"counts cover {sum(runs)} pixels of {height * width}")
    except ValueError as error:
        raise RecordError(f"the mask of region {region.label!r} is not a COCO RLE: {error}") from error
    marked = np.arange(len(runs)) % 2 == 1
    return np.repeat(marked, runs).reshape(width, height).T


def _run_lengths(counts: str) -> list[int]:
    """Decode COCO's compressed counts: 5 bits a character; from the fourth run on, the difference to the run two before."""
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
    """Encode a mask, bool [H, W], as COCO RLE with `counts` as text, ready for JSON."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}
