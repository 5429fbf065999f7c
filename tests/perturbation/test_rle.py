"""COCO run-length encoding, compared with pycocotools, and refusal of invalid run lengths.

pycocotools returns uninitialised memory for counts that do not cover the image, so these cases matter most.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco

from vlm_calibration.perturbation.masks import mask_to_rle, region_to_mask
from vlm_calibration.records import RecordError, Region


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    share = draw(st.sampled_from([0.05, 0.5, 0.95]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    mask = rng.random((height, width)) < share
    mask[rng.integers(height), rng.integers(width)] = True
    return mask


def _region(mask: Any, box: tuple[float, float, float, float] = (0, 0, 5, 4)) -> Region:
    return Region("dog", box, mask)


@given(masks())
def test_reads_what_pycocotools_writes_and_the_other_way_round(mask: np.ndarray) -> None:
    theirs = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    assert np.array_equal(region_to_mask(_region(theirs), *mask.shape), mask)
    ours = json.loads(json.dumps(mask_to_rle(mask)))
    assert np.array_equal(coco.decode({"size": ours["size"], "counts": ours["counts"].encode()}), mask)


def test_long_runs_and_uncompressed_counts() -> None:
    mask = np.zeros((700, 900), dtype=bool)
    mask[100:650, 3:897] = True
    assert np.array_equal(region_to_mask(_region(mask_to_rle(mask)), 700, 900), mask)
    # column by column: one pixel off, two on, 17 off
    decoded = region_to_mask(_region({"size": [4, 5], "counts": [1, 2, 17]}), 4, 5)
    assert np.argwhere(decoded).tolist() == [[1, 0], [2, 0]]


NO_MASKS: dict[str, tuple[Any, ...]] = {
    "pixels of 20": ([10, 5], [100], [], "", [2**40]),
    "must be a text or a list of whole numbers of at least 0": (
        *([-5, 25], [1.5, 18.5], [True, 19], ["a"]),
        *(5, None, {"a": 1}),
    ),
    "end within a number": ("P",),
    "unexpected character": ("0 4", "日本"),
}


@pytest.mark.parametrize(("says", "counts"), [(says, c) for says, of in NO_MASKS.items() for c in of])
def test_counts_that_are_no_mask(says: str, counts: Any) -> None:
    with pytest.raises(RecordError, match=f"mask of region 'dog' is not a COCO RLE: .*{says}"):
        region_to_mask(_region({"size": [4, 5], "counts": counts}), 4, 5)


@given(st.text(alphabet=[chr(c) for c in range(40, 120)], max_size=12))
def test_any_text_is_a_mask_or_an_error(counts: str) -> None:
    try:
        decoded = region_to_mask(_region({"size": [4, 5], "counts": counts}), 4, 5)
    except RecordError:
        return
    again = mask_to_rle(decoded)
    assert np.array_equal(region_to_mask(_region(again), 4, 5), decoded)


@pytest.mark.parametrize("size", [[5, 4], [4, 5, 1], 4, None, "45", {}])
def test_a_mask_of_another_size_is_refused(size: Any) -> None:
    with pytest.raises(RecordError, match=r"'dog' has size .* but the image is \[4, 5\]"):
        region_to_mask(_region({"size": size, "counts": [0, 20]}), 4, 5)


@pytest.mark.parametrize("box", [(5, 0, 9, 4), (0, -9, 5, -1), (1.1, 1.1, 1.2, 1.2)])
def test_an_empty_mask_and_a_box_without_a_pixel_are_refused(box: tuple[float, float, float, float]) -> None:
    for region in (_region({"size": [4, 5], "counts": [20]}), _region(None, box)):
        with pytest.raises(RecordError, match="'dog' .* covers no pixel of the 5 x 4 image"):
            region_to_mask(region, 4, 5)


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((1, 0, 3, 2), (0, 2), (1, 3)),
        ((0.6, 0.4, 2.6, 2.4), (0, 2), (1, 3)),
        ((-7, -7, 3, 2), (0, 2), (0, 3)),
        ((2, 1, 99, 99), (1, 4), (2, 5)),
    ],
)
def test_a_box_stands_for_its_pixels(
    box: tuple[float, float, float, float], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    expected = np.zeros((4, 5), dtype=bool)
    expected[slice(*rows), slice(*columns)] = True
    assert np.array_equal(region_to_mask(_region(None, box), 4, 5), expected)
