"""Bootstrap intervals: replicates are tables, and intervals hold the truth as often as they promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_calibration.metrics import bootstrap
from vlm_calibration.metrics.bootstrap import bootstrap_replicates, interval_of, percentile_interval
from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.table import ConfidenceTable

from ..performance.intervals import POPULATIONS, coverage


def resample(table, replicates, seed):
    """Groups of tables of N answers, drawn from the N answers of a table with replacement, unparsed ones included."""
    cells = np.append(table.counts.numpy().reshape(-1), table.unparsed)
    drawn = np.random.default_rng(seed).multinomial(table.n, cells / table.n, size=replicates)
    counts = torch.from_numpy(drawn[:, :-1].copy()).reshape(replicates, -1, 2)
    return table._replace(counts=counts, unparsed=torch.from_numpy(drawn[:, -1].copy()))


def intervals_of(table, names, replicates=1000, seed=0):
    drawn, rarer = resample(table, replicates, seed), int(table.counts.sum(0).amin())
    return {
        name: interval_of(METRICS[name], table, drawn, bootstrap_replicates(drawn, METRICS[name]), rarer)
        for name in names
    }


def test_replicates_with_one_class_or_empty_levels_or_nothing(monkeypatch):
    """Replicates of small tables, in three batches, lack levels, a class or all answers, and are NaN exactly where that table's metric is."""
    monkeypatch.setattr(bootstrap, "_BATCH_CELLS", 64 * 512)
    table = ConfidenceTable.from_predictions([0.9, 0.9, 0.3, None, None], [True, True, False, False, True])
    drawn = resample(table, 150, seed=0)
    parsed = drawn.counts.sum((1, 2))
    assert parsed.min() == 0
    assert (drawn.counts.sum(1) == 0).any()
    tables = []
    for counts, unparsed in zip(drawn.counts, drawn.unparsed, strict=True):
        present = counts.sum(1) > 0
        tables.append(ConfidenceTable(table.value[present], counts[present], unparsed))
    for name, spec in METRICS.items():
        batch = bootstrap_replicates(drawn, spec).tolist()
        assert batch == pytest.approx([float(spec(t)) for t in tables], abs=1e-5, nan_ok=True), name
    assert not bootstrap_replicates(drawn, METRICS["n"]).isnan().any()
    assert bootstrap_replicates(drawn, METRICS["smooth_ece"]).isnan().sum() == (parsed == 0).sum()


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 5, 50, 90, 95, 99, 100]) | st.integers(0, 100), st.booleans()),
        min_size=1,
    ),
    st.integers(0, 3),
)
@settings(max_examples=25)
def test_an_interval_holds_its_estimate(answers, seed):
    percent, correct = (torch.tensor(column) for column in zip(*answers, strict=True))
    table = ConfidenceTable.from_predictions(percent / 100, correct)
    intervals = intervals_of(table, METRICS, replicates=20, seed=seed)
    for name, (value, low, high) in intervals.items():
        if math.isnan(value):
            assert math.isnan(low), name
            assert math.isnan(high), name
        else:
            assert METRICS[name].lower <= low <= value <= high <= METRICS[name].upper, name


@pytest.mark.parametrize(
    ("population", "metric"),
    [
        *(("calibrated, 11 levels", metric) for metric in ("ece", "brier", "auroc")),
        *(("overconfident, 11 levels", metric) for metric in ("ece", "auroc")),
        *(("always 95%", metric) for metric in ("ece", "brier")),
        *((name, "ece") for name in ("calibrated, 90 to 100%", "one level off", "calibrated, 4 an image")),
    ],
)
@pytest.mark.parametrize("answers", [200, pytest.param(2000, marks=pytest.mark.nightly)])
def test_intervals_cover(population, metric, answers):
    """At least 135 of 150 intervals contain the truth; at a coverage of 95% fewer do with a probability of 1/200."""
    counted = coverage(POPULATIONS[population], answers, [metric], samples=150, replicates=200)[metric]
    assert counted.samples == 150
    assert counted.samples - counted.below - counted.above >= 135
    assert counted.width < 0.2, "a wide interval is no use"


def test_bins_whose_answers_are_all_right_still_leave_a_doubt():
    """60 answers at 95%, all correct: all draws are equal, but a calibrated model has this result one time in 22."""
    interval = intervals_of(ConfidenceTable.from_predictions([0.95] * 60, [True] * 60), ["ece"])["ece"]
    assert interval.value == pytest.approx(0.05)
    assert interval.low < 0.02
    assert 0.06 < interval.high < 0.12


def test_replicates_without_a_value_are_left_out():
    """One wrong answer of eight: a third of the replicates have no wrong answer and no AUROC, and are left out."""
    table = ConfidenceTable.from_predictions([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.45], [True] * 7 + [False])
    drawn = resample(table, 300, seed=0)
    values = bootstrap_replicates(drawn, METRICS["auroc"])
    assert 0.2 < float(values.isnan().double().mean()) < 0.5
    of_all, of_defined = (percentile_interval(0.5, v, 7) for v in (values, values[~values.isnan()]))
    assert of_all == of_defined
    _, low, high = intervals_of(table, ["auroc"], replicates=300)["auroc"]
    extremes = (np.nanmin(values.numpy()), np.nanmax(values.numpy()))
    assert (low, high) == extremes, "one wrong answer determines next to nothing"


def test_few_answers_of_one_kind_widen_the_interval():
    replicates = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    widths = []
    for rarer in (2, 7, 100, 10_000):
        value, low, high = percentile_interval(0.5, replicates, rarer)
        assert value - low == pytest.approx(high - value, abs=1e-9)
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] == pytest.approx(0.95, abs=1e-3)
    assert widths[1] == pytest.approx(0.992, abs=1e-3)
