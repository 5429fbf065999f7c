"""Level fitting: every answer at every level is counted, and the written table loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest

from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.perturbation.levels import AnchoredLevels, LinearLevels
from vlm_calibration.records import DataError, LoadedImage, Prediction, Query
from vlm_calibration.stages import level_fit
from vlm_calibration.stages.answering import answer_batch
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.stages.level_fit import LevelFitModule

Data = Callable[..., PerturbedQueryDataModule]
FOUR, TWO = DemoSource("calibration", scenes=4), DemoSource("calibration", scenes=2)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Prediction]:
    """The model's answers, graded at random with an accuracy that falls with the strength.

    The tiny model itself is hardly ever correct, which gives no table.
    """
    answers: list[Prediction] = []
    rng = np.random.default_rng(0)

    def answer(*arguments: Any) -> list[Prediction]:
        graded = [replace(p, correct=bool(rng.random() >= p.strength)) for p in answer_batch(*arguments)]
        answers.extend(graded)
        return graded

    monkeypatch.setattr(level_fit, "answer_batch", answer)
    return answers


def test_counts_add_up_and_the_table_loads(
    model_folder: str,
    data: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    answers: list[Prediction],
) -> None:
    out = tmp_path / "deep" / "levels.json"
    module = LevelFitModule(BaseModel(model_folder, dtype="float32"), str(out), max_new_tokens=5)
    kinds = {"noise": 1.0, "blur": 3.0, "fade": 0.0}
    policy = NoisePolicy(levels=LinearLevels(n_levels=6), kinds=kinds, distractor_probability=0.0, seed=3)
    trainer().test(module, datamodule=data(levels=FOUR, noise=policy), verbose=False)

    assert len(answers) == 12 * 11
    total = Counter((p.answer_type, p.perturbation, p.strength) for p in answers)
    correct = Counter((p.answer_type, p.perturbation, p.strength) for p in answers if p.correct)
    assert 40 < sum(correct.values()) < 80

    levels = AnchoredLevels(out)
    assert levels.table.kinds == ("noise", "blur")
    assert levels.answer_types == ("yes_no", "short")
    for answer_type, counts in levels.table.counts.items():
        for kind, rows in counts.pooled.items():
            assert [row.strength for row in rows] == [0, 0.2, 0.4, 0.6, 0.8, 1]
            for strength, n, n_correct in rows:
                key = (answer_type, kind if strength else "", strength)
                assert (n, n_correct) == (total[key], correct[key])
    assert not list(out.parent.glob("*.parquet")), "likelihoods are not asked for"
    provenance = levels.table.provenance
    assert provenance["model"] == model_folder
    assert provenance["seed"] == 3
    assert "CosineSchedule" in provenance["schedule"]
    assert provenance["resolution"] == "model"
    assert "{question}" in provenance["prompt"]


def test_absent_objects_are_noised_as_in_training(model_folder: str, data: Data) -> None:
    splits = {"": EvalSplit(TWO, "every_level")}
    queries = data(test=splits, noise=NoisePolicy(distractor_probability=0.5))
    queries.setup("test")
    dataset = queries.test_set
    strengths = [dataset[0, i].perturbation.strength for i in range(len(dataset))]
    assert strengths == [s for s in LinearLevels().strengths() for _ in range(6)], (
        "none is lost to a distractor"
    )


def test_clean_absent_objects_count_as_untouched(
    model_folder: str,
    data: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    answers: list[Prediction],
) -> None:
    # With `absent: clean` a "no" question stays clean, so it is asked once and counts at strength 0.
    module = LevelFitModule(
        BaseModel(model_folder, dtype="float32"), str(tmp_path / "l.json"), max_new_tokens=3
    )
    policy = NoisePolicy(levels=LinearLevels(n_levels=3), absent="clean")
    trainer().test(module, datamodule=data(levels=FOUR, noise=policy), verbose=False)
    (counts,) = AnchoredLevels(tmp_path / "l.json").table.counts["yes_no"].bins
    assert {row.strength: row.n for row in counts["noise"]} == {0: 4 + 4, 0.5: 4, 1: 4}


class Damaged(DemoSource):
    """A source without the images of the first scene, and without regions in the second."""

    on_bad_record = "skip"

    def load(self, query: Query) -> LoadedImage:
        if query.image.endswith("000000"):
            raise DataError(f"record {query.id!r}: damaged")
        return super().load(query)

    def labels(self, query: Query) -> Sequence[str]:
        return () if query.image.endswith("000001") else super().labels(query)


@pytest.mark.filterwarnings("ignore:data.levels")
def test_queries_without_a_region_count_once_and_those_without_a_readable_image_never(
    model_folder: str,
    data: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    answers: list[Prediction],
) -> None:
    """Of four scenes three are left, the yes and the corner of one untouched alone; whole batches of the first scene are empty."""
    module = LevelFitModule(
        BaseModel(model_folder, dtype="float32"), str(tmp_path / "l.json"), max_new_tokens=3
    )
    trainer().test(module, datamodule=data(levels=Damaged("calibration", scenes=4)), verbose=False)
    counts = AnchoredLevels(tmp_path / "l.json").table.counts
    assert [row.n for row in counts["yes_no"].pooled["noise"]] == [6] + [5] * 10
    assert [row.n for row in counts["short"].pooled["noise"]] == [3] + [2] * 10


class Absent(DemoSource):
    """Only the queries about absent objects."""

    def queries(self) -> Sequence[Query]:
        return [query for query in super().queries() if query.answer == "No"]


def test_a_level_without_queries_is_an_error(
    model_folder: str, data: Data, trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    module = LevelFitModule(
        BaseModel(model_folder, dtype="float32"), str(tmp_path / "l.json"), max_new_tokens=3
    )
    queries = data(levels=Absent("calibration", scenes=1), noise=NoisePolicy(absent="clean"))
    with pytest.raises(DataError, match=r"^data\.levels: no query can be perturbed"):
        trainer().test(module, datamodule=queries, verbose=False)
    assert not (tmp_path / "l.json").exists()


def test_without_levels_nothing_is_loaded(data: Data, trainer: Callable[..., L.Trainer]) -> None:
    """The test set is not measured in their place."""
    module = LevelFitModule(BaseModel("no/such-model"))
    with pytest.raises(DataError, match=r"data\.levels is not set"):
        trainer().test(module, datamodule=data(), verbose=False)


def test_one_data_module_serves_levels_and_evaluation(
    model_folder: str,
    data: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    answers: list[Prediction],
) -> None:
    """Each command asks its own queries, whatever else is set."""
    queries = data(levels=FOUR, calibration={"held": EvalSplit(DemoSource("calibration", 1, first=50))})
    base = BaseModel(model_folder, dtype="float32")
    module = LevelFitModule(base, str(tmp_path / "l.json"), max_new_tokens=5)
    trainer().test(module, datamodule=queries, verbose=False)
    assert list(queries.tested_queries) == ["levels"]
    evaluation = EvaluationModule(base, max_new_tokens=3)
    trainer(PredictionWriter()).test(evaluation, datamodule=queries, verbose=False)
    assert list(queries.tested_queries) == ["test", "calibration"]


def test_a_table_that_teaches_nothing_is_not_written(
    model_folder: str, data: Data, trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    """The tiny model is never correct."""
    out = tmp_path / "levels.json"
    module = LevelFitModule(BaseModel(model_folder, dtype="float32"), str(out), max_new_tokens=3)
    policy = NoisePolicy(levels=LinearLevels(n_levels=2))
    with pytest.raises(DataError) as caught:
        trainer().test(module, datamodule=data(levels=FOUR, noise=policy), verbose=False)
    assert str(caught.value).startswith(f"{out} is not written: yes_no answers teach no confidence")
    assert "0/8 at 0, 0/8 at 1" in str(caught.value)
    assert not out.exists()
