import math

import numpy as np
import pytest

from vlm_calibration.perturbation.schedules import (
    CosineSchedule,
    LinearSchedule,
    SigmoidSchedule,
    schedule_by_name,
)

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
        lambda: CosineSchedule(steps=-5),
        lambda: SigmoidSchedule(steps=2.5),
        lambda: LinearSchedule(steps=10),
        lambda: LinearSchedule(beta_start=0.0),
        lambda: LinearSchedule(beta_start=0.02, beta_end=1e-4),
        lambda: LinearSchedule(beta_end=float("nan")),
        lambda: CosineSchedule(offset=-0.1),
        lambda: CosineSchedule(offset=-2.0),
        lambda: CosineSchedule(offset=float("nan")),
        lambda: SigmoidSchedule(steps=2),
        lambda: schedule_by_name("quadratic"),
    ],
)
def test_impossible_parameters_are_refused(make):
    with pytest.raises(ValueError, match=r"steps|betas must|offset must|'quadratic'; known: linear"):
        make()
