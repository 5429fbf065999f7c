"""ConfidenceTable: conversion to levels, counting, bin edges and refusals."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_calibration.metrics.table import ConfidenceTable, bin_index, to_level

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "grid_steps"), [*((dtype, 100) for dtype in DTYPES), (torch.float32, 10_000)]
)
@pytest.mark.parametrize("autocast", [False, True])
def test_every_percent_is_its_own_level(dtype, grid_steps, autocast):
    """0.29 is 29 (0.29 * 100 is 28.999999999999996) in every dtype, also under bfloat16 autocast."""
    confidence = (torch.arange(grid_steps + 1, dtype=torch.float64) / grid_steps).repeat(3).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        correct = torch.arange(len(confidence)) % 3 == 0
        table = ConfidenceTable.from_predictions(confidence, correct, grid_steps)
    assert table.counts.dtype == torch.int64
    assert table.counts.tolist() == [[2, 1]] * (grid_steps + 1)
    assert table.value.tolist() == [i / grid_steps for i in range(grid_steps + 1)]


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 0x3F80), (torch.float16, 0x3C00)])
def test_every_half_precision_number_goes_to_its_nearest_level(dtype, bits):
    """All numbers from 0 to 1 against exact rounding, halves to even: the product is not rounded to half precision."""
    values = torch.arange(bits + 1, dtype=torch.int16).view(dtype)
    assert values[-1] == 1
    assert to_level(values, 100).tolist() == [round(Fraction(v) * 100) for v in values.tolist()]


@settings(max_examples=100)
@given(st.floats(0, 1), st.sampled_from([1, 10, 100, 1000, 10_000]))
def test_no_confidence_moves_by_more_than_half_a_step(confidence, grid_steps):
    level = int(to_level(torch.tensor([confidence], dtype=torch.float64), grid_steps)[0])
    assert abs(level / grid_steps - confidence) <= 1 / (2 * grid_steps) * (1 + 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_values_are_counted_together_and_unparsed_answers_apart(dtype):
    confidence = torch.tensor([0.3, 0.1, 0.3, 1.0, 0.0, 0.3, float("nan")], dtype=dtype)
    correct = torch.tensor([True, False, False, True, False, True, True])
    table = ConfidenceTable.from_predictions(confidence, correct, None)
    assert table.value.tolist() == sorted({float(c) for c in confidence[:-1]})
    assert table.counts.tolist() == [[1, 0], [1, 0], [1, 2], [0, 1]]
    assert (table.n, table.parsed, int(table.unparsed), table.dtype) == (7, 6, 1, dtype)
    listed = ConfidenceTable.from_predictions([0.9, None, 0.2, None], [True, True, False, False])
    assert (listed.n, listed.parsed, int(listed.unparsed)) == (4, 2, 2)
    assert (listed.value.tolist(), listed.counts.tolist()) == ([0.2, 0.9], [[1, 0], [0, 1]])


def test_the_grid_is_free():
    for grid_steps, values in ((100, [0.81]), (10_000, [0.8051]), (None, [0.8051, 0.80509])):
        table = ConfidenceTable.from_predictions([0.8051, 0.80509], [True, False], grid_steps)
        assert table.value.tolist() == sorted(values)
        assert table.counts.sum(0).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([0.5, -0.25], [True, True], r"confidence\[1\] = -0.25 is outside \[0, 1\]"),
        ([1.0001], [True], r"confidence\[0\] = 1.0001\d* is outside"),
        ([float("-inf")], [True], "outside"),
        ([0.5], [True, False], r"bool of shape \(1,\)"),
        ([50], [True], "floating"),
        ([[0.5]], [[True]], "vector"),
        ([0.5], [1], "bool"),
    ],
)
@pytest.mark.parametrize("grid_steps", [100, None])
def test_refusals(confidence, correct, message, grid_steps):
    with pytest.raises(ValueError, match=message):
        ConfidenceTable.from_predictions(torch.tensor(confidence), torch.tensor(correct), grid_steps)


def uniform_bins(value, n_bins, dtype):
    table = ConfidenceTable(value, torch.ones(len(value), 2, dtype=torch.int64), torch.tensor(0), dtype)
    return bin_index(table, n_bins, "uniform")


@pytest.mark.parametrize("grid_steps", [1, 7, 10, 100, 1000, 10_000])
def test_levels_are_binned_as_in_integer_arithmetic(grid_steps):
    """`[b / n_bins, (b + 1) / n_bins)`, the last closed, for quotients of integers."""
    levels = torch.arange(grid_steps + 1)
    for n_bins in (*range(1, 34), 100, 137, 200):
        expected = (levels * n_bins // grid_steps).clamp_max(n_bins - 1)
        assert torch.equal(uniform_bins(levels.double() / grid_steps, n_bins, torch.float64), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_percents_and_edges_have_the_bins_of_integers_in_every_dtype(dtype):
    """The literal nearest to k / n_bins in the dtype is in bin k; 1 is in the last bin."""
    for n_bins in (1, 2, 3, 5, 10, 15, 20, 25, 50):
        steps = n_bins if 100 % n_bins else 100
        values = torch.tensor([float(Fraction(i, steps)) for i in range(steps + 1)], dtype=torch.float64)
        expected = (torch.arange(steps + 1) * n_bins // steps).clamp_max(n_bins - 1)
        assert torch.equal(uniform_bins(values.to(dtype).double(), n_bins, dtype), expected)
