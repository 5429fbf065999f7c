import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from vlm_calibration.perturbation.masks import bounding_box, check_mask
from vlm_calibration.perturbation.regions import (
    PLAUSIBLE_AREA,
    PLAUSIBLE_ASPECT,
    choose_region,
    region_mask,
)

SHAPE = (40, 60)


def box(top, bottom, left, right, shape=SHAPE):
    mask = np.zeros(shape, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def disc(shape=SHAPE):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (y - 20) ** 2 + (x - 30) ** 2 < 100


def choose(targets=(), distractors=(), *, absent="distractor", probability=0.0, seed=0, shape=SHAPE):
    return choose_region(
        targets,
        distractors,
        absent=absent,
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


def test_a_mask_of_zeros_and_ones_is_accepted_as_uint8():
    mask = disc()
    accepted = check_mask(mask.astype(np.uint8), SHAPE)
    assert accepted.dtype == np.bool_
    np.testing.assert_array_equal(accepted, mask)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.zeros(SHAPE, bool), ValueError, "mask is empty"),
        (np.zeros(SHAPE, np.uint8), ValueError, "mask is empty"),
        (np.ones((40, 61), bool), ValueError, r"mask has shape \(40, 61\), but the image has \(40, 60\)"),
        (np.ones((60, 40), bool), ValueError, "mask has shape"),
        (np.ones((40, 60, 1), bool), ValueError, r"mask must have shape \(height, width\)"),
        (np.ones(2400, bool), ValueError, r"mask must have shape \(height, width\)"),
        (np.full(SHAPE, 255, np.uint8), ValueError, "values up to 255"),
        (np.ones(SHAPE, np.float32), TypeError, "must be bool or uint8 .* got dtype float32"),
        (np.ones(SHAPE, np.int64), TypeError, "got dtype int64"),
        ([[True]], TypeError, "must be a numpy array, got list"),
        (None, TypeError, "must be a numpy array, got NoneType"),
    ],
)
def test_a_wrong_mask_is_refused_in_words(mask, error, message):
    with pytest.raises(error, match=message):
        check_mask(mask, (*SHAPE, 3))


# --- region_mask


def test_by_default_the_region_is_the_mask_itself_as_a_copy():
    mask = disc()
    region = region_mask(mask)
    np.testing.assert_array_equal(region, mask)
    assert not np.shares_memory(region, mask)


@given(masks(), st.floats(0, 2), st.sampled_from(["mask", "box"]))
def test_growing_is_square_dilation_by_a_fraction_of_the_longer_side(mask, dilate, shape):
    bounds = bounding_box(mask)
    radius = max(1, round(dilate * max(bounds.height, bounds.width))) if dilate else 0
    filled = mask.copy()
    if shape == "box":
        filled[bounds.slices] = True
    expected = ndimage.binary_dilation(filled, np.ones((2 * radius + 1, 2 * radius + 1)))
    np.testing.assert_array_equal(region_mask(mask, shape=shape, dilate=dilate), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "circle"}, "shape"),
        ({"dilate": -0.1}, "dilate"),
        ({"dilate": float("nan")}, "dilate"),
        ({"dilate": float("inf")}, "dilate"),
    ],
)
def test_wrong_region_parameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        region_mask(disc(), **arguments)


# --- choose_region


def test_without_distraction_the_noise_goes_to_all_key_objects():
    targets = [box(0, 10, 0, 10), box(5, 20, 5, 20)]
    for seed in range(20):
        choice = choose(targets, [box(30, 40, 30, 40)], seed=seed)
        assert choice.kind == "target"
        np.testing.assert_array_equal(choice.mask, targets[0] | targets[1])


def test_with_distraction_it_goes_to_an_object_clear_of_the_target():
    target, clear, other_clear, touching = (
        box(0, 10, 0, 10),
        box(20, 30, 20, 30),
        box(30, 40, 50, 60),
        box(9, 15, 9, 15),
    )
    chosen = [
        choose([target], [touching, clear, other_clear], probability=1.0, seed=seed) for seed in range(40)
    ]
    assert {choice.kind for choice in chosen} == {"distractor"}
    hits = [np.array_equal(choice.mask, clear) for choice in chosen]
    assert all(
        hit or np.array_equal(choice.mask, other_clear) for hit, choice in zip(hits, chosen, strict=True)
    )
    assert 5 < sum(hits) < 35


def test_the_share_of_distraction_is_the_probability():
    kinds = [choose([disc()], [box(0, 3, 0, 3)], probability=0.3, seed=seed).kind for seed in range(2000)]
    assert kinds.count("distractor") / 2000 == pytest.approx(0.3, abs=0.04)


def test_without_a_clear_object_it_goes_to_a_box_of_the_targets_size_off_the_target():
    target = box(0, 10, 0, 15)
    places = set()
    for seed in range(50):
        choice = choose([target], [box(5, 12, 5, 12)], probability=1.0, seed=seed)
        bounds = bounding_box(choice.mask)
        assert choice.kind == "distractor"
        assert not np.any(choice.mask & target)
        assert (bounds.height, bounds.width) == (10, 15)
        assert choice.mask.sum() == 150
        places.add((bounds.top, bounds.left))
    assert len(places) > 30


@given(masks(), st.integers(0, 2**32 - 1))
def test_a_random_box_never_touches_the_target(target, seed):
    choice = choose([target], probability=1.0, seed=seed, shape=target.shape)
    if target.all():
        assert choice.kind == "target"
    else:
        assert choice.kind == "distractor"
        assert choice.mask.any()
        assert not np.any(choice.mask & target)


def test_every_free_place_is_possible():
    target = np.ones((3, 3), dtype=bool)
    target[0, 2] = target[2, 0] = False
    sizes = {
        tuple(np.argwhere(choose([target], probability=1.0, seed=s, shape=(3, 3)).mask)[0]) for s in range(50)
    }
    assert sizes == {(0, 2), (2, 0)}


def test_an_absent_object_gets_noise_on_another_object():
    distractors = [box(0, 5, 0, 5), box(20, 30, 20, 30)]
    seen = set()
    for seed in range(30):
        choice = choose((), distractors, seed=seed)
        assert choice.kind == "absent"
        seen.add([np.array_equal(choice.mask, mask) for mask in distractors].index(True))
    assert seen == {0, 1}


def test_an_absent_object_without_others_gets_a_box_of_plausible_size():
    shape = (300, 400)
    for seed in range(200):
        choice = choose(seed=seed, shape=shape)
        bounds = bounding_box(choice.mask)
        assert choice.kind == "absent"
        assert choice.mask.sum() == bounds.height * bounds.width
        assert PLAUSIBLE_AREA[0] * 0.95 < choice.mask.mean() < PLAUSIBLE_AREA[1] * 1.05
        assert PLAUSIBLE_ASPECT[0] * 0.9 < bounds.width / bounds.height < PLAUSIBLE_ASPECT[1] * 1.1


@pytest.mark.parametrize("shape", [(1, 1), (1, 100), (100, 1), (7, 3, 3)])
def test_a_plausible_box_fits_any_image(shape):
    for seed in range(20):
        mask = choose(seed=seed, shape=shape).mask
        assert mask.shape == shape[:2]
        assert mask.any()


def test_an_absent_object_may_leave_the_image_clean():
    assert choose((), [disc()], absent="clean") == (None, "none")


def test_under_skip_the_record_must_not_get_here():
    with pytest.raises(ValueError, match="drop them before choosing"):
        choose((), [disc()], absent="skip")
    assert choose([disc()], absent="skip").kind == "target"


@given(st.integers(0, 2**63), st.floats(0, 1), st.booleans(), st.booleans())
def test_the_choice_is_a_function_of_the_seed(seed, probability, present, n_distractors):
    arguments = {
        "targets": [disc()] if present else [],
        "distractors": [box(0, 4, 0, 4), box(35, 40, 0, 4)] if n_distractors else [],
        "probability": probability,
        "seed": seed,
    }
    first, second = choose(**arguments), choose(**arguments)
    assert first.kind == second.kind
    np.testing.assert_array_equal(first.mask, second.mask)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"absent": "ignore"}, ValueError, "absent must be"),
        ({"probability": 1.5}, ValueError, "distractor_probability"),
        ({"probability": float("nan")}, ValueError, "distractor_probability"),
        ({"targets": [disc(), np.zeros(SHAPE, bool)]}, ValueError, "target mask 1 is empty"),
        ({"targets": [np.ones((4, 4), bool)]}, ValueError, "target mask 0 has shape"),
        ({"distractors": [disc().astype(float)]}, TypeError, "distractor mask 0 must be bool"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        choose(**arguments)
