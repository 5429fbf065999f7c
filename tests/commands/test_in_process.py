"""Commands without a process of their own: what `main` prints and returns, and the parsers that completion reads."""

from __future__ import annotations

from argparse import _SubParsersAction
from pathlib import Path

import pytest
import yaml

from vlm_calibration.cli import COMMANDS, main
from vlm_calibration.cli.completion import all_commands


def test_data_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes = {
        "class_path": "vlm_calibration.demo.source.DemoSource",
        "init_args": {"split": "test", "scenes": 4},
    }
    config = tmp_path / "data.yaml"
    config.write_text(
        yaml.safe_dump({"data": {"processor": "none", "train": scenes}, "model": {"unread": 1}})
    )
    assert main(["data", "inspect", "--config", str(config), "--samples", "3"]) == 0
    printed = capsys.readouterr().out
    assert "data.train" in printed
    assert "3 opened" in printed
    assert main(["data", "inspect", "--config", str(config), "--data.train.init_args.scene", "5"]) == 2
    assert "scene" in capsys.readouterr().err


def test_levels_fit_names_a_missing_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["levels", "fit", "--config", "none.yaml"]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_completion_knows_every_command_and_its_settings() -> None:
    [commands] = [a for a in all_commands()._actions if isinstance(a, _SubParsersAction)]
    assert list(commands.choices) == list(COMMANDS)
    assert "--trainer.max_steps" in commands.choices["fit"]._option_string_actions
    assert "--model.init_args.drift_weight" in commands.choices["fit"]._option_string_actions
    assert "--adapter" in commands.choices["ask"]._option_string_actions
