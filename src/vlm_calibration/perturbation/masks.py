"""Binary masks: checks, bounding boxes, sizes, COCO run-length encoding (RLE); and the region to perturb: its shape, and the choice of one for a query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco
from scipy.ndimage import maximum_filter

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

    def grown(self, margin: int, shape: tuple[int, ...]) -> MaskBox:
        """The box with a margin, cut off at the border of an image of this shape [H, W, ...]."""
        top, left = max(0, self.top - margin), max(0, self.left - margin)
        return MaskBox(top, min(shape[0], self.bottom + margin), left, min(shape[1], self.right + margin))


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
            expected_values = "0 and 1 (or a bool array: use mask > 127)"
            raise ValueError(f"mask is uint8 with values up to {mask.max()}; expected {expected_values}")
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


def resize_mask(mask: NDArray[Any], size: tuple[int, int]) -> BoolMask:
    """Resize a mask, bool or uint8 [H, W], to `size = (height, width)`: a pixel is marked if the mask covers at least half of its area.

    If a non-empty mask covers half of no pixel, the pixels with the largest coverage are marked, so that no object vanishes.
    """
    mask = check_mask(mask, getattr(mask, "shape", ()), allow_empty=True)
    if mask.shape == size:
        return mask.copy()
    resized = np.zeros(size, dtype=np.bool_)
    if not mask.any():
        return resized
    box = bounding_box(mask).slices
    sums: NDArray[Any] = cv2.integral(np.ascontiguousarray(mask[box]).view(np.uint8))
    touched = []
    for axis, (old, length, n) in enumerate(zip(box, mask.shape, size, strict=True)):
        new = slice(old.start * n // length, -(-old.stop * n // length))
        borders = np.arange(new.start, new.stop + 1) * (length / n) - old.start
        borders = borders.clip(0, old.stop - old.start)
        # A pixel's value is the same everywhere within it, so cumulative sums at borders within pixels are interpolated exactly.
        whole = np.minimum(borders.astype(np.int64), sums.shape[axis] - 2)
        before, after = sums.take(whole, axis), sums.take(whole + 1, axis)
        part = np.expand_dims(borders - whole, 1 - axis)
        sums = np.diff(before + part * (after - before), axis=axis)
        touched.append(new)
    coverage = sums * (size[0] * size[1] / mask.size)
    # The factor allows for rounding errors where the coverage is exactly half, or tied.
    resized[tuple(touched)] = coverage >= min(0.5, float(coverage.max())) * (1 - 1e-5)
    return resized


def region_to_mask(region: Region, height: int, width: int) -> np.ndarray:
    """The mask of a region, or else its box: bool [height, width]. A RecordError if none of it is inside."""
    if region.mask is None:
        x0, y0, x1, y1 = region.box
        mask = np.zeros((height, width), dtype=bool)
        mask[max(0, round(y0)) : max(0, round(y1)), max(0, round(x0)) : max(0, round(x1))] = True
    else:
        mask = _decode_mask(region, height, width)
    if not mask.any():
        named = f"the region {region.label!r} (box {list(region.box)})"
        raise RecordError(f"{named} covers no pixel of the {width} x {height} image")
    return mask


def leaves_image(region: Region, height: int, width: int) -> bool:
    """Whether a region without a mask has a box that is partly outside the image."""
    x0, y0, x1, y1 = map(round, region.box)
    return region.mask is None and (x0 < 0 or y0 < 0 or x1 > width or y1 > height)


def _decode_mask(region: Region, height: int, width: int) -> np.ndarray:
    assert region.mask is not None
    size, counts = region.mask["size"], region.mask["counts"]
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        sizes = f"size {size} ([height, width]) but the image is {[height, width]}"
        raise RecordError(f"the mask of region {region.label!r} has {sizes}")
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
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


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


PLAUSIBLE_AREA = (0.02, 0.25)  # range of the area of a random region, as a share of the image
PLAUSIBLE_ASPECT = (0.5, 2.0)  # range of width over height of a random region


def region_mask(mask: BoolMask, *, shape: Literal["mask", "box"] = "mask", dilate: float = 0.0) -> BoolMask:
    """Dilate a mask or fill its bounding box, which hides the silhouette of the object: a new mask, bool [H, W], that contains it.

    Args:
        mask: bool [H, W], not empty.
        shape: "mask" keeps the outline; "box" fills the bounding box of the whole mask.
        dilate: growth in each direction, by a square, as a fraction of the longer side of the bounding box; at least one pixel if > 0.
    """
    if shape not in ("mask", "box"):
        raise ValueError(f"region shape must be 'mask' or 'box', got {shape!r}")
    if not 0 <= dilate < float("inf"):
        raise ValueError(f"dilate must be a finite fraction >= 0, got {dilate!r}")
    mask = check_mask(mask, mask.shape)
    box = bounding_box(mask)
    radius = max(1, round(dilate * max(box.height, box.width))) if dilate else 0
    grown = box.grown(radius, mask.shape).slices
    region = np.zeros_like(mask)
    if shape == "box":
        region[grown] = True
        return region
    # A window longer than the array has the same result, but costs more in scipy.
    window = [2 * min(radius, length) + 1 for length in mask[grown].shape]
    region[grown] = maximum_filter(mask[grown].view(np.uint8), window, mode="constant")
    return region


def choose_region(
    targets: Sequence[BoolMask],
    distractors: Sequence[BoolMask],
    *,
    perturb_absent: bool,
    distractor_probability: float,
    rng: np.random.Generator,
    image_shape: tuple[int, ...],
    silhouette: bool = False,
) -> tuple[BoolMask | None, bool]:
    """Choose the region to perturb for one query, bool [H, W], and tell whether it has, or could hide, a key object.

    With key objects, the region is their union, the target, or with `distractor_probability` a random distractor that does not touch
    it, or if there is none the target's box, or its silhouette, at a random position off the target (smaller if it does not fit). A
    target that covers the whole image is perturbed. Without key objects, it is a random distractor or else a random box, or None for an
    image that stays clean.

    Args:
        targets, distractors: masks of the key objects, none for an absent one, and of others: bool [H, W], not empty.
        perturb_absent: whether there is a region without a key object.
        distractor_probability: in [0, 1].
        image_shape: [H, W, ...].
        silhouette: off the target, perturb the target's silhouette instead of its box, so that the shape does not tell them apart.
    """
    if targets:
        target = np.logical_or.reduce(targets)
        if rng.random() < distractor_probability:
            off_target = _region_off(target, distractors, silhouette, rng)
            if off_target is not None:
                return off_target, False
        return target, True
    if not perturb_absent:
        return None, False
    if distractors:
        return distractors[int(rng.integers(len(distractors)))], True
    return _plausible_box(image_shape, rng), True


def _region_off(
    target: BoolMask, distractors: Sequence[BoolMask], silhouette: bool, rng: np.random.Generator
) -> BoolMask | None:
    """A distractor, or else the target's box or silhouette at a random place, off the target; None if the target fills the image."""
    disjoint = [mask for mask in distractors if not np.any(mask & target)]
    if disjoint:
        return disjoint[int(rng.integers(len(disjoint)))]
    if target.all():
        return None
    box = bounding_box(target)
    height, width = box.height, box.width
    shape = target[box.slices] if silhouette else np.ones((height, width), dtype=np.bool_)
    sums = cv2.integral(target.view(np.uint8))
    while True:
        # The boxes of this size without a pixel of the target, by their top-left corner.
        rows = sums[height:] - sums[:-height]
        corners = np.flatnonzero(rows[:, width:] == rows[:, :-width])
        if corners.size:
            top, left = divmod(int(rng.choice(corners)), target.shape[1] - width + 1)
            region = np.zeros_like(target)
            region[top : top + height, left : left + width] = resize_mask(shape, (height, width))
            return region
        # At least one pixel is free, so a box of one pixel always fits.
        height, width = max(1, int(height * 0.8)), max(1, int(width * 0.8))


def _plausible_box(image_shape: tuple[int, ...], rng: np.random.Generator) -> BoolMask:
    """A box at a random position whose area and aspect are log-uniform in the plausible ranges."""
    height, width = image_shape[:2]
    area = np.exp(rng.uniform(*np.log(PLAUSIBLE_AREA))) * height * width
    aspect = np.exp(rng.uniform(*np.log(PLAUSIBLE_ASPECT)))
    box_height = min(height, max(1, round(np.sqrt(area / aspect))))
    box_width = min(width, max(1, round(np.sqrt(area * aspect))))
    top = int(rng.integers(height - box_height + 1))
    left = int(rng.integers(width - box_width + 1))
    mask = np.zeros((height, width), dtype=np.bool_)
    mask[top : top + box_height, left : left + box_width] = True
    return mask
