"""`vlm-calibration config`: list, show and copy presets, outside a checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vlm_calibration.cli import main
from vlm_calibration.presets import preset_names


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_preset_is_listed_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "list"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == preset_names()
    assert [line for line in lines if len(line) < 2] == []


def test_a_pattern_selects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "list", "trainer/*ddp"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "trainer/cpu_ddp",
        "trainer/ddp",
    ]


def test_a_copy_is_what_show_prints(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "data/jsonl"]) == 0
    shown = capsys.readouterr().out
    assert shown == (root / "configs/data/jsonl.yaml").read_text()
    assert main(["config", "copy", "data/jsonl"]) == 0
    assert Path("jsonl.yaml").read_text() == shown
    Path("folder").mkdir()
    assert main(["config", "copy", "data/jsonl", "folder"]) == 0
    assert Path("folder/jsonl.yaml").read_text() == shown


def test_a_copy_replaces_nothing_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("mine")
    assert main(["config", "copy", "sft", "mine.yaml"]) == 1
    assert "mine.yaml exists" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "mine"
    assert main(["config", "copy", "sft", "mine.yaml", "--overwrite"]) == 0
    assert Path("mine.yaml").read_text() != "mine"


@pytest.mark.parametrize(
    "arguments", [("show", "model/qlorra"), ("copy", "model/qlorra"), ("list", "qlorra")]
)
def test_what_does_not_exist_is_named(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", *arguments]) == 2
    assert "qlorra" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_may_end_before_the_output() -> None:
    command = f"{sys.executable} -m vlm_calibration.cli config list | head -1"
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("data/coco ")
    assert "Traceback" not in ran.stderr
