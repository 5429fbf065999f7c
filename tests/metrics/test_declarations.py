"""A new metric takes one declaration, and every docstring of the package shows what it says."""

import doctest
import importlib
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vlm_calibration
import vlm_calibration.metrics as package
from vlm_calibration.metrics import functional
from vlm_calibration.metrics.functional import METRICS

DECLARATION = """
@metric("doubt", "doubt", higher_is_better=False)
def mean_doubt(table: ConfidenceTable) -> Tensor:
    \"\"\"Mean distance of the confidences from certainty.\"\"\"
    return (table.answers * (1 - table.value)).sum(-1) / table.total

"""
USES = """
import torch
from vlm_calibration.metrics import CalibrationMetrics, functional
from vlm_calibration.records import Prediction
from vlm_calibration.reporting.report.table import MEASURED, ImageBootstrap
from vlm_calibration.reporting.report.data import summarize_predictions
from vlm_calibration.stages.scoring import Scorer

confidence, correct = torch.tensor([0.9, 0.5]), torch.tensor([True, False])
metrics = CalibrationMetrics(categories=["a"])
metrics.update(confidence, correct, [["a"], []])
rows = zip(confidence.tolist(), correct.tolist(), [0.9, 0.5], strict=True)
answers = [
    Prediction(str(i), "?", "Yes", "", "yes", round(c, 2), y, "a", 0, "yes_no", estimates={"other": e})
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
    done = subprocess.run([sys.executable, "-c", USES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(package.__file__).parent.glob("*.py")))
def test_examples(name):
    module = package if name == "__init__" else importlib.import_module(f"{package.__name__}.{name}")
    assert doctest.testmod(module).failed == 0
    assert module.__doc__


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_an_example(name):
    """Its docstring, which declaration and function share, shows a value."""
    spec = METRICS[name]
    of_values = getattr(functional, spec.function.__name__)
    (test,) = doctest.DocTestFinder(recurse=False).find(of_values, spec.function.__name__)
    assert "tensor(" in test.examples[-1].want
    assert list(inspect.signature(of_values).parameters) == ["confidence", "correct"]
