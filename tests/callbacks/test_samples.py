"""The comparison that an evaluation prints, and the official scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest

from vlm_calibration.callbacks.official import OfficialScores
from vlm_calibration.callbacks.results_table import ResultsTable
from vlm_calibration.data.dataset import EvalSplit, PerturbedQueries
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.predictions import graded_prediction
from vlm_calibration.perturbation.levels import CLEAN
from vlm_calibration.records import DataError
from vlm_calibration.stages.scoring import Scorer
from vlm_calibration.text.grading import Grading


@pytest.fixture(scope="module")
def dataset(processor: Any) -> PerturbedQueries:
    splits = {"noised": EvalSplit(DemoSource("test", 3), "drawn")}
    return PerturbedQueries(splits, NoisePolicy(), processor.image_processor)


def test_the_first_process_prints_the_comparison(
    dataset: PerturbedQueries, capsys: pytest.CaptureFixture[str]
) -> None:
    query, scorer = dataset[0, 0].query, Scorer()
    scorer.update([graded_prediction(query, f"{query.answer}. Confidence: 75%", CLEAN, 0, Grading())])
    module: Any = SimpleNamespace(results={"mine": scorer.compute()})
    for is_first in (True, False):
        trainer: Any = SimpleNamespace(is_global_zero=is_first, default_root_dir="runs/eval")
        ResultsTable().on_test_end(trainer, module)
        printed = capsys.readouterr().out
        assert ("mine" in printed) is is_first
        assert ("0.250" in printed) is is_first


def test_official_scores_need_written_predictions() -> None:
    callback = OfficialScores()
    trainer = L.Trainer(callbacks=[callback], logger=False, accelerator="cpu")
    with pytest.raises(DataError, match="OfficialScores needs a PredictionWriter before it"):
        callback.setup(trainer, L.LightningModule(), "test")
