"""`Plan` and `vlm-calibration calibrate`: the command of each stage, which `make`, the SLURM jobs and Python share."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from vlm_calibration import Plan, steps
from vlm_calibration.cli import main
from vlm_calibration.records import DataError
from vlm_calibration.steps import BASE, STAGES, train_sft

from .command_line import Capture, Patch
from .test_configs import Parse
from .test_configs import parse as parse

OWN = ["--model", "qwen2_5_vl_7b", "--data", "jsonl"]
Commands = Callable[..., dict[str, list[str]]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def commands(capsys: Capture) -> Commands:
    """Function that returns the stages that `calibrate` would run with these arguments -> what follows `vlm-calibration`."""

    def run(*arguments: str) -> dict[str, list[str]]:
        assert main(["calibrate", *arguments, "--dry-run"]) == 0, capsys.readouterr().err
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert all(shlex.split(command)[0] == "vlm-calibration" for _, _, command in lines)
        return {stage: shlex.split(command)[1:] for stage, _, command in lines}

    return run


def values(command: list[str], key: str) -> list[str]:
    pairs = [value for name, value in itertools.pairwise(command) if name == f"--{key}"]
    return pairs + [word.partition("=")[2] for word in command if word.startswith(f"--{key}=")]


def test_without_settings_it_is_the_demo(commands: Commands) -> None:
    planned = commands()
    assert list(planned) == ["sft", "dpo", "evaluate", "report"]
    common = ["--data-root", "data", "--runs", "runs"]
    for stage in ("sft", "dpo"):
        run = ["--trainer.default_root_dir", f"runs/{stage}"]
        assert planned[stage] == ["fit", "--config", stage, *common, *run, "--resume"]
    assert planned["evaluate"][:3] == ["test", "--config", "eval/demo"]
    adapters = json.dumps({"sft": "runs/sft/adapter", "dpo": "runs/dpo/adapter"})
    assert values(planned["evaluate"], "model.init_args.adapters") == [adapters], (
        "as the stages before write them"
    )
    alone = commands("evaluate")["evaluate"]
    assert values(alone, "model.init_args.adapters") == ["{}"]
    assert values(alone, BASE)[0].endswith("demo/model")
    assert planned["report"] == ["report", "runs/eval"]


def test_every_stage_of_your_own_calibration_has_the_same_settings(commands: Commands, folder: Path) -> None:
    (folder / "my data").mkdir()
    arguments = ["--data-root", "my data", "--trainer", "ddp", "--runs", "mine", "--data.workers", "3"]
    planned = commands(*OWN, *arguments)
    assert list(planned) == list(STAGES)
    assert planned.pop("report") == ["report", "mine/eval"]
    for stage, command in planned.items():
        assert tuple(command[: command.index("--config")]) == STAGES[stage]
        own, *overlays = values(command, "config")
        assert own == ("eval/jsonl" if stage == "evaluate" else stage)
        of_stage_2 = ["experiment/anchored_dpo"] if stage == "dpo" else []
        shared = ["model/qwen2_5_vl_7b", "data/jsonl", "experiment/anchored"]
        assert overlays == [*shared, *of_stage_2, "trainer/ddp"]
        assert values(command, "data-root") == ["my data"]
        assert values(command, "data.regions") == ([] if stage == "regions" else ["mine/regions"])
        assert values(command, "runs") == ["mine"]
        assert values(command, "data.workers") == ["3"]
        run = "eval" if stage == "evaluate" else stage
        assert command[-3:] == ["--trainer.default_root_dir", f"mine/{run}", "--resume"]


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        (["--preset", "paper"], "sft dpo evaluate report"),
        (["--preset", "anchored"], "levels sft dpo evaluate report"),
        (["--model", "smolvlm2_256m"], "levels sft dpo evaluate report"),
        ([*OWN, "--preset", "paper"], "regions sft dpo evaluate report"),
        (["dpo", "sft"], "sft dpo"),
    ],
)
def test_a_calibration_consists_of_the_stages_that_it_needs(
    commands: Commands, arguments: list[str], stages: str
) -> None:
    assert list(commands(*arguments)) == stages.split()


def test_files_of_your_own_and_several_files(commands: Commands, folder: Path) -> None:
    for name in ("my model", "preset", "preset_dpo", "mine"):
        (folder / f"{name}.yaml").touch()
    command = commands("dpo", "--model", "'my model.yaml' qlora", "--preset", "paper preset.yaml")["dpo"]
    assert values(command, "config") == [
        *("dpo", "my model.yaml", "model/qlora"),
        *("experiment/paper", "experiment/paper_dpo", "preset.yaml", "preset_dpo.yaml"),
    ]
    command = commands("sft", "--config", "mine.yaml")["sft"]
    assert command[:3] == ["fit", "--config", "mine.yaml"], "instead of the stage's own"
    assert values(command, "trainer.default_root_dir") == ["runs/sft"]


def test_arguments_of_one_stage_reach_no_other_and_settings_no_report(commands: Commands) -> None:
    planned = commands(
        *("sft", "dpo", "report", "--seed_everything", "3", "--overwrite"),
        *("--sft.data.train.init_args", '{"scenes": 4}', "--sft.ckpt_path=x", "--report.replicates", "9"),
    )
    assert planned["sft"][7:11] == ["--seed_everything", "3", "--data.train.init_args", '{"scenes": 4}']
    assert planned["sft"][11:] == ["--ckpt_path=x", "--trainer.default_root_dir", "runs/sft", "--overwrite"]
    assert planned["dpo"][7:9] == ["--seed_everything", "3"]
    assert planned["report"] == ["report", "runs/eval", "--replicates", "9"]
    assert commands("sft", "--ckpt_path", "last")["sft"][-1] == "runs/sft", "instead of --resume"


def test_stages_take_what_earlier_ones_left(commands: Commands, folder: Path) -> None:
    adapters = "model.init_args.adapters"
    (folder / "runs/sft/adapter").mkdir(parents=True)
    assert values(commands("evaluate")["evaluate"], adapters) == ['{"sft": "runs/sft/adapter"}']
    for name in ("dpo/adapter", "regions"):
        (folder / "runs" / name).mkdir(parents=True)
    planned = commands(*OWN)
    both = ['{"sft": "runs/sft/adapter", "dpo": "runs/dpo/adapter"}']
    assert values(planned["evaluate"], adapters) == both
    used = {stage: values(command, "data.regions") for stage, command in planned.items()}
    assert used.pop("regions") == used.pop("report") == []
    assert set(map(tuple, used.values())) == {("runs/regions",)}


def test_the_parser_takes_every_stage(commands: Commands, parse: Parse) -> None:
    for stage, command in commands(*OWN).items():
        if stage != "report":
            subcommand = "test" if stage == "levels" else command[0]
            parsed = parse([subcommand, *command[command.index("--config") :]])
            run = "eval" if stage == "evaluate" else stage
            assert parsed.trainer.default_root_dir == f"runs/{run}"


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["stf"], "stf"),
        (["--model", "qwen2_5_vl_7b nowhere"], "model/nowhere"),
        (["--preset", "nowhere.yaml"], "nowhere.yaml"),
        (["--data-root", "."], "data root . without data"),
        (["--model", "it's"], "it's"),
        (["sft", "--trainer.default_root_dir", "x"], "runs/sft"),
        (["sft", "dpo", "--config", "mine.yaml"], "--config"),
    ],
)
def test_invalid_settings_are_named(capsys: Capture, arguments: list[str], culprit: str) -> None:
    assert main(["calibrate", *arguments]) in (1, 2)
    printed = capsys.readouterr()
    assert re.fullmatch(rf"vlm-calibration: error: .*{re.escape(culprit)}.*\n", printed.err)
    assert printed.out == ""


def test_settings_from_python_are_those_of_json_and_a_stage_s_own_come_later() -> None:
    plan = Plan(settings={"data.workers": 0, "trainer.logger": False, "a": "text"}, overwrite=True)
    command = plan.command("sft", "--data.workers=2")
    shared = ["--data.workers=0", "--trainer.logger=false", "--a=text"]
    assert command[-7:] == [*shared, "--data.workers=2", *command[-3:-1], "--overwrite"]


def test_the_demo_s_model_is_not_used_on_other_data_unasked() -> None:
    for stage in ("levels", "sft", "dpo"):
        with pytest.raises(DataError, match="without a model"):
            Plan(data="jsonl").command(stage)
    assert f"--{BASE}=mine" in Plan(data="jsonl", settings={BASE: "mine"}).command("sft")


def test_a_stage_that_fails_leaves_the_process_s_arguments_alone(
    model_folder: str, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(sys, "argv", ["notebook"])
    with pytest.raises(DataError, match=r"data/train\.jsonl"):
        train_sft(Plan(data="jsonl", preset="paper", settings={"trainer.logger": False, BASE: model_folder}))
    assert sys.argv == ["notebook"]


@pytest.mark.slow
def test_a_failed_stage_ends_the_calibration_with_its_status(capfd: Capture, folder: Path) -> None:
    assert main(["calibrate", "sft", "report", "--data.batch_size", "none"]) == 2
    printed = capfd.readouterr()
    assert printed.out.count("+ vlm-calibration") == 1
    assert "data.batch_size" in printed.err


def test_the_metrics_are_those_of_the_evaluated_systems(folder: Path, monkeypatch: Patch) -> None:
    """In the order of the configuration, without those of an earlier evaluation in the folder."""
    model = {"class_path": "EvaluationModule", "init_args": {"adapters": {"sft": "a", "dpo": "b"}}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}, sort_keys=False))
    for name in ("base", "dpo", "old", "sft"):
        (folder / name).mkdir()
        (folder / name / "metrics.json").write_text(f'{{"n": {len(name)}}}')
    monkeypatch.setattr(steps, "_run", lambda *_: folder)
    assert list(steps.evaluate(Plan()).items()) == [("base", {"n": 4}), ("sft", {"n": 3}), ("dpo", {"n": 3})]
