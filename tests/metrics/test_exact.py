"""Every metric, of raw values and of a table, against the rational reference: random cases and all bin edges."""

import math
import warnings
from itertools import permutations, product

import numpy as np
import pytest
import torch

from vlm_calibration.metrics import functional
from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.table import ConfidenceTable

CHECKS = {
    "ece": ("expected_calibration_error", {}, lambda e: e.ece()),
    "ece 15 bins": ("expected_calibration_error", {"n_bins": 15}, lambda e: e.ece(15)),
    "ece 1 bin": ("expected_calibration_error", {"n_bins": 1}, lambda e: e.ece(1)),
    "ece more bins than levels": ("expected_calibration_error", {"n_bins": 137}, lambda e: e.ece(137)),
    "mce": ("maximum_calibration_error", {}, lambda e: e.mce()),
    "ace": ("adaptive_calibration_error", {}, lambda e: e.ace()),
    "ace 4 bins": ("adaptive_calibration_error", {"n_bins": 4}, lambda e: e.ace(4)),
    "brier": ("brier_score", {}, lambda e: e.brier()),
    "auroc": ("auroc", {}, lambda e: e.auroc()),
    "aurc": ("area_under_risk_coverage", {}, lambda e: e.aurc()),
    "mean confidence": ("mean_confidence", {}, lambda e: e.mean()),
    "overconfidence": ("overconfidence", {}, lambda e: e.mean() - e.accuracy()),
    "parsed accuracy": ("parsed_accuracy", {}, lambda e: e.accuracy()),
}

SPECS = {spec.function.__name__: spec for spec in METRICS.values()}


def check(percent, correct, exact, name):
    """Compare raw float64, raw float32 (with a tolerance for its rounding) and table values with the reference."""
    function, options, reference = CHECKS[name]
    truth = reference(exact(percent, correct))
    truth = math.nan if truth is None else float(truth)
    confidence, y = torch.tensor(percent / 100), torch.tensor(correct)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = getattr(functional, function)(confidence, y, **options)
        single = getattr(functional, function)(confidence.float(), y, **options)
        table = SPECS[function](ConfidenceTable.from_predictions(confidence, y), **options)
    assert raw.dtype == table.dtype == torch.float64
    assert raw.shape == table.shape == ()
    assert float(raw) == pytest.approx(truth, abs=1e-12, nan_ok=True)
    assert float(table) == pytest.approx(truth, abs=1e-12, nan_ok=True)
    assert float(single) == pytest.approx(truth, abs=1e-6, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_random_cases(cases, exact, name):
    for kind in ("tens", "percents", "few"):
        for percent, correct in cases(25, kind, seed=len(name), largest=35):
            check(percent, correct, exact, name)


@pytest.mark.parametrize("name", CHECKS)
def test_edge_cases(edge_case, exact, name):
    check(*edge_case, exact, name)


def test_brier_decomposition_adds_up(cases, exact):
    for kind in ("tens", "percents", "few"):
        for percent, correct in cases(25, kind, seed=3, largest=40):
            truth = exact(percent, correct).decomposition()
            table = ConfidenceTable.from_predictions(torch.tensor(percent / 100), torch.tensor(correct))
            parts = functional.brier_decomposition(torch.tensor(percent / 100), torch.tensor(correct))
            assert [float(p) for p in parts] == pytest.approx([float(t) for t in truth], abs=1e-12)
            of_table = [float(METRICS[f"brier_{part}"](table)) for part in parts._fields]
            assert of_table == pytest.approx([float(t) for t in truth], abs=1e-12)
            total = parts.reliability - parts.resolution + parts.uncertainty
            assert float(total) == pytest.approx(float(METRICS["brier"](table)), abs=1e-12)


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


UNDEFINED_WITHOUT_ANSWERS = sorted(
    {function for function, _, _ in CHECKS.values()}
    | {"log_loss", "smooth_calibration_error", "parse_failure_rate"}
    | {f"brier_{part}" for part in ("reliability", "resolution", "uncertainty")}
)


@pytest.mark.parametrize("function", UNDEFINED_WITHOUT_ANSWERS)
def test_no_answers_give_nan_and_one_warning(function):
    unparsed = ConfidenceTable.from_predictions([None, None], [True, False])
    assert math.isnan(SPECS[function](unparsed)) == (function != "parse_failure_rate")
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


def test_bad_options_and_answers_without_a_confidence_are_refused():
    for n_bins in (0, 2.5):
        with pytest.raises(ValueError, match="n_bins must be a positive integer"):
            functional.expected_calibration_error(torch.tensor([0.5]), torch.tensor([True]), n_bins=n_bins)
    for function in (functional.brier_score, functional.expected_calibration_error, functional.auroc):
        with pytest.raises(ValueError, match=r"confidence\[1\] is not a number"):
            function(torch.tensor([0.5, float("nan")]), torch.tensor([True, True]))
