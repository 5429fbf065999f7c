"""Bin edges: one convention, on integers, equal for tables and for raw values of every dtype."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from vlm_calibration.metrics.groups import (
    bin_sums,
    group_values,
    quantile_bin,
    uniform_bin_of_level,
    uniform_bin_of_value,
)
from vlm_calibration.metrics.table import ConfidenceTable

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def truth(level, grid_steps, n_bins):
    """`[b / n_bins, (b + 1) / n_bins)`, the last closed, by comparing fractions one edge at a time."""
    value = Fraction(level, grid_steps)
    return max(b for b in range(n_bins) if Fraction(b, n_bins) <= value)


@pytest.mark.parametrize("grid_steps", [1, 7, 10, 100, 1000])
def test_levels_against_fractions(grid_steps):
    levels = torch.arange(grid_steps + 1)
    for n_bins in (1, 2, 3, 7, 10, 15, 20, 33, 100):
        expected = [truth(i, grid_steps, n_bins) for i in range(grid_steps + 1)]
        assert uniform_bin_of_level(levels, grid_steps, n_bins).tolist() == expected


def test_percents_in_ten_bins():
    bins = uniform_bin_of_level(torch.arange(101), 100, 10).tolist()
    assert bins == [min(percent // 10, 9) for percent in range(101)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_bins", [2, 3, 5, 10, 15, 20, 25, 50])
def test_raw_values_on_an_edge_are_above_it_in_every_dtype(dtype, n_bins):
    """The literal nearest to k / n_bins in the dtype is in bin k; 1 is in the last bin."""
    for k in range(n_bins + 1):
        literal = torch.tensor([float(Fraction(k, n_bins))], dtype=torch.float64).to(dtype)
        assert uniform_bin_of_value(literal, n_bins).tolist() == [min(k, n_bins - 1)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_percents_have_the_bins_of_the_table(dtype):
    percents = (torch.arange(101, dtype=torch.float64) / 100).to(dtype)
    for n_bins in (1, 2, 5, 10, 20):
        assert torch.equal(
            uniform_bin_of_value(percents, n_bins), uniform_bin_of_level(torch.arange(101), 100, n_bins)
        )


def test_all_percents_in_any_number_of_bins():
    """Float64 literals agree with integer arithmetic for every percent and every number of bins up to 200."""
    percents = torch.tensor([float(Fraction(i, 100)) for i in range(101)], dtype=torch.float64)
    for n_bins in range(1, 201):
        assert torch.equal(
            uniform_bin_of_value(percents, n_bins), uniform_bin_of_level(torch.arange(101), 100, n_bins)
        )


def test_quantiles_are_those_of_numpy(cases):
    """Integer arithmetic against exact interpolation: bin k starts at `numpy.quantile(values, k / n_bins)`."""
    for kind in ("tens", "percents", "few"):
        for percent, correct in cases(25, kind, seed=41, largest=80):
            table = ConfidenceTable.from_predictions(torch.tensor(percent / 100), torch.tensor(correct))
            levels = table.groups()
            for n_bins in (1, 2, 5, 10, 15):
                bins = quantile_bin(levels.counts.sum(-1), n_bins).tolist()
                # Percents as integers and a step of 1 / 1e9 keep interpolated quantiles off the values they equal.
                edges = np.quantile(percent.astype(float), np.arange(1, n_bins) / n_bins, method="linear")
                for level, ours in zip(levels.cell.tolist(), bins, strict=True):
                    assert ours == sum(edge <= level + 1e-9 for edge in edges)


def test_quantile_bins_have_equal_mass_without_ties():
    count = torch.ones(1000, dtype=torch.int64)
    sizes = torch.bincount(quantile_bin(count, 8))
    assert sizes.min() >= 124
    assert sizes.max() <= 126


def test_bin_sums_lose_nothing(cases):
    for percent, correct in cases(25, "percents", seed=42):
        levels = group_values(torch.tensor(percent / 100), torch.tensor(correct))
        for binning in ("uniform", "quantile"):
            sums = bin_sums(levels, 10, binning)
            assert float(sums.answers.sum()) == len(percent)
            assert float(sums.correct.sum()) == correct.sum()
            assert float(sums.confidence.sum()) == pytest.approx(percent.sum() / 100)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouping_counts_equal_values(dtype):
    confidence = torch.tensor([0.3, 0.1, 0.3, 1.0, 0.0, 0.3], dtype=dtype)
    levels = group_values(confidence, torch.tensor([True, False, False, True, False, True]))
    assert levels.value.tolist() == sorted({float(c) for c in confidence})
    assert levels.counts.tolist() == [[1, 0], [1, 0], [1, 2], [0, 1]]
    assert levels.grid_steps is None
