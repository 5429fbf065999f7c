"""An estimate of what is behind a region, from the pixels outside of it only.

Pixels outside the region are averaged to ever coarser grids, and the region is filled from the finest grid that knows something
about a place ("push-pull" interpolation; Gortler et al., The Lumigraph, 1996).
"""

import cv2
import numpy as np

from vlm_calibration.perturbation.masks import BoolMask
from vlm_calibration.perturbation.noise import ImageArray

GREY = 128
"""What is assumed if there is no pixel outside the region."""

_CELLS = 64  # the estimate is smooth: it is computed on a grid of at most so many cells a side, and enlarged
_LEAST_KNOWN = 0.05  # a smaller share of known pixels is averaged in floating point, which takes longer


def surroundings(image: ImageArray, region: BoolMask) -> ImageArray:
    """Estimate the image, uint8 [H, W, 3], without the content of a region, bool [H, W].

    Returns:
        uint8 [H, W, 3], the same whatever the region's pixels are; uniformly `GREY` if the region is the whole image. Outside
        the region it is a smoothed image.
    """
    height, width = region.shape
    outside = (~region).view(np.uint8) * np.uint8(255)
    count = np.count_nonzero(outside)
    if not count:
        return np.full_like(image, GREY)
    known = cv2.bitwise_and(image, image, mask=outside)
    if count < _LEAST_KNOWN * outside.size:
        known, outside = known.astype(np.float32), outside.astype(np.float32)
    cell = -(-max(height, width) // _CELLS)
    # Whole cells: OpenCV averages them several times faster. The last ones of each row and column are the region's.
    bottom, right = -height % cell, -width % cell
    size = ((width + right) // cell, (height + bottom) // cell)
    known, weight = (
        _reduced(cv2.copyMakeBorder(a, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=0), size).astype(
            np.float32
        )
        for a in (known, outside)
    )
    fill = np.clip(np.rint(_push_pull(known, weight / 255)), 0, 255).astype(np.uint8)
    enlarged = cv2.resize(fill, (width + right, height + bottom), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(enlarged[:height, :width])


def mixed(image: ImageArray, background: ImageArray, weight: float) -> ImageArray:
    """`(1 - weight) * image + weight * background`, rounded; exactly `background` at weight 1."""
    return cv2.addWeighted(image, 1 - weight, background, weight, 0).astype(np.uint8, copy=False)


def _push_pull(known: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Fill in what is unknown: float32 [h, w, 3], from values multiplied by their weights, the known share of each cell in [0, 1]."""
    height, width = weight.shape
    if height == width == 1:
        return known / weight[..., None]
    half = ((width + 1) // 2, (height + 1) // 2)
    coarse = _push_pull(_reduced(known, half), _reduced(weight, half))
    return known + (1 - weight)[..., None] * cv2.resize(
        coarse, (width, height), interpolation=cv2.INTER_LINEAR
    )


def _reduced(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The means of the cells of a coarser grid of `size` (width, height)."""
    return cv2.resize(values, size, interpolation=cv2.INTER_AREA)
