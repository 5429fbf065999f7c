"""Commands without a process of their own: what `main` prints and returns."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vlm_calibration.cli import main


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
