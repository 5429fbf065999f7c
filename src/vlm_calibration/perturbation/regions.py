"""The region to perturb: its shape, and the choice of one for a query."""

from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
from scipy.ndimage import maximum_filter

from vlm_calibration.perturbation.images import resize_mask
from vlm_calibration.perturbation.masks import BoolMask, bounding_box, check_mask

PLAUSIBLE_AREA = (0.02, 0.25)
"""Range of the area of a random region, as a share of the image."""
PLAUSIBLE_ASPECT = (0.5, 2.0)
"""Range of width over height of a random region."""


def region_mask(mask: BoolMask, *, shape: Literal["mask", "box"] = "mask", dilate: float = 0.0) -> BoolMask:
    """Dilate a mask or fill its bounding box, which hides the silhouette of the object.

    Args:
        mask: bool [H, W], not empty.
        shape: "mask" keeps the outline; "box" fills the bounding box of the whole mask.
        dilate: growth in each direction, by a square, as a fraction of the longer side of the bounding box; at least one pixel if > 0.

    Returns:
        A new mask, bool [H, W], that contains the given mask.
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
    """Choose the region to perturb for one query.

    With key objects, the region is their union, the target, or with `distractor_probability` a random distractor that does not touch
    it, or if there is none the target's box, or its silhouette, at a random position off the target (smaller if it does not fit). A
    target that covers the whole image is perturbed. Without key objects, it is a random distractor or else a random box.

    Args:
        targets: masks of the key objects, bool [H, W], not empty; none for an absent object.
        distractors: masks of other objects, alike.
        perturb_absent: whether there is a region without a key object.
        distractor_probability: in [0, 1].
        rng: the only source of randomness.
        image_shape: [H, W, ...].
        silhouette: off the target, perturb the target's silhouette instead of its box, so that the shape does not tell them apart.

    Returns:
        The region, bool [H, W], or None for an image that stays clean; and whether the region has, or could hide, a key object.
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
        # The pixels of the target in each box of this size, by its top-left corner.
        covered = (
            sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
        )
        corners = np.flatnonzero(covered == 0)
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
