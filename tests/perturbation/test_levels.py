"""Levels: linear levels as in the paper, anchored levels state the measured accuracy, rounded to a grid."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentError, ArgumentParser

from vlm_calibration.perturbation.levels import (
    AnchoredLevels,
    ConfidenceLevels,
    LinearLevels,
    StepCount,
    nominal_step,
)
from vlm_calibration.perturbation.schedules import CosineSchedule, Schedule

from .conftest import COUNTS


def test_linear_levels_are_the_papers():
    levels = LinearLevels()
    assert levels.steps == (0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
    stated = [levels.confidence(step, "yes_no") for step in levels.steps]
    assert stated == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    assert [nominal_step(confidence, 1000) for confidence in stated] == list(levels.steps)
    assert levels.confidence(250, "short") == 0.75
    assert nominal_step(0.7504, 1000) == 250


@given(st.integers(2, 101), st.integers(100, 4000))
def test_linear_levels_invert_themselves(n_levels, total_steps):
    levels = LinearLevels(n_levels, total_steps)
    assert len(set(levels.steps)) == n_levels
    assert levels.steps[0] == 0
    assert levels.steps[-1] == total_steps
    stated = [levels.confidence(step, "any") for step in levels.steps]
    assert stated == sorted(stated, reverse=True)
    assert [nominal_step(confidence, total_steps) for confidence in stated] == list(levels.steps)


@pytest.mark.parametrize(
    "make", [lambda: LinearLevels(1), lambda: LinearLevels(0), lambda: LinearLevels(11, 9)]
)
def test_impossible_linear_levels_are_refused(make):
    with pytest.raises(ValueError, match="n_levels"):
        make()


@pytest.mark.parametrize("confidence", [-0.1, 1.1, float("nan"), float("inf"), 80])
def test_a_confidence_outside_the_unit_interval_is_refused(confidence):
    with pytest.raises(ValueError, match=r"confidence must be in \[0, 1\]"):
        nominal_step(confidence, 1000)


@pytest.mark.parametrize("step", [-1, 1001])
def test_a_step_outside_the_range_is_refused(step, levels):
    for each in (LinearLevels(), levels):
        with pytest.raises(ValueError, match=r"noise step must be in \[0, 1000\]"):
            each.confidence(step, "yes_no")


def test_anchored_levels_state_the_measured_accuracy_per_answer_type(levels):
    assert levels.steps == (0, 500, 1000)
    assert levels.answer_types == ("yes_no", "short")
    assert levels.accuracy(0, "yes_no") == 0.95
    assert levels.accuracy(1000, "yes_no") == 0.52
    assert levels.confidence(1000, "yes_no") == 0.5
    assert levels.confidence(0, "short") == 0.95


def test_accuracies_that_rise_with_the_noise_are_pooled_by_their_counts(levels):
    pooled = (20 + 90) / (100 + 300)
    assert levels.accuracy(500, "short") == pytest.approx(pooled)
    assert levels.accuracy(1000, "short") == pytest.approx(pooled)
    assert levels.accuracy(700, "short") == pytest.approx(pooled)


def pool_adjacent_violators(accuracies, weights):
    """The textbook algorithm for a non-increasing fit."""
    blocks = []
    for accuracy, weight in zip(accuracies, weights, strict=True):
        blocks.append([accuracy, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            a, b = blocks[-2:]
            weight = a[1] + b[1]
            blocks[-2:] = [[(a[0] * a[1] + b[0] * b[1]) / weight, weight, a[2] + b[2]]]
    return [value for value, _, size in blocks for _ in range(size)]


@given(
    st.lists(
        st.integers(1, 500).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
        min_size=1,
        max_size=12,
    )
)
def test_the_fit_is_isotonic_regression(pairs):
    rows = [StepCount(100 * i, n, right) for i, (n, right) in enumerate(pairs)]
    levels = AnchoredLevels.fit({"open": rows})
    fitted = [levels.accuracy(row.step, "open") for row in rows]
    expected = pool_adjacent_violators([right / n for n, right in pairs], [n for n, _ in pairs])
    np.testing.assert_allclose(fitted, expected, atol=1e-9)
    assert all(0 <= value <= 1 for value in fitted)


def test_between_measured_steps_accuracy_is_linear(levels):
    assert levels.accuracy(250, "yes_no") == pytest.approx((0.95 + 0.75) / 2)
    assert levels.accuracy(600, "yes_no") == pytest.approx(0.75 + (0.52 - 0.75) / 5)


@pytest.mark.parametrize(
    ("right", "grid", "stated"),
    [
        (974, 5, 0.95),
        (975, 5, 1.0),
        (523, 5, 0.5),
        (525, 5, 0.55),
        (523, 1, 0.52),
        (525, 1, 0.53),
        (549, 10, 0.5),
        (30, 100, 0),
    ],
)
def test_confidences_are_rounded_to_the_grid_with_ties_up(right, grid, stated):
    levels = AnchoredLevels.fit({"open": [(0, 1000, right)]}, grid=grid)
    assert levels.confidence(0, "open") == stated
    assert levels.accuracy(0, "open") == right / 1000


@given(st.integers(0, 1000), st.sampled_from([1, 2, 5, 10, 20, 25]))
def test_a_stated_confidence_is_a_whole_percent_and_close(step, grid):
    levels = AnchoredLevels.fit(COUNTS, grid=grid)
    stated = levels.confidence(step, "yes_no")
    assert round(stated * 100) / 100 == stated
    assert round(stated * 100) % grid == 0
    assert abs(stated - levels.accuracy(step, "yes_no")) <= grid / 200 + 1e-9


def test_an_answer_type_that_was_not_measured_is_answered_with_the_known_ones(levels):
    for method in (levels.confidence, levels.accuracy):
        with pytest.raises(
            ValueError, match="no levels were measured for answer type 'open'; known: yes_no, short"
        ):
            method(0, "open")


@pytest.mark.parametrize("grid", [0, -5, 3, 200, 2.5, True])
def test_a_grid_must_divide_a_hundred(grid):
    with pytest.raises(ValueError, match="grid must be a whole number of percent"):
        AnchoredLevels.fit(COUNTS, grid=grid)


def test_levels_survive_pickling(levels):
    copy = pickle.loads(pickle.dumps(levels))
    assert copy.confidence(300, "short") == levels.confidence(300, "short")
    assert pickle.loads(pickle.dumps(LinearLevels(6))) == LinearLevels(6)


def test_levels_can_be_named_in_a_configuration(levels, tmp_path):
    levels.save(tmp_path / "levels.json")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--levels", type=ConfidenceLevels)
    parser.add_argument("--schedule", type=Schedule)

    def build(key, class_name, **arguments):
        package = "vlm_calibration.perturbation"
        config = parser.parse_object({key: {"class_path": f"{package}.{class_name}", "init_args": arguments}})
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # before 4.49
        return instantiate(config)[key]

    assert build("levels", "LinearLevels", n_levels=6) == LinearLevels(6)
    assert build("levels", "AnchoredLevels", path=str(tmp_path / "levels.json")).answer_types == (
        "yes_no",
        "short",
    )
    assert build("schedule", "CosineSchedule", offset=0.01) == CosineSchedule(offset=0.01)
    with pytest.raises(ArgumentError, match="foo"):
        build("levels", "LinearLevels", foo=6)
