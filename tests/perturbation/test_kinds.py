import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from vlm_calibration.perturbation.by_kind import KIND_NAMES, perturb, region_perturbation
from vlm_calibration.perturbation.kinds import (
    ELECTRONS,
    GREY,
    KINDS,
    READ_NOISE,
    RegionPerturbation,
    surroundings,
)
from vlm_calibration.perturbation.noise import CosineSchedule, LinearSchedule, add_region_noise

# isort: split
import albumentations as A
import cv2

SCHEDULE = CosineSchedule()
STRENGTHS = tuple(i / 10 for i in range(11))
EVERY_KIND = pytest.mark.parametrize("kind", KIND_NAMES)
NOISELESS = pytest.mark.parametrize("kind", [kind for kind in KIND_NAMES if kind != "noise"])


def texture(height, width, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth_texture(height, width, seed=1):
    smooth = gaussian_filter(texture(height, width, seed).astype(float), (3, 3, 0))
    return np.clip(128 + 8 * (smooth - smooth.mean()), 0, 255).astype(np.uint8)


def ellipse(height, width, box):
    top, bottom, left, right = box
    y, x = np.mgrid[:height, :width] + 0.5
    inside = ((2 * y - top - bottom) / (bottom - top)) ** 2 + ((2 * x - left - right) / (right - left)) ** 2
    return inside < 1


def perturbed(kind, image, mask, strength, seed=7):
    return region_perturbation(kind, SCHEDULE)(image=image, mask=mask, strength=strength, seed=seed)["image"]


def test_the_names_are_those_of_the_transforms():
    assert ("noise", *KINDS) == KIND_NAMES
    with pytest.raises(ValueError, match="'snow'.*motion_blur"):
        region_perturbation("snow", SCHEDULE)


@NOISELESS
def test_strength_0_9_is_not_yet_strength_1(kind, image, mask):
    changed = np.where(mask[..., None], 255 - image // 4, image)
    assert np.any(perturbed(kind, changed, mask, 0.9) != perturbed(kind, image, mask, 0.9))


@EVERY_KIND
def test_evidence_is_lost_over_the_range(kind):
    mask = ellipse(120, 120, (20, 100, 20, 100))

    def left(strength):
        """Correlation of object and result, seen through a little noise, so that contrast counts as well."""
        correlations = []
        for seed in range(8):
            # An object that does not continue its surroundings, which would tell something about it.
            inside, outside = (smooth_texture(120, 120, s) for s in (seed, 100 + seed))
            image = np.where(mask[..., None], inside, outside)
            noise = np.random.default_rng(seed).normal(0, 20, image.shape)
            seen = perturbed(kind, image, mask, strength, seed) + noise
            correlations.append(np.corrcoef(image[mask].ravel(), seen[mask].ravel())[0, 1])
        return np.mean(correlations)

    correlations = [left(strength) for strength in STRENGTHS]
    assert correlations[0] > 0.85
    assert correlations[1] > 0.7
    assert correlations[8] < correlations[1] - 0.1
    assert abs(correlations[-1]) < 0.05
    assert max(np.diff(correlations)) < 0.03


@EVERY_KIND
def test_a_result_is_a_pure_function_of_image_mask_strength_and_seed(kind, image, mask):
    first = perturbed(kind, image, mask, 0.6, (1, 2))
    # The state of the process does not matter.
    np.random.seed(9)  # noqa: NPY002
    cv2.setRNGSeed(9)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    np.testing.assert_array_equal(perturbed(kind, image, mask, 0.6, (1, 2)), first)
    cv2.setNumThreads(threads)
    np.testing.assert_array_equal(perturbed(kind, image, mask.astype(np.uint8), 0.6, [1, 2]), first)
    flipped = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    np.testing.assert_array_equal(perturbed(kind, flipped, mask, 0.6, (1, 2)), first)
    untouched = perturbed(kind, image, mask, 0.0)
    np.testing.assert_array_equal(untouched, image)
    assert untouched is not image
    result = perturb(image, mask, 0.4, schedule=SCHEDULE, seed=(1, 2), kind=kind)
    np.testing.assert_array_equal(result, first)
    if kind in ("noise", "motion_blur", "occlusion", "darkness"):
        assert len({perturbed(kind, image, mask, 0.6, seed).tobytes() for seed in range(5)}) == 5


@pytest.mark.parametrize("kind", ["noise", "blur"])
def test_it_composes_with_other_transforms(kind, image, mask):
    transform = A.Compose([A.HorizontalFlip(p=1), RegionPerturbation(kind), A.Resize(30, 40)], strict=True)
    result = transform(image=image, mask=mask.astype(np.uint8), strength=0.5, seed=4)
    flipped, flipped_mask = np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])
    expected = RegionPerturbation(kind)(image=flipped, mask=flipped_mask, strength=0.5, seed=4)["image"]
    np.testing.assert_array_equal(result["image"], A.Resize(30, 40)(image=expected)["image"])
    assert result["mask"].shape == (30, 40)


@st.composite
def images_and_masks(draw):
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    row, column = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    mask = np.zeros((height, width), dtype=bool)
    match draw(st.sampled_from(["pixel", "row", "column", "whole", "all but one", "scattered", "box"])):
        case "row":
            mask[row] = True
        case "column":
            mask[:, column] = True
        case "whole":
            mask[:] = True
        case "all but one":
            mask[:] = True
            mask[row, column] = False
        case "scattered":
            mask = np.random.default_rng(draw(st.integers(0, 99))).random((height, width)) < 0.2
        case "box":
            mask[: row + 1, column:] = True
    mask[row, column] |= not mask.any()
    return texture(height, width, draw(st.integers(0, 99))), mask


@EVERY_KIND
@given(images_and_masks(), st.floats(0, 1), st.integers(0, 2**63))
@settings(max_examples=40, deadline=None)
def test_any_region_of_any_image(kind, image_and_mask, strength, seed):
    image, mask = image_and_mask
    before = image.copy()
    result = perturbed(kind, image, mask, strength, seed)
    assert (result.shape, result.dtype, result.flags.c_contiguous) == (image.shape, np.uint8, True)
    np.testing.assert_array_equal(result[~mask], image[~mask])
    if kind != "noise":
        nothing = perturbed(kind, image, mask, 1.0, seed)
        for other in (255 - image, np.zeros_like(image), np.full_like(image, 255)):
            changed = np.where(mask[..., None], other, image)
            np.testing.assert_array_equal(perturbed(kind, changed, mask, 1.0, seed), nothing)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.45])
@pytest.mark.parametrize("side", [60, 300])
def test_blur_is_scipys(side, strength):
    image = smooth_texture(2 * side, 2 * side)
    mask = np.zeros((2 * side, 2 * side), bool)
    mask[side // 2 : -side // 2, side // 2 : -side // 2] = True
    sigma = 0.35 * strength * side
    expected = gaussian_filter(image.astype(float), (sigma, sigma, 0))
    error = (perturbed("blur", image, mask, strength) - expected)[mask]
    assert np.sqrt(np.mean(error**2)) < 0.5  # rounding alone is 0.29


def test_motion_blur_averages_along_one_line():
    # A bright line becomes a box of the movement's length across it, and stays as it is along it.
    mask = np.zeros((120, 120), bool)
    mask[10:110, 10:110] = True
    spreads = []
    for seed in range(40):
        image = np.zeros((120, 120, 3), np.uint8)
        image[56:65, 56:65] = 255
        result = perturbed("motion_blur", image, mask, 0.3, seed)[..., 0].astype(float)
        y, x = np.mgrid[:120, :120] - 60
        weight = result / result.sum()
        spreads.append(np.linalg.eigvalsh(np.cov(np.stack([y.ravel(), x.ravel()]), aweights=weight.ravel())))
    across, along = np.mean(spreads, axis=0)
    square = (9**2 - 1) / 12
    assert across == pytest.approx(square, abs=1)
    assert along == pytest.approx(square + (1.8 * 0.3 * 100) ** 2 / 12, rel=0.05)


def test_pixelation_makes_blocks_of_their_mean():
    image = texture(64, 64)
    mask = np.ones((64, 64), bool)
    strength = 8 / 64 / 0.8
    blocks = image.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3))
    expected = blocks.repeat(8, axis=0).repeat(8, axis=1)
    assert np.abs(perturbed("pixelation", image, mask, strength) - expected).max() <= 0.5


@pytest.mark.parametrize("strength", [0.001, 0.13, 0.5, 0.77, 1.0])
def test_occlusion_covers_the_share_of_the_region_to_the_pixel(strength):
    image, mask = np.zeros((60, 80, 3), np.uint8), ellipse(60, 80, (10, 45, 15, 60))
    occluded, strongest = (perturbed("occlusion", image, mask, s) for s in (strength, 1.0))
    changed = np.any(occluded != image, axis=-1)
    # A pixel whose random colour is that of the image would not count, so two images decide.
    covered = changed | np.any(perturbed("occlusion", 255 - image, mask, strength) != 255, axis=-1)
    assert covered.sum() == round(strength * mask.sum())
    np.testing.assert_array_equal(strongest[changed], occluded[changed], "a stronger one contains a weaker")


def test_fading_is_a_mean_of_image_and_surroundings(image, mask):
    for strength in (0.2, 0.5, 0.9):
        background = perturbed("fade", image, mask, 1.0).astype(float)
        expected = (1 - strength) * image + strength * background
        assert np.abs(perturbed("fade", image, mask, strength) - expected).max() <= 0.51


def test_the_surroundings_of_an_object_on_a_gradient_continue_the_gradient():
    ramp = np.broadcast_to(np.linspace(50, 200, 200)[None, :, None], (200, 200, 3))
    mask = ellipse(200, 200, (60, 140, 60, 140))
    fill = surroundings(np.where(mask[..., None], 0, np.rint(ramp)).astype(np.uint8), mask)
    assert np.abs(fill[mask] - ramp[mask]).max() < 15
    assert np.abs(fill[mask] - ramp[mask]).mean() < 5


def test_surroundings_know_even_one_pixel_and_are_grey_without_any():
    image, mask = np.zeros((300, 400, 3), np.uint8), np.ones((300, 400), bool)
    assert (surroundings(image, mask) == GREY).all()
    mask[299, 399] = False
    image[299, 399] = (10, 20, 250)
    assert (surroundings(image, mask) == (10, 20, 250)).all()


def test_darkness_has_the_mean_and_variance_of_a_sensor():
    image = np.full((200, 200, 3), 180, np.uint8)
    strength = 0.5
    result = perturbed("darkness", image, np.ones((200, 200), bool), strength) / 255
    exposure = (1 - strength) ** 3
    gain = exposure**-0.75 / ELECTRONS
    electrons = ELECTRONS * (180 / 255) ** 2 * exposure
    spread = np.sqrt((electrons + READ_NOISE**2) * (1 - exposure))
    assert np.mean(result**2) == pytest.approx(gain * electrons, rel=0.01)
    assert np.std(result**2) == pytest.approx(gain * spread, rel=0.02)


def test_overexposure_only_brightens_and_ends_in_white(image, mask):
    results = [perturbed("overexposure", image, mask, strength).astype(int) for strength in STRENGTHS]
    assert all((after >= before).all() for before, after in pairwise(results))
    assert (results[-1][mask] == 255).all()


@NOISELESS
@pytest.mark.parametrize("strength", [0.3, 0.6])
def test_a_strength_takes_about_as_much_from_a_small_object_as_from_a_large_one(kind, strength):
    def left(scale):
        image = texture(12, 12).repeat(8 * scale, axis=0).repeat(8 * scale, axis=1)
        mask = ellipse(*image.shape[:2], [n * scale for n in (20, 76, 20, 76)])
        results = [perturbed(kind, image, mask, strength, seed)[mask] for seed in range(6)]
        return np.mean([np.corrcoef(image[mask].ravel(), result.ravel())[0, 1] for result in results])

    assert left(5) == pytest.approx(left(1), abs=0.15)


def test_noise_has_the_step_of_the_strength_in_any_schedule(image, mask):
    for schedule in (CosineSchedule(steps=5), LinearSchedule(beta_end=0.01)):
        result = RegionPerturbation("noise", schedule)(image=image, mask=mask, strength=0.8, seed=7)["image"]
        expected = add_region_noise(image, mask, round(0.8 * schedule.steps), schedule, 7)
        np.testing.assert_array_equal(result, expected)
    for kind in ("noise", "fade"):
        with pytest.raises(ValueError, match=r"strength must be in \[0, 1\], got 1.5"):
            perturbed(kind, image, mask, 1.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("without", "needs_it"),
    [
        ("perturb(image, mask, 0.5, seed=1)", "perturb(image, mask, 0.5, seed=1, kind='fade')"),
        ("import vlm_calibration.data.noise", "import vlm_calibration.data.module"),
    ],
)
def test_albumentations_is_imported_only_by_what_needs_it_and_stays_off_the_network(without, needs_it):
    code = (
        "import os, socket, sys, numpy as np\n"
        "import vlm_calibration.text\n"
        "from vlm_calibration.perturbation import perturb\n"
        "print([name for name in ('torch', 'lightning', 'transformers') if name in sys.modules])\n"
        "os.environ.pop('NO_ALBUMENTATIONS_UPDATE', None)\n"
        "def refuse(*args, **kwargs): raise SystemExit('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "image, mask = np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), bool)\n"
        f"{without}\nprint('albumentations' in sys.modules)\n"
        f"{needs_it}\nprint('albumentations' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.split() == ["[]", "False", "True"]
