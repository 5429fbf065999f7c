"""Evaluations by the command line: base models, adapters that do not fit them, and several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText

from vlm_calibration.demo.architecture import build_model

from .command_line import LIMIT, Ended
from .level_tables import measured


def _evaluation(model_folder: str, folder: Path, adapters: dict[str, str], scenes: int = 2) -> list[str]:
    """Arguments of an evaluation of the base model, adapters and the oracle, which writes to `folder`/eval."""
    measured(model_folder).save(folder / "levels.json")
    demo = {"class_path": "vlm_calibration.demo.source.DemoSource"}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "default_root_dir": str(folder / "eval"),
            "callbacks": [
                {"class_path": "vlm_calibration.callbacks.predictions.PredictionWriter"},
                {"class_path": "vlm_calibration.callbacks.results_table.ResultsTable"},
            ],
        },
        "model": {
            "class_path": "vlm_calibration.stages.evaluation.EvaluationModule",
            "init_args": {
                "base": {"name_or_path": model_folder, "dtype": "float32"},
                "adapters": adapters,
                "oracle_levels": str(folder / "levels.json"),
                "max_new_tokens": 5,
            },
        },
        "data": {
            "test": {
                "clean": {"source": {**demo, "init_args": {"split": "test", "scenes": scenes}}},
                "noised": {
                    "source": {**demo, "init_args": {"split": "test", "scenes": scenes}},
                    "noise": "drawn",
                },
                "shifted": {"source": {**demo, "init_args": {"split": "test", "scenes": 1, "shifted": True}}},
            },
            "eval_batch_size": 4,
            "workers": 0,
        },
    }
    path = folder / "eval.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["test", "--config", str(path)]


def test_no_adapter(run: Callable[..., Ended], model_folder: str, tmp_path: Path) -> None:
    ended = run(*_evaluation(model_folder, tmp_path, {"sft": "runs/none/adapter"}))
    assert ended.error().startswith("no adapter at runs/none/adapter")
    assert ended.status == 1


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> str:
    """The folder of a wider model of the demo's architecture, with its processor."""
    folder = tmp_path_factory.mktemp("other")
    config = build_model(processor).config
    config.text_config.hidden_size *= 2
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _without_base(arguments: list[str]) -> list[str]:
    """Remove the base model from the configuration of an evaluation."""
    path = Path(arguments[2])
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    del config["model"]["init_args"]["base"]
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return arguments


@pytest.mark.parametrize("command", ["test", "ask", "dpo"])
def test_an_adapter_of_another_base_model(
    run: Callable[..., Ended],
    fit: Callable[..., list[str]],
    model_folder: str,
    other_model: str,
    new_adapter: Callable[..., str],
    tmp_path: Path,
    command: str,
) -> None:
    adapter = new_adapter(1)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    settings = {
        "test": _evaluation(other_model, tmp_path, {"one": adapter}),
        "ask": ["ask", "a.png", "A dog?", "--base", other_model, "--adapter", adapter],
        "dpo": [
            *fit("dpo"),
            "--model.init_args.adapter",
            adapter,
            "--model.init_args.base.name_or_path",
            other_model,
        ],
    }
    ended = run(*settings[command])
    assert ended.status == 1
    assert ended.error().startswith(
        f"the adapter at {adapter} does not fit the base model {other_model}: model."
    )
    assert f"its base model is {model_folder}: " in ended.error()


def test_the_base_model_is_the_one_that_the_adapters_name(
    run: Callable[..., Ended],
    model_folder: str,
    other_model: str,
    new_adapter: Callable[..., str],
    tmp_path: Path,
) -> None:
    adapters = {"one": new_adapter(1)}
    named = run(*_evaluation(model_folder, tmp_path, adapters, scenes=1))
    assert named.status == 0, named.err
    (tmp_path / "eval").rename(tmp_path / "named")
    ended = run(*_without_base(_evaluation(model_folder, tmp_path, adapters, scenes=1)))
    assert ended.status == 0, ended.err
    for name in ("base/predictions.jsonl", "one/predictions.jsonl", "one/metrics.json"):
        assert (tmp_path / "eval" / name).read_bytes() == (tmp_path / "named" / name).read_bytes()
    again = run("test", "--config", "eval/config.yaml", "--trainer.default_root_dir", "again")
    assert again.status == 0, again.err


def test_no_base_model_is_named(run: Callable[..., Ended], model_folder: str, tmp_path: Path) -> None:
    ended = run(*_without_base(_evaluation(model_folder, tmp_path, {})))
    assert ended.error().startswith("no base model: give model.init_args.base.name_or_path")
    assert ended.status == 1
    assert not (tmp_path / "eval").exists()


def test_adapters_of_two_base_models(
    run: Callable[..., Ended],
    model_folder: str,
    other_model: str,
    new_adapter: Callable[..., str],
    tmp_path: Path,
) -> None:
    other = Path(new_adapter(2))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": other_model}))
    ended = run(
        *_without_base(_evaluation(model_folder, tmp_path, {"one": new_adapter(1), "two": str(other)}))
    )
    assert ended.error().startswith(
        f"the adapters 'one' and 'two' have different base models: {model_folder} (auto) and {other_model} (auto); "
    )
    assert not (tmp_path / "eval").exists(), "checked before anything is loaded or written"


def test_two_processes_give_the_files_of_one(
    run: Callable[..., Ended], model_folder: str, new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    arguments = _evaluation(model_folder, tmp_path, {"one": new_adapter(1), "two": new_adapter(2)})
    ended = run(*arguments)
    assert ended.status == 0, ended.err
    assert "All 15 answers" in ended.out
    for system in ("base", "one", "two", "oracle"):
        assert f"│ {system}" in ended.out
    command = [sys.executable, "-m", "vlm_calibration.cli", *arguments]
    several = [
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
        "--trainer.default_root_dir",
        str(tmp_path / "ddp"),
    ]
    ran = subprocess.run(
        [*command, *several],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    assert "world_size=2" in ran.stderr or "2 processes" in ran.stderr, ran.stderr
    files = {
        p.relative_to(tmp_path / "eval"): p.read_bytes()
        for p in (tmp_path / "eval").rglob("*")
        if p.is_file()
    }
    others = {
        p.relative_to(tmp_path / "ddp"): p.read_bytes() for p in (tmp_path / "ddp").rglob("*") if p.is_file()
    }
    written = {
        Path(s, f) for s in ("base", "one", "two", "oracle") for f in ("metrics.json", "predictions.jsonl")
    }
    assert written <= set(files)
    assert set(files) == set(others)
    for name in written:
        assert files[name] == others[name], name
    assert len(files[Path("base/predictions.jsonl")].splitlines()) == 15
    assert ran.stdout.count("All 15 answers") == 1, "one process reports"
