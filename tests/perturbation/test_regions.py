"""Masks of regions, which of them are perturbed, and COCO run-length encoding, compared with pycocotools.

pycocotools returns uninitialised memory for counts that do not cover the image, so these cases matter most.
"""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco
from scipy import ndimage

from vlm_calibration.perturbation.masks import (
    PLAUSIBLE_AREA,
    PLAUSIBLE_ASPECT,
    bounding_box,
    check_mask,
    choose_region,
    mask_to_rle,
    region_mask,
    region_to_mask,
)
from vlm_calibration.records import RecordError, Region

SHAPE = (40, 60)


def box(top, bottom, left, right, shape=SHAPE):
    mask = np.zeros(shape, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def disc(shape=SHAPE):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (y - 20) ** 2 + (x - 30) ** 2 < 100


def choose(targets=(), distractors=(), *, perturb_absent=True, probability=0.0, seed=0, shape=SHAPE):
    return choose_region(
        targets,
        distractors,
        perturb_absent=perturb_absent,
        distractor_probability=probability,
        rng=np.random.default_rng(seed),
        image_shape=shape,
    )


@st.composite
def masks(draw):
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    pixels = draw(st.sets(st.integers(0, height * width - 1), min_size=1))
    mask = np.zeros(height * width, dtype=bool)
    mask[list(pixels)] = True
    return mask.reshape(height, width)


# --- masks


@given(masks())
def test_the_bounding_box_is_the_smallest(mask):
    rows, columns = np.nonzero(mask)
    bounds = bounding_box(mask)
    assert bounds == (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)
    assert mask[bounds.slices].sum() == mask.sum()
    assert mask[bounds.slices].shape == (bounds.height, bounds.width)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.zeros(SHAPE, bool), ValueError, "mask is empty"),
        (np.zeros(SHAPE, np.uint8), ValueError, "mask is empty"),
        (np.ones((40, 61), bool), ValueError, r"mask has shape \(40, 61\), but the image has \(40, 60\)"),
        (np.ones((40, 60, 1), bool), ValueError, r"mask has shape \(40, 60, 1\)"),
        (np.full(SHAPE, 255, np.uint8), ValueError, "values up to 255"),
        (np.ones(SHAPE, np.float32), TypeError, "must be a bool array, or uint8 .* got dtype float32"),
        ([[True]], TypeError, "must be a bool array, .* got list"),
    ],
)
def test_a_mask_is_of_booleans_or_zeros_and_ones(mask, error, message):
    accepted = check_mask(disc().astype(np.uint8), (*SHAPE, 3))
    assert accepted.dtype == np.bool_
    np.testing.assert_array_equal(accepted, disc())
    with pytest.raises(error, match=message):
        check_mask(mask, (*SHAPE, 3))


# --- region_mask


@given(masks(), st.floats(0, 2), st.sampled_from(["mask", "box"]))
def test_growing_is_square_dilation_by_a_fraction_of_the_longer_side(mask, dilate, shape):
    bounds = bounding_box(mask)
    radius = max(1, round(dilate * max(bounds.height, bounds.width))) if dilate else 0
    filled = mask.copy()
    if shape == "box":
        filled[bounds.slices] = True
    expected = ndimage.binary_dilation(filled, np.ones((2 * radius + 1, 2 * radius + 1)))
    region = region_mask(mask, shape=shape, dilate=dilate)
    np.testing.assert_array_equal(region, expected)
    assert not np.shares_memory(region, mask)


def test_wrong_region_parameters_are_refused():
    with pytest.raises(ValueError, match="shape"):
        region_mask(disc(), shape="circle")
    for dilate in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="dilate"):
            region_mask(disc(), dilate=dilate)


# --- choose_region


def test_the_noise_goes_to_all_key_objects_or_to_an_object_clear_of_them():
    targets = [box(0, 10, 0, 10), box(5, 9, 5, 9)]
    clear, touching = [box(20, 30, 20, 30), box(30, 40, 50, 60)], box(9, 15, 9, 15)
    for seed in range(20):
        region, takes_evidence = choose(targets, clear, seed=seed)
        assert takes_evidence
        np.testing.assert_array_equal(region, targets[0] | targets[1])
    chosen = [choose(targets, [touching, *clear], probability=1.0, seed=seed) for seed in range(40)]
    assert not any(takes_evidence for _, takes_evidence in chosen)
    hits = [[np.array_equal(region, mask) for mask in clear].index(True) for region, _ in chosen]
    assert 5 < sum(hits) < 35
    lost = [choose([disc()], [box(0, 3, 0, 3)], probability=0.3, seed=seed)[1] for seed in range(2000)]
    assert np.mean(lost) == pytest.approx(0.7, abs=0.04)


def test_without_a_clear_object_it_goes_to_a_box_of_the_targets_size_off_the_target():
    target = box(0, 10, 0, 15)
    places = set()
    for seed in range(50):
        region, takes_evidence = choose([target], [box(5, 12, 5, 12)], probability=1.0, seed=seed)
        bounds = bounding_box(region)
        assert not takes_evidence
        assert not np.any(region & target)
        assert (bounds.height, bounds.width, region.sum()) == (10, 15, 150)
        places.add((bounds.top, bounds.left))
    assert len(places) > 30


@given(masks(), st.integers(0, 2**32 - 1))
def test_a_random_box_never_touches_the_target(target, seed):
    region, takes_evidence = choose([target], probability=1.0, seed=seed, shape=target.shape)
    assert takes_evidence == target.all()
    assert target.all() or (region.any() and not np.any(region & target))


def test_every_free_place_is_possible():
    target = ~np.eye(3, dtype=bool)[::-1]
    places = {choose([target], probability=1.0, seed=s, shape=(3, 3))[0].argmax() for s in range(50)}
    assert places == {2, 4, 6}


def test_an_absent_object_gets_noise_on_another_object_or_leaves_the_image_clean():
    distractors = [box(0, 5, 0, 5), box(20, 30, 20, 30)]
    seen = set()
    for seed in range(30):
        region, takes_evidence = choose((), distractors, seed=seed)
        assert takes_evidence
        seen.add([np.array_equal(region, mask) for mask in distractors].index(True))
    assert seen == {0, 1}
    assert choose((), distractors, perturb_absent=False) == (None, False)
    assert choose([disc()], distractors, perturb_absent=False)[1]


def test_an_absent_object_without_others_gets_a_box_of_plausible_size():
    shape = (300, 400)
    for seed in range(200):
        region, takes_evidence = choose(seed=seed, shape=shape)
        bounds = bounding_box(region)
        assert takes_evidence
        assert region.sum() == bounds.height * bounds.width
        assert PLAUSIBLE_AREA[0] * 0.95 < region.mean() < PLAUSIBLE_AREA[1] * 1.05
        assert PLAUSIBLE_ASPECT[0] * 0.9 < bounds.width / bounds.height < PLAUSIBLE_ASPECT[1] * 1.1
    for shape in ((1, 1), (1, 100), (100, 1), (7, 3, 3)):
        for seed in range(20):
            region, _ = choose(seed=seed, shape=shape)
            assert region.shape == shape[:2]
            assert region.any()


# --- run-length encoding


def region(mask, box=(0, 0, 5, 4)):
    return Region("dog", box, mask)


@given(masks())
def test_reads_what_pycocotools_writes_and_the_other_way_round(mask):
    theirs = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    assert np.array_equal(region_to_mask(region(theirs), *mask.shape), mask)
    ours = json.loads(json.dumps(mask_to_rle(mask)))
    assert np.array_equal(coco.decode({"size": ours["size"], "counts": ours["counts"].encode()}), mask)


def test_long_runs_and_uncompressed_counts():
    mask = np.zeros((700, 900), dtype=bool)
    mask[100:650, 3:897] = True
    assert np.array_equal(region_to_mask(region(mask_to_rle(mask)), 700, 900), mask)
    # column by column: one pixel off, two on, 17 off
    decoded = region_to_mask(region({"size": [4, 5], "counts": [1, 2, 17]}), 4, 5)
    assert np.argwhere(decoded).tolist() == [[1, 0], [2, 0]]


NO_MASKS = {
    "pixels of 20": ([10, 5], [100], [], "", [2**40]),
    "must be a text or a list of whole numbers of at least 0": (
        *([-5, 25], [1.5, 18.5], [True, 19], ["a"]),
        *(5, None, {"a": 1}),
    ),
    "end within a number": ("P",),
    "unexpected character": ("0 4", "日本"),
}


@pytest.mark.parametrize(("says", "counts"), [(says, c) for says, of in NO_MASKS.items() for c in of])
def test_counts_that_are_no_mask(says, counts):
    with pytest.raises(RecordError, match=f"mask of region 'dog' is not a COCO RLE: .*{says}"):
        region_to_mask(region({"size": [4, 5], "counts": counts}), 4, 5)


@given(st.text(alphabet=[chr(c) for c in range(40, 120)], max_size=12))
def test_any_text_is_a_mask_or_an_error(counts):
    try:
        decoded = region_to_mask(region({"size": [4, 5], "counts": counts}), 4, 5)
    except RecordError:
        return
    again = mask_to_rle(decoded)
    assert np.array_equal(region_to_mask(region(again), 4, 5), decoded)


@pytest.mark.parametrize("size", [[5, 4], [4, 5, 1], 4, None, "45", {}])
def test_a_mask_of_another_size_is_refused(size):
    with pytest.raises(RecordError, match=r"'dog' has size .* but the image is \[4, 5\]"):
        region_to_mask(region({"size": size, "counts": [0, 20]}), 4, 5)


@pytest.mark.parametrize("box", [(5, 0, 9, 4), (0, -9, 5, -1), (1.1, 1.1, 1.2, 1.2)])
def test_an_empty_mask_and_a_box_without_a_pixel_are_refused(box):
    for empty in (region({"size": [4, 5], "counts": [20]}), region(None, box)):
        with pytest.raises(RecordError, match="'dog' .* covers no pixel of the 5 x 4 image"):
            region_to_mask(empty, 4, 5)


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((1, 0, 3, 2), (0, 2), (1, 3)),
        ((0.6, 0.4, 2.6, 2.4), (0, 2), (1, 3)),
        ((-7, -7, 3, 2), (0, 2), (0, 3)),
        ((2, 1, 99, 99), (1, 4), (2, 5)),
    ],
)
def test_a_box_stands_for_its_pixels(box, rows, columns):
    expected = np.zeros((4, 5), dtype=bool)
    expected[slice(*rows), slice(*columns)] = True
    assert np.array_equal(region_to_mask(region(None, box), 4, 5), expected)
