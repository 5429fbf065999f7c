"""ConfidenceTable: conversion to levels, counting, arithmetic and refusals."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_calibration.metrics import table as table_module
from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.groups import group_values
from vlm_calibration.metrics.table import ConfidenceTable, count_cells, tables_by_category, to_level

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_percent_is_its_own_level(dtype):
    """0.29 is 29 (0.29 * 100 is 28.999999999999996) in every dtype."""
    percents = (torch.arange(101, dtype=torch.float64) / 100).to(dtype)
    assert to_level(percents, 100).tolist() == list(range(101))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_basis_point_is_its_own_level(dtype):
    points = (torch.arange(10_001, dtype=torch.float64) / 10_000).to(dtype)
    assert to_level(points, 10_000).tolist() == list(range(10_001))


def test_halves_go_to_the_even_level():
    assert to_level(torch.tensor([0.125, 0.375, 0.625, 0.875], dtype=torch.float64), 100).tolist() == [
        12,
        38,
        62,
        88,
    ]
    assert to_level(torch.tensor([0.805, 0.8051, 0.8049], dtype=torch.float64), 100).tolist() == [80, 81, 80]


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
    correct = torch.arange(303) % 3 == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        table = ConfidenceTable.from_predictions(confidence, correct)
    assert table.counts.dtype == torch.int64
    assert table.counts.sum(1).tolist() == [3] * 101
    assert table == ConfidenceTable.from_predictions(confidence.double(), correct)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 50])
def test_counting_in_chunks(monkeypatch, n):
    """Any chunk size gives the same counts, and no bincount ever sees more than a chunk."""
    generator = torch.Generator().manual_seed(n)
    confidence = torch.rand(n, generator=generator)
    confidence[::5] = torch.nan
    correct = torch.rand(n, generator=generator) < 0.5
    row = torch.randint(0, 3, (n,), generator=generator)
    total = count_cells(confidence, correct, 100, row, 3)
    sizes = []
    bincount = torch.bincount
    monkeypatch.setattr(torch, "bincount", lambda x, **k: (sizes.append(len(x)), bincount(x, **k))[1])
    monkeypatch.setattr(table_module, "CHUNK", 8)
    assert torch.equal(count_cells(confidence, correct, 100, row, 3), total)
    assert max(sizes) <= 8
    assert sum(sizes) == n
    expected = torch.zeros(3, 102, 2, dtype=torch.int64)
    for c, y, r in zip(confidence.tolist(), correct.tolist(), row.tolist(), strict=True):
        expected[r, 101 if c != c else int(np.rint(c * 100)), int(y)] += 1
    assert torch.equal(total, expected)


def test_unparsed_answers_are_counted_and_in_no_level():
    table = ConfidenceTable.from_predictions(
        torch.tensor([0.9, float("nan"), 0.2, float("nan")]), torch.tensor([True, True, False, False])
    )
    assert (table.n, table.parsed, table.unparsed) == (4, 2, 2)
    assert table.counts[90].tolist() == [0, 1]
    assert table.counts[20].tolist() == [1, 0]
    assert ConfidenceTable.from_predictions([0.9, None, 0.2, None], [True, True, False, False]) == table


def test_addition_is_that_of_the_answers(cases):
    for percent, correct in cases(60, "percents", seed=51):
        confidence, y = torch.tensor(percent / 100), torch.tensor(correct)
        confidence[confidence == 0.5] = torch.nan
        cut = len(percent) // 3
        first = ConfidenceTable.from_predictions(confidence[:cut], y[:cut])
        second = ConfidenceTable.from_predictions(confidence[cut:], y[cut:])
        total = ConfidenceTable.from_predictions(confidence, y)
        assert first + second == second + first == total
        assert (first + second).unparsed == (percent == 50).sum()
        assert total + ConfidenceTable.empty() == total
        assert (first == total) == (cut == len(percent))


def test_tables_of_different_grids_do_not_add():
    with pytest.raises(ValueError, match="100 and 10 grid steps"):
        ConfidenceTable.empty() + ConfidenceTable.empty(10)
    assert ConfidenceTable.empty() != ConfidenceTable.empty(10)
    with pytest.raises(TypeError):
        ConfidenceTable.empty() + 1


def test_a_table_owns_its_counts():
    counts = torch.zeros(101, 2, dtype=torch.int64)
    table = ConfidenceTable(counts, 3)
    counts += 1
    assert table.parsed == 0
    with pytest.raises(AttributeError):
        table.unparsed = 4


def test_the_grid_is_free():
    table = ConfidenceTable.from_predictions([0.8051, 0.80509], [True, False], grid_steps=10_000)
    assert table.counts[8051].tolist() == [1, 1]
    assert table.groups().value.tolist() == [0.8051]
    assert table.grid_steps == 10_000


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        (
            torch.tensor([0.5, -0.25]),
            torch.tensor([True, True]),
            r"confidence\[1\] = -0.25 is outside \[0, 1\]",
        ),
        (torch.tensor([1.0001]), torch.tensor([True]), r"confidence\[0\] = 1.0001\d* is outside"),
        (torch.tensor([float("-inf")]), torch.tensor([True]), "outside"),
        (torch.tensor([0.5]), torch.tensor([True, False]), "shape"),
        (torch.tensor([50]), torch.tensor([True]), "floating"),
        (torch.tensor([[0.5]]), torch.tensor([[True]]), "vector"),
        (torch.tensor([0.5]), torch.tensor([1.0]), "bool"),
        (torch.tensor([0.5]), torch.tensor([3]), "only 0 and 1"),
    ],
)
def test_refusals(confidence, correct, message):
    with pytest.raises(ValueError, match=message):
        ConfidenceTable.from_predictions(confidence, correct)


def test_the_error_names_the_place_in_a_later_chunk(monkeypatch):
    monkeypatch.setattr(table_module, "CHUNK", 4)
    confidence = torch.full((11,), 0.5)
    confidence[9] = 1.5
    with pytest.raises(ValueError, match=r"confidence\[9\] = 1.5"):
        ConfidenceTable.from_predictions(confidence, torch.ones(11, dtype=torch.bool))


@pytest.mark.parametrize("grid_steps", [0, -1, 2.5, True])
def test_bad_grid_steps(grid_steps):
    with pytest.raises(ValueError, match="grid_steps must be a positive integer"):
        ConfidenceTable.from_predictions([0.5], [True], grid_steps)


def test_bad_counts():
    with pytest.raises(ValueError, match="int64"):
        ConfidenceTable(torch.zeros(101, 2))
    with pytest.raises(ValueError, match="shape"):
        ConfidenceTable(torch.zeros(101, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="negative"):
        ConfidenceTable(torch.full((101, 2), -1))
    with pytest.raises(ValueError, match="negative"):
        ConfidenceTable(torch.zeros(101, 2, dtype=torch.int64), -1)


def test_tables_by_category():
    confidence = [0.9, 0.8, None, 0.9, 0.1]
    correct = [True, False, True, False, True]
    tables = tables_by_category(confidence, correct, ["b", "a", "b", None, "a"])
    assert list(tables) == ["b", "a"]
    assert tables["b"] == ConfidenceTable.from_predictions([0.9, None], [True, True])
    assert tables["a"] == ConfidenceTable.from_predictions([0.8, 0.1], [False, True])
    assert tables_by_category([], [], []) == {}
    with pytest.raises(ValueError, match="5 confidences but 1 categories"):
        tables_by_category(confidence, correct, ["a"])


@pytest.mark.parametrize("grid_steps", [10, 100, 10_000])
def test_rounding_moves_metrics_by_no_more_than_confidences_move(cases, grid_steps):
    """Those that are Lipschitz in the confidences, on continuous ones."""
    half = 1 / (2 * grid_steps)
    for confidence, correct in cases(25, "continuous", seed=61, largest=150):
        values, y = torch.tensor(confidence), torch.tensor(correct)
        raw, table = group_values(values, y), ConfidenceTable.from_predictions(values, y, grid_steps)
        for name, slope in {"mean_confidence": 1, "overconfidence": 1, "brier": 2}.items():
            moved = abs(float(METRICS[name](table)) - float(METRICS[name](raw)))
            assert moved <= slope * half + 1e-12, name
        assert METRICS["parsed_accuracy"](table) == METRICS["parsed_accuracy"](raw)
