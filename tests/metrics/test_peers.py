"""Comparison with published packages on at least 200 random cases each, where those packages are correct."""

from math import gcd

import numpy as np
import pytest
import torch
from netcal.metrics import ACE, ECE, MCE
from scipy.stats import rankdata
from sklearn import metrics as sklearn_metrics
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from vlm_calibration.metrics import functional
from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.table import ConfidenceTable

SPECS = {spec.function.__name__: spec for spec in METRICS.values()}


def raw(confidence, correct):
    return torch.tensor(confidence), torch.tensor(correct)


def both(name, percent, correct, **options):
    """The metric from raw values and from the table, which must agree."""
    confidence, y = raw(percent / 100, correct)
    values = (
        float(getattr(functional, name)(confidence, y, **options)),
        float(SPECS[name](ConfidenceTable.from_predictions(confidence, y), **options)),
    )
    assert values[0] == pytest.approx(values[1], abs=1e-12)
    return values[1]


@pytest.mark.parametrize("kind", ["tens", "percents", "few"])
def test_sklearn(cases, kind):
    compared = 0
    for percent, correct in cases(25, kind, seed=11, largest=300):
        c, y = percent / 100, correct.astype(int)
        assert both("brier_score", percent, correct) == pytest.approx(
            sklearn_metrics.brier_score_loss(y, c, pos_label=1), abs=1e-12
        )
        assert both("log_loss", percent, correct) == pytest.approx(
            sklearn_metrics.log_loss(y, c, labels=[0, 1]), rel=1e-9
        )
        if 0 < y.sum() < len(y):
            compared += 1
            assert both("auroc", percent, correct) == pytest.approx(
                sklearn_metrics.roc_auc_score(y, c), abs=1e-12
            )
    assert compared > 15


@pytest.mark.slow
def test_sklearn_on_continuous_values(cases):
    for confidence, correct in cases(60, "continuous", seed=12, largest=300):
        y, values = correct.astype(int), raw(confidence, correct)
        assert float(functional.brier_score(*values)) == pytest.approx(
            sklearn_metrics.brier_score_loss(y, confidence, pos_label=1), abs=1e-12
        )
        assert float(functional.log_loss(*values)) == pytest.approx(
            sklearn_metrics.log_loss(y, confidence, labels=[0, 1]), rel=1e-9
        )


@pytest.mark.parametrize("n_bins", [10, 15])
def test_netcal(cases, n_bins):
    """Continuous values: netcal's float edges are only wrong for values on an edge."""
    by_quantile = 0
    for confidence, correct in cases(60, "continuous", seed=13, largest=200):
        # Else a quantile equals one of the values, which rounding puts into either bin.
        while len(correct) > 2 and gcd(len(correct) - 1, n_bins) > 1:
            confidence, correct = confidence[:-1], correct[:-1]
        values, y = raw(confidence, correct), correct.astype(int)
        # netcal refuses quantiles that nearly coincide.
        edges = np.quantile(confidence, np.linspace(0, 1, n_bins + 1))[1:-1]
        distinct = len(y) > 1 and np.diff(edges, prepend=0, append=1).min() > 1e-6
        pairs = [
            (functional.expected_calibration_error(*values, n_bins=n_bins), ECE(n_bins), True),
            (functional.maximum_calibration_error(*values, n_bins=n_bins), MCE(n_bins), True),
            (
                functional.adaptive_calibration_error(*values, n_bins=n_bins),
                ACE(n_bins, equal_intervals=False),
                distinct,
            ),
        ]
        by_quantile += distinct
        for ours, peer, comparable in pairs:
            if comparable:
                assert float(ours) == pytest.approx(peer.measure(confidence, y), abs=1e-9)
    assert by_quantile >= 50


def test_torchmetrics(cases):
    """On values below 1 and off the edges, where torchmetrics is correct."""
    for percent, correct in cases(60, "tens", seed=15, largest=300):
        percent = np.clip(percent + 5, 5, 95)
        c, y = raw(percent / 100, correct.astype(int))
        for norm, name in (("l1", "expected_calibration_error"), ("max", "maximum_calibration_error")):
            peer = binary_calibration_error(c, y, n_bins=10, norm=norm)  # type: ignore[arg-type]
            assert both(name, percent, correct) == pytest.approx(float(peer), abs=1e-9)
        if 0 < y.sum() < len(y):
            assert both("auroc", percent, correct) == pytest.approx(float(binary_auroc(c, y)), abs=1e-6)


def test_auroc_is_the_mann_whitney_statistic(cases):
    for confidence, correct in cases(60, "continuous", seed=19, largest=200):
        n_correct, n_wrong = int(correct.sum()), int((~correct).sum())
        if not n_correct or not n_wrong:
            continue
        u = rankdata(confidence)[correct].sum() - n_correct * (n_correct + 1) / 2
        assert float(functional.auroc(*raw(confidence, correct))) == pytest.approx(
            u / (n_correct * n_wrong), abs=1e-12
        )
