"""The examples in docstrings run, and modules obey the package's import rules."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import vlm_calibration.metrics as package

ALLOWED = {"torch", "torchmetrics", "numpy", "scipy", "matplotlib", "vlm_calibration"}
ALLOWED |= {"collections", "dataclasses", "functools", "importlib", "math", "typing", "warnings"}
MODULES = sorted(path.stem for path in Path(package.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = package if name == "__init__" else importlib.import_module(f"{package.__name__}.{name}")
    assert doctest.testmod(module).failed == 0
    assert module.__doc__


def test_some_examples_exist():
    found = [importlib.import_module(f"{package.__name__}.{name}") for name in MODULES if name != "__init__"]
    assert sum(len(doctest.DocTestFinder().find(m)) > 0 for m in found) >= 4
    assert sum(len(t.examples) for m in found for t in doctest.DocTestFinder().find(m)) >= 8


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
