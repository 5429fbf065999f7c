"""Imports run one way: lower layers know nothing of higher ones, and neither packages nor modules import each other in a circle.

The imports are read from the syntax tree of every module. Nothing is imported, so an import inside a function or under
TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "vlm_calibration"
SOURCE = Path(__file__).parents[1] / "src"
LAYERS = [
    set(names.split())
    for names in (
        "records files settings arguments errors hub presets quiet progress",
        "text perturbation losses metrics",
        "data models benchmarks",
        "regions estimators",
        "endpoint",
        "stages",
        "demo reporting",
        "callbacks inference",
        "app",
        "commands",
        "cli steps",
    )
]
"""From the lowest to the highest."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
STRANGERS = {("data", "models"), ("models", "data")}
"""Neither imports the other: a batch knows no model, and a model no query."""
HEAVY = ("lightning", "pytorch_lightning", "lightning_fabric", "transformers")


@cache
def import_graph(source: Path) -> dict[str, set[str]]:
    """Module of the package at `source`/vlm_calibration -> the modules of it, and other packages, that it imports."""
    paths = {
        ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (source / PACKAGE).rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        names = {name for node in ast.walk(ast.parse(path.read_text("utf-8"))) for name in _names(node)}
        ours = {name if name in paths else name.rpartition(".")[0] for name in names if _top(name) == PACKAGE}
        graph[module] = (ours - {module}) | {_top(name) for name in names if _top(name) != PACKAGE}
    return graph


def _top(name: str) -> str:
    return name.partition(".")[0]


def _names(node: ast.AST) -> Iterator[str]:
    """What a statement imports: modules, and behind `from` the names in them, as dotted names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, f"a relative import: {ast.unparse(node)}"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages_of(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph of the packages and top-level modules, without the root package."""
    packages: dict[str, set[str]] = {}
    for module, others in graph.items():
        if module != PACKAGE:
            unit, *units = (_top(name.removeprefix(f"{PACKAGE}.")) for name in (module, *sorted(others)))
            packages.setdefault(unit, set()).update({*units} - {unit})
    return packages


def violations(source: Path) -> list[str]:
    """One line for each import that the layers forbid, and for each package without a layer."""
    found = []
    for unit, others in packages_of(import_graph(source)).items():
        level = LEVEL.get(unit, -1)
        found += [f"{unit} is in no layer"] if level < 0 else []
        found += [f"{unit} imports {o}, which is higher" for o in others if LEVEL.get(o, -1) > level >= 0]
        found += [
            f"{unit} imports {o}" for o in others if (unit, o) in STRANGERS or (o in HEAVY and level < 2)
        ]
        found += [f"{unit} imports the root package"] if PACKAGE in others else []
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of the graph, its first node again at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_layers_hold() -> None:
    assert len(import_graph(SOURCE)) > 30
    assert violations(SOURCE) == []


def test_the_root_package_imports_nothing_of_ours_or_heavy() -> None:
    names = ("vlm_calibration.", *HEAVY, "torch")
    code = f"import sys, vlm_calibration; print([m for m in sys.modules if m.startswith({names})])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=SOURCE, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_nothing_is_imported_in_a_circle() -> None:
    graph = {module: names for module, names in import_graph(SOURCE).items() if module != PACKAGE}
    packages = packages_of(graph)
    assert sum(map(len, graph.values())) > 300
    assert cycle(packages) == []
    assert cycle(graph) == []
    first, second = "vlm_calibration.reporting.runs", "vlm_calibration.commands.runs"
    assert cycle({**graph, first: graph[first] | {second}}), "an import back closes a circle"
    assert cycle({**packages, "data": packages["data"] | {"regions"}})


@pytest.mark.parametrize(
    ("module", "code", "expected"),
    [
        ("records.py", "import vlm_calibration.text.confidence", ["records imports text, which is higher"]),
        ("metrics/a.py", "def f():\n    import lightning.pytorch as pl", ["metrics imports lightning"]),
        ("models/a.py", "from vlm_calibration import text", []),
        ("models/a.py", "from vlm_calibration import stages", ["models imports stages, which is higher"]),
        ("data/a.py", "from vlm_calibration.models.loading import load_base", ["data imports models"]),
        ("data/a.py", "from vlm_calibration import load_calibrated", ["data imports the root package"]),
        ("helpers/a.py", "x = 1", ["helpers is in no layer"]),
    ],
)
def test_a_violation_is_found(tmp_path: Path, module: str, code: str, expected: list[str]) -> None:
    folders = ("", "text/", "data/", "models/", "stages/")
    written = {f"{folder}__init__.py": "" for folder in folders}
    written |= {"text/confidence.py": "", "models/loading.py": "", module: code}
    for name, content in written.items():
        (tmp_path / PACKAGE / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / PACKAGE / name).write_text(content, encoding="utf-8")
    assert violations(tmp_path) == expected


def test_metrics_import_records_and_numerical_packages_alone() -> None:
    allowed = {"torch", "torchmetrics", "numpy", "scipy", "matplotlib", f"{PACKAGE}.records"}
    for module, imported in import_graph(SOURCE).items():
        if module.startswith(f"{PACKAGE}.metrics"):
            others = imported - allowed - sys.stdlib_module_names
            assert [name for name in others if not name.startswith(f"{PACKAGE}.metrics")] == [], module
