"""Bin edges: one convention, equal to integer arithmetic for grid levels and for raw values of every dtype."""

from fractions import Fraction

import pytest
import torch

from vlm_calibration.metrics.table import ConfidenceTable, uniform_bin

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("grid_steps", [1, 7, 10, 100, 1000, 10_000])
def test_levels_are_binned_as_in_integer_arithmetic(grid_steps):
    """`[b / n_bins, (b + 1) / n_bins)`, the last closed, for quotients of integers."""
    levels = torch.arange(grid_steps + 1)
    for n_bins in (*range(1, 34), 100, 137, 200):
        expected = (levels * n_bins // grid_steps).clamp_max(n_bins - 1)
        assert torch.equal(uniform_bin(levels.double() / grid_steps, n_bins), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_percents_and_edges_have_the_bins_of_integers_in_every_dtype(dtype):
    """The literal nearest to k / n_bins in the dtype is in bin k; 1 is in the last bin."""
    for n_bins in (1, 2, 3, 5, 10, 15, 20, 25, 50):
        steps = n_bins if 100 % n_bins else 100
        values = torch.tensor([float(Fraction(i, steps)) for i in range(steps + 1)], dtype=torch.float64)
        expected = (torch.arange(steps + 1) * n_bins // steps).clamp_max(n_bins - 1)
        assert torch.equal(uniform_bin(values.to(dtype).double(), n_bins, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouping_counts_equal_values(dtype):
    confidence = torch.tensor([0.3, 0.1, 0.3, 1.0, 0.0, 0.3, float("nan")], dtype=dtype)
    correct = torch.tensor([True, False, False, True, False, True, True])
    table = ConfidenceTable.from_predictions(confidence, correct, None)
    assert table.value.tolist() == sorted({float(c) for c in confidence[:-1]})
    assert table.counts.tolist() == [[1, 0], [1, 0], [1, 2], [0, 1]]
    assert (int(table.unparsed), table.dtype) == (1, dtype)
