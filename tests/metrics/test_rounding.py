"""Rounding to the grid: the bound of every metric holds, and most bounds are nearly reached."""

import math
import warnings

import numpy as np
import pytest
import torch

from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.groups import group_values
from vlm_calibration.metrics.table import ConfidenceTable

from .rounding import rounding_bounds

VACUOUS = {"brier_reliability", "brier_resolution"}


def compare(confidence, correct, grid_steps):
    """Every metric's change by rounding, with its bound."""
    raw = group_values(torch.tensor(confidence), torch.tensor(correct))
    table = ConfidenceTable.from_predictions(torch.tensor(confidence), torch.tensor(correct), grid_steps)
    bounds = rounding_bounds(table)
    assert set(bounds) == set(METRICS)
    return {
        name: (abs(float(METRICS[name](table)) - float(METRICS[name](raw))), bounds[name]) for name in METRICS
    }


@pytest.mark.slow
@pytest.mark.parametrize("grid_steps", [10, 100, 10_000])
def test_bounds_hold(cases, grid_steps):
    closest = dict.fromkeys(METRICS, 0.0)
    for confidence, correct in cases(60 if grid_steps == 100 else 25, "continuous", seed=61, largest=150):
        for name, (change, bound) in compare(confidence, correct, grid_steps).items():
            if math.isnan(change):
                continue
            assert change <= bound + 1e-9, name
            if bound > 0:
                closest[name] = max(closest[name], change / bound)
    idle = {name for name, ratio in closest.items() if ratio < 0.01} - VACUOUS
    assert idle <= {"smooth_ece", "ace", "mce"} | {
        "n",
        "parse_failure_rate",
        "brier_uncertainty",
        "parsed_accuracy",
    }


def test_bounds_hold_at_the_worst_places():
    """Everything half a step from its level, all in one direction and next to bin edges."""
    rng = np.random.default_rng(0)
    for _ in range(70):
        n = int(rng.integers(2, 80))
        level = rng.choice([1, 9, 10, 11, 29, 30, 31, 50, 70, 90, 99], size=n)
        confidence = level / 100 + rng.choice([-1, 1], size=n) * 0.004999
        correct = rng.random(n) < rng.random()
        for name, (change, bound) in compare(confidence, correct, 100).items():
            assert math.isnan(change) or change <= bound + 1e-9, name


def test_means_reach_their_bound():
    confidence = np.full(50, 0.50499999)
    changes = compare(confidence, np.arange(50) % 2 == 0, 100)
    for name in ("mean_confidence", "overconfidence"):
        assert changes[name][0] == pytest.approx(changes[name][1], rel=1e-4)


def test_stated_percentages_do_not_move(cases):
    """On the grid nothing is rounded: table and raw values agree to the last bits, whatever the bound says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for percent, correct in cases(25, "percents", seed=62):
            for name, (change, _) in compare(percent / 100, correct, 100).items():
                assert math.isnan(change) or change < 1e-12, name


def test_a_finer_grid_has_smaller_bounds(cases):
    for confidence, correct in cases(30, "continuous", seed=63, largest=100):
        tables = [
            ConfidenceTable.from_predictions(torch.tensor(confidence), torch.tensor(correct), r)
            for r in (100, 10_000)
        ]
        coarse, fine = (rounding_bounds(t) for t in tables)
        assert fine["brier"] == pytest.approx(coarse["brier"] / 100)
        assert fine["ece"] <= coarse["ece"]


def test_an_empty_table_has_no_bounds():
    with pytest.raises(ValueError, match="no bounds"):
        rounding_bounds(ConfidenceTable.from_predictions([None], [True]))
