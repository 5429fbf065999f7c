"""Imports run one way: lower layers know nothing of higher ones, and neither packages nor modules import each other in a circle.

The imports are read from the syntax tree of every module. Nothing is imported, so an import inside a function or under
TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "vlm_calibration"
LAYERS = (
    {
        *(
            "records",
            "files",
            "append_log",
            "settings",
            "arguments",
            "errors",
            "hub",
            "presets",
            "quiet",
        ),
        "progress",
    },
    {"text", "perturbation", "losses", "metrics"},
    {"data", "models", "benchmarks"},
    {"regions", "estimators"},
    {"endpoint"},
    {"stages"},
    {"demo", "reporting"},
    {"callbacks", "inference"},
    {"app"},
    {"commands"},
    {"cli", "steps"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
STRANGERS = frozenset({"data", "models"})
"""Neither imports the other: a batch knows no model, and a model no query."""
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


def import_graph(source: Path) -> dict[str, set[str]]:
    """Module -> modules of the package at `source`/vlm_calibration that it imports; a package is its `__init__`."""
    paths = {
        ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (source / PACKAGE).rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = {
            name for node in ast.walk(ast.parse(path.read_text("utf-8"))) for name in _members(node, package)
        }
        graph[module] = {name if name in paths else name.rpartition(".")[0] for name in names} & set(
            paths
        ) - {module}
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of the graph, its first node again at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def packages_of(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph of the packages and top-level modules."""

    def unit(module: str) -> str:
        return module.removeprefix(f"{PACKAGE}.").partition(".")[0]

    packages: dict[str, set[str]] = {}
    for module, others in graph.items():
        if module != PACKAGE:
            packages.setdefault(unit(module), set()).update({unit(m) for m in others} - {unit(module)})
    return packages


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
    """Modules that a statement imports, relative ones made absolute."""
    for name in _members(node, package):
        # "from vlm_calibration import data" names the package that matters only behind the import.
        in_root = name.rpartition(".")[0] == PACKAGE
        yield name if in_root or not isinstance(node, ast.ImportFrom) else name.rpartition(".")[0]


def _members(node: ast.AST, package: str) -> Iterator[str]:
    """What a statement imports: modules, and behind `from` the names in them, as dotted names made absolute."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        base = parts[: len(parts) - node.level + 1] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        yield from (f"{module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
        "import_module",
        "__import__",
    ):
        yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def test_layers_hold(root: Path) -> None:
    modules = list((root / "src" / PACKAGE).rglob("*.py"))
    assert len(modules) > 30
    assert violations(root / "src") == []


def test_nothing_is_imported_in_a_circle(root: Path) -> None:
    graph = import_graph(root / "src")
    assert sum(map(len, graph.values())) > 300
    assert cycle(packages_of(graph)) == []
    assert cycle(graph) == []


@pytest.mark.parametrize(
    ("package", "module"),
    [("data", "regions"), ("reporting", "callbacks"), ("metrics", "stages")],
)
def test_an_import_back_closes_a_circle_of_packages(root: Path, package: str, module: str) -> None:
    graph = packages_of(import_graph(root / "src"))
    assert cycle({**graph, package: graph[package] | {module}}) != []


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        (
            {"data/a.py": "from vlm_calibration.data.b import x", "data/b.py": "from . import a"},
            ("data.a", "data.b"),
        ),
        (
            {
                "data/a.py": "from .b import x",
                "data/b.py": "from .c import x",
                "data/c.py": "def f():\n    from .a import x",
            },
            ("data.a", "data.b", "data.c"),
        ),
        (
            {
                "data/__init__.py": "from .a import x",
                "data/a.py": "if TYPE_CHECKING:\n    from vlm_calibration.data import y",
            },
            ("data", "data.a"),
        ),
    ],
)
def test_a_circle_of_modules_is_found(tmp_path: Path, files: dict[str, str], circle: tuple[str, ...]) -> None:
    for name, code in files.items():
        (tmp_path / PACKAGE / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / PACKAGE / name).write_text(code, encoding="utf-8")
    found = cycle(import_graph(tmp_path))
    assert {name.removeprefix(f"{PACKAGE}.") for name in found} == set(circle)


@pytest.mark.parametrize(
    ("module", "code", "expected"),
    [
        ("records.py", "import vlm_calibration.text.prompts", "records imports text, which is higher"),
        ("text/a.py", "from transformers import AutoModel", "text imports transformers"),
        ("metrics/a.py", "def f():\n    import lightning.pytorch as pl", "metrics imports lightning"),
        ("losses/a.py", "from pytorch_lightning import Trainer", "losses imports pytorch_lightning"),
        (
            "data/a.py",
            "from vlm_calibration.regions.detector import Box",
            "data imports regions, which is higher",
        ),
        (
            "models/deep/a.py",
            "from vlm_calibration import regions",
            "models imports regions, which is higher",
        ),
        ("data/a.py", "from vlm_calibration.models.loading import load_base", "data imports models"),
        ("models/deep/a.py", "from vlm_calibration import data", "models imports data"),
        ("models/a.py", "from ..data import module", "models imports data"),
        ("models/a.py", "from ..estimators import base", "models imports estimators, which is higher"),
        ("reporting/a.py", "from ..callbacks import adapter", "reporting imports callbacks, which is higher"),
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
            "from ..noise import Sample\nfrom vlm_calibration.perturbation.masks import region_to_mask",
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
