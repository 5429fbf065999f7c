"""Comparison with published packages on random cases, where those packages are correct."""

from math import gcd

import numpy as np
import pytest
import torch
from netcal.metrics import ACE, ECE, MCE
from sklearn import metrics as sklearn_metrics

from vlm_calibration.metrics import functional


def raw(confidence, correct):
    return torch.tensor(confidence), torch.tensor(correct)


@pytest.mark.parametrize("kind", ["tens", "percents", "few", "continuous"])
def test_sklearn(cases, kind):
    compared = 0
    for confidence, correct in cases(25, kind, seed=11, largest=300):
        confidence = confidence if kind == "continuous" else confidence / 100
        values, y = raw(confidence, correct), correct.astype(int)
        brier = sklearn_metrics.brier_score_loss(y, confidence, pos_label=1)
        assert float(functional.brier_score(*values)) == pytest.approx(brier, abs=1e-12)
        log_loss = sklearn_metrics.log_loss(y, confidence, labels=[0, 1])
        assert float(functional.log_loss(*values)) == pytest.approx(log_loss, rel=1e-9)
        if 0 < y.sum() < len(y):
            compared += 1
            auroc = sklearn_metrics.roc_auc_score(y, confidence)
            assert float(functional.auroc(*values)) == pytest.approx(auroc, abs=1e-12)
    assert compared > 15


def test_netcal(cases):
    """Continuous values: netcal's float edges are only wrong for values on an edge."""
    by_quantile = 0
    for confidence, correct in cases(60, "continuous", seed=13, largest=200):
        # Else a quantile equals one of the values, which rounding puts into either bin.
        while len(correct) > 2 and gcd(len(correct) - 1, 10) > 1:
            confidence, correct = confidence[:-1], correct[:-1]
        values, y = raw(confidence, correct), correct.astype(int)
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
