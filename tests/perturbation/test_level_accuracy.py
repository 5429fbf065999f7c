"""Fits of accuracies: against solvers of the same least-squares problems, and their order over strengths and likelihoods."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

from vlm_calibration.perturbation.level_accuracy import (
    fit_bins,
    fit_kinds,
    group_means,
    spread_strengths,
)
from vlm_calibration.perturbation.level_table import AnswerTypeCounts, LevelTable
from vlm_calibration.perturbation.levels import AnchoredLevels

from .conftest import instance_counts

CELL = st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


def counts_of(cells):
    """Counts from those of the untouched image and, for each kind, of its strengths above 0."""
    (n, right), kinds = cells
    return AnswerTypeCounts.of_kinds(
        {
            f"kind{k}": [(0, n, right), *(((i + 1) / 10, *cell) for i, cell in enumerate(row))]
            for k, row in enumerate(kinds)
        }
    )


def columns(counts):
    accuracy = {kind: np.array([r.n_correct / r.n for r in rows]) for kind, rows in counts.pooled.items()}
    return accuracy, {kind: np.array([float(r.n) for r in rows]) for kind, rows in counts.pooled.items()}


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
    fit = (
        design @ lsq_linear(root[:, None] * design, root * b, (lower, np.inf), method="bvls", max_iter=1000).x
    )
    parts = np.split(fit[1:], np.cumsum(sizes)[:-1])
    return {kind: np.r_[fit[0], part] for kind, part in zip(kinds, parts, strict=True)}


@given(st.tuples(CELL, st.lists(st.lists(CELL, min_size=0, max_size=5), min_size=1, max_size=4)))
def test_the_fit_of_several_kinds_is_that_of_a_general_solver(cells):
    accuracy, n = columns(counts_of(cells))
    fit, expected = fit_kinds(accuracy, n), solved(accuracy, n)
    for kind, values in fit.items():
        np.testing.assert_allclose(values, expected[kind], atol=1e-9)


@given(st.tuples(CELL, st.lists(st.lists(CELL, min_size=0, max_size=5), min_size=1, max_size=4)))
def test_a_fit_falls_with_the_strength_from_one_value_and_keeps_the_mean(cells):
    counts = counts_of(cells)
    (fit,) = fit_bins(counts)
    assert len({values[0] for values in fit.values()}) == 1
    for values in fit.values():
        assert (np.diff(values) <= 1e-12).all()
        assert ((values >= 0) & (values <= 1)).all()
    _, n = columns(counts)
    first = next(iter(fit))
    total = sum(float((n[kind][1:] * values[1:]).sum()) for kind, values in fit.items())
    (n_untouched, right), kinds = cells
    measured = right + sum(r for row in kinds for _, r in row)
    assert total + n_untouched * fit[first][0] == pytest.approx(measured)


def test_a_fall_of_one_kind_does_not_pull_another_down():
    fit = fit_kinds(
        {"a": np.array([0.9, 0.2]), "b": np.array([0.9, 0.95])}, {"a": np.ones(2), "b": np.ones(2)}
    )
    assert fit["a"].tolist() == [pytest.approx(0.925), 0.2]
    assert fit["b"] == pytest.approx([0.925, 0.925])


@given(
    st.integers(1, 4).flatmap(
        lambda bins: st.lists(
            st.lists(st.integers(0, 40), min_size=6, max_size=6), min_size=bins, max_size=bins
        )
    )
)
def test_with_equal_counts_accuracies_rise_with_the_likelihood_and_fall_with_the_strength(rows):
    counts = AnswerTypeCounts(
        tuple(
            {
                "noise": [(0, 40, a), (0.5, 40, b), (1, 40, c)],
                "blur": [(0, 40, a), (0.2, 40, d), (0.6, 40, e), (0.9, 40, f)],
            }
            for a, b, c, d, e, f in rows
        ),
        tuple((i + 1) / 10 for i in range(len(rows) - 1)),
    )
    fits = fit_bins(counts)
    assert len(fits) == len(rows)
    for kind in ("noise", "blur"):
        table = np.stack([fit[kind] for fit in fits])
        assert (np.diff(table, axis=0) >= -1e-9).all()
        assert (np.diff(table, axis=1) <= 1e-9).all()
    for fit in fits:
        assert fit["noise"][0] == fit["blur"][0]


def test_measurements_in_order_are_their_own_fit():
    counts = instance_counts()
    for fit, bin_ in zip(fit_bins(counts), counts.bins, strict=True):
        for kind, rows in bin_.items():
            assert fit[kind] == pytest.approx([row.n_correct / row.n for row in rows])


FALLING = st.lists(st.integers(0, 1000), min_size=2, max_size=11, unique=True).map(
    lambda values: np.sort(np.array(values) / 1000)[::-1]
)


@given(FALLING, st.randoms())
def test_accuracies_at_the_chosen_strengths_are_evenly_spread(accuracies, random):
    measured = [0.0, *sorted(random.sample(range(10, 1001), len(accuracies) - 1))]
    measured = [s / 1000 for s in measured]
    chosen = spread_strengths(measured, [accuracies])
    assert chosen[0] == 0
    assert list(chosen) == sorted(set(chosen))
    assert chosen[-1] == measured[-1]
    # A strength is rounded to a thousandth, which moves an accuracy by at most the steepest slope times half of that.
    steepest = np.max(-np.diff(accuracies) / np.diff(measured))
    even = np.linspace(accuracies[0], accuracies[-1], len(accuracies))
    stated = np.interp(chosen, measured, accuracies)
    for target in even:
        assert np.abs(stated - target).min() <= steepest * 5e-4 + 1e-9
    for value in stated:
        assert np.abs(even - value).min() <= steepest * 5e-4 + 1e-9


def test_a_line_keeps_its_strengths_and_a_flat_end_is_left_out():
    measured = [0, 0.25, 0.5, 0.75, 1]
    assert spread_strengths(measured, [np.array([0.9, 0.7, 0.5, 0.3, 0.1])]) == tuple(measured)
    flat = np.array([0.9, 0.9, 0.5, 0.5, 0.5])
    assert spread_strengths(measured, [flat]) == (0, 0.312, 0.375, 0.438, 0.5)


def test_answer_types_count_alike_whatever_their_range():
    measured = [0, 0.5, 1]
    small, large = np.array([0.52, 0.51, 0.5]), np.array([1.0, 0.5, 0.0])
    assert spread_strengths(measured, [small, large]) == (0, 0.5, 1)
    late = np.array([1.0, 1.0, 0.0])
    assert spread_strengths(measured, [small, late]) == (0, 0.667, 1)
    assert spread_strengths(measured, [np.full(3, 0.5), large]) == (0, 0.5, 1), "one that never falls"
    assert spread_strengths(measured, [np.full(3, 0.5)]) == (0, 0.5, 1), "none falls"


def test_no_strength_is_beyond_the_measured_ones():
    last = 0.99961
    assert spread_strengths([0, last], [np.array([0.9, 0.1])]) == (0, last)


def test_the_strengths_of_levels_are_spread_by_all_answer_types():
    table = LevelTable({"yes_no": instance_counts(), "short": instance_counts(0.1, ease=(0.4, 0.7, 0.95))})
    levels = AnchoredLevels(table=table)
    fits = [fit_bins(counts.merged)[0] for counts in table.counts.values()]
    for kind in table.kinds:
        measured = [row.strength for row in table.counts["short"].bins[0][kind]]
        assert levels.strengths(kind) == spread_strengths(measured, [fit[kind] for fit in fits])


def test_groups_of_numbers_that_differ_by_rounding_errors_have_boundaries():
    values = [0.5 + 1e-10, 0.5, 0.5, 0.5 - 1e-10, 0.1 + 0.2, 0.3]
    smallest = [value for value, _ in group_means(values, 4)]
    assert smallest == sorted(set(smallest), reverse=True)
    assert smallest[-1] == min(values)
