"""The layers of DESIGN.md section 4: what may import what, read from the syntax tree of every module.

Nothing is imported, so an import inside a function or under TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "vlm_calibration"
LAYERS = (
    {"records", "arguments", "hub", "files"},
    {"text", "perturbation", "losses", "metrics"},
    {"regions", "data", "models", "benchmarks"},
    {"estimators"},
    {"stages"},
    {"callbacks", "reporting", "demo"},
    {"app"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
STRANGERS = frozenset({"data", "models"})
HEAVY = ("lightning", "pytorch_lightning", "lightning_fabric", "transformers")


def violations(source: Path) -> list[str]:
    """One line a violation, for the package at `source`/vlm_calibration."""
    found: list[str] = []
    for path in sorted((source / PACKAGE).rglob("*.py")):
        module = path.relative_to(source).with_suffix("").parts
        unit = module[1] if len(module) > 1 else ""
        where = path.relative_to(source)
        if unit == "__init__":
            found += [
                f"{where}: the root package imports {name}"
                for name in _at_import(path)
                if _is_ours_or_heavy(name)
            ]
            continue
        if unit not in LEVEL:
            found.append(f"{where}: {unit} is in no layer")
            continue
        problems = (_problem(unit, name) for name in _imported(path, ".".join(module[:-1])))
        found += [f"{where}: {problem}" for problem in problems if problem]
    return found


def _problem(unit: str, name: str) -> str | None:
    top, _, rest = name.partition(".")
    if top in HEAVY and LEVEL[unit] < 2:
        return f"{unit} imports {top}"
    if top != PACKAGE:
        return None
    other = rest.split(".")[0]
    if other == unit:
        return None
    if other not in LEVEL:
        return f"{unit} imports {name}, which is in no layer"
    if LEVEL[other] > LEVEL[unit]:
        return f"{unit} imports {other}, which is higher"
    if {unit, other} == STRANGERS:
        return f"{unit} imports {other}"
    return None


def _is_ours_or_heavy(name: str) -> bool:
    return name.split(".")[0] in (PACKAGE, *HEAVY)


def _at_import(path: Path) -> Iterator[str]:
    """What importing the module imports: the statements outside functions, and not those for type checkers."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _names(node, PACKAGE)
            pending += ast.iter_child_nodes(node)


def _imported(path: Path, package: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        yield from _names(node, package)


def _names(node: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that a statement imports, relative ones made absolute."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        base = parts[: len(parts) - node.level + 1] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        # "from vlm_calibration import data" names the package that matters only behind the import.
        yield from (f"{module}.{alias.name}" if module == PACKAGE else module for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
        "import_module",
        "__import__",
    ):
        yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def test_layers_hold(root: Path) -> None:
    modules = list((root / "src" / PACKAGE).rglob("*.py"))
    assert len(modules) > 30
    assert violations(root / "src") == []


@pytest.mark.parametrize(
    ("module", "code", "expected"),
    [
        ("records.py", "import vlm_calibration.text.prompts", "records imports text, which is higher"),
        ("text/a.py", "from transformers import AutoModel", "text imports transformers"),
        ("metrics/a.py", "def f():\n    import lightning.pytorch as pl", "metrics imports lightning"),
        ("losses/a.py", "from pytorch_lightning import Trainer", "losses imports pytorch_lightning"),
        ("data/a.py", "from vlm_calibration.models.loading import load_vlm", "data imports models"),
        ("models/deep/a.py", "from vlm_calibration import data", "models imports data"),
        ("models/a.py", "from ..data import module", "models imports data"),
        ("models/__init__.py", "from ..stages import sft", "models imports stages, which is higher"),
        ("models/deep/a.py", "from ... import stages", "models imports stages, which is higher"),
        (
            "stages/a.py",
            "if TYPE_CHECKING:\n    from vlm_calibration.callbacks import run",
            "stages imports callbacks, which is higher",
        ),
        ("demo/a.py", "import vlm_calibration.cli as c", "demo imports cli, which is higher"),
        (
            "regions/a.py",
            "importlib.import_module('vlm_calibration.app')",
            "regions imports app, which is higher",
        ),
        ("data/a.py", "from vlm_calibration import load_calibrated", "which is in no layer"),
        ("utils.py", "x = 1", "utils is in no layer"),
        ("helpers/a.py", "x = 1", "helpers is in no layer"),
        ("__init__.py", "from vlm_calibration.app import ask", "the root package imports"),
        ("__init__.py", "import transformers", "the root package imports transformers"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, module: str, code: str, expected: str) -> None:
    path = tmp_path / PACKAGE / module
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")
    found = violations(tmp_path)
    assert len(found) == 1
    assert expected in found[0]
    assert module in found[0]


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("cli.py", "import lightning, transformers\nfrom vlm_calibration.stages.sft import SFTModule"),
        (
            "data/sources/a.py",
            "from ..noise import Sample\nfrom vlm_calibration.regions.rle import region_to_mask",
        ),
        ("models/a.py", "from transformers import AutoModel\nfrom vlm_calibration.records import DataError"),
        ("text/a.py", "from vlm_calibration.text import prompts\nfrom . import grading\nimport torch"),
        ("__init__.py", "def __getattr__(name):\n    from vlm_calibration.app import ask\n    return ask"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, module: str, code: str) -> None:
    path = tmp_path / PACKAGE / module
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")
    assert violations(tmp_path) == []
