"""The noise of a region, and its schedules."""

import math

import numpy as np
import pytest

from vlm_calibration.perturbation.by_kind import perturb
from vlm_calibration.perturbation.noise import (
    CosineSchedule,
    LinearSchedule,
    SigmoidSchedule,
    add_region_noise,
    schedule_by_name,
)

SCHEDULE = LinearSchedule()


def reference(image, mask, step, schedule, seed):
    """The formula in float64, in the order of the noise."""
    alpha_bar = schedule.alpha_bar(step)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    noise = rng.standard_normal((int(mask.sum()), 3), np.float32).astype(np.float64)
    result = image.astype(np.float64)
    value = math.sqrt(alpha_bar) * (result[mask] / 127.5 - 1) + math.sqrt(1 - alpha_bar) * noise
    result[mask] = np.clip((value + 1) * 127.5, 0, 255)
    return result


@pytest.mark.parametrize(
    "schedule", [LinearSchedule(), CosineSchedule(), SigmoidSchedule(), LinearSchedule(200)]
)
@pytest.mark.parametrize("share", [0.005, 0.3, 0.7, 1.0])
def test_it_is_the_papers_formula_rounded_to_the_nearest(image, mask, schedule, share):
    step = round(share * schedule.steps)
    expected = reference(image, mask, step, schedule, seed=7)
    noisy = add_region_noise(image, mask, step, schedule, 7)
    # Half a level for rounding, plus the float32 error.
    assert np.abs(noisy - expected).max() <= 0.5 + 1e-3
    assert np.mean(noisy == np.rint(expected)) > 0.999


def test_other_seeds_give_other_noise(image, mask):
    def noisy(seed):
        return add_region_noise(image, mask, 500, SCHEDULE, seed).tobytes()

    assert len({noisy(s) for s in (0, 1, 2**63, (0, 1), (1, 1), (0, 1, 5), np.random.SeedSequence(99))}) == 7
    assert noisy(2**64) == noisy([2**64]) == noisy(np.random.SeedSequence(2**64))


def test_perturb_goes_to_the_linear_level_of_the_confidence(image, mask):
    for confidence, step in ((1.0, 0), (0.9, 100), (0.7, 300), (0.295, 705), (0.0, 1000)):
        for name, schedule in (("linear", SCHEDULE), (SigmoidSchedule(), SigmoidSchedule())):
            noisy = perturb(image, mask, confidence, schedule=name, seed=9)
            np.testing.assert_array_equal(noisy, add_region_noise(image, mask, step, schedule, 9))


@pytest.mark.parametrize("kind", ["noise", "fade"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": np.zeros((60, 80), np.uint8)}, ValueError, r"image must have shape \(height, width, 3\)"),
        ({"image": np.zeros((60, 80, 3), np.float32)}, TypeError, "image must be a uint8 array, got float32"),
        ({"mask": np.ones((80, 60), bool)}, ValueError, "mask has shape"),
        ({"mask": np.zeros((60, 80), bool)}, ValueError, "mask is empty"),
        ({"confidence": 1.01}, ValueError, r"confidence must be in \[0, 1\], got 1.01"),
        ({"confidence": float("nan")}, ValueError, r"confidence must be in \[0, 1\], got nan"),
        ({"schedule": "exponential"}, ValueError, "unknown noise schedule 'exponential'"),
        ({"seed": -1}, ValueError, "seed must be a non-negative integer or a sequence of them, got -1"),
        ({"seed": ()}, TypeError, "seed must be"),
        ({"seed": None}, TypeError, "seed must be"),
        ({"seed": (1, -1)}, ValueError, "seed must be"),
        ({"seed": 0.5}, TypeError, "seed must be a non-negative integer"),
    ],
)
def test_wrong_arguments_are_refused_in_words(image, mask, kind, change, error, message):
    arguments = {"image": image, "mask": mask, "confidence": 0.5, "seed": 0, "kind": kind} | change
    with pytest.raises(error, match=message):
        perturb(**arguments)


# --- schedules


NAMES = ["linear", "cosine", "sigmoid"]


def published_alpha_bars(name, steps=1000):
    """The formulas of the papers and of diffusers, computed step by step."""
    if name == "linear":
        betas = [1e-4 + (0.02 - 1e-4) * i / (steps - 1) for i in range(steps)]
    elif name == "cosine":

        def f(t):
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - f((i + 1) / steps) / f(i / steps), 0.999) for i in range(steps)]
    else:
        betas = [1 / (1 + math.exp(6 - 12 * i / (steps - 1))) * (0.5e-2 - 1e-5) + 1e-5 for i in range(steps)]
    products = [1.0]
    for beta in betas:
        products.append(products[-1] * (1 - beta))
    return np.array(products)


@pytest.mark.parametrize("name", NAMES)
def test_alpha_bar_is_the_published_formula(name):
    schedule = schedule_by_name(name)
    np.testing.assert_allclose(
        [schedule.alpha_bar(step) for step in range(1001)], published_alpha_bars(name), rtol=1e-10
    )


@pytest.mark.parametrize("steps", [25, 100, 1000, 4000])
@pytest.mark.parametrize("name", NAMES)
def test_it_falls_strictly_from_exactly_one_and_the_steps_do_not_change_what_half_way_means(name, steps):
    schedule, published = schedule_by_name(name, steps), schedule_by_name(name)
    values = np.array([schedule.alpha_bar(step) for step in range(steps + 1)])
    assert values[0] == 1.0
    assert np.all(np.diff(values) < 0)
    assert values[-1] > 0
    if steps >= 100:
        assert schedule.alpha_bar(steps // 2) == pytest.approx(published.alpha_bar(500), abs=0.01)
        assert schedule.alpha_bar(steps) == pytest.approx(published.alpha_bar(1000), abs=0.01)


@pytest.mark.parametrize("step", [-1, 1001, np.int64(1001), 0.5, 300.0, True, "300", np.array([0])])
def test_a_step_is_an_integer_of_the_schedule(step):
    error = ValueError if isinstance(step, int | np.integer) and step is not True else TypeError
    with pytest.raises(error, match=r"step must be (?:in \[0, 1000\]|an integer)"):
        CosineSchedule().alpha_bar(step)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearSchedule(steps=0),
        lambda: SigmoidSchedule(steps=2.5),
        lambda: LinearSchedule(steps=10),
        lambda: LinearSchedule(beta_start=0.0),
        lambda: LinearSchedule(beta_start=0.02, beta_end=1e-4),
        lambda: LinearSchedule(beta_end=float("nan")),
        lambda: CosineSchedule(offset=-0.1),
        lambda: CosineSchedule(offset=float("nan")),
        lambda: SigmoidSchedule(steps=2),
        lambda: schedule_by_name("quadratic"),
    ],
)
def test_impossible_parameters_are_refused(make):
    with pytest.raises(ValueError, match=r"steps|betas must|offset must|'quadratic'; known: linear"):
        make()
