"""The examples in docstrings run, and modules obey the package's import rules."""

import ast
import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import vlm_calibration.metrics as package
from vlm_calibration.metrics import functional
from vlm_calibration.metrics.functional import METRICS

ALLOWED = {"torch", "torchmetrics", "numpy", "scipy", "matplotlib", "vlm_calibration"}
ALLOWED |= {
    "collections",
    "dataclasses",
    "functools",
    "inspect",
    "math",
    "typing",
    "warnings",
}
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


@pytest.mark.parametrize("name", MODULES)
def test_imports(name):
    """Only torch, torchmetrics, numpy, scipy, matplotlib, the standard library and this package (or `records`)."""
    tree = ast.parse((Path(package.__file__).parent / f"{name}.py").read_text())
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for imported in names:
            root = imported.split(".")[0]
            assert root in ALLOWED, imported
            if root == "vlm_calibration":
                assert imported.startswith(("vlm_calibration.metrics", "vlm_calibration.records"))
