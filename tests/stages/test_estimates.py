"""Estimators in an evaluation: their keys and metrics in the files, their cost, and several processes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch, Estimator
from vlm_calibration.estimators.consistency import SelfConsistency
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.p_true import PTrue
from vlm_calibration.estimators.predictions import prediction_from_dict, read_predictions
from vlm_calibration.estimators.verbal import ExpectedConfidence, VerbalizedConfidence
from vlm_calibration.metrics import functional
from vlm_calibration.models.adapters import load_adapters, using_adapter
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.perturbation.levels import AnchoredLevels, LinearLevels
from vlm_calibration.records import DataError
from vlm_calibration.stages.evaluation import EvaluationModule

from ..command_line import Ended, run_plainly
from ..level_tables import noise_counts

Data = Callable[..., PerturbedQueryDataModule]
NAMES = ("expected", "likelihood", "p_true", "self_consistency")


def estimators() -> list[Estimator]:
    return [ExpectedConfidence(), AnswerLikelihood(), PTrue(), SelfConsistency(2)]


@pytest.fixture
def folder(
    run_evaluation: Callable[..., EvaluationModule], new_adapter: Callable[..., str], tmp_path: Path
) -> Path:
    run_evaluation({"one": new_adapter(1)}, estimators=estimators())
    return tmp_path / "run"


@pytest.mark.slow
def test_every_estimator_has_its_key_and_its_metrics(
    folder: Path, data: Data, load_model: Callable[..., Any], new_adapter: Callable[..., str]
) -> None:
    queries = data(eval_batch_size=5)
    queries.setup("test")
    model = load_adapters(load_model(), {"one": new_adapter(1)})
    tokenizer = AnswerTokenizer(queries.chat, [LinearLevels()])
    estimates: dict[str, list[Any]] = {}
    for system in ("base", "one"):
        lines = [json.loads(x) for x in (folder / system / "predictions.jsonl").read_text().splitlines()]
        assert [tuple(line)[-5:] for line in lines] == [("image", *NAMES)] * 15
        predictions = [prediction_from_dict(line) for line in lines]
        estimates[system] = [p.estimates for p in predictions]

        # Other batches, other padding, no cache: the same estimates.
        with torch.no_grad(), using_adapter(model, None if system == "base" else system):
            for start, batch in zip((0, 5, 10), queries.test_dataloader(), strict=True):
                part = predictions[start : start + 5]
                answered = AnsweredBatch(model, batch, part, [0] * 5, tokenizer, 5)
                for estimator in estimators():
                    again = estimator.estimate(answered).confidence
                    assert again == pytest.approx([p.estimates[estimator.name] for p in part], abs=1e-5)

        metrics = json.loads((folder / system / "metrics.json").read_text())
        for name in NAMES:
            rated = [(p.estimates[name], p.correct) for p in predictions if p.estimates[name] is not None]
            assert metrics[f"parse_failure_rate@{name}"] == pytest.approx(1 - len(rated) / 15)
            if rated:
                confidence = torch.tensor([c for c, _ in rated], dtype=torch.float64)
                correct = torch.tensor([r for _, r in rated])
                brier = float(functional.brier_score(confidence, correct))
                assert metrics[f"brier@{name}"] == pytest.approx(brier, abs=1e-4)
                assert metrics[f"mean_confidence@{name}"] == pytest.approx(float(confidence.mean()), abs=1e-4)
        shifted = [p.estimates["expected"] for p in predictions if "shifted" in (p.category or "").split("/")]
        shifted = [c for c in shifted if c is not None]
        assert metrics["mean_confidence@expected/shifted"] == pytest.approx(
            math.fsum(shifted) / len(shifted), abs=1e-4
        )
        assert [metrics[f"forward_passes@{n}"] for n in NAMES[:3]] == [1, 1, 1]
        assert 1 <= metrics["forward_passes@verbalized"] <= 5
        assert 2 <= metrics["forward_passes@self_consistency"] <= 10
    assert estimates["base"] != estimates["one"]

    oracle = (folder / "oracle" / "predictions.jsonl").read_text().splitlines()
    assert not set(NAMES) & set(json.loads(oracle[0])), "the oracle is not a model"
    assert not [key for key in json.loads((folder / "oracle" / "metrics.json").read_text()) if "@" in key]


def test_levels_are_those_of_the_data_and_of_the_estimators(model_folder: str) -> None:
    own, base, drawn = [LinearLevels(3), LinearLevels(5)], BaseModel(model_folder), LinearLevels(11)
    module = EvaluationModule(base, estimators=[AnswerLikelihood(), ExpectedConfidence(own)])
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(noise=SimpleNamespace(levels=drawn)))  # type: ignore[assignment]
    assert module.levels == [drawn, *own]
    assert [*EvaluationModule(base, estimators=[PTrue()]).estimators] == ["verbalized", "p_true"]
    assert EvaluationModule(base).estimators == {}


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([PTrue(), PTrue(true="Yes", false="No")], "'p_true' appears twice"),
        ([VerbalizedConfidence()], "'verbalized' appears twice"),
    ],
)
def test_an_estimator_that_appears_twice_is_refused(chosen: list[Estimator], message: str) -> None:
    with pytest.raises(DataError, match=message):
        EvaluationModule(BaseModel("nowhere"), estimators=chosen)


def test_levels_that_miss_an_answer_type_are_an_error_before_anything_is_answered(
    model_folder: str, data: Data, trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    table = AnchoredLevels.fit({"yes_no": noise_counts((0, 10, 9), (1, 10, 5))})
    module = EvaluationModule(
        BaseModel(model_folder, dtype="float32"), estimators=[ExpectedConfidence([table])]
    )
    with pytest.raises(
        DataError, match="model.estimators: the level table has no levels for answer type 'short'"
    ):
        trainer(PredictionWriter()).test(module, datamodule=data(), verbose=False)
    assert not list((tmp_path / "run").rglob("*.jsonl"))


def test_two_processes_estimate_as_one(
    run: Callable[..., Ended], root: Path, model_folder: str, tmp_path: Path
) -> None:
    """From the command line: the same files, up to the rounding that depends on the batch size."""
    source = {
        "class_path": "vlm_calibration.demo.source.DemoSource",
        "init_args": {"split": "test", "scenes": 3},
    }
    calibration = {**source, "init_args": {"split": "calibration", "scenes": 1}}
    kinds = (
        "verbal.ExpectedConfidence",
        "likelihood.AnswerLikelihood",
        "p_true.PTrue",
        "consistency.SelfConsistency",
    )
    overlay = {
        "trainer": {"accelerator": "cpu", "logger": False},
        "model": {
            "init_args": {
                "base": {"name_or_path": model_folder},
                "adapters": None,
                "oracle_levels": None,
                "max_new_tokens": 3,
                "estimators": [{"class_path": f"vlm_calibration.estimators.{kind}"} for kind in kinds],
            }
        },
        "data": {
            "test": {"": {"source": source, "noise": "drawn"}},
            "calibration": {"held_out": {"source": calibration}},
            "eval_batch_size": 4,
            "workers": 0,
        },
    }
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
    command = [
        "test",
        "--config",
        str(root / "configs/eval/demo.yaml"),
        "--config",
        str(tmp_path / "overlay.yaml"),
    ]
    ended = run(*command, "--trainer.default_root_dir", str(tmp_path / "one"))
    assert ended.status == 0, ended.err
    two = [
        "--trainer.default_root_dir",
        str(tmp_path / "two"),
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
    ]
    ended = run_plainly([*command, *two], root, tmp_path)
    assert ended.status == 0, ended.err

    for file, n in (("predictions.jsonl", 9), ("calibration.jsonl", 3)):
        one_process, two_processes = (
            read_predictions(tmp_path / name / "base" / file) for name in ("one", "two")
        )
        assert len(one_process) == n
        for a, b in zip(one_process, two_processes, strict=True):
            assert {**a.to_dict(), **dict.fromkeys(NAMES)} == {**b.to_dict(), **dict.fromkeys(NAMES)}
            assert a.estimates == pytest.approx(b.estimates, abs=1e-5)
    metrics = [json.loads((tmp_path / name / "base/metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[0] == pytest.approx(metrics[1], abs=2e-4)
    assert f"ece@{NAMES[-1]}" in metrics[0]
