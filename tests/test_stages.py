"""configs/stages.sh: what `make` and the SLURM jobs run for their variables, with `echo` for Python."""

from __future__ import annotations

import itertools
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_calibration.steps import Plan

from .slurm.cluster import clean_environment
from .test_configs import parse as parse

OWN = {"MODEL": "qwen2_5_vl_7b", "DATA": "jsonl"}


def _run(root: Path, folder: Path, *stages: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # The working directory does not matter: the script finds the repository.
    return subprocess.run(
        ["bash", str(root / "configs/stages.sh"), *stages],
        cwd=folder,
        env={**clean_environment(), "PYTHON": "echo", "RUN": str(folder), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _commands(root: Path, folder: Path, *stages: str, **variables: str) -> list[list[str]]:
    """The command lines of `vlm-calibration` that the variables stand for."""
    ran = _run(root, folder, *stages, **variables)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    commands = [shlex.split(line)[2:] for line in lines[::2]]
    # What is announced is what is run.
    assert lines[1::2] == [" ".join(["-m vlm_calibration.cli", *command]) for command in commands]
    return commands


def _values(command: list[str], key: str) -> list[str]:
    return [value for name, value in itertools.pairwise(command) if name == f"--{key}"]


def _configs(command: list[str]) -> list[str]:
    return [name.removeprefix("configs/").removesuffix(".yaml") for name in _values(command, "config")]


def test_without_variables_all_is_the_demo(root: Path, tmp_path: Path) -> None:
    sft, dpo, evaluate, report = _commands(root, tmp_path)
    common = ["--runs", str(tmp_path)]
    for stage, command in (("sft", sft), ("dpo", dpo)):
        run = ["--trainer.default_root_dir", f"{tmp_path}/{stage}"]
        assert command == ["fit", "--config", f"configs/{stage}.yaml", *common, *run, "--resume"]
    assert evaluate[:5] == ["test", "--config", "configs/eval/demo.yaml", *common]
    assert _values(evaluate, "model.init_args.adapters") == ["{}"]
    assert _values(evaluate, "model.init_args.base.name_or_path") == ["src/vlm_calibration/demo/model"]
    assert report == ["report", f"{tmp_path}/eval"]


def test_every_stage_of_your_own_calibration_has_the_same_settings(root: Path, tmp_path: Path) -> None:
    commands = _commands(root, tmp_path, **OWN, DATA_ROOT=str(tmp_path), TRAINER="ddp", ARGS="--data.seed 3")
    assert [" ".join(command[: command.index("--config")]) for command in commands[:-1]] == [
        "predict",
        "levels fit",
        *("fit", "fit", "test"),
    ]
    assert [_configs(command)[0] for command in commands[:-1]] == [
        *("regions", "levels", "sft", "dpo"),
        "eval/jsonl",
    ]
    for command in commands[:-1]:
        overlays = [name for name in _configs(command)[1:] if not name.endswith("_dpo")]
        assert overlays == ["model/qwen2_5_vl_7b", "data/jsonl", "experiment/anchored", "trainer/ddp"]
        assert _values(command, "data-root") == [str(tmp_path)]
        assert _values(command, "runs") == [str(tmp_path)]
        assert _values(command, "data.seed") == ["3"]
        assert command[-1] == "--resume"
    runs = [_values(command, "trainer.default_root_dir")[-1] for command in commands[:-1]]
    assert runs == [f"{tmp_path}/{name}" for name in ("regions", "levels", "sft", "dpo", "eval")]
    assert [_configs(command).count("experiment/anchored_dpo") for command in commands] == [0, 0, 0, 1, 0, 0]
    assert commands[-1] == ["report", f"{tmp_path}/eval"]


@pytest.mark.parametrize(
    ("variables", "stages"),
    [
        ({}, "sft dpo evaluate report"),
        ({"PRESET": "paper"}, "sft dpo evaluate report"),
        ({"MODEL": "smolvlm2_256m"}, "levels sft dpo evaluate report"),
        (OWN, "regions levels sft dpo evaluate report"),
    ],
)
def test_a_calibration_consists_of_the_stages_that_it_needs(
    root: Path, tmp_path: Path, variables: dict[str, str], stages: str
) -> None:
    assert _commands(root, tmp_path, **variables) == _commands(root, tmp_path, *stages.split(), **variables)


def test_files_of_your_own_and_several_files(root: Path, tmp_path: Path) -> None:
    for name in ("my model", "preset", "preset_dpo"):
        (tmp_path / f"{name}.yaml").touch()
    variables = {"MODEL": f"'{tmp_path}/my model.yaml' qlora", "PRESET": f"paper {tmp_path}/preset.yaml"}
    (command,) = _commands(root, tmp_path, "dpo", **variables)
    assert _configs(command) == [
        *("dpo", f"{tmp_path}/my model", "model/qlora"),
        *("experiment/paper", "experiment/paper_dpo", f"{tmp_path}/preset", f"{tmp_path}/preset_dpo"),
    ]


@pytest.mark.parametrize(("run", "folder"), [("", "runs"), ("mine", "runs/mine"), ("a/mine/", "a/mine")])
def test_run_directories(root: Path, tmp_path: Path, run: str, folder: str) -> None:
    (command,) = _commands(root, tmp_path, "sft", RUN=run)
    assert _values(command, "runs") == [folder]


def test_settings_of_one_stage_reach_no_other(root: Path, tmp_path: Path) -> None:
    variables = {
        "ARGS": "--seed_everything 3",
        "SFT_ARGS": "--data.train.init_args '{\"scenes\": 4}' --overwrite",
        "REPORT_ARGS": "--calibration other",
    }
    sft, dpo, report = _commands(root, tmp_path, "sft", "dpo", "report", **variables)
    own = ["--seed_everything", "3", "--data.train.init_args", '{"scenes": 4}', "--overwrite"]
    assert sft[5:] == [*own, "--trainer.default_root_dir", f"{tmp_path}/sft"]
    assert dpo[5:-3] == ["--seed_everything", "3"]
    assert report[2:] == ["--calibration", "other"]


def test_a_configuration_of_your_own_replaces_that_of_a_stage(root: Path, tmp_path: Path) -> None:
    (command,) = _commands(root, tmp_path, "sft", CONFIG="mine.yaml")
    assert command[:3] == ["fit", "--config", "mine.yaml"]
    assert _values(command, "trainer.default_root_dir") == [f"{tmp_path}/sft"]


def test_extracted_regions_are_used_by_all_stages_after_the_extraction(root: Path, tmp_path: Path) -> None:
    (tmp_path / "regions").mkdir()
    commands = _commands(root, tmp_path, **OWN)
    regions = [_values(command, "data.regions") for command in commands]
    assert regions == [[], *[[f"{tmp_path}/regions"]] * 4, []]


def test_evaluation_takes_the_adapters_that_are_there_or_those_named(root: Path, tmp_path: Path) -> None:
    def adapters(**variables: str) -> list[str]:
        (command,) = _commands(root, tmp_path, "evaluate", **variables)
        return _values(command, "model.init_args.adapters")

    (tmp_path / "sft/adapter").mkdir(parents=True)
    assert adapters() == [f'{{"sft": "{tmp_path}/sft/adapter"}}']
    (tmp_path / "dpo/adapter").mkdir(parents=True)
    assert adapters() == [f'{{"sft": "{tmp_path}/sft/adapter", "dpo": "{tmp_path}/dpo/adapter"}}']
    assert adapters(EVALUATED="mine dpo") == [
        f'{{"mine": "{tmp_path}/mine/adapter", "dpo": "{tmp_path}/dpo/adapter"}}'
    ]


def test_parts_of_an_extraction(root: Path, tmp_path: Path) -> None:
    (command,) = _commands(root, tmp_path, "regions", **OWN, PARTS="3", PART="2")
    assert (_values(command, "data.parts"), _values(command, "data.part")) == (["3"], ["2"])
    (command,) = _commands(root, tmp_path, "regions", **OWN)
    assert _values(command, "data.parts") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {**OWN, "TRAINER": "ddp"},
        {"MODEL": "qwen2_5_vl_7b qlora", "DATA": "coco", "PRESET": "paper", "TRAINER": "ddp adamw_8bit"},
    ],
)
def test_the_settings_are_those_of_the_same_plan_in_python(
    root: Path, tmp_path: Path, parse: Callable[[list[str]], Any], variables: dict[str, str]
) -> None:
    for name in ("regions", "sft/adapter", "dpo/adapter"):
        (tmp_path / name).mkdir(parents=True)
    named = {name.lower(): value.split() for name, value in variables.items() if name != "PRESET"}
    plan = Plan(**named, preset=variables.get("PRESET"), runs=tmp_path)  # type: ignore[arg-type]
    *commands, _ = _commands(root, tmp_path, **variables)
    assert len(commands) >= 3
    for command in commands:
        stage = _configs(command)[0]
        subcommand = command[0].replace("levels", "test")
        adapters = {name: f"{tmp_path}/{name}/adapter" for name in ("sft", "dpo")}
        settings = {"model.init_args.adapters": adapters} if stage.startswith("eval/") else {}
        run = f"{tmp_path}/{stage if '/' not in stage else 'eval'}"
        ours = parse([subcommand, *command[command.index("--config") :]])
        theirs = parse([subcommand, *plan.arguments(stage, {"trainer.default_root_dir": run, **settings})])
        del ours["config"], theirs["config"]
        assert ours == theirs


@pytest.mark.parametrize(
    ("stages", "variables", "culprit"),
    [
        ("stf", {}, "stf"),
        ("sft", {"MODEL": "nowhere"}, "MODEL=nowhere"),
        ("sft", {"MODEL": "qwen2_5_vl_7b nowhere"}, "MODEL=nowhere"),
        ("sft", {"PRESET": "nowhere.yaml"}, "PRESET=nowhere.yaml"),
        ("sft", {"DATA": "jsonl"}, "MODEL="),
        ("sft", {"DATA_ROOT": "."}, "DATA_ROOT=. without DATA="),
        ("sft", {**OWN, "DATA_ROOT": "nowhere"}, "DATA_ROOT=nowhere"),
        ("sft", {"ARGS": "--trainer.max_steps '3"}, "--trainer.max_steps '3"),
        ("sft", {"SFT_ARGS": "--trainer.default_root_dir x"}, "RUN="),
        ("sft dpo", {"CONFIG": "mine.yaml"}, "CONFIG="),
        ("regions", {"PARTS": "2", "PART": "2"}, "part 2 of PARTS=2"),
    ],
)
def test_invalid_variables_are_named(
    root: Path, tmp_path: Path, stages: str, variables: dict[str, str], culprit: str
) -> None:
    ran = _run(root, tmp_path, *stages.split(), **variables)
    assert ran.returncode == 1
    assert culprit in ran.stderr
    assert ran.stdout == ""
