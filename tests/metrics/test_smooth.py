"""Smooth ECE against its definition: reflected Gaussians summed image by image, integrated on a fine grid."""

import numpy as np
import pytest
import torch

from vlm_calibration.metrics import functional
from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.smooth import MIN_BANDWIDTH
from vlm_calibration.metrics.table import ConfidenceTable


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


def value(confidence, correct):
    return float(functional.smooth_calibration_error(torch.tensor(confidence), torch.tensor(correct)))


def test_a_batch_has_the_values_of_its_rows(cases):
    counts = torch.zeros(30, 101, 2, dtype=torch.int64)
    for row, (percent, correct) in zip(counts, cases(30, "percents", seed=35, largest=200), strict=True):
        np.add.at(row.numpy(), (percent, correct.astype(int)), 1)
    levels, metric = torch.arange(101, dtype=torch.float64) / 100, METRICS["smooth_ece"]
    batch = metric(ConfidenceTable(levels, counts, torch.zeros(30, dtype=torch.int64)))
    single = torch.stack([metric(ConfidenceTable(levels, row, torch.tensor(0))) for row in counts])
    assert torch.allclose(batch, single, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["tens", "percents", "continuous"])
def test_the_value_is_the_error_at_its_own_bandwidth(cases, kind):
    """It lies between |overconfidence| and the ECE over distinct confidences."""
    for confidence, correct in cases(25, kind, seed=32, largest=60):
        confidence = confidence if kind == "continuous" else confidence / 100
        ours = value(confidence, correct)
        assert ours == pytest.approx(definition(confidence, correct, max(ours, MIN_BANDWIDTH)), abs=2e-5)
        table = ConfidenceTable.from_predictions(torch.tensor(confidence), torch.tensor(correct), None)
        of_levels = (table.answers * table.value - table.correct).abs().sum() / table.total
        assert abs(float(METRICS["overconfidence"](table))) - 1e-5 <= ours <= float(of_levels) + 1e-5


def test_perfect_and_worst():
    assert value([0.0, 1.0, 0.0], [False, True, False]) == 0
    assert value([0.5, 0.5], [False, True]) == pytest.approx(0, abs=1e-12)
    assert value([1.0, 1.0], [False, False]) == pytest.approx(1)
    assert value([0.0], [True]) == pytest.approx(1)


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
    many = value(confidence, correct)
    values, inverse = np.unique(np.rint(confidence * 2000), return_inverse=True)
    assert len(values) < 4096 < len(confidence)
    assert many == pytest.approx(value(values[inverse] / 2000, correct), abs=1e-5)
    edge = np.concatenate([np.linspace(0.5, 1, 5000), np.ones(5000)])
    assert value(edge, np.zeros(10_000, dtype=bool)) == pytest.approx(edge.mean(), abs=1e-9)


def test_it_is_continuous_where_the_binned_error_jumps():
    """Moving 0.3 to just below it changes bins, and the ECE from 0.175 to 0.475; the smooth ECE hardly moves."""
    correct = torch.tensor([False, True])
    at, below = (torch.tensor(c, dtype=torch.float64) for c in ([0.3, 0.35], [0.3 - 1e-9, 0.35]))
    assert float(functional.expected_calibration_error(at, correct)) == pytest.approx(0.175)
    assert float(functional.expected_calibration_error(below, correct)) == pytest.approx(0.475)
    smooth = functional.smooth_calibration_error
    assert float(smooth(at, correct)) == pytest.approx(float(smooth(below, correct)), abs=1e-6)
