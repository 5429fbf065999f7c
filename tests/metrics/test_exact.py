"""Every metric in all its forms, against the rational reference: random cases and all bin edges."""

import math
import warnings
from itertools import permutations, product

import numpy as np
import pytest
import torch

from vlm_calibration.metrics import CalibrationMetrics, functional
from vlm_calibration.metrics.functional import METRICS, REPORTED
from vlm_calibration.metrics.table import ConfidenceTable


def check(percent, correct, exact):
    """Compare a table, raw float64, raw float32 (with a tolerance for its rounding) and torchmetrics with the reference."""
    expected = {
        name: math.nan if v is None else float(v) for name, v in exact(percent, correct).values().items()
    }
    confidence, y = torch.tensor(percent / 100), torch.tensor(correct)
    table, metrics = ConfidenceTable.from_predictions(confidence, y), CalibrationMetrics(metrics=METRICS)
    metrics.update(confidence, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collected = metrics.compute()
        for name, spec in METRICS.items():
            of_values = getattr(functional, spec.function.__name__)
            value, raw, single = spec(table), of_values(confidence, y), of_values(confidence.float(), y)
            assert value.dtype == raw.dtype == collected[name].dtype == torch.float64
            assert value.shape == raw.shape == ()
            truth = expected.get(name, float(value))
            assert float(value) == pytest.approx(truth, abs=1e-12, nan_ok=True), name
            assert float(raw) == pytest.approx(
                truth, abs=3e-8 if name == "smooth_ece" else 1e-12, nan_ok=True
            ), name
            assert float(collected[name]) == pytest.approx(float(value), abs=0, nan_ok=True), name
            assert float(single) == pytest.approx(
                truth, abs=1e-5 if name == "log_loss" else 1e-6, nan_ok=True
            ), name
            assert math.isnan(truth) or spec.lower - 1e-9 <= float(value) <= spec.upper + 1e-9
    reliability, resolution, uncertainty = functional.brier_decomposition(confidence, y)
    assert float(reliability - resolution + uncertainty) == pytest.approx(expected["brier"], abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tens", "percents", "few"])
def test_random_cases(cases, exact, kind):
    for percent, correct in cases(40, kind, seed=len(kind), largest=35):
        check(percent, correct, exact)


def test_edge_cases(edge_case, exact):
    check(*edge_case, exact)


def test_aurc_is_the_mean_over_all_orders_of_ties():
    """Three answers at 90% and two at 40%, in every order that keeps the levels apart."""
    orders = product(permutations([0, 1, 0]), permutations([1, 0]))  # errors of each level
    areas = [np.mean(np.cumsum(first + second) / np.arange(1, 6)) for first, second in orders]
    confidence = torch.tensor([0.9] * 3 + [0.4] * 2, dtype=torch.float64)
    correct = torch.tensor([True, False, True, False, True])
    aurc = float(functional.area_under_risk_coverage(confidence, correct))
    assert aurc == pytest.approx(np.mean(areas), abs=1e-14)


def test_aurc_of_many_answers_is_stable():
    """Differences of harmonic numbers do not cancel: a million answers, against the sum over all of them."""
    counts = torch.tensor([[100, 888], [5, 999_000], [3, 4]])
    errors, done, area = 0.0, 0, 0.0
    for wrong, y in counts.flip(0).tolist():
        k = np.arange(1, wrong + y + 1)
        area += ((errors + k * wrong / (wrong + y)) / (done + k)).sum()
        errors, done = errors + wrong, done + wrong + y
    table = ConfidenceTable(torch.tensor([0.5, 0.99, 1], dtype=torch.float64), counts, torch.tensor(0))
    assert float(METRICS["aurc"](table)) == pytest.approx(area / done, rel=1e-9)


@pytest.mark.parametrize("name", sorted({*METRICS} - {"n"}))
def test_no_answers_give_nan_and_one_warning(name):
    unparsed = ConfidenceTable.from_predictions([None, None], [True, False])
    assert math.isnan(METRICS[name](unparsed)) == (name != "parse_failure_rate")
    function = METRICS[name].function.__name__
    with pytest.warns(UserWarning, match=f"{function} is undefined") as caught:
        value = getattr(functional, function)(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert math.isnan(value)
    assert len(caught) == 1


def test_one_class_has_no_auroc():
    for correct in (True, False):
        with pytest.warns(UserWarning, match="auroc is undefined .* all answers are correct") as caught:
            assert math.isnan(functional.auroc(torch.tensor([0.2, 0.8]), torch.tensor([correct, correct])))
        assert len(caught) == 1
    with pytest.warns(UserWarning, match="brier_decomposition") as caught:
        parts = functional.brier_decomposition(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert all(math.isnan(part) for part in parts)
    assert len(caught) == 1


def test_answers_without_a_confidence_are_refused():
    for function in (functional.brier_score, functional.brier_decomposition):
        with pytest.raises(ValueError, match=r"confidence\[1\] is not a number"):
            function(torch.tensor([0.5, float("nan")]), torch.tensor([True, True]))


DIRECTED = {name for name, spec in METRICS.items() if spec.higher_is_better is not None}


@pytest.mark.parametrize(
    "name", sorted(DIRECTED - {"parsed_accuracy", "parse_failure_rate", "brier_resolution"})
)
def test_an_oracle_is_at_the_better_bound(name):
    """Confidences of 100% where correct and 0% where wrong are better than the opposite, by every metric with a direction."""
    correct = [True] * 9 + [False] * 9
    best, worst = (
        float(METRICS[name](ConfidenceTable.from_predictions([right] * 9 + [1 - right] * 9, correct)))
        for right in (1.0, 0.0)
    )
    assert best != worst
    assert (best > worst) == METRICS[name].higher_is_better


def test_the_reported_ones_come_first():
    assert tuple(METRICS)[: len(REPORTED)] == REPORTED
