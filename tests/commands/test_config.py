"""`vlm-calibration config`: list, show and copy presets, outside a checkout."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_calibration.presets import preset_names

from ..command_line import Ended

Call = Callable[..., Ended]


def test_every_preset_is_listed_with_a_sentence_and_a_pattern_selects(call: Call) -> None:
    lines = [line.split(maxsplit=1) for line in call("config", "list").out.splitlines()]
    assert [name for name, _ in lines] == preset_names()
    lines = call("config", "list", "trainer/*ddp").out.splitlines()
    assert [line.split()[0] for line in lines] == ["trainer/cpu_ddp", "trainer/ddp"]


def test_a_copy_is_what_show_prints(root: Path, call: Call) -> None:
    shown = call("config", "show", "data/jsonl").out
    assert shown == (root / "configs/data/jsonl.yaml").read_text()
    Path("folder").mkdir()
    for to, path in (((), "jsonl.yaml"), (("folder",), "folder/jsonl.yaml")):
        assert call("config", "copy", "data/jsonl", *to).status == 0
        assert Path(path).read_text() == shown


def test_a_copy_replaces_nothing_unasked(call: Call) -> None:
    Path("mine.yaml").write_text("mine")
    assert "mine.yaml exists" in call("config", "copy", "sft", "mine.yaml").error()
    assert Path("mine.yaml").read_text() == "mine"
    assert call("config", "copy", "sft", "mine.yaml", "--overwrite").status == 0
    assert Path("mine.yaml").read_text() != "mine"


@pytest.mark.parametrize(
    "arguments", [("show", "model/qlorra"), ("copy", "model/qlorra"), ("list", "qlorra")]
)
def test_what_does_not_exist_is_named(arguments: tuple[str, ...], call: Call) -> None:
    ended = call("config", *arguments)
    assert ended.status == 2
    assert "qlorra" in ended.error()


@pytest.mark.slow
def test_a_reader_may_end_before_the_output() -> None:
    command = f"{sys.executable} -m vlm_calibration.cli config list | head -1"
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("data/coco ")
    assert "Traceback" not in ran.stderr
