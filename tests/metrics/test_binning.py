"""Bin edges: one convention, equal to integer arithmetic for grid levels and for raw values of every dtype."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from vlm_calibration.metrics.table import ConfidenceTable, bin_sums, quantile_bin, uniform_bin

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("grid_steps", [1, 7, 10, 100, 1000, 10_000])
def test_levels_are_binned_as_in_integer_arithmetic(grid_steps):
    """`[b / n_bins, (b + 1) / n_bins)`, the last closed, for quotients of integers."""
    levels = torch.arange(grid_steps + 1)
    for n_bins in (*range(1, 34), 100, 137, 200):
        expected = (levels * n_bins // grid_steps).clamp_max(n_bins - 1)
        assert torch.equal(uniform_bin(levels.double() / grid_steps, n_bins), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_percents_have_the_bins_of_integers_in_every_dtype(dtype):
    percents = torch.tensor([float(Fraction(i, 100)) for i in range(101)], dtype=torch.float64).to(dtype)
    for n_bins in (1, 2, 5, 10, 20, 25, 50):
        expected = (torch.arange(101) * n_bins // 100).clamp_max(n_bins - 1)
        assert torch.equal(uniform_bin(percents.double(), n_bins, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_bins", [3, 10, 15, 50])
def test_raw_values_on_an_edge_are_above_it_in_every_dtype(dtype, n_bins):
    """The literal nearest to k / n_bins in the dtype is in bin k; 1 is in the last bin."""
    edges = torch.tensor([float(Fraction(k, n_bins)) for k in range(n_bins + 1)], dtype=torch.float64)
    assert uniform_bin(edges.to(dtype).double(), n_bins, dtype).tolist() == [*range(n_bins), n_bins - 1]


def test_quantiles_are_those_of_numpy(cases):
    """Integer arithmetic against exact interpolation: bin k starts at `numpy.quantile(values, k / n_bins)`."""
    for kind in ("tens", "percents", "few"):
        for percent, correct in cases(25, kind, seed=41, largest=80):
            table = ConfidenceTable.from_predictions(torch.tensor(percent / 100), torch.tensor(correct))
            for n_bins in (1, 2, 5, 10, 15):
                bins = quantile_bin(table.counts.sum(-1), n_bins).tolist()
                # Percents as integers and a step of 1 / 1e9 keep interpolated quantiles off the values they equal.
                edges = np.quantile(percent.astype(float), np.arange(1, n_bins) / n_bins, method="linear")
                for value, ours in zip(table.value.tolist(), bins, strict=True):
                    assert ours == sum(edge <= 100 * value + 1e-9 for edge in edges)


def test_bin_sums_lose_nothing(cases):
    for percent, correct in cases(25, "percents", seed=42):
        table = ConfidenceTable.from_predictions(torch.tensor(percent / 100), torch.tensor(correct), None)
        for binning in ("uniform", "quantile"):
            sums = bin_sums(table, 10, binning)
            assert float(sums.answers.sum()) == len(percent)
            assert float(sums.correct.sum()) == correct.sum()
            assert float(sums.confidence.sum()) == pytest.approx(percent.sum() / 100)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouping_counts_equal_values(dtype):
    confidence = torch.tensor([0.3, 0.1, 0.3, 1.0, 0.0, 0.3, float("nan")], dtype=dtype)
    correct = torch.tensor([True, False, False, True, False, True, True])
    table = ConfidenceTable.from_predictions(confidence, correct, None)
    assert table.value.tolist() == sorted({float(c) for c in confidence[:-1]})
    assert table.counts.tolist() == [[1, 0], [1, 0], [1, 2], [0, 1]]
    assert (int(table.unparsed), table.dtype) == (1, dtype)
