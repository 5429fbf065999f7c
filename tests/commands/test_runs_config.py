"""`vlm-calibration runs`, what a list of run directories says about each, damage included; `config`, presets outside a checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_calibration.files import hold, release, write_json
from vlm_calibration.presets import preset_names
from vlm_calibration.reporting.runs import find_runs

from ..command_line import Ended

HEADLINE = {"n": 300, "accuracy": 0.8, "ece": 0.05, "brier": 0.12, "auroc": None}
METRICS = {**HEADLINE, "ece/other": 1.0}


def _run(folder: Path, *, finished: bool = False, command: str = "fit", **more: Any) -> Path:
    folder.mkdir(parents=True)
    record = {"command": command, "stage": "SFTModule", "finished": finished, "settings": {}, **more}
    write_json(folder / "run.json", record)
    (folder / "config.yaml").touch()
    return folder


def test_an_interrupted_run_has_a_command_and_one_that_is_held_is_running(tmp_path: Path) -> None:
    settings = {"model.init_args.base.name_or_path": "owner/model-7b"}
    folder = _run(tmp_path / "a b/dpo", stage="DPOModule", settings=settings)
    [run] = find_runs(tmp_path)
    assert (run.stage, run.state, run.model) == ("dpo", "interrupted", "owner/model-7b")
    assert run.command == f"vlm-calibration fit --config '{folder}/config.yaml' --resume"
    lock = hold(folder / "config.yaml")
    assert [(run.state, run.command) for run in find_runs(tmp_path)] == [("running", "")]
    release(lock)
    assert [run.state for run in find_runs(tmp_path)] == ["interrupted"]


def test_a_finished_run_has_figures_of_each_system(call: Callable[..., Ended], tmp_path: Path) -> None:
    folder = _run(tmp_path / "eval", finished=True, command="test")
    for system in ("base", "sft"):
        write_json(folder / system / "metrics.json", METRICS)
    write_json(_run(tmp_path / "eval/other", finished=True) / "metrics.json", METRICS)
    first, second = find_runs(tmp_path)
    assert (first.state, first.command) == ("finished", "")
    assert (first.figures, second.figures) == ({"base": HEADLINE, "sft": HEADLINE}, {"": HEADLINE})
    shown = "    sft  300 answers, accuracy 0.800, ECE 0.050, Brier 0.120, AUROC nan\n"
    assert shown in call("runs", ".").out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", b"{"),
        ("run.json", b"[1]"),
        ("run.json", b'{"command": "fit"}'),
        ("metrics.json", b"{"),
        ("config.yaml", None),
    ],
)
def test_a_damaged_folder_is_named_and_the_others_are_listed(
    call: Callable[..., Ended], tmp_path: Path, name: str, content: bytes | None
) -> None:
    damaged, _ = (_run(tmp_path / folder) for folder in ("damaged", "good"))
    (damaged / name).unlink() if content is None else (damaged / name).write_bytes(content)
    first, second, *_ = call("runs", ".").out.splitlines()
    assert [text for text in ("damaged:", "damaged (", name) if text not in first] == []
    assert second.startswith("good:  sft  interrupted")


def test_json_has_all_runs(call: Callable[..., Ended], tmp_path: Path) -> None:
    for name in ("b", "a/c"):
        _run(tmp_path / name)
    rows = json.loads(call("runs", ".", "--json").out)
    assert [(row["folder"], row["state"]) for row in rows] == [("a/c", "interrupted"), ("b", "interrupted")]
    assert "nothing-here" in call("runs", "nothing-here").error()


# --- config


def test_every_preset_is_listed_with_a_sentence_and_a_pattern_selects(call: Callable[..., Ended]) -> None:
    lines = [line.split(maxsplit=1) for line in call("config", "list").out.splitlines()]
    assert [name for name, _ in lines] == preset_names()
    lines = call("config", "list", "trainer/*ddp").out.splitlines()
    assert [line.split()[0] for line in lines] == ["trainer/cpu_ddp", "trainer/ddp"]


def test_a_copy_is_what_show_prints(root: Path, call: Callable[..., Ended]) -> None:
    shown = call("config", "show", "data/jsonl").out
    assert shown == (root / "configs/data/jsonl.yaml").read_text()
    Path("folder").mkdir()
    for to, path in (((), "jsonl.yaml"), (("folder",), "folder/jsonl.yaml")):
        assert call("config", "copy", "data/jsonl", *to).status == 0
        assert Path(path).read_text() == shown


def test_a_copy_replaces_nothing_unasked(call: Callable[..., Ended]) -> None:
    Path("mine.yaml").write_text("mine")
    assert "mine.yaml exists" in call("config", "copy", "sft", "mine.yaml").error()
    assert Path("mine.yaml").read_text() == "mine"
    assert call("config", "copy", "sft", "mine.yaml", "--overwrite").status == 0
    assert Path("mine.yaml").read_text() != "mine"


@pytest.mark.parametrize(
    "arguments", [("show", "model/qlorra"), ("copy", "model/qlorra"), ("list", "qlorra")]
)
def test_what_does_not_exist_is_named(arguments: tuple[str, ...], call: Callable[..., Ended]) -> None:
    ended = call("config", *arguments)
    assert ended.status == 2
    assert "qlorra" in ended.error()
    assert arguments[0] == "list" or "did you mean model/qlora" in ended.error()


@pytest.mark.slow
def test_a_reader_may_end_before_the_output() -> None:
    command = f"{sys.executable} -m vlm_calibration.cli config list | head -1"
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("data/coco ")
    assert "Traceback" not in ran.stderr
