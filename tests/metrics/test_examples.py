"""The examples in docstrings run."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import vlm_calibration.metrics as package
from vlm_calibration.metrics import functional
from vlm_calibration.metrics.functional import METRICS

MODULES = sorted(path.stem for path in Path(package.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("name", MODULES)
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
    assert list(inspect.signature(of_values).parameters)[:2] == ["confidence", "correct"]
