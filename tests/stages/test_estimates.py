"""Estimators and probes in an evaluation: their keys and metrics in the files, and their cost."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators import base
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch, grade_answers
from vlm_calibration.estimators.consistency import SelfConsistency
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.p_true import PTrue
from vlm_calibration.estimators.predictions import prediction_from_dict, read_predictions
from vlm_calibration.estimators.probes import PROBES
from vlm_calibration.estimators.stability import Stability
from vlm_calibration.estimators.verbal import ExpectedConfidence, VerbalizedConfidence
from vlm_calibration.metrics import functional
from vlm_calibration.models.adapters import load_adapters, using_adapter
from vlm_calibration.models.base import BaseModel
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.records import DataError
from vlm_calibration.reporting.report.data import summarize_predictions
from vlm_calibration.stages.evaluation import EvaluationModule

from .preference import Data, Evaluate, LoadModel, MakeTrainer, NewAdapter

NAMES = ("expected", "likelihood", "p_true", "self_consistency", "stability")


@pytest.mark.slow
def test_every_estimator_has_its_key_and_its_metrics(
    run_evaluation: Evaluate, new_adapter: NewAdapter, tmp_path: Path
) -> None:
    folder, chosen = tmp_path / "run", [ExpectedConfidence(), AnswerLikelihood(), PTrue(), SelfConsistency(2)]
    run_evaluation({"one": new_adapter(1)}, estimators=[*chosen, Stability()])
    estimates: dict[str, list[Any]] = {}
    for system in ("base", "one"):
        lines = [json.loads(x) for x in (folder / system / "predictions.jsonl").read_text().splitlines()]
        assert [tuple(line)[-6:] for line in lines] == [("image", *NAMES)] * 15
        predictions = [prediction_from_dict(line) for line in lines]
        estimates[system] = [p.estimates for p in predictions]
        assert all((p["stability"] is None) == (p["likelihood"] is None) for p in estimates[system])
        assert [p["stability"] for p in estimates[system]] != [p["likelihood"] for p in estimates[system]]

        metrics = json.loads((folder / system / "metrics.json").read_text())
        shifted = [p for p in predictions if "shifted" in (p.category or "").split("/")]
        for suffix, part in (("", predictions), ("/shifted", shifted)):
            for name in NAMES:
                rated = [(c, p.correct) for p in part if (c := p.estimates[name]) is not None]
                assert metrics[f"parse_failure_rate@{name}{suffix}"] == pytest.approx(
                    1 - len(rated) / len(part)
                )
                if rated:
                    confidence, correct = (torch.tensor(column) for column in zip(*rated, strict=True))
                    brier = float(functional.brier_score(confidence.double(), correct))
                    assert metrics[f"brier@{name}{suffix}"] == pytest.approx(brier, abs=1e-4)
                    mean = float(confidence.mean())
                    assert metrics[f"mean_confidence@{name}{suffix}"] == pytest.approx(mean, abs=1e-4)
        assert [metrics[f"forward_passes@{n}"] for n in (*NAMES[:3], "stability")] == [1, 1, 1, 4]
        assert 1 <= metrics["forward_passes@verbalized"] <= 5
        assert 2 <= metrics["forward_passes@self_consistency"] <= 10
    assert estimates["base"] != estimates["one"]

    oracle = (folder / "oracle" / "predictions.jsonl").read_text().splitlines()
    assert not set(NAMES) & set(json.loads(oracle[0])), "the oracle is not a model"
    assert not [key for key in json.loads((folder / "oracle" / "metrics.json").read_text()) if "@" in key]


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
    run_evaluation: Evaluate,
    monkeypatch: pytest.MonkeyPatch,
    chosen: dict[str, Any],
    fractional: int,
    refused: bool,
) -> None:
    """`fractional` of the 15 answers state fractions of a percent, all others whole percents."""
    stated = iter([0.875] * fractional + [0.29] * (15 - fractional))

    def answers(*arguments: Any) -> list[Any]:
        return [replace(answer, confidence=next(stated)) for answer in grade_answers(*arguments)]

    monkeypatch.setattr(base, "grade_answers", answers)
    with pytest.raises(DataError, match="'base'.* 87.5%") if refused else nullcontext():
        run_evaluation({}, **chosen)


def test_an_estimator_that_appears_twice_is_refused() -> None:
    for chosen in ([PTrue(), PTrue(true="Yes", false="No")], [VerbalizedConfidence()]):
        with pytest.raises(DataError, match=f"'{chosen[0].name}' appears twice"):
            EvaluationModule(BaseModel("nowhere"), estimators=chosen)


KEYS = ("original", *PROBES)


@pytest.fixture
def queries(data: Data) -> PerturbedQueryDataModule:
    """Six queries, in batches of four and two, and a calibration set."""
    source = DemoSource("test", scenes=1)
    held_out = {"held_out": EvalSplit(DemoSource("calibration", scenes=1))}
    return data(test={"clean": EvalSplit(source), "noised": EvalSplit(source, "drawn")}, calibration=held_out)


def metrics_of(folder: Path, of_probes: bool = True) -> dict[str, Any]:
    """The metrics of a system that are of probes, or all others."""
    values: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return {k: v for k, v in values.items() if (k.startswith("probe_") or "@probes" in k) == of_probes}


@pytest.mark.slow
def test_every_answer_of_a_model_has_its_probed_confidences_and_nothing_else_changes(
    run_evaluation: Evaluate,
    new_adapter: NewAdapter,
    load_model: LoadModel,
    queries: PerturbedQueryDataModule,
    tmp_path: Path,
) -> None:
    estimators, folder = [ExpectedConfidence(), Stability()], tmp_path / "run"
    run_evaluation({}, queries=queries, estimators=estimators)
    without = (
        metrics_of(folder / "base", of_probes=False),
        read_predictions(folder / "base/predictions.jsonl"),
    )
    assert not metrics_of(folder / "base")
    run_evaluation({"one": new_adapter(1)}, queries=queries, estimators=estimators, probes=[*PROBES[::-1]])
    unprobed = [replace(p, probes={}) for p in read_predictions(folder / "base/predictions.jsonl")]
    assert (metrics_of(folder / "base", of_probes=False), unprobed) == without, "probes change nothing else"
    model = load_adapters(load_model(), {"one": new_adapter(1)})
    tokenizer = AnswerTokenizer(queries.chat, LinearLevels(n_levels=101))
    for system in ("base", "one"):
        predictions = read_predictions(folder / system / "predictions.jsonl")
        assert [tuple(p.probes) for p in predictions] == [KEYS] * 6
        with torch.no_grad(), using_adapter(model, None if system == "base" else system):
            test, _ = queries.test_dataloader()
            for start, batch in zip((0, 4), test, strict=True):
                part = predictions[start : start + 4]
                answered = AnsweredBatch(model, batch, part, [0] * len(part), tokenizer, 5)
                assert answered.read_probes(PROBES)[0] == [p.probes for p in part]
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


def test_the_original_confidence_is_the_stated_one(
    demo_folder: str, trainer: MakeTrainer, tmp_path: Path
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
