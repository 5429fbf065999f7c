"""Probes in an evaluation: their keys and metrics in the files, which answers are probed, and their cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch
from vlm_calibration.estimators.predictions import read_predictions
from vlm_calibration.estimators.probes import PROBES, read_probes
from vlm_calibration.estimators.stability import Stability
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.models.adapters import load_adapters, using_adapter
from vlm_calibration.models.base import BaseModel
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.reporting.report.data import summarize_predictions
from vlm_calibration.stages.evaluation import EvaluationModule

Data = Callable[..., PerturbedQueryDataModule]
KEYS = ("original", *PROBES)


@pytest.fixture
def queries(data: Data) -> PerturbedQueryDataModule:
    """Six queries, in batches of four and two, and a calibration set."""
    source = DemoSource("test", scenes=1)
    held_out = {"held_out": EvalSplit(DemoSource("calibration", scenes=1))}
    return data(test={"clean": EvalSplit(source), "noised": EvalSplit(source, "drawn")}, calibration=held_out)


def metrics_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in values.items() if name.startswith("probe_") or "@probes" in name}


@pytest.mark.slow
def test_every_answer_of_a_model_has_its_probed_confidences(
    run_evaluation: Callable[..., EvaluationModule],
    new_adapter: Callable[..., str],
    load_model: Callable[..., Any],
    queries: PerturbedQueryDataModule,
    tmp_path: Path,
) -> None:
    estimators = [ExpectedConfidence(), Stability()]
    run_evaluation({"one": new_adapter(1)}, queries=queries, estimators=estimators, probes=[*PROBES[::-1]])
    folder = tmp_path / "run"
    model = load_adapters(load_model(), {"one": new_adapter(1)})
    tokenizer = AnswerTokenizer(queries.chat, [LinearLevels(n_levels=101)])
    for system in ("base", "one"):
        predictions = read_predictions(folder / system / "predictions.jsonl")
        assert [tuple(p.probes) for p in predictions] == [KEYS] * 6
        with torch.no_grad(), using_adapter(model, None if system == "base" else system):
            test, _ = queries.test_dataloader()
            for start, batch in zip((0, 4), test, strict=True):
                part = predictions[start : start + 4]
                answered = AnsweredBatch(model, batch, part, [0] * len(part), tokenizer, 5)
                assert read_probes(answered, PROBES)[0] == [p.probes for p in part]
        assert not any(p.probes for p in read_predictions(folder / system / "calibration.jsonl"))

        metrics = metrics_of(folder / system)
        assert 3 <= metrics.pop("forward_passes@probes") <= 5
        again = {k: v for k, v in summarize_predictions(predictions).items() if k.startswith("probe_")}
        assert metrics == {k: None if v != v else v for k, v in again.items()}
        changes = [
            p.probes["image"] - p.probes["original"] for p in predictions if p.probes["original"] is not None
        ]  # type: ignore[operator]
        assert metrics["probe_image_n"] == len(changes)
        if changes:
            assert metrics["probe_image_change"] == pytest.approx(sum(changes) / len(changes))
        assert "probe_object_change/noised" in metrics
    assert metrics_of(folder / "oracle") == {}
    assert not any(p.probes for p in read_predictions(folder / "oracle/predictions.jsonl"))


@pytest.mark.slow
def test_probes_change_nothing_else(
    run_evaluation: Callable[..., EvaluationModule], data: Data, tmp_path: Path
) -> None:
    """The same answers, confidences and metrics; without probes no key of them."""
    files = {}
    for probes in ([], ["image", "object"]):
        queries = data(test={"": EvalSplit(DemoSource("test", scenes=2), "drawn")})
        run_evaluation({}, queries=queries, estimators=[ExpectedConfidence()], probes=probes)
        base = tmp_path / "run/base"
        lines = [json.loads(line) for line in (base / "predictions.jsonl").read_text().splitlines()]
        metrics = json.loads((base / "metrics.json").read_text())
        assert all(("probes" in line) == bool(probes) for line in lines)
        assert bool(metrics_of(base)) == bool(probes)
        for line in lines:
            line.pop("probes", None)
        files[bool(probes)] = lines, {k: v for k, v in metrics.items() if k not in metrics_of(base)}
    assert files[True] == files[False]


def test_the_original_confidence_is_the_stated_one(
    demo_folder: str, trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    """A percentage is one token here, so the likeliest one is stated, whichever it is."""
    module = EvaluationModule(BaseModel(demo_folder), max_new_tokens=16, probes=["image"])
    queries = PerturbedQueryDataModule(
        demo_folder, test={"": EvalSplit(DemoSource("test", scenes=8))}, workers=0
    )
    trainer(PredictionWriter()).test(module, datamodule=queries, verbose=False)
    predictions = read_predictions(tmp_path / "run" / "base" / "predictions.jsonl")
    assert [p.probes["original"] for p in predictions] == [p.confidence for p in predictions]
    assert any(round(100 * (p.confidence or 0)) % 10 for p in predictions)


def test_the_calibration_set_is_not_copied_for_probes(model_folder: str) -> None:
    stable = Stability()
    module = EvaluationModule(BaseModel(model_folder), estimators=[stable], probes=["image", "answer"])
    assert [len(copies) for copies in module.data_needs.copies.values()] == [5, 4]
    assert module.data_needs.copies["calibration"] == stable.copies
    assert EvaluationModule(BaseModel(model_folder)).data_needs.copies == {"test": [], "calibration": []}
