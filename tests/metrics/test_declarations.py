"""Declarations of metrics: a new metric takes one, and all forms of a metric agree with its declaration."""

import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import vlm_calibration
from vlm_calibration.metrics import CalibrationMetrics, ConfidenceTable, functional
from vlm_calibration.metrics.functional import METRICS, REPORTED

DECLARATION = """
@metric("doubt", "doubt", higher_is_better=False)
def mean_doubt(table: ConfidenceTable) -> Tensor:
    \"\"\"Mean distance of the confidences from certainty.\"\"\"
    return (table.answers * (1 - table.value)).sum(-1) / table.total

"""
USES = """
import torch
from vlm_calibration.metrics import CalibrationMetrics, functional
from vlm_calibration.reporting.report.table import MEASURED, ImageBootstrap
from vlm_calibration.reporting.report.data import summarize_predictions
from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.stages.scoring import Scorer

confidence, correct = torch.tensor([0.9, 0.5]), torch.tensor([True, False])
metrics = CalibrationMetrics(categories=["a"])
metrics.update(confidence, correct, ["a", None])
rows = zip(confidence.tolist(), correct.tolist(), [0.9, 0.5], strict=True)
answers = [
    EstimatedPrediction(str(i), "?", "Yes", "", "yes", round(c, 2), y, "a", 0, "yes_no", estimates={"other": e})
    for i, (c, y, e) in enumerate(rows)
]
scorer = Scorer(["a"], ["other"])
scorer.update(answers, {"verbalized": [1, 1], "other": [2, 2]})
values = {
    "functional": functional.mean_doubt(confidence, correct),
    "collection": metrics.compute()["doubt"],
    "interval": ImageBootstrap(answers, replicates=10).measure(confidence.tolist()).intervals["doubt"].value,
    "evaluation": scorer.compute()["doubt"],
    "group": scorer.compute()["doubt/a"],
    "estimator": scorer.compute()["doubt@other/a"],
    "file": summarize_predictions(answers)["doubt"],
}
assert all(abs(float(value) - 0.3) < 1e-6 for value in values.values()), values
assert abs(float(metrics.compute()["doubt/a"]) - 0.1) < 1e-6
assert "doubt" in MEASURED
"""


@pytest.mark.slow
def test_a_declaration_is_all_that_a_new_metric_takes(tmp_path):
    """A formula and its declaration in a copy of the package give class, functional form, documentation and results."""
    shutil.copytree(Path(vlm_calibration.__file__).parent, tmp_path / "vlm_calibration")
    path = tmp_path / "vlm_calibration" / "metrics" / "functional.py"
    before, marker, after = path.read_text().partition("\nREPORTED = ")
    path.write_text(before + DECLARATION + marker + after)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USES], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_name_is_declared_once_and_the_reported_ones_come_first():
    with pytest.raises(ValueError, match="'ece' is declared twice"):
        functional.metric("ece", "ECE")(METRICS["ece"].function)
    assert tuple(METRICS)[: len(REPORTED)] == REPORTED


@pytest.mark.parametrize("name", METRICS)
def test_every_form_has_the_same_value_within_the_declared_bounds(cases, name):
    spec = METRICS[name]
    for kind in ("tens", "few"):
        for percent, correct in cases(40, kind, seed=len(name)):
            confidence, correct = torch.tensor(percent / 100), torch.tensor(correct)
            table = ConfidenceTable.from_predictions(confidence, correct)
            metrics = CalibrationMetrics(metrics=[name])
            metrics.update(confidence, correct)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values = [
                    float(getattr(functional, spec.function.__name__)(confidence, correct)),
                    float(metrics.compute()[name]),
                ]
            assert values == pytest.approx([float(spec(table))] * 2, abs=3e-8, nan_ok=True)
            assert math.isnan(values[0]) or spec.lower - 1e-9 <= values[0] <= spec.upper + 1e-9


DIRECTED = [name for name, spec in METRICS.items() if spec.higher_is_better is not None]


@pytest.mark.parametrize("name", sorted({*DIRECTED} - {"parsed_accuracy"}))
def test_an_oracle_is_at_the_better_bound(name):
    """Confidences of 100% where correct and 0% where wrong are better than the opposite, by every metric with a direction."""
    spec = METRICS[name]
    table = ConfidenceTable.from_predictions([1.0] * 9 + [0.0] * 9, [True] * 9 + [False] * 9)
    opposite = ConfidenceTable.from_predictions([0.0] * 9 + [1.0] * 9, [True] * 9 + [False] * 9)
    best, worst = float(spec(table)), float(spec(opposite))
    if best != worst:
        assert (best > worst) == spec.higher_is_better
    assert best != worst or name in ("parse_failure_rate", "brier_resolution")
