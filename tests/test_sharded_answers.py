"""Models that are sharded over two processes answer as a whole model does, although the processes need different passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def _evaluation(root: Path, adapter: str, folder: Path, **trainer: Any) -> list[str]:
    """Arguments of an evaluation of the demo's model and an adapter, with estimators and probes, which writes to `folder`."""
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
                "adapters": {"one": adapter},
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
