"""Where the noise goes: the shape of a region, and the policy that chooses one for a query.

Noise only carries meaning if its mere presence gives nothing away. So some of it falls on objects that the question
is not about, and questions about absent objects get noise as well. Everything here is geometry on masks and a
random generator; nothing knows about images or records.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.ndimage import maximum_filter1d

from vlm_calibration.perturbation.masks import BoolMask, MaskBox, bounding_box, check_mask

AbsentPolicy = Literal["distractor", "clean", "skip"]
RegionShape = Literal["mask", "box"]
RegionKind = Literal["target", "distractor", "absent", "none"]

PLAUSIBLE_AREA = (0.02, 0.25)
"""Share of the image that a made-up object covers where there is no object to take the size from."""

PLAUSIBLE_ASPECT = (0.5, 2.0)
"""Width over height of a made-up object."""


class RegionChoice(NamedTuple):
    """The region to noise, and what noise there means for the confidence to state.

    Attributes:
        mask: `(H, W)` bool, or None to leave the image clean.
        kind: "target": the key object; state the confidence of the noise level. "distractor": a region that the question is
            not about; the evidence is whole, so state the confidence of the clean image. "absent": the question is about
            an object that is not there; the noise could hide one, so state the confidence of the noise level. "none":
            the image stays clean.
    """

    mask: BoolMask | None
    kind: RegionKind


def region_mask(mask: BoolMask, *, shape: RegionShape = "mask", dilate: float = 0.0) -> BoolMask:
    """A region grown, or squared off, so that its outline does not give the object's silhouette away.

    Args:
        mask: `(H, W)` bool, not empty.
        shape: "mask" keeps the outline; "box" fills the bounding box (of the whole mask, if it has several parts).
        dilate: how far to grow in each direction, as a fraction of the longer side of the bounding box, so that it means
            the same at every resolution; at least one pixel if positive. Growth is square and stops at the image's edge.

    Returns:
        A new `(H, W)` bool mask that contains the given one.

    Raises:
        ValueError: for an empty mask, an unknown shape, or a `dilate` that is negative or not finite.
    """
    if shape not in ("mask", "box"):
        raise ValueError(f"region shape must be 'mask' or 'box', got {shape!r}")
    if not 0 <= dilate < float("inf"):
        raise ValueError(f"dilate must be a finite fraction >= 0, got {dilate!r}")
    mask = check_mask(mask, mask.shape, name="region mask")
    box = bounding_box(mask)
    radius = max(1, round(dilate * max(box.height, box.width))) if dilate else 0
    grown = MaskBox(
        max(0, box.top - radius),
        min(mask.shape[0], box.bottom + radius),
        max(0, box.left - radius),
        min(mask.shape[1], box.right + radius),
    )
    region = np.zeros_like(mask)
    if shape == "box":
        region[grown.slices] = True
        return region
    part = mask[grown.slices].view(np.uint8)
    if radius:
        for axis, length in enumerate(part.shape):
            # A window longer than the array sees nothing more; scipy would pay for its full length.
            part = maximum_filter1d(part, 2 * min(radius, length) + 1, axis=axis, mode="constant")
    region[grown.slices] = part.astype(np.bool_)
    return region


def choose_region(
    target_masks: Sequence[BoolMask],
    distractor_masks: Sequence[BoolMask],
    *,
    absent: AbsentPolicy,
    distractor_probability: float,
    rng: np.random.Generator,
    image_shape: tuple[int, ...],
) -> RegionChoice:
    """The region to noise for one query; a pure function of its arguments and the generator's state.

    With key objects, the region is their union ("target"), or with `distractor_probability` one that the question is not
    about ("distractor"): a distractor mask that does not touch the target, drawn at random, or without one a box
    of the target's size at a random place off the target (smaller if it fits nowhere). If the target covers the whole
    image there is no such place, and the target is noised.

    Without key objects, `absent` decides: "distractor" noises a random distractor or, without one, a random box of
    plausible size ("absent"); "clean" noises nothing ("none"). Records under "skip" must be left out before.

    Args:
        target_masks: masks of the key objects, each `(H, W)` bool and not empty; none for an absent object.
        distractor_masks: masks of the other objects.
        absent: policy for queries without a key object.
        distractor_probability: in [0, 1].
        rng: source of the choice.
        image_shape: `(H, W, ...)`.

    Raises:
        TypeError, ValueError: for a mask that is empty, not bool or of another size, a probability outside [0, 1], an
            unknown policy, or a query without a key object under "skip".
    """
    if absent not in ("distractor", "clean", "skip"):
        raise ValueError(f"absent must be 'distractor', 'clean' or 'skip', got {absent!r}")
    if not 0.0 <= distractor_probability <= 1.0:
        raise ValueError(f"distractor_probability must be in [0, 1], got {distractor_probability!r}")
    targets = [check_mask(m, image_shape, name=f"target mask {i}") for i, m in enumerate(target_masks)]
    others = [check_mask(m, image_shape, name=f"distractor mask {i}") for i, m in enumerate(distractor_masks)]
    if targets:
        target = np.logical_or.reduce(targets)
        if rng.random() < distractor_probability:
            off_target = _region_off(target, others, rng)
            if off_target is not None:
                return RegionChoice(off_target, "distractor")
        return RegionChoice(target, "target")
    if absent == "skip":
        raise ValueError(
            "absent: skip leaves out queries without a key-object region; drop them before choosing"
        )
    if absent == "clean":
        return RegionChoice(None, "none")
    if others:
        return RegionChoice(others[int(rng.integers(len(others)))], "absent")
    return RegionChoice(_plausible_box(image_shape, rng), "absent")


def _region_off(target: BoolMask, others: Sequence[BoolMask], rng: np.random.Generator) -> BoolMask | None:
    """A distractor clear of the target, or a random box clear of it, or None if the target fills the image."""
    clear = [mask for mask in others if not np.any(mask & target)]
    if clear:
        return clear[int(rng.integers(len(clear)))]
    if target.all():
        return None
    box = bounding_box(target)
    height, width = box.height, box.width
    while True:
        corners = _free_corners(target, height, width)
        if corners.size:
            top, left = divmod(int(rng.choice(corners)), target.shape[1] - width + 1)
            return _box_mask(target.shape, MaskBox(top, top + height, left, left + width))
        # Some pixel is free, so this ends at the latest with a box of one pixel.
        height, width = max(1, int(height * 0.8)), max(1, int(width * 0.8))


def _free_corners(target: BoolMask, height: int, width: int) -> np.ndarray:
    """Flat indices, over `(H - height + 1, W - width + 1)`, of top-left corners of boxes that miss the target."""
    sums = np.zeros((target.shape[0] + 1, target.shape[1] + 1), dtype=np.int32)
    np.cumsum(np.cumsum(target, axis=0, dtype=np.int32), axis=1, out=sums[1:, 1:])
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    return np.flatnonzero(inside == 0)


def _plausible_box(image_shape: tuple[int, ...], rng: np.random.Generator) -> BoolMask:
    """A box whose area and aspect are drawn log-uniformly from the plausible ranges, at a random place."""
    height, width = image_shape[:2]
    area = np.exp(rng.uniform(*np.log(PLAUSIBLE_AREA))) * height * width
    aspect = np.exp(rng.uniform(*np.log(PLAUSIBLE_ASPECT)))
    box_height = min(height, max(1, round(np.sqrt(area / aspect))))
    box_width = min(width, max(1, round(np.sqrt(area * aspect))))
    top = int(rng.integers(height - box_height + 1))
    left = int(rng.integers(width - box_width + 1))
    return _box_mask((height, width), MaskBox(top, top + box_height, left, left + box_width))


def _box_mask(shape: tuple[int, ...], box: MaskBox) -> BoolMask:
    mask = np.zeros(shape[:2], dtype=np.bool_)
    mask[box.slices] = True
    return mask
