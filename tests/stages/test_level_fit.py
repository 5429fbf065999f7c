"""Level fitting: which queries are asked at which levels, interruptions, bins of the base model's own likelihood, and likelihoods."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.callbacks.run_directory import outputs_of
from vlm_calibration.data.collate import PromptCollator
from vlm_calibration.data.dataset import EvalSplit, level_id
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy, query_rng
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators import base
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch, grade_answers
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.predictions import read_predictions
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.perturbation.level_table import (
    AnswerTypeCounts,
    LevelCount,
    Measured,
    read_likelihoods,
    read_table,
    write_likelihoods,
)
from vlm_calibration.perturbation.levels import CLEAN, AnchoredLevels, LinearLevels, Perturbation
from vlm_calibration.records import DataError, LoadedImage, Prediction, Query
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.stages.level_fit import LevelFitModule, count_levels
from vlm_calibration.stages.sft import SFTModule

from ..level_tables import noise_counts
from ..trainers import plain_trainer
from .conftest import Data, MakeTrainer, Stop

FitLevels = Callable[..., dict[str, bytes]]
FOUR = DemoSource("calibration", scenes=4)


def grade_at_random(answers: list[Prediction]) -> Callable[..., list[Prediction]]:
    """Grading with an accuracy that falls with the strength, which adds to a list what it grades.

    The tiny model itself is hardly ever correct, which gives no table.
    """

    def grade(*arguments: Any) -> list[Prediction]:
        graded = [
            replace(p, correct=bool(query_rng(0, 0, p.id).random() >= p.strength))
            for p in grade_answers(*arguments)
        ]
        answers.extend(graded)
        return graded

    return grade


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Prediction]:
    """The model's answers, graded at random."""
    answers: list[Prediction] = []
    monkeypatch.setattr(base, "grade_answers", grade_at_random(answers))
    return answers


def test_queries_that_no_perturbation_touches_are_asked_and_counted_once(
    model_folder: str, data: Data, trainer: MakeTrainer, tmp_path: Path, answers: list[Prediction]
) -> None:
    """With `absent: clean`; the rows of strengths are about the other queries alone, of which none is lost to a distractor."""
    base = BaseModel(model_folder, dtype="float32")
    module = LevelFitModule(base, str(tmp_path / "l.json"), max_new_tokens=3)
    policy = NoisePolicy(levels=LinearLevels(n_levels=3), absent="clean", distractor_probability=0.5)
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
    model_folder: str, data: Data, trainer: MakeTrainer, tmp_path: Path, answers: list[Prediction]
) -> None:
    """Of four scenes three are left, the yes and the corner of one untouched alone; whole batches of the first scene are empty."""
    out, likelihoods = tmp_path / "l.json", tmp_path / "l.parquet"
    module = LevelFitModule(BaseModel(model_folder, dtype="float32"), str(out), str(likelihoods), 3)
    sources = {"levels": Damaged("calibration", scenes=4), "train": Damaged("train", scenes=2)}
    noise = NoisePolicy(levels=LinearLevels(n_levels=3))
    few = "data.levels has 6 queries with yes_no answers: to tell hard images from easy ones, levels need 100"
    with pytest.warns(UserWarning, match=few):
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


def test_without_queries_nothing_is_loaded(data: Data, trainer: MakeTrainer) -> None:
    """The test set is not measured in their place."""
    module = LevelFitModule(BaseModel("no/such-model"), likelihoods="l.parquet")
    untouched = data(levels=Absent("calibration", scenes=1), noise=NoisePolicy(absent="clean"))
    with pytest.raises(DataError, match=r"^data\.levels: no query can be perturbed"):
        trainer().test(module, datamodule=untouched, verbose=False)
    with pytest.raises(DataError, match=r"data\.levels is not set"):
        trainer().test(module, datamodule=data(), verbose=False)
    with pytest.raises(DataError, match=r"data\.train is not set"):
        trainer().test(module, datamodule=data(levels=FOUR, train=None), verbose=False)


# --- Interruptions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fit_levels(model_folder: str, data: Data, trainer: MakeTrainer, tmp_path: Path) -> FitLevels:
    """Measures with a new module and returns what it wrote."""

    def fit(
        name: str = "run",
        *callbacks: L.Callback,
        start_over: bool = False,
        digest: str = "of these settings",
    ) -> dict[str, bytes]:
        out, likelihoods = tmp_path / name / "levels.json", tmp_path / name / "likelihoods.parquet"
        base = BaseModel(model_folder, dtype="float32")
        module = LevelFitModule(base, str(out), str(likelihoods), max_new_tokens=3)
        module.start_over, module.run_digest = start_over, digest
        policy = NoisePolicy(levels=LinearLevels(n_levels=3))
        run = trainer(*callbacks, default_root_dir=tmp_path / name)
        run.test(module, datamodule=data(levels=FOUR, noise=policy), verbose=False)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    return fit


TOTAL = 12 * 3 + 9
"""The queries of `FOUR` at three levels, and those of `data.train`."""


def test_an_interrupted_measurement_resumes_and_ends_as_an_uninterrupted_one(
    fit_levels: FitLevels, answers: list[Prediction]
) -> None:
    """Interrupted among the levels, and among the training queries."""
    whole = fit_levels("whole")
    assert whole.keys() == {"levels.json", "likelihoods.parquet"}, "answers are removed in the end"
    for name, stop in (("early", Stop(4, RuntimeError)), ("late", Stop(1, RuntimeError, loader=1))):
        answers.clear()
        with pytest.raises(RuntimeError):
            fit_levels(name, stop)
        assert 0 < len(answers) < TOTAL
        assert fit_levels(name) == whole
        assert len(answers) == len({p.id for p in answers}) == TOTAL


@pytest.mark.parametrize(
    ("edited", "settings"),
    [(False, {"start_over": True}), (True, {}), (False, {"digest": "of other settings"})],
    ids=["overwrite", "other images", "other settings"],
)
def test_a_measurement_of_other_images_or_settings_or_with_overwrite_starts_over(
    fit_levels: FitLevels,
    answers: list[Prediction],
    monkeypatch: pytest.MonkeyPatch,
    edited: bool,
    settings: dict[str, Any],
) -> None:
    """An image may be edited after the interruption, under the same name."""
    with pytest.raises(RuntimeError):
        fit_levels("run", Stop(4, RuntimeError))
    answers.clear()
    if edited:
        monkeypatch.setattr(DemoSource, "image_digest", lambda self, query: "edited")
    fit_levels(**settings)
    assert len(answers) == TOTAL


def test_a_table_that_teaches_nothing_is_not_written_and_keeps_its_answers(
    fit_levels: FitLevels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


LEVELS = (CLEAN, Perturbation("noise", 0.5), Perturbation("noise", 1.0), Perturbation("blur", 1.0))
KINDS = {"noise": 1.0, "blur": 1.0}


# --- Counts in bins -------------------------------------------------------------------------------------------------------


def answers_of(likelihoods: Sequence[float], answer_type: str = "short", seed: int = 0) -> list[Any]:
    """Answers to as many queries as likelihoods, each at every one of `LEVELS`, in random order."""
    rng = np.random.default_rng(seed)
    answers = [
        SimpleNamespace(
            query=n,
            id=level_id(f"{answer_type}-{n}", level),
            answer_type=answer_type,
            perturbation=level.kind,
            strength=level.strength,
            correct=bool(rng.random() < 0.5),
            estimates={"likelihood": likelihood} if level == CLEAN else {},
        )
        for n, likelihood in enumerate(likelihoods)
        for level in LEVELS
    ]
    return [answers[i] for i in rng.permutation(len(answers))]


def sizes(counts: AnswerTypeCounts) -> list[int]:
    """The number of queries of each bin."""
    return list(counts.kinds["noise"][0].n)


@given(
    st.lists(st.sampled_from([0.0, 0.2, 0.2, 0.5, 0.9, 1.0]) | st.floats(0, 1), min_size=1, max_size=260),
    st.integers(0, 5),
)
def test_every_answer_is_counted_in_the_bin_of_its_likelihood(likelihoods: list[float], seed: int) -> None:
    answers = answers_of(likelihoods, seed=seed)
    counts = count_levels(answers, LEVELS)["short"]
    bin_of = np.searchsorted(counts.edges, likelihoods, side="right")
    expected = Counter((bin_of[a.query], a.perturbation, a.strength) for a in answers)
    correct = Counter((bin_of[a.query], a.perturbation, a.strength) for a in answers if a.correct)
    for kind, rows in counts.kinds.items():
        for strength, n, n_correct in rows:
            keys = [(number, kind if strength else "", strength) for number in range(len(n))]
            assert list(n) == [expected[key] for key in keys]
            assert list(n_correct) == [correct[key] for key in keys]
    assert sum(sizes(counts)) == len(likelihoods)


def test_bins_hold_alike_many_queries_and_at_least_fifty() -> None:
    for n, bins in ((1, 1), (99, 1), (100, 2), (149, 2), (150, 3), (400, 8), (1000, 8)):
        likelihoods = np.random.default_rng(0).permutation(n) / n
        counts = count_levels(answers_of(likelihoods.tolist()), LEVELS)["short"]
        assert len(sizes(counts)) == bins
        assert max(sizes(counts)) - min(sizes(counts)) <= 1


def test_equal_likelihoods_share_a_bin() -> None:
    for likelihoods, expected in (
        ([1.0] * 400, [400]),
        ([0.0] * 300 + [1.0] * 100, [300, 100]),
        ([0.3] * 390 + [0.9] * 10, [400]),
        ([0.1] * 100 + [0.5] * 200 + [1.0] * 100, [100, 200, 100]),
    ):
        assert sizes(count_levels(answers_of(likelihoods), LEVELS)["short"]) == expected


def test_each_answer_type_has_bins_of_its_own() -> None:
    low, high = np.linspace(0, 0.5, 120).tolist(), np.linspace(0.5, 1, 40).tolist()
    counts = count_levels(answers_of(low, "yes_no") + answers_of(high, "open", seed=1), LEVELS)
    assert [(t, len(counts[t].edges)) for t in counts] == [("yes_no", 1), ("open", 0)]
    assert counts["yes_no"].edges[0] == pytest.approx(0.25, abs=0.01)


def test_queries_that_are_never_perturbed_are_counted_apart_and_leave_fewer_bins() -> None:
    """As with `absent: clean`, where sure answers of "no" have no perturbed image."""
    answers = [a for a in answers_of(np.linspace(0, 1, 200).tolist()) if a.query < 110 or not a.strength]
    counts = count_levels(answers, LEVELS)["short"]
    assert 1 <= len(sizes(counts)) < 4
    assert [sum(row.n) for row in counts.kinds["blur"]] == [110, 110]
    untouched = [a for a in answers if not a.strength]
    assert counts.untouched.sum(axis=1).tolist() == [200, sum(a.correct for a in untouched)]
    alone = [a.correct for a in untouched if a.query >= 110]
    assert counts.never_perturbed.pooled == LevelCount(0, (90,), (sum(alone),))


def test_a_level_without_an_answer_is_named() -> None:
    answers = [a for a in answers_of([0.5] * 20) if a.perturbation != "blur"]
    with pytest.raises(DataError, match="no short query with blur of strength 1"):
        count_levels(answers, LEVELS)


# --- A measurement with the tiny model --------------------------------------------------------------------------------------


class AtSigns(DemoSource):
    """Training queries whose ids end as those of levels do."""

    def queries(self) -> Sequence[Query]:
        return [replace(q, id=f"q@{i}") for i, q in enumerate(super().queries())]


POLICY = NoisePolicy(levels=LinearLevels(3), kinds={**KINDS, "fade": 0.0}, distractor_probability=0.0, seed=3)
TRAIN = AtSigns("train", scenes=3)


@pytest.fixture(scope="module")
def measured(model_folder: str, data: Data, tmp_path_factory: pytest.TempPathFactory) -> LevelFitModule:
    """A module that has measured the tiny model's levels."""
    folder = tmp_path_factory.mktemp("measured")
    paths = folder / "levels.json", folder / "deep" / "likelihoods.parquet"
    module = LevelFitModule(BaseModel(model_folder, dtype="float32"), *map(str, paths), max_new_tokens=5)
    queries, run = data(levels=FOUR, train=TRAIN, noise=POLICY), plain_trainer(folder / "run")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(base, "grade_answers", grade_at_random([]))
        run.test(module, datamodule=queries, verbose=False)
    assert outputs_of(run, module, queries)[:2] == [*paths]
    return module


def test_the_table_has_each_query_at_each_level_and_its_provenance(
    measured: LevelFitModule, model_folder: str
) -> None:
    table = AnchoredLevels(measured.out, likelihoods=measured.likelihoods).table
    assert table.kinds == ("noise", "blur")
    rows = {
        t: [[row.pooled[:2] for row in rows] for rows in c.kinds.values()] for t, c in table.counts.items()
    }
    assert rows == {t: [[(s, (n,)) for s in (0, 0.5, 1)]] * 2 for t, n in (("yes_no", 8), ("short", 4))}
    provenance = table.provenance
    assert (provenance["model"], provenance["seed"], provenance["resolution"]) == (model_folder, 3, "model")
    assert "CosineSchedule" in provenance["schedule"]
    assert "{question}" in provenance["prompt"]


def test_the_file_has_the_likelihood_of_every_training_query(measured: LevelFitModule, data: Data) -> None:
    table = AnchoredLevels(measured.out, likelihoods=measured.likelihoods).table
    read = read_likelihoods(Path(measured.likelihoods or ""), table.provenance, "")
    assert list(read) == [q.id for q in TRAIN.queries()]
    assert [m.content for m in read.values()] == [TRAIN.content_digest(q) for q in TRAIN.queries()]
    other = AtSigns("train", scenes=3, hand="line")
    assert not {m.content for m in read.values()} & {other.content_digest(q) for q in other.queries()}
    assert len({m.likelihood for m in read.values()}) > 3
    # One by one, with the estimator that an evaluation uses.
    queries = data(train=TRAIN, noise=POLICY)
    queries.setup("fit")
    samples = queries.train_dataloader().dataset
    for index, query in enumerate(TRAIN.queries()):
        untouched = TRAIN.load(query).image
        sample = samples[0, index]._replace(image=untouched, perturbation=CLEAN, noise_step=0)  # type: ignore[index]
        batch = PromptCollator(queries.chat)([sample])
        with torch.no_grad():
            answered = AnsweredBatch.generate(measured.model, batch, AnswerTokenizer(queries.chat), 5)
            (expected,) = AnswerLikelihood().estimate(answered).confidence
        assert read[query.id].likelihood == pytest.approx(expected or 0.0, abs=1e-4)


def test_training_states_the_confidence_of_each_query(measured: LevelFitModule, data: Data) -> None:
    """Validation and held-out queries, whose likelihood is not known, get the average."""
    levels = AnchoredLevels(measured.out, likelihoods=measured.likelihoods)
    queries = data(train=TRAIN, noise=replace(POLICY, levels=levels))
    queries.setup("fit")
    for name, scale in (("train", levels), ("validation", levels.averaged)):
        dataset = queries.sets[name]
        for index, query in enumerate(dataset.queries):
            sample = dataset[0, index]
            assert sample.confidence == scale.confidence(sample.perturbation, query.answer_type, query.id)


PROVENANCE = {"weights": None, "prompt": "", "max_pixels": None}


@pytest.fixture
def refused(data: Data, trainer: MakeTrainer, tmp_path: Path) -> Callable[..., str]:
    """Trains on a source with these likelihoods by query id, which is refused before a model is loaded; returns the message."""

    def refuse(source: QuerySource, measured: dict[str, Measured]) -> str:
        path = tmp_path / "likelihoods.parquet"
        write_likelihoods(path, measured, PROVENANCE)
        counts = {t: noise_counts((0, 100, 90), (1, 100, 50)) for t in ("yes_no", "short")}
        table = AnchoredLevels.fit(counts, provenance=PROVENANCE).table
        queries = data(train=source, noise=NoisePolicy(levels=AnchoredLevels(table=table, likelihoods=path)))
        with pytest.raises(DataError) as caught:
            trainer(max_steps=1).fit(SFTModule(BaseModel("no/such-model")), datamodule=queries)
        return str(caught.value)

    return refuse


def own_data(folder: Path, colour: str = "red", question: str = "Is there a dog?") -> JsonlSource:
    """Three queries of one's own, of which the second has this image and question."""
    folder.mkdir()
    rows = []
    for number in range(3):
        edited = number == 1
        Image.new("RGB", (8, 8), colour if edited else "red").save(folder / f"{number}.png")
        facts = {"id": f"q{number}", "image": f"{number}.png", "answer": "No", "answer_type": "yes_no"}
        rows.append({**facts, "question": question if edited else "Is there a dog?"})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return JsonlSource(str(folder / "train.jsonl"))


@pytest.mark.parametrize("changes", [{"colour": "blue"}, {"question": "Is there a cat?"}])
def test_missing_likelihoods_and_those_of_other_images_or_questions_stop_the_run_before_a_model_is_loaded(
    refused: Callable[..., str], tmp_path: Path, changes: dict[str, str]
) -> None:
    """Under the same ids; the same data in another folder is the same, and is refused without the likelihood of one query."""
    source = own_data(tmp_path / "measured")
    measured = {q.id: Measured(0.5, source.content_digest(q)) for q in source.queries()}
    *_, missing = measured
    message = refused(own_data(tmp_path / "same"), {k: v for k, v in measured.items() if k != missing})
    file, command = f"{tmp_path}/likelihoods.parquet", "`vlm-calibration levels fit`"
    for part in (repr(missing), file, "data.train", command):
        assert part in message
    message = refused(own_data(tmp_path / "changed", **changes), measured)
    for part in (
        "another question or image",
        "data.train",
        "'q1'",
        "`vlm-calibration levels fit --overwrite`",
    ):
        assert part in message


class Spread(DemoSource):
    """24 of the demo's training queries, of scenes spread over all."""

    def queries(self) -> Sequence[Query]:
        return [
            query
            for first in range(0, 7200, 900)
            for query in DemoSource("train", scenes=1, first=first, hard=0.3).queries()
        ]


@pytest.mark.slow
def test_the_shipped_likelihoods_are_those_of_the_shipped_model(
    demo_folder: str, data: Data, trainer: MakeTrainer, root: Path, tmp_path: Path
) -> None:
    demo, source = root / "src/vlm_calibration/demo", Spread("train", scenes=7200, hard=0.3)
    shipped = read_likelihoods(demo / "likelihoods.parquet", read_table(demo / "levels.json").provenance, "")
    queries = PerturbedQueryDataModule(demo_folder, test={"": EvalSplit(source)}, workers=0)
    module = EvaluationModule(
        BaseModel(demo_folder, dtype="float32"), estimators=[AnswerLikelihood()], max_new_tokens=16
    )
    trainer(PredictionWriter()).test(module, datamodule=queries, verbose=False)
    measured = {
        p.id: p.estimates["likelihood"] or 0.0
        for p in read_predictions(tmp_path / "run/base/predictions.jsonl")
    }
    assert len(measured) == 24
    assert {q: shipped[q].likelihood for q in measured} == pytest.approx(measured, abs=1e-4)
    assert all(shipped[q.id].content == source.content_digest(q) for q in source.queries())
