"""Fits of accuracies: against solvers of the same least-squares problems; evenly spread strengths, and groups that state their mean."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

from vlm_calibration.perturbation.level_table import AnswerTypeCounts, LevelTable
from vlm_calibration.perturbation.levels import (
    CLEAN,
    AnchoredLevels,
    Perturbation,
    fit_bins,
    fit_kinds,
    group_means,
    spread_strengths,
)

from ..level_tables import noise_counts
from .conftest import instance_counts

CELL = st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(float(n)), st.integers(0, n)))


def solved(accuracy, n):
    """The same fit by a general solver: least squares over the value of untouched images and the falls, which are at least 0."""
    kinds = list(accuracy)
    sizes = [len(accuracy[kind]) - 1 for kind in kinds]
    first = kinds[0]
    rows = [np.eye(1, 1 + sum(sizes))]
    weights, target = [n[first][:1]], [accuracy[first][:1]]
    for number, kind in enumerate(kinds):
        block = np.zeros((sizes[number], 1 + sum(sizes)))
        block[:, 0] = 1
        start = 1 + sum(sizes[:number])
        block[:, start : start + sizes[number]] = -np.tri(sizes[number])
        rows.append(block)
        weights.append(n[kind][1:])
        target.append(accuracy[kind][1:])
    root = np.sqrt(np.concatenate(weights))
    lower = np.r_[-np.inf, np.zeros(sum(sizes))]
    design, b = np.concatenate(rows), np.concatenate(target)
    bounds = (lower, np.inf)
    fit = design @ lsq_linear(root[:, None] * design, root * b, bounds, method="bvls", max_iter=1000).x
    parts = np.split(fit[1:], np.cumsum(sizes)[:-1])
    return {kind: np.r_[fit[0], part] for kind, part in zip(kinds, parts, strict=True)}


@given(CELL, st.lists(st.lists(CELL, min_size=0, max_size=5), min_size=1, max_size=4))
def test_the_fit_of_several_kinds_is_that_of_a_general_solver(untouched, kinds):
    cells = {f"kind{k}": np.array([untouched, *row]) for k, row in enumerate(kinds)}
    n = {kind: rows[:, 0] for kind, rows in cells.items()}
    accuracy = {kind: rows[:, 1] / rows[:, 0] for kind, rows in cells.items()}
    fit, expected = fit_kinds(accuracy, n), solved(accuracy, n)
    for kind, values in fit.items():
        np.testing.assert_allclose(values, expected[kind], atol=1e-9)


@given(st.lists(st.lists(st.integers(0, 40), min_size=6, max_size=6), min_size=1, max_size=4))
def test_with_equal_counts_accuracies_rise_with_the_likelihood_and_fall_with_the_strength(bins):
    n = (40,) * len(bins)
    a, b, c, d, e, f = zip(*bins, strict=True)
    kinds = {"noise": [(0, n, a), (0.5, n, b), (1, n, c)]}
    kinds["blur"] = [(0, n, a), (0.2, n, d), (0.6, n, e), (0.9, n, f)]
    fits = fit_bins(AnswerTypeCounts(kinds, tuple((i + 1) / 10 for i in range(len(bins) - 1))))
    assert len(fits) == len(bins)
    for kind in kinds:
        table = np.stack([fit[kind] for fit in fits])
        assert (np.diff(table, axis=0) >= -1e-9).all()
        assert (np.diff(table, axis=1) <= 1e-9).all()
    assert all(fit["noise"][0] == fit["blur"][0] for fit in fits)


def test_measurements_in_order_are_their_own_fit():
    counts = instance_counts()
    for number, fit in enumerate(fit_bins(counts)):
        for kind, rows in counts.kinds.items():
            assert fit[kind] == pytest.approx([row.n_correct[number] / row.n[number] for row in rows])


# --- strengths


FALLING = st.lists(st.integers(0, 1000), min_size=2, max_size=11, unique=True).map(
    lambda values: np.sort(np.array(values) / 1000)[::-1]
)


@given(FALLING, st.randoms())
def test_accuracies_at_the_chosen_strengths_are_evenly_spread(accuracies, random):
    measured = [0.0, *sorted(random.sample(range(10, 1001), len(accuracies) - 1))]
    measured = [s / 1000 for s in measured]
    chosen = spread_strengths(measured, [accuracies])
    assert list(chosen) == sorted(set(chosen))
    assert (chosen[0], chosen[-1]) == (0, measured[-1])
    # A strength is rounded to a thousandth, which moves an accuracy by at most the steepest slope times half of that.
    steepest = np.max(-np.diff(accuracies) / np.diff(measured))
    even = np.linspace(accuracies[0], accuracies[-1], len(accuracies))
    stated = np.interp(chosen, measured, accuracies)
    distances = np.abs(even[:, None] - stated)
    assert max(distances.min(0).max(), distances.min(1).max()) <= steepest * 5e-4 + 1e-9


FLAT, SMALL, LARGE, LATE = [0.5] * 3, [0.52, 0.51, 0.5], [1.0, 0.5, 0.0], [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("measured", "accuracies", "chosen"),
    [
        ([0, 0.25, 0.5, 0.75, 1], [[0.9, 0.7, 0.5, 0.3, 0.1]], (0, 0.25, 0.5, 0.75, 1)),
        ([0, 0.25, 0.5, 0.75, 1], [[0.9, 0.9, 0.5, 0.5, 0.5]], (0, 0.312, 0.375, 0.438, 0.5)),
        ([0, 0.5, 1], [SMALL, LARGE], (0, 0.5, 1)),
        ([0, 0.5, 1], [SMALL, LATE], (0, 0.667, 1)),
        ([0, 0.5, 1], [FLAT, LARGE], (0, 0.5, 1)),
        ([0, 0.5, 1], [FLAT], (0, 0.5, 1)),
        ([0, 0.99961], [[0.9, 0.1]], (0, 0.99961)),
    ],
    ids=["line", "flat end", "two types", "whatever their range", "one never falls", "none falls", "last"],
)
def test_chosen_strengths_by_hand(measured, accuracies, chosen):
    assert spread_strengths(measured, list(map(np.array, accuracies))) == chosen


# --- groups


def partitions(values, groups):
    """All partitions of falling numbers into at most `groups` runs."""
    for cuts in range(min(groups, len(values))):
        for where in combinations(range(1, len(values)), cuts):
            yield [values[a:b] for a, b in pairwise((0, *where, len(values)))]


def error(runs):
    return sum(float(((np.array(run) - np.mean(run)) ** 2).sum()) for run in runs)


@given(st.lists(st.integers(0, 12).map(lambda i: i / 12), min_size=1, max_size=9), st.integers(1, 10))
def test_groups_are_the_best_of_all_partitions(values, groups):
    falling = sorted(values, reverse=True)
    result = group_means(values, groups)
    upper = [np.inf, *(lower for lower, _ in result)]
    runs = [[v for v in falling if lower <= v < top] for (lower, _), top in zip(result, upper, strict=False)]
    assert len(result) <= groups
    assert error(runs) == pytest.approx(min(error(p) for p in partitions(falling, groups)), abs=1e-9)
    assert [mean for _, mean in result] == pytest.approx([np.mean(run) for run in runs])
    assert sum(map(len, runs)) == len(values)


def test_groups_of_numbers_that_differ_by_rounding_errors_have_boundaries():
    boundaries = [lower for lower, _ in group_means([0.5 + 1e-10, 0.5, 0.5 - 1e-10, 0.1 + 0.2, 0.3], 4)]
    assert boundaries == sorted(set(boundaries), reverse=True)
    assert boundaries[-1] == 0


def grouped(rights, groups, n=100, grid=1, **more):
    counts = noise_counts(*((i / 10, n, right) for i, right in enumerate(rights)))
    return AnchoredLevels(table=LevelTable({"open": counts, **more}), grid=grid, groups=groups)


def stated(levels, answer_type="open"):
    """The confidences at the measured strengths."""
    strengths = levels.table.strengths["noise"]
    return [levels.confidence(Perturbation("noise", strength), answer_type) for strength in strengths]


def test_neighbours_are_merged_to_their_mean_in_each_answer_type():
    levels = grouped([90, 70, 50, 30, 10], 5)
    assert stated(levels) == [0.9, 0.7, 0.5, 0.3, 0.1]
    assert levels.strengths("noise") == (0, 0.1, 0.2, 0.3, 0.4)
    assert levels.confidences("open") == (0.9, 0.7, 0.5, 0.3, 0.1)
    # At evenly spread accuracies 0.9, 0.7, ..., 0.1; the untouched image counts as often as the four others.
    assert stated(grouped([90, 70, 50, 30, 10], 1)) == [0.65] * 5
    short = noise_counts(*((i / 10, 100, right) for i, right in enumerate([50, 44, 36, 40])))
    levels = grouped([98, 96, 94, 92], 2, short=short)
    assert stated(levels) == [0.98, 0.98, 0.93, 0.93]
    assert len(levels.confidences("short")) == 2
    assert max(levels.confidences("short")) <= 0.5
    accuracies = [levels.accuracy(Perturbation("noise", i / 10), "open") for i in range(4)]
    assert accuracies == [0.98, 0.96, 0.94, 0.92], "not merged"


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=10),
    st.integers(1, 6),
    st.sampled_from([1, 5, 10, 25, 100]),
)
def test_the_means_of_groups_are_rounded_to_the_grid(rights, groups, grid):
    levels = grouped(rights, groups, 400, grid)
    strengths = levels.strengths("noise")
    accuracies = [round(levels.accuracy(Perturbation("noise", s), "open"), 9) for s in strengths]
    result = group_means(accuracies + accuracies[:1] * (len(accuracies) - 2), groups)
    of_strengths = [levels.confidence(Perturbation("noise", s), "open") for s in strengths]
    expected = [next(mean for lower, mean in result if a >= lower) for a in accuracies]
    assert np.abs(np.array(of_strengths) - expected).max() <= grid / 200 + 1e-8
    assert all(round(value * 100) % grid == 0 and round(value * 100) / 100 == value for value in of_strengths)
    assert len(set(of_strengths)) <= groups
    assert levels.confidences("open") == tuple(sorted(set(of_strengths), reverse=True))
    assert (np.diff(stated(levels)) <= 0).all(), "never rising with the strength"
    assert set(stated(levels)) <= set(of_strengths)


def levels_of(percent, groups, grid=1):
    """Levels whose own strengths have these accuracies, since every kind has two strengths."""
    top, *rest = percent
    kinds = zip(("blur", "fade"), rest, strict=True)
    counts = AnswerTypeCounts({kind: [(0, 100, top), (1, 100, value)] for kind, value in kinds})
    return AnchoredLevels(table=LevelTable({"open": counts}), grid=grid, groups=groups)


def test_a_tie_of_a_group_goes_up_and_between_groups_the_nearest_accuracy_counts():
    assert levels_of([90, 85, 0], 2).confidence(CLEAN, "open") == 0.88
    assert levels_of([90, 85, 0], 2, grid=25).confidence(CLEAN, "open") == 1.0
    levels, means = levels_of([98, 60, 10], 3), (0.98, 0.6, 0.1)
    for fade in (Perturbation("fade", s) for s in np.linspace(0, 1, 41)):
        distances = {abs(levels.accuracy(fade, "open") - mean): mean for mean in means}
        near = {mean for distance, mean in distances.items() if distance <= min(distances) + 1e-9}
        assert levels.confidence(fade, "open") in near
