"""Groups of levels: neighbouring steps are merged, and state the mean accuracy of their answers."""

import pickle
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.perturbation.levels import AnchoredLevels, LevelTable, StepCount, _group_means


def segmentations(n, max_runs):
    """All segmentations of `range(n)` into at most `max_runs` runs, as lists of (start, end)."""
    for cuts in range(min(max_runs, n)):
        for where in combinations(range(1, n), cuts):
            yield list(pairwise((0, *where, n)))


def error_and_means(values, weights, runs):
    """The weighted sum of squared errors of a segmentation, and the mean of the run that each value is in."""
    means = []
    for start, end in runs:
        weight = sum(weights[start:end])
        mean = sum(v * w for v, w in zip(values[start:end], weights[start:end], strict=True)) / weight
        means += [mean] * (end - start)
    return sum(w * (v - m) ** 2 for v, m, w in zip(values, means, weights, strict=True)), means


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 500)), min_size=1, max_size=8), st.integers(1, 9)
)
def test_groups_are_the_best_of_all_segmentations(pairs, groups):
    values = sorted((v / 1000 for v, _ in pairs), reverse=True)
    weights = [w for _, w in pairs]
    group_means = _group_means(np.array(values), weights, groups)
    all_of_them = [error_and_means(values, weights, runs) for runs in segmentations(len(values), groups)]
    minimum = min(error for error, _ in all_of_them)
    error = sum(w * (v - m) ** 2 for v, m, w in zip(values, group_means, weights, strict=True))
    assert error == pytest.approx(minimum, abs=1e-9)
    assert any(
        np.allclose(group_means, means, atol=1e-9) for e, means in all_of_them if e <= minimum + 1e-9
    ), "the means of such a segmentation"
    assert (np.diff(group_means) <= 1e-12).all(), "never rising with the noise"
    assert len(set(np.round(group_means, 9))) <= groups
    assert np.average(group_means, weights=weights) == pytest.approx(np.average(values, weights=weights))


def grouped(rights, groups, ns=None, grid=1, **more):
    ns = ns or [100] * len(rights)
    rows = tuple(StepCount(100 * i, n, right) for i, (n, right) in enumerate(zip(ns, rights, strict=True)))
    return AnchoredLevels(table=LevelTable({"open": rows, **more}), grid=grid, groups=groups)


def stated_at_steps(levels, kind="open"):
    return [levels.confidence(step, kind) for step in levels.steps]


def test_neighbours_are_merged_to_the_mean_of_their_answers():
    levels = grouped([98, 96, 60, 58, 10], 3)
    assert stated_at_steps(levels) == [0.97, 0.97, 0.59, 0.59, 0.10]
    assert [levels.accuracy(step, "open") for step in levels.steps] == [0.98, 0.96, 0.60, 0.58, 0.10], (
        "as it was"
    )
    # 900 of 1000 and 60 of 100 answers, then 90 of 100 and 600 of 1000.
    assert stated_at_steps(grouped([900, 60, 1], 2, [1000, 100, 100])) == [0.87, 0.87, 0.01]
    assert stated_at_steps(grouped([90, 600, 1], 2, [100, 1000, 100])) == [0.63, 0.63, 0.01]


def test_groups_are_of_the_monotone_fit_and_of_each_answer_type():
    rows = tuple(StepCount(100 * i, 100, right) for i, right in enumerate([50, 50, 40, 44]))
    levels = grouped([98, 96, 60, 58], 2, short=rows)
    assert stated_at_steps(levels) == [0.97, 0.97, 0.59, 0.59]
    assert stated_at_steps(levels, "short") == [0.5, 0.5, 0.42, 0.42]
    with pytest.raises(ValueError, match="no levels were measured for answer type 'yes_no'"):
        levels.confidence(0, "yes_no")


@pytest.mark.parametrize("groups", [5, 6, 100])
@pytest.mark.parametrize("grid", [1, 5, 25])
def test_as_many_groups_as_steps_are_the_fit_itself(groups, grid):
    rights = [975, 925, 925, 600, 125]
    plain, merged = (grouped(rights, g, [1000] * 5, grid) for g in (None, groups))
    assert stated_at_steps(merged) == stated_at_steps(plain)


def test_one_group_is_the_mean():
    assert stated_at_steps(grouped([90, 60, 0], 1)) == [0.5, 0.5, 0.5]


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=10),
    st.integers(1, 6),
    st.sampled_from([1, 5, 10, 25, 100]),
)
def test_the_means_of_groups_are_rounded_to_the_grid(rights, groups, grid):
    levels = grouped(rights, groups, [400] * len(rights), grid)
    fit = np.array([levels.accuracy(step, "open") for step in levels.steps])
    stated = np.array(stated_at_steps(levels))
    means = _group_means(fit, [400] * len(rights), groups)
    assert (np.abs(stated - means) <= grid / 200 + 1e-8).all()
    assert all(round(value * 100) % grid == 0 and round(value * 100) / 100 == value for value in stated)
    assert len(set(stated)) <= groups
    assert (np.diff(stated) <= 0).all()


def test_a_tie_of_a_group_goes_up():
    assert stated_at_steps(grouped([90, 85, 0], 2)) == [0.88, 0.88, 0.0]
    assert stated_at_steps(grouped([90, 85, 0], 2, grid=25)) == [1.0, 1.0, 0.0]


def test_between_measured_steps_a_group_is_that_of_the_nearest():
    levels = grouped([98, 96, 60, 58, 10], 3)
    for step in range(401):
        nearest = min(abs(step - s) for s in levels.steps)
        could_be = {levels.confidence(s, "open") for s in levels.steps if abs(step - s) == nearest}
        assert levels.confidence(step, "open") in could_be
    assert levels.confidence(149, "open") == 0.97
    assert levels.confidence(151, "open") == 0.59
    for step in (-1, 401):
        with pytest.raises(ValueError, match=r"noise step must be in \[0, 400\]"):
            levels.confidence(step, "open")


def test_groups_can_be_saved_and_sent(tmp_path):
    levels = grouped([98, 96, 60, 58, 10], 3)
    levels.save(tmp_path / "levels.json")
    again = AnchoredLevels(tmp_path / "levels.json", grid=1, groups=3)
    for copy in (again, pickle.loads(pickle.dumps(levels))):
        assert stated_at_steps(copy) == stated_at_steps(levels)
    assert stated_at_steps(AnchoredLevels(tmp_path / "levels.json", grid=1)) == [0.98, 0.96, 0.60, 0.58, 0.10]


@pytest.mark.parametrize("groups", [0, -1])
def test_there_is_at_least_one_group(groups):
    with pytest.raises(ValueError, match=f"groups must be at least 1, got {groups}"):
        grouped([90, 50], groups)
