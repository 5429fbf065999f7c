"""Binary masks: checking them, and the one bit of geometry (the bounding box) that several modules share.

A wrong mask must stop a run here, in words, rather than surface later as an indexing error or, worse, as noise in the
wrong place.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BoolMask = NDArray[np.bool_]


class MaskBox(NamedTuple):
    """Half-open bounding box in pixels: rows `top:bottom`, columns `left:right`."""

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
        """Indexes the box out of an `(H, W, ...)` array."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


def check_mask(
    mask: NDArray[Any], image_shape: tuple[int, ...], *, name: str = "mask", allow_empty: bool = False
) -> BoolMask:
    """The mask as a boolean array, or an error that says what is wrong with it.

    Args:
        mask: `(H, W)`, bool, or uint8 that holds only 0 and 1 (what pycocotools decodes to). 0/255 masks are refused:
            a mask with grey values has no single meaning, so the caller compares with a threshold.
        image_shape: `(H, W, ...)` of the image that the mask belongs to.
        name: what to call the mask in messages.
        allow_empty: accept a mask without a single pixel.

    Returns:
        The mask as bool, without a copy (a view for uint8).

    Raises:
        TypeError: if it is not an array of bool or uint8.
        ValueError: if it has another size than the image, other values than 0 and 1, or no pixel.
    """
    if not isinstance(mask, np.ndarray):
        raise TypeError(f"{name} must be a numpy array, got {type(mask).__name__}")
    if mask.ndim != 2:
        raise ValueError(f"{name} must have shape (height, width), got {mask.shape}")
    if mask.shape != tuple(image_shape[:2]):
        raise ValueError(
            f"{name} has shape {mask.shape}, but the image has {tuple(image_shape[:2])} (height, width)"
        )
    if mask.dtype == np.uint8:
        if mask.size and mask.max() > 1:
            raise ValueError(
                f"{name} is uint8 with values up to {mask.max()}; expected 0 and 1 (or a bool array: use mask > 127)"
            )
        mask = mask.view(np.bool_)
    elif mask.dtype != np.bool_:
        raise TypeError(f"{name} must be bool or uint8 with values 0 and 1, got dtype {mask.dtype}")
    if not allow_empty and not mask.any():
        raise ValueError(f"{name} is empty: no pixel is marked, so there is nothing to perturb")
    return mask


def bounding_box(mask: BoolMask) -> MaskBox:
    """The smallest box that holds every marked pixel of a non-empty `(H, W)` mask.

    Raises:
        ValueError: if the mask is empty.
    """
    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size == 0:
        raise ValueError("an empty mask has no bounding box")
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    return MaskBox(top, bottom, int(columns[0]), int(columns[-1]) + 1)
