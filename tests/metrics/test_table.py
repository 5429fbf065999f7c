"""ConfidenceTable: conversion to levels, counting and refusals."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.table import ConfidenceTable, to_level

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "grid_steps"), [*((dtype, 100) for dtype in DTYPES), (torch.float32, 10_000)]
)
def test_every_percent_is_its_own_level(dtype, grid_steps):
    """0.29 is 29 (0.29 * 100 is 28.999999999999996) in every dtype."""
    confidences = (torch.arange(grid_steps + 1, dtype=torch.float64) / grid_steps).to(dtype)
    assert to_level(confidences, grid_steps).tolist() == list(range(grid_steps + 1))


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
def test_counting_under_autocast(dtype):
    """Inputs in any precision under bfloat16 autocast: the same integers as without."""
    confidence = (torch.arange(101, dtype=torch.float64) / 100).repeat(3).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        table = ConfidenceTable.from_predictions(confidence, torch.arange(303) % 3 == 0)
    assert table.counts.dtype == torch.int64
    assert table.counts.tolist() == [[2, 1]] * 101
    assert table.value.tolist() == [i / 100 for i in range(101)]


def test_unparsed_answers_are_counted_and_in_no_level():
    correct = [True, True, False, False]
    for confidence in ([0.9, None, 0.2, None], torch.tensor([0.9, float("nan"), 0.2, float("nan")])):
        table = ConfidenceTable.from_predictions(confidence, correct)
        assert (table.n, table.parsed, int(table.unparsed)) == (4, 2, 2)
        assert (table.value.tolist(), table.counts.tolist()) == ([0.2, 0.9], [[1, 0], [0, 1]])


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
        ([0.5], [True, False], "shape"),
        ([50], [True], "floating"),
        ([[0.5]], [[True]], "vector"),
        ([0.5], [1.0], "bool"),
        ([0.5], [3], "0 and 1"),
    ],
)
@pytest.mark.parametrize("grid_steps", [100, None])
def test_refusals(confidence, correct, message, grid_steps):
    with pytest.raises(ValueError, match=message):
        ConfidenceTable.from_predictions(torch.tensor(confidence), torch.tensor(correct), grid_steps)


@pytest.mark.parametrize("grid_steps", [0, -1, 2.5, True])
def test_bad_grid_steps(grid_steps):
    with pytest.raises(ValueError, match="grid_steps must be a positive integer"):
        ConfidenceTable.from_predictions([0.5], [True], grid_steps)


@pytest.mark.parametrize("grid_steps", [10, 100, 10_000])
def test_rounding_moves_metrics_by_no_more_than_confidences_move(cases, grid_steps):
    """Those that are Lipschitz in the confidences, on continuous ones."""
    half = 1 / (2 * grid_steps)
    for confidence, correct in cases(25, "continuous", seed=61, largest=150):
        raw, table = (
            ConfidenceTable.from_predictions(torch.tensor(confidence), torch.tensor(correct), steps)
            for steps in (None, grid_steps)
        )
        for name, slope in {"mean_confidence": 1, "overconfidence": 1, "brier": 2}.items():
            moved = abs(float(METRICS[name](table)) - float(METRICS[name](raw)))
            assert moved <= slope * half + 1e-12, name
        assert METRICS["parsed_accuracy"](table) == METRICS["parsed_accuracy"](raw)
