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
from vlm_calibration.estimators import base
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch, Estimator
from vlm_calibration.estimators.consistency import SelfConsistency
from vlm_calibration.estimators.generating import answer_batch
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
from vlm_calibration.stages.evaluation import EvaluationModule

from ..command_line import Ended

Data = Callable[..., PerturbedQueryDataModule]
NAMES = ("expected", "likelihood", "p_true", "self_consistency", "stability")


def estimators() -> list[Estimator]:
    return [ExpectedConfidence(), AnswerLikelihood(), PTrue(), SelfConsistency(2)]


@pytest.mark.slow
def test_every_estimator_has_its_key_and_its_metrics(
    run_evaluation: Callable[..., EvaluationModule],
    data: Data,
    load_model: Callable[..., Any],
    new_adapter: Callable[..., str],
    tmp_path: Path,
) -> None:
    adapter, folder = new_adapter(1), tmp_path / "run"
    run_evaluation({"one": adapter}, estimators=[*estimators(), Stability()])
    queries = data(eval_batch_size=5)
    queries.setup("test")
    estimates: dict[str, list[Any]] = {}
    for system in ("base", "one"):
        lines = [json.loads(x) for x in (folder / system / "predictions.jsonl").read_text().splitlines()]
        assert [tuple(line)[-6:] for line in lines] == [("image", *NAMES)] * 15
        predictions = [prediction_from_dict(line) for line in lines]
        estimates[system] = [p.estimates for p in predictions]
        assert all((p["stability"] is None) == (p["likelihood"] is None) for p in estimates[system])
        assert [p["stability"] for p in estimates[system]] != [p["likelihood"] for p in estimates[system]]

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
        assert [metrics[f"forward_passes@{n}"] for n in (*NAMES[:3], "stability")] == [1, 1, 1, 4]
        assert 1 <= metrics["forward_passes@verbalized"] <= 5
        assert 2 <= metrics["forward_passes@self_consistency"] <= 10
    assert estimates["base"] != estimates["one"]

    # Another batch, other padding, no cache: the same estimates.
    model = load_adapters(load_model(), {"one": adapter})
    tokenizer = AnswerTokenizer(queries.chat, [LinearLevels(n_levels=101)])
    with torch.no_grad(), using_adapter(model, "one"):
        part, batch = predictions[:5], next(iter(queries.test_dataloader()))
        answered = AnsweredBatch(model, batch, part, [0] * 5, tokenizer, 5)
        for estimator in estimators():
            again = estimator.estimate(answered).confidence
            assert again == pytest.approx([p.estimates[estimator.name] for p in part], abs=1e-5)

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

    monkeypatch.setattr(base, "answer_batch", answers)
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


def test_two_processes_evaluate_as_one(
    run: Callable[..., Ended],
    run_two: Callable[..., Ended],
    root: Path,
    model_folder: str,
    new_adapter: Callable[..., str],
    levels_file: str,
    tmp_path: Path,
) -> None:
    """From the command line: the same files, each written once; estimates up to the rounding that depends on the batch size."""
    source = {
        "class_path": "vlm_calibration.demo.source.DemoSource",
        "init_args": {"split": "test", "scenes": 3},
    }
    calibration = {**source, "init_args": {"split": "calibration", "scenes": 1}}
    kinds = (
        "verbal.ExpectedConfidence",
        "likelihood.AnswerLikelihood",
        "consistency.SelfConsistency",
        "stability.Stability",
    )
    names = ("expected", "likelihood", "self_consistency", "stability")
    overlay = {
        "trainer": {"accelerator": "cpu", "logger": False},
        "model": {
            "init_args": {
                "base": {"name_or_path": model_folder},
                "adapters": {"one": new_adapter(1)},
                "oracle_levels": levels_file,
                "max_new_tokens": 3,
                "estimators": [{"class_path": f"vlm_calibration.estimators.{kind}"} for kind in kinds],
            }
        },
        "data": {
            "test": {"": {"source": source, "noise": "drawn"}},
            "noise": {"kinds": {"noise": 1}},
            "calibration": {"held_out": {"source": calibration}},
            "eval_batch_size": 4,
            "workers": 0,
        },
    }
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
    configs = (str(root / "configs/eval/demo.yaml"), str(tmp_path / "overlay.yaml"))
    command = ["test", *(word for path in configs for word in ("--config", path))]
    folders = [tmp_path / name for name in ("one", "two")]
    alone = run(*command, "--trainer.default_root_dir", str(folders[0]))
    assert alone.status == 0, alone.err
    ddp = ("--trainer.strategy", "ddp", "--trainer.default_root_dir", str(folders[1]))
    together = run_two(*command, *ddp)
    assert together.status == 0, together.err
    assert [ended.out.count("All 9 answers") for ended in (alone, together)] == [1, 1], "one process reports"
    written = [{p.relative_to(f) for p in f.rglob("*") if p.is_file()} for f in folders]
    assert written[0] == written[1]

    for system in ("base", "one", "oracle"):
        for file, n in (("predictions.jsonl", 9), ("calibration.jsonl", 3)):
            if system == "oracle" and file == "calibration.jsonl":
                continue
            one_process, two_processes = (read_predictions(folder / system / file) for folder in folders)
            assert len(one_process) == n
            for a, b in zip(one_process, two_processes, strict=True):
                assert {**a.to_dict(), **dict.fromkeys(names)} == {**b.to_dict(), **dict.fromkeys(names)}
                assert a.estimates == pytest.approx(b.estimates, abs=1e-5)
        metrics = [json.loads((folder / system / "metrics.json").read_text()) for folder in folders]
        assert metrics[0] == pytest.approx(metrics[1], abs=2e-4)
        assert all((f"ece@{name}" in metrics[0]) == (system != "oracle") for name in names)
