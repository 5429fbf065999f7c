"""Tables of a few answers with their images, and the comparison that an evaluation prints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest

from vlm_calibration.callbacks.media import LARGEST_SIDE, drawing, photo
from vlm_calibration.callbacks.official import OfficialScores, benchmark_splits
from vlm_calibration.callbacks.results_table import ResultsTable
from vlm_calibration.callbacks.samples import SampleTable, spread
from vlm_calibration.data.dataset import EvalSplit, PerturbedQueries
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.predictions import graded_prediction
from vlm_calibration.metrics.figures import reliability_diagram
from vlm_calibration.metrics.table import ConfidenceTable
from vlm_calibration.perturbation.levels import CLEAN
from vlm_calibration.records import DataError
from vlm_calibration.stages.scoring import Scorer
from vlm_calibration.text.grading import Grading


@pytest.fixture(scope="module")
def dataset(processor: Any) -> PerturbedQueries:
    splits = {"noised": EvalSplit(DemoSource("test", 3), "drawn")}
    return PerturbedQueries(splits, NoisePolicy(), processor.image_processor)


@pytest.mark.parametrize(
    ("length", "size", "processes", "indices"),
    [(11, 4, 1, [0, 3, 7, 10]), (10, 3, 2, [0, 4, 8]), (2, 5, 1, [0, 1]), (0, 3, 1, [])],
)
def test_samples_are_evenly_spaced(length: int, size: int, processes: int, indices: list[int]) -> None:
    assert spread(length, size, processes) == indices


def test_a_table_has_a_row_for_each_query_and_the_answers_of_each_system(dataset: PerturbedQueries) -> None:
    table = SampleTable(dataset, size=2, taught=True)
    samples = [dataset[0, i] for i in range(len(dataset))]
    for system, text in (("base", "Yes. Confidence: 90%"), ("sft", "No. Confidence: 20%")):
        table.update(
            system,
            [graded_prediction(s.query, text, s.perturbation, s.noise_step, Grading()) for s in samples],
        )
    logged = table.draw()
    first, last = (dict(zip(logged.columns, row, strict=True)) for row in logged.data)
    assert (first["id"], last["id"]) == (samples[0].query.id, samples[-1].query.id)
    assert (first["perturbation"], first["strength"]) == samples[0].perturbation
    assert first["earned_confidence"] == samples[0].confidence
    assert (first["base_confidence"], first["sft_confidence"]) == (0.9, 0.2)
    assert first["base_correct"] != first["sft_correct"]


def test_photographs_are_shrunk_and_figures_are_not(dataset: PerturbedQueries) -> None:
    image = photo(np.zeros((300, 1024, 3), np.uint8))
    assert (image._width, image._height) == (LARGEST_SIDE, 150)
    figure = reliability_diagram(ConfidenceTable.empty())
    width, height = figure.get_size_inches() * figure.dpi
    assert (drawing(figure)._width, drawing(figure)._height) == (int(width), int(height))


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


def test_only_the_questions_of_benchmarks_have_official_scores() -> None:
    assert benchmark_splits({"mine": EvalSplit(DemoSource("test", 1))}) == {}
