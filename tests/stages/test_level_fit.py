"""Level fitting: which queries are asked at which levels, and interruptions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest

from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy, query_rng
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators import base
from vlm_calibration.estimators.base import grade_answers
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.perturbation.level_table import read_likelihoods
from vlm_calibration.perturbation.levels import AnchoredLevels, LinearLevels
from vlm_calibration.records import DataError, LoadedImage, Prediction, Query
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

    def answer(*arguments: Any) -> list[Prediction]:
        graded = [
            replace(p, correct=bool(query_rng(0, 0, p.id).random() >= p.strength))
            for p in grade_answers(*arguments)
        ]
        answers.extend(graded)
        return graded

    monkeypatch.setattr(base, "grade_answers", answer)
    return answers


def test_absent_objects_are_noised_as_in_training(model_folder: str, data: Data) -> None:
    splits = {"": EvalSplit(TWO, "every_level")}
    queries = data(test=splits, noise=NoisePolicy(distractor_probability=0.5))
    queries.setup("test")
    dataset = queries.sets["test"]
    strengths = [dataset[0, i].perturbation.strength for i in range(len(dataset))]
    assert strengths == [s for s in LinearLevels().strengths() for _ in range(6)], (
        "none is lost to a distractor"
    )


def test_queries_that_no_perturbation_touches_are_asked_and_counted_once(
    model_folder: str,
    data: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    answers: list[Prediction],
) -> None:
    """With `absent: clean`; the rows of strengths are about the other queries alone."""
    module = LevelFitModule(
        BaseModel(model_folder, dtype="float32"), str(tmp_path / "l.json"), max_new_tokens=3
    )
    policy = NoisePolicy(levels=LinearLevels(n_levels=3), absent="clean")
    trainer().test(module, datamodule=data(levels=FOUR, noise=policy), verbose=False)
    asked = Counter((p.answer, p.strength) for p in answers if p.answer_type == "yes_no")
    assert asked == {("Yes", 0): 4, ("Yes", 0.5): 4, ("Yes", 1): 4, ("No", 0): 4}
    counts = AnchoredLevels(tmp_path / "l.json").table.counts["yes_no"]
    assert [sum(row.n) for row in counts.kinds["noise"]] == [4, 4, 4]
    assert sum(counts.never_perturbed.n) == 4
    assert [path.name for path in tmp_path.rglob("*.*")] == ["l.json"], "likelihoods are not asked for"


class Damaged(DemoSource):
    """A source without the images of the first scene, and without regions in the second."""

    on_bad_record = "skip"

    def load(self, query: Query) -> LoadedImage:
        if query.image.endswith("000000"):
            raise DataError(f"record {query.id!r}: damaged")
        return super().load(query)

    def labels(self, query: Query) -> Sequence[str]:
        return () if query.image.endswith("000001") else super().labels(query)


@pytest.mark.filterwarnings("ignore:data.levels", "ignore:data.train")
def test_queries_without_a_region_count_once_and_those_without_a_readable_image_never(
    model_folder: str,
    data: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    answers: list[Prediction],
) -> None:
    """Of four scenes three are left, the yes and the corner of one untouched alone; whole batches of the first scene are empty."""
    out, likelihoods = tmp_path / "l.json", tmp_path / "l.parquet"
    module = LevelFitModule(BaseModel(model_folder, dtype="float32"), str(out), str(likelihoods), 3)
    sources = {"levels": Damaged("calibration", scenes=4), "train": Damaged("train", scenes=2)}
    noise = NoisePolicy(levels=LinearLevels(n_levels=3))
    trainer().test(module, datamodule=data(**sources, noise=noise), verbose=False)
    table = AnchoredLevels(out).table
    assert [sum(row.n) for row in table.counts["yes_no"].kinds["noise"]] == [5] * 3
    assert [sum(row.n) for row in table.counts["short"].kinds["noise"]] == [2] * 3
    assert [c.never_perturbed.n for c in table.counts.values()] == [(1,), (1,)]
    readable = [q.id for q in sources["train"].queries() if not q.image.endswith("000000")]
    assert list(read_likelihoods(likelihoods, table.provenance, "")) == readable


class Absent(DemoSource):
    """Only the queries about absent objects."""

    def queries(self) -> Sequence[Query]:
        return [query for query in super().queries() if query.answer == "No"]


@pytest.mark.parametrize(
    ("settings", "likelihoods", "culprit"),
    [
        (
            {"levels": Absent("calibration", scenes=1), "noise": NoisePolicy(absent="clean")},
            None,
            r"^data\.levels: no query can be perturbed",
        ),
        ({}, None, r"data\.levels is not set"),
        ({"levels": FOUR, "train": None}, "l.parquet", r"data\.train is not set"),
    ],
)
def test_without_queries_nothing_is_loaded(
    data: Data,
    trainer: Callable[..., L.Trainer],
    settings: dict[str, Any],
    likelihoods: str | None,
    culprit: str,
) -> None:
    """The test set is not measured in their place."""
    module = LevelFitModule(BaseModel("no/such-model"), likelihoods=likelihoods)
    with pytest.raises(DataError, match=culprit):
        trainer().test(module, datamodule=data(**settings), verbose=False)


def test_each_command_asks_its_own_queries_of_one_data_module(data: Data) -> None:
    splits = {"held": EvalSplit(DemoSource("calibration", 1, first=50))}
    queries = data(levels=FOUR, calibration=splits, noise=NoisePolicy(levels=LinearLevels(n_levels=3)))
    for module, asked in (
        (LevelFitModule(BaseModel("nowhere")), ["levels"]),
        (EvaluationModule(BaseModel("nowhere")), ["test", "calibration"]),
    ):
        queries.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
        queries.setup("test")
        assert list(queries.tested_queries) == asked


# --- Interruptions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fit_levels(
    model_folder: str, data: Data, trainer: Callable[..., L.Trainer], tmp_path: Path
) -> Callable[..., dict[str, bytes]]:
    """Measures with a new module and returns what it wrote."""

    def fit(name: str = "run", start_over: bool = False, max_new_tokens: int = 3) -> dict[str, bytes]:
        out, likelihoods = tmp_path / name / "levels.json", tmp_path / name / "likelihoods.parquet"
        base = BaseModel(model_folder, dtype="float32")
        module = LevelFitModule(base, str(out), str(likelihoods), max_new_tokens)
        module.start_over, module.run_digest = start_over, f"of {max_new_tokens}"
        policy = NoisePolicy(levels=LinearLevels(n_levels=3))
        run = trainer(default_root_dir=tmp_path / name)
        run.test(module, datamodule=data(levels=FOUR, noise=policy), verbose=False)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    return fit


TOTAL = 12 * 3 + 9
"""The queries of `FOUR` at three levels, and those of `data.train`."""


def interrupt(monkeypatch: pytest.MonkeyPatch, fit: Callable[..., object], batches: int) -> None:
    """Begin to measure, and fail after this many batches."""
    answer, calls = base.grade_answers, iter(range(batches))

    def fail(*arguments: Any) -> list[Prediction]:
        if next(calls, None) is None:
            raise RuntimeError("interrupted")
        return answer(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(base, "grade_answers", fail)
        with pytest.raises(RuntimeError, match="interrupted"):
            fit()


def test_an_interrupted_measurement_resumes_and_ends_as_an_uninterrupted_one(
    fit_levels: Callable[..., dict[str, bytes]],
    answers: list[Prediction],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted among the levels, and among the training queries."""
    whole = fit_levels("whole")
    assert whole.keys() == {"levels.json", "likelihoods.parquet"}, "answers are removed in the end"
    for batches in (4, 10):
        answers.clear()
        interrupt(monkeypatch, partial(fit_levels, f"cut-{batches}"), batches)
        assert 0 < len(answers) < TOTAL
        assert fit_levels(f"cut-{batches}") == whole
        assert len(answers) == len({p.id for p in answers}) == TOTAL


@pytest.mark.parametrize("changes", [{"start_over": True}, {"max_new_tokens": 4}, {}])
def test_a_measurement_of_other_settings_or_images_or_with_overwrite_starts_over(
    fit_levels: Callable[..., dict[str, bytes]],
    answers: list[Prediction],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    """An image may be edited after the interruption, under the same name."""
    interrupt(monkeypatch, fit_levels, 4)
    answers.clear()
    if not changes:
        monkeypatch.setattr(DemoSource, "image_digest", lambda self, query: "edited")
    fit_levels(**changes)
    assert len(answers) == TOTAL


def test_a_table_that_teaches_nothing_is_not_written_and_keeps_its_answers(
    fit_levels: Callable[..., dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model is never correct; measured again, it is asked nothing."""
    with pytest.raises(DataError) as caught:
        fit_levels()
    out = tmp_path / "run/levels.json"
    assert str(caught.value).startswith(f"{out} is not written: yes_no answers teach no confidence")
    assert "0/8 at 0, 0/8 at 0.5, 0/8 at 1" in str(caught.value)
    assert str(tmp_path / "run/.answered.*.jsonl") in str(caught.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".answered.0.jsonl"]
    monkeypatch.setattr(base, "grade_answers", None)
    with pytest.raises(DataError) as again:
        fit_levels()
    assert str(again.value) == str(caught.value)
