"""Every metric in all its forms: against the rational reference, published packages and, of the smooth ECE, its definition."""

import math
import warnings
from math import gcd

import numpy as np
import pytest
import torch
from netcal.metrics import ACE, ECE, MCE
from sklearn import metrics as sklearn_metrics

from vlm_calibration.metrics import CalibrationMetrics, functional
from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.smooth import MIN_BANDWIDTH
from vlm_calibration.metrics.table import ConfidenceTable

from .references import EDGE_CASES, Exact, cases


def check(percent, correct):
    """Compare a table, raw float64, raw float32 (with a tolerance for its rounding) and torchmetrics with the reference."""
    expected = {
        name: math.nan if v is None else float(v) for name, v in Exact(percent, correct).values().items()
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
def test_random_cases(kind):
    for percent, correct in cases(40, kind, seed=len(kind), largest=35):
        check(percent, correct)


@pytest.mark.parametrize("name", EDGE_CASES)
def test_edge_cases(name):
    percent, correct = EDGE_CASES[name]
    check(np.array(percent), np.array(correct, dtype=bool))


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


# --- published packages, where they are correct


@pytest.mark.parametrize("kind", ["few", "continuous"])
def test_the_log_loss_is_that_of_sklearn(kind):
    for confidence, correct in cases(25, kind, seed=11, largest=300):
        confidence = confidence if kind == "continuous" else confidence / 100
        log_loss = sklearn_metrics.log_loss(correct.astype(int), confidence, labels=[0, 1])
        value = functional.log_loss(torch.tensor(confidence), torch.tensor(correct))
        assert float(value) == pytest.approx(log_loss, rel=1e-9)


def test_netcal():
    """Continuous values: netcal's float edges are only wrong for values on an edge."""
    by_quantile = 0
    for confidence, correct in cases(60, "continuous", seed=13, largest=200):
        # Else a quantile equals one of the values, which rounding puts into either bin.
        while len(correct) > 2 and gcd(len(correct) - 1, 10) > 1:
            confidence, correct = confidence[:-1], correct[:-1]
        values, y = (torch.tensor(confidence), torch.tensor(correct)), correct.astype(int)
        pairs = [
            (functional.expected_calibration_error, ECE(10)),
            (functional.maximum_calibration_error, MCE(10)),
        ]
        # netcal refuses quantiles that nearly coincide.
        edges = np.quantile(confidence, np.linspace(0, 1, 11))[1:-1]
        if len(y) > 1 and np.diff(edges, prepend=0, append=1).min() > 1e-6:
            pairs.append((functional.adaptive_calibration_error, ACE(10, equal_intervals=False)))
            by_quantile += 1
        for ours, peer in pairs:
            assert float(ours(*values)) == pytest.approx(peer.measure(confidence, y), abs=1e-9)
    assert by_quantile >= 50


# --- smooth ECE


def definition(confidence, correct, sigma, nodes=4000):
    """The integral of |mean of K_sigma(t, c_i) (c_i - y_i)| over t by the midpoint rule."""
    t = (np.arange(nodes) + 0.5) / nodes
    values, inverse = np.unique(confidence, return_inverse=True)
    residual = np.zeros(len(values))
    np.add.at(residual, inverse, (confidence - correct) / len(confidence))
    images = np.arange(-2, 3) * 2
    centres = np.concatenate([values[:, None] + images, -values[:, None] + images], axis=1)
    kernel = np.exp(-0.5 * ((t[:, None, None] - centres) / sigma) ** 2).sum(2) / (sigma * np.sqrt(2 * np.pi))
    return np.abs(kernel @ residual).mean()


def smooth_ece(confidence, correct):
    return float(functional.smooth_calibration_error(torch.tensor(confidence), torch.tensor(correct)))


@pytest.mark.parametrize("kind", ["tens", "percents", "continuous"])
def test_the_value_is_the_error_at_its_own_bandwidth(kind):
    """It lies between |overconfidence| and the ECE over distinct confidences."""
    for confidence, correct in cases(25, kind, seed=32, largest=60):
        confidence = confidence if kind == "continuous" else confidence / 100
        ours = smooth_ece(confidence, correct)
        assert ours == pytest.approx(definition(confidence, correct, max(ours, MIN_BANDWIDTH)), abs=2e-5)
        table = ConfidenceTable.from_predictions(torch.tensor(confidence), torch.tensor(correct), None)
        of_levels = (table.answers * table.value - table.correct).abs().sum() / table.total
        assert abs(float(METRICS["overconfidence"](table))) - 1e-5 <= ours <= float(of_levels) + 1e-5


def test_a_small_error_is_that_of_the_narrowest_kernel():
    """A millionth too confident at two far levels in opposite directions: at 1/1024 they do not cancel."""
    counts = torch.tensor([[800_100, 199_900], [199_900, 800_100]])
    table = ConfidenceTable(torch.tensor([0.2, 0.8], dtype=torch.float64), counts, torch.tensor(0))
    value = float(METRICS["smooth_ece"](table))
    assert value == pytest.approx(1e-4, abs=1e-9)


def test_many_raw_values_go_through_the_fine_grid():
    rng = np.random.default_rng(5)
    confidence = rng.random(20_000)
    correct = rng.random(20_000) < 0.5 + 0.6 * (confidence - 0.5)
    many = smooth_ece(confidence, correct)
    values, inverse = np.unique(np.rint(confidence * 2000), return_inverse=True)
    assert len(values) < 4096 < len(confidence)
    assert many == pytest.approx(smooth_ece(values[inverse] / 2000, correct), abs=1e-5)
    edge = np.concatenate([np.linspace(0.5, 1, 5000), np.ones(5000)])
    assert smooth_ece(edge, np.zeros(10_000, dtype=bool)) == pytest.approx(edge.mean(), abs=1e-9)
