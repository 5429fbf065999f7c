"""Models that are sharded over two processes answer as a whole model does, although the processes need different passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from .command_line import SHARDED, Ended, run_plainly

pytestmark = pytest.mark.slow

ESTIMATORS = "vlm_calibration.estimators."


def _close(value: Any, other: Any) -> bool:
    """Whether two values of JSON are equal, floats up to 2e-4: estimates are rounded to four digits."""
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(_close(value[k], other[k]) for k in value)
    if isinstance(value, list):
        return len(value) == len(other) and all(map(_close, value, other))
    if isinstance(value, float) and isinstance(other, float):
        return value == pytest.approx(other, abs=2e-4)
    return bool(value == other)


def _answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def _evaluation(root: Path, adapter: str | None, folder: Path, **trainer: Any) -> list[str]:
    """Arguments of an evaluation of the demo's model and an adapter if there is one, with estimators and probes, which writes to `folder`."""
    demo = {"class_path": "vlm_calibration.demo.source.DemoSource"}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "default_root_dir": str(folder),
            "callbacks": [{"class_path": "vlm_calibration.callbacks.predictions.PredictionWriter"}],
            **trainer,
        },
        "model": {
            "class_path": "vlm_calibration.stages.evaluation.EvaluationModule",
            "init_args": {
                "base": {"name_or_path": str(root / "src/vlm_calibration/demo/model"), "dtype": "float32"},
                "adapters": {"one": adapter} if adapter else {},
                "estimators": [
                    {"class_path": f"{ESTIMATORS}verbal.ExpectedConfidence"},
                    {"class_path": f"{ESTIMATORS}consistency.SelfConsistency", "init_args": {"samples": 1}},
                    {
                        "class_path": f"{ESTIMATORS}stability.Stability",
                        "init_args": {"strengths": {"blur": [0.1]}},
                    },
                ],
                "probes": ["object", "answer"],
                "max_new_tokens": 12,
            },
        },
        "data": {
            "test": {
                # Of three queries one process has a batch more than the other.
                "clean": {"source": {**demo, "init_args": {"split": "test", "scenes": 1}}},
                "noised": {"source": {**demo, "init_args": {"split": "test", "scenes": 2}}, "noise": "drawn"},
            },
            "eval_batch_size": 1,
            "workers": 0,
        },
    }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["test", "--config", str(path)]


def _levels(root: Path, model: str, folder: Path, strategy: Any, processes: int) -> list[str]:
    """Arguments of a fit of levels with likelihoods, which writes to `folder`."""
    settings = {
        "model.init_args.base.name_or_path": model,
        "model.init_args.out": str(folder / "levels.json"),
        "model.init_args.likelihoods": str(folder / "likelihoods.parquet"),
        "model.init_args.max_new_tokens": "3",
        "data.levels.init_args.scenes": "5",
        "data.train.init_args.scenes": "1",
        "data.workers": "0",
        "trainer.default_root_dir": str(folder),
        "trainer.strategy": strategy if isinstance(strategy, str) else json.dumps(strategy),
        "trainer.devices": str(processes),
    }
    config = ["--config", str(root / "configs/levels.yaml")]
    return ["levels", "fit", *config, *(f"--{key}={value}" for key, value in settings.items())]


def test_an_evaluation_with_estimators_and_probes(
    run: Callable[..., Ended], adapter_run: Path, root: Path, tmp_path: Path
) -> None:
    adapter = str(adapter_run)
    ended = run(*_evaluation(root, adapter, tmp_path / "one"))
    assert ended.status == 0, ended.err
    ended = run_plainly(
        _evaluation(root, adapter, tmp_path / "two", devices=2, strategy=SHARDED), root, tmp_path
    )
    assert ended.status == 0, ended.err
    lengths = set()
    for system in ("base", "one"):
        one, two = (_answers(tmp_path / name / system) for name in ("one", "two"))
        assert len(one) == 9
        assert [row["text"] for row in one] == [row["text"] for row in two]
        assert _close(one, two)
        metrics = [json.loads((tmp_path / n / system / "metrics.json").read_text()) for n in ("one", "two")]
        assert _close(*metrics)
        lengths |= {len(row["text"].split()) for row in one}
    assert len(lengths) > 1, "answers end at different steps"


def test_a_fit_of_levels(run: Callable[..., Ended], root: Path, tmp_path: Path) -> None:
    model, one, two = str(root / "src/vlm_calibration/demo/model"), tmp_path / "one", tmp_path / "two"
    ended = run(*_levels(root, model, one, "auto", 1))
    assert ended.status == 0, ended.err
    ended = run_plainly(_levels(root, model, two, SHARDED, 2), root, tmp_path)
    assert ended.status == 0, ended.err
    assert _close(*(json.loads((folder / "levels.json").read_text()) for folder in (one, two)))
    likelihoods = [pq.read_table(folder / "likelihoods.parquet").to_pydict() for folder in (one, two)]
    assert len(likelihoods[0]["id"]) == 3
    assert _close(*likelihoods)


@pytest.mark.parametrize("stage", ["sft", "dpo", "test", "levels"])
def test_int8_weights_are_refused_before_they_are_loaded(
    run: Callable[..., Ended],
    fit: Callable[..., list[str]],
    model_folder: str,
    root: Path,
    tmp_path: Path,
    stage: str,
) -> None:
    """The model's folder has no weights."""
    folder = shutil.copytree(model_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    alone = {**SHARDED, "init_args": {**SHARDED["init_args"], "data_parallel_size": 1}}
    if stage == "test":
        command = _evaluation(root, None, tmp_path / "run", strategy=alone)
    elif stage == "levels":
        command = _levels(root, str(folder), tmp_path / "run", alone, 1)
    else:
        command = fit(stage, trainer={"strategy": alone})
    if stage == "dpo":
        command += ["--model.init_args.adapter", "null", "--model.init_args.reference", "base"]
        command += ["--model.init_args.parts", "null"]
    base = "--model.init_args.base."
    ended = run(*command, f"{base}name_or_path", str(folder), f"{base}quantization", "int8")
    assert ended.error().startswith("model.init_args.base.quantization: int8 weights cannot be sharded")
