"""Known defects of peers: their value, ours, and the truth worked out by hand.

Most cases are confidences of exactly 0%, 10%, ... or 100%, which models state.
"""

from itertools import pairwise

import numpy as np
import pytest
import relplot
import torch
from netcal.metrics import ECE
from torchmetrics.functional.classification import binary_calibration_error

from vlm_calibration.metrics import functional
from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.table import ConfidenceTable


def ours(confidence, correct):
    """Our ECE of float64 values, float32 values and a table, which must be equal."""
    table = METRICS["ece"](ConfidenceTable.from_predictions(confidence, correct))
    y = torch.tensor(correct)
    for dtype in (torch.float64, torch.float32):
        value = functional.expected_calibration_error(torch.tensor(confidence, dtype=dtype), y)
        assert float(value) == pytest.approx(float(table), abs=1e-6)
    return float(table)


def theirs(confidence, correct):
    """torchmetrics, netcal and relplot, ten uniform bins each."""
    y = np.array(correct, dtype=int)
    return (
        float(binary_calibration_error(torch.tensor(confidence), torch.tensor(y), n_bins=10)),
        ECE(10).measure(np.array(confidence), y),
        relplot.metrics.binnedECE(np.array(confidence), y, 10),
    )


def test_one_hundred_percent_is_in_the_last_bin():
    """95% wrong and 100% right share [0.9, 1]: |(0.95 + 1) - 1| / 2 = 0.475.

    torchmetrics and relplot open an eleventh bin for 1.0: (|0.95 - 0| + |1 - 1|) / 2 = 0.475 here, so the second
    pair shows it: 95% right and 100% wrong give |(0.95 + 1) - 1| / 2 = 0.475, theirs (0.05 + 1) / 2 = 0.525.
    """
    torchmetrics, netcal, relplot_value = theirs([0.95, 1.0], [True, False])
    assert ours([0.95, 1.0], [True, False]) == pytest.approx(0.475)
    assert netcal == pytest.approx(0.475)
    assert torchmetrics == pytest.approx(0.525)
    assert relplot_value == pytest.approx(0.525)


@pytest.mark.parametrize(("edge", "truth"), [(0.3, 0.175), (0.6, 0.125), (0.7, 0.225)])
def test_an_edge_is_in_the_bin_above_it(edge, truth):
    """`edge` wrong and `edge + 0.05` right share a bin: |(2 edge + 0.05) - 1| / 2.

    The float edges of relplot (0.3 / 0.1 = 2.9999999999999996) and netcal (numpy.linspace, 0.30000000000000004)
    put 0.3, 0.6 and 0.7 into the bin below: (edge + 1 - edge - 0.05) / 2 = 0.475.
    """
    confidence, correct = [edge, edge + 0.05], [False, True]
    assert abs(2 * edge + 0.05 - 1) / 2 == pytest.approx(truth)
    _, netcal, relplot_value = theirs(confidence, correct)
    assert ours(confidence, correct) == pytest.approx(truth)
    assert netcal == pytest.approx(0.475)
    assert relplot_value == pytest.approx(0.475)


def test_a_confidence_outside_the_unit_interval_is_an_error():
    """A logit-like 1.5 makes torchmetrics squash everything: sigmoid(0.9) = 0.711, sigmoid(1.5) = 0.818.

    Its ECE is then 1 - (0.711 + 0.818) / 2 = 0.236, of numbers that nobody stated. Ours names the value.
    """
    confidence, correct = torch.tensor([0.9, 1.5]), torch.tensor([True, True])
    squashed = 1 - torch.sigmoid(confidence).mean()
    assert float(binary_calibration_error(confidence, correct.int(), n_bins=1)) == pytest.approx(
        float(squashed)
    )
    with pytest.raises(ValueError, match=r"confidence\[1\] = 1.5 is outside \[0, 1\]"):
        functional.expected_calibration_error(confidence, correct)
    with pytest.raises(ValueError, match=r"confidence\[1\] = 1.5 is outside \[0, 1\]"):
        ConfidenceTable.from_predictions(confidence, correct)


def test_one_hundred_percent_is_not_dropped():
    """A harness whose last bin is open loses 1.0: two wrong answers at 100% then have ECE 0 instead of 1."""
    confidence, correct = np.array([1.0, 1.0, 0.5]), np.array([0, 0, 1])
    edges = np.linspace(0, 1, 11)
    dropped = sum(
        abs((correct - confidence)[(confidence >= low) & (confidence < high)].sum()) / 3
        for low, high in pairwise(edges)
    )
    assert dropped == pytest.approx(0.5 / 3)
    assert ours(confidence.tolist(), correct.astype(bool).tolist()) == pytest.approx(2.5 / 3)


def test_a_missing_confidence_is_not_one_half():
    """90% right and 90% wrong, one answer without a number: ECE |0.9 - 0.5| = 0.4 over the two that state one.

    With 0.5 in its place and a wrong answer: (2 * 0.4 + 0.5) / 3 = 0.433.
    """
    imputed = ours([0.9, 0.9, 0.5], [True, False, False])
    assert imputed == pytest.approx(1.3 / 3)
    table = ConfidenceTable.from_predictions([0.9, 0.9, None], [True, False, False])
    assert float(METRICS["ece"](table)) == pytest.approx(0.4)
    assert (table.n, table.parsed) == (3, 2)


def test_binning_the_negative_of_uncertainty_hides_everything():
    """A harness bins `-uncertainty` (values in [-1, 0]) over [0, 1], where nothing is, and reports 0 for 0.254."""
    confidence, correct = np.array([0.9, 0.8, 0.62, 0.95]), np.array([1, 0, 1, 0])
    score = -(1 - confidence)
    edges = np.linspace(0, 1, 11)
    hidden = sum(((score > low) & (score <= high)).mean() for low, high in pairwise(edges))
    assert hidden == 0
    truth = (abs(0.9 + 0.95 - 1) + 0.8 + (1 - 0.62)) / 4
    assert ours(confidence.tolist(), correct.astype(bool).tolist()) == pytest.approx(truth)


def test_relplot_smooth_ece_counts_half_of_what_is_at_0_and_1():
    """Four answers, two at 100% wrong (residual 1) and two at 50% of which one is right (residual 0 together).

    All smoothed residuals have one sign, so whatever the bandwidth the error is |mean residual| = 2 / 4 = 0.5.
    relplot reflects its kernel without doubling the boundary node; the answers at 100% weigh half, 1 / 3.
    """
    confidence, correct = np.array([1.0, 1.0, 0.5, 0.5]), np.array([0.0, 0.0, 1.0, 0.0])
    assert relplot.smECE(confidence, correct) == pytest.approx(1 / 3, abs=0.01)
    table = ConfidenceTable.from_predictions(confidence.tolist(), correct.astype(bool).tolist())
    assert float(METRICS["smooth_ece"](table)) == pytest.approx(0.5, abs=1e-6)
