"""Estimators in an evaluation: their keys and metrics in the files, their cost, and several processes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch, Estimator
from vlm_calibration.estimators.consistency import SelfConsistency
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.p_true import PTrue
from vlm_calibration.estimators.predictions import prediction_from_dict, read_predictions
from vlm_calibration.estimators.stability import Stability
from vlm_calibration.estimators.verbal import ExpectedConfidence, VerbalizedConfidence
from vlm_calibration.metrics import functional
from vlm_calibration.models.adapters import load_adapters, using_adapter
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.records import DataError
from vlm_calibration.stages import evaluation
from vlm_calibration.stages.answering import answer_batch
from vlm_calibration.stages.evaluation import EvaluationModule

from ..command_line import Ended, run_plainly

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
    tokenizer = AnswerTokenizer(queries.chat, [LinearLevels(n_levels=101)])
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


@pytest.mark.slow
def test_stability_rates_the_answers_of_every_system(
    run_evaluation: Callable[..., Any], new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    run_evaluation({"one": new_adapter(1)}, estimators=[AnswerLikelihood(), Stability()])
    for system in ("base", "one"):
        metrics = json.loads((tmp_path / "run" / system / "metrics.json").read_text())
        assert metrics["forward_passes@stability"] == 4
        assert "brier@stability" in metrics
        lines = (tmp_path / "run" / system / "predictions.jsonl").read_text().splitlines()
        rated = [json.loads(line) for line in lines]
        assert all((r["stability"] is None) == (r["likelihood"] is None) for r in rated)
        assert [r["stability"] for r in rated] != [r["likelihood"] for r in rated]


@pytest.mark.parametrize(
    ("chosen", "fractional", "refused"),
    [
        ({"estimators": [ExpectedConfidence()]}, 10, True),
        ({"probes": ["image"]}, 10, True),
        ({"probes": ["image"]}, 7, False),
        ({"estimators": [AnswerLikelihood()]}, 15, False),
    ],
)
def test_a_system_that_mostly_states_what_is_not_scored_is_refused(
    run_evaluation: Callable[..., EvaluationModule],
    monkeypatch: pytest.MonkeyPatch,
    chosen: dict[str, Any],
    fractional: int,
    refused: bool,
) -> None:
    """`fractional` of the 15 answers state fractions of a percent, all others whole percents."""
    stated = iter([0.875] * fractional + [0.29] * (15 - fractional))

    def answers(*arguments: Any) -> list[Any]:
        return [replace(answer, confidence=next(stated)) for answer in answer_batch(*arguments)]

    monkeypatch.setattr(evaluation, "answer_batch", answers)
    with pytest.raises(DataError, match="'base'.* 87.5%") if refused else nullcontext():
        run_evaluation({}, **chosen)


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
        "stability.Stability",
    )
    names = (*NAMES, "stability")
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
            assert {**a.to_dict(), **dict.fromkeys(names)} == {**b.to_dict(), **dict.fromkeys(names)}
            assert a.estimates == pytest.approx(b.estimates, abs=1e-5)
    metrics = [json.loads((tmp_path / name / "base/metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[0] == pytest.approx(metrics[1], abs=2e-4)
    assert all(f"ece@{name}" in metrics[0] for name in names)
    assert metrics[0]["forward_passes@stability"] == 4
