"""Level fitting with likelihoods: bins of the base model's own likelihood, and the file of the training queries'."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.callbacks.run_directory import outputs_of
from vlm_calibration.data.collate import PromptCollator
from vlm_calibration.data.dataset import EvalSplit, level_id
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
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
from vlm_calibration.records import DataError, Prediction, Query
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.stages.level_fit import LevelFitModule, count_levels
from vlm_calibration.stages.sft import SFTModule

from ..command_line import Ended
from ..level_tables import noise_counts

Data = Callable[..., PerturbedQueryDataModule]
LEVELS = (CLEAN, Perturbation("noise", 0.5), Perturbation("noise", 1.0), Perturbation("blur", 1.0))
KINDS = {"noise": 1.0, "blur": 1.0}
HELD_OUT = DemoSource("calibration", scenes=4)


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


@pytest.mark.parametrize(("n", "bins"), [(1, 1), (99, 1), (100, 2), (149, 2), (150, 3), (400, 8), (1000, 8)])
def test_bins_hold_alike_many_queries_and_at_least_fifty(n: int, bins: int) -> None:
    likelihoods = np.random.default_rng(0).permutation(n) / n
    counts = count_levels(answers_of(likelihoods.tolist()), LEVELS)["short"]
    assert len(sizes(counts)) == bins
    assert max(sizes(counts)) - min(sizes(counts)) <= 1


@pytest.mark.parametrize(
    ("likelihoods", "expected"),
    [
        ([1.0] * 400, [400]),
        ([0.0] * 300 + [1.0] * 100, [300, 100]),
        ([0.3] * 390 + [0.9] * 10, [400]),
        ([0.1] * 100 + [0.5] * 200 + [1.0] * 100, [100, 200, 100]),
    ],
)
def test_equal_likelihoods_share_a_bin(likelihoods: list[float], expected: list[int]) -> None:
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


class Measurement(NamedTuple):
    """A measurement of the tiny model's levels, its answers graded at random: less often correct the stronger the perturbation.

    Attributes:
        levels, likelihoods: the files that it wrote.
        module: what measured.
        graded: the answers.
    """

    levels: Path
    likelihoods: Path
    module: LevelFitModule
    graded: list[Prediction]


@pytest.fixture(scope="module")
def measurement(model_folder: str, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    rng, graded = np.random.default_rng(0), []

    def answer(*arguments: Any) -> list[Any]:
        result = [
            replace(p, correct=bool(rng.random() >= (p.strength or 0))) for p in grade_answers(*arguments)
        ]
        graded.extend(result)
        return result

    folder = tmp_path_factory.mktemp("measured")
    out, likelihoods = folder / "levels.json", folder / "deep" / "likelihoods.parquet"
    module = LevelFitModule(
        BaseModel(model_folder, dtype="float32"), str(out), str(likelihoods), max_new_tokens=5
    )
    queries = data(levels=HELD_OUT, train=TRAIN, noise=POLICY)
    run = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        default_root_dir=folder / "run",
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(base, "grade_answers", answer)
        run.test(module, datamodule=queries, verbose=False)
    assert outputs_of(run, module, queries)[:2] == [out, likelihoods]
    assert list(queries.tested_queries) == ["levels", "instances"]
    return Measurement(out, likelihoods, module, graded)


def test_counts_add_up_and_the_table_loads(measurement: Measurement, model_folder: str) -> None:
    answers = measurement.graded[: 12 * 5]
    total = Counter((p.answer_type, p.perturbation, p.strength) for p in answers)
    correct = Counter((p.answer_type, p.perturbation, p.strength) for p in answers if p.correct)
    assert 15 < sum(correct.values()) < 40
    levels = AnchoredLevels(measurement.levels, likelihoods=measurement.likelihoods)
    assert levels.table.kinds == ("noise", "blur")
    assert levels.answer_types == ("yes_no", "short")
    for answer_type, counts in levels.table.counts.items():
        for kind, rows in counts.kinds.items():
            assert [row.strength for row in rows] == [0, 0.5, 1]
            for strength, n, n_correct in rows:
                key = (answer_type, kind if strength else "", strength)
                assert (sum(n), sum(n_correct)) == (total[key], correct[key])
    provenance = levels.table.provenance
    assert provenance["model"] == model_folder
    assert provenance["seed"] == 3
    assert "CosineSchedule" in provenance["schedule"]
    assert provenance["resolution"] == "model"
    assert "{question}" in provenance["prompt"]


def test_the_file_has_the_likelihood_of_every_training_query(measurement: Measurement, data: Data) -> None:
    assert len(measurement.graded) == 12 * 5 + 9
    levels = AnchoredLevels(measurement.levels, likelihoods=measurement.likelihoods)
    read = read_likelihoods(measurement.likelihoods, levels.table.provenance, "")
    assert list(read) == [q.id for q in TRAIN.queries()]
    assert [m.content for m in read.values()] == [TRAIN.content_digest(q) for q in TRAIN.queries()]
    assert len({m.likelihood for m in read.values()}) > 3
    # One by one, with the estimator that an evaluation uses.
    queries, model = data(train=TRAIN, noise=POLICY), measurement.module.model
    queries.setup("fit")
    samples = queries.train_dataloader().dataset
    for index, query in enumerate(TRAIN.queries()):
        untouched = TRAIN.load(query).image
        sample = samples[0, index]._replace(image=untouched, perturbation=CLEAN, noise_step=0)  # type: ignore[index]
        batch = PromptCollator(queries.chat)([sample])
        with torch.no_grad():
            answered = AnsweredBatch.generate(model, batch, AnswerTokenizer(queries.chat), 5)
            (expected,) = AnswerLikelihood().estimate(answered).confidence
        assert read[query.id].likelihood == pytest.approx(expected or 0.0, abs=1e-4)


def test_training_states_the_confidence_of_each_query(measurement: Measurement, data: Data) -> None:
    """Validation and held-out queries, whose likelihood is not known, get the average."""
    levels = AnchoredLevels(measurement.levels, likelihoods=measurement.likelihoods)
    queries = data(train=TRAIN, noise=replace(POLICY, levels=levels))
    queries.setup("fit")
    for dataset, scale in (
        (queries.train_dataloader().dataset, levels),
        (queries.sets["validation"], levels.averaged),
    ):
        for index, query in enumerate(dataset.queries):  # type: ignore[attr-defined]
            sample = dataset[0, index]
            expected = scale.confidence(sample.perturbation, query.answer_type, query.id)
            assert sample.confidence == expected


PROVENANCE = {"weights": None, "prompt": "", "max_pixels": None}


@pytest.fixture
def refused(data: Data, trainer: Callable[..., L.Trainer], tmp_path: Path) -> Callable[..., str]:
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


def measured_on(source: QuerySource) -> dict[str, Measured]:
    return {q.id: Measured(0.5, source.content_digest(q)) for q in source.queries()}


def test_a_training_query_without_a_likelihood_stops_the_run_before_a_model_is_loaded(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    source = DemoSource("train", scenes=3)
    measured = measured_on(source)
    missing = list(measured)[1]
    del measured[missing]
    message = refused(source, measured)
    for part in (
        repr(missing),
        f"{tmp_path}/likelihoods.parquet",
        "data.train",
        "`vlm-calibration levels fit`",
    ):
        assert part in message
    assert "\n" not in message


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


@pytest.mark.parametrize(
    ("make", "changes", "culprit"),
    [
        (lambda _, **changes: DemoSource("train", scenes=3, **changes), {"hand": "line"}, "train-000000-yes"),
        (lambda _, **changes: DemoSource("train", 3, **changes), {"shifted": True}, "train-000000-yes"),
        (own_data, {"colour": "blue"}, "q1"),
        (own_data, {"question": "Is there a cat?"}, "q1"),
    ],
)
def test_likelihoods_of_other_images_or_questions_stop_the_run_before_a_model_is_loaded(
    refused: Callable[..., str],
    tmp_path: Path,
    make: Callable[..., QuerySource],
    changes: dict[str, Any],
    culprit: str,
) -> None:
    """Under the same ids; the same data in another folder is the same."""
    measured = measured_on(make(tmp_path / "measured"))
    assert "another question or image" not in refused(make(tmp_path / "same"), measured)
    message = refused(make(tmp_path / "changed", **changes), measured)
    for part in (
        "another question or image",
        "data.train",
        repr(culprit),
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
    demo_folder: str, data: Data, trainer: Callable[..., L.Trainer], root: Path, tmp_path: Path
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


# --- The command ----------------------------------------------------------------------------------------------------------


def _command(root: Path, folder: Path, devices: int) -> list[str]:
    """Arguments that measure the demo's model, which answers."""
    linear = "vlm_calibration.perturbation.levels.LinearLevels"
    overlay = {
        "trainer": {
            "accelerator": "cpu",
            "callbacks": None,
            "devices": devices,
            "strategy": "ddp" if devices > 1 else "auto",
            "enable_progress_bar": False,
            "default_root_dir": str(folder),
        },
        "model": {
            "init_args": {
                "base": {"name_or_path": str(root / "src/vlm_calibration/demo/model")},
                "out": str(folder / "levels.json"),
                "likelihoods": str(folder / "likelihoods.parquet"),
                "max_new_tokens": 8,
            }
        },
        "data": {
            "levels": {"init_args": {"scenes": 20, "hard": 0.0}},
            "train": {"init_args": {"scenes": 3}},
            "noise": {"kinds": {"noise": 1}, "levels": {"class_path": linear, "init_args": {"n_levels": 2}}},
            "eval_batch_size": 16 // devices,
            "workers": 0,
        },
    }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(overlay), encoding="utf-8")
    return ["levels", "fit", "--config", str(root / "configs/levels.yaml"), "--config", str(path)]


def test_levels_fit_writes_both_files(run: Callable[..., Ended], root: Path, tmp_path: Path) -> None:
    ended = run(*_command(root, tmp_path / "one", 1))
    assert ended.status == 0, ended.err
    files = [tmp_path / "one" / name for name in ("levels.json", "likelihoods.parquet")]
    assert ended.out.splitlines()[-2:] == [f"wrote {file}" for file in files]
    table = AnchoredLevels(files[0], likelihoods=files[1]).table
    counts = {t: {sum(row.n) for rows in c.kinds.values() for row in rows} for t, c in table.counts.items()}
    assert counts == {"yes_no": {40}, "short": {20}}


@pytest.mark.nightly
def test_two_processes_measure_as_one(
    run: Callable[..., Ended], run_two: Callable[..., Ended], root: Path, tmp_path: Path
) -> None:
    """The table is the same, and the likelihoods agree to float precision."""
    for name, devices, start in (("one", 1, run), ("two", 2, run_two)):
        ended = start(*_command(root, tmp_path / name, devices))
        assert ended.status == 0, ended.err
    one, two = (AnchoredLevels(tmp_path / name / "levels.json").table for name in ("one", "two"))
    assert {t: c.kinds for t, c in one.counts.items()} == {t: c.kinds for t, c in two.counts.items()}
    for answer_type, counts in one.counts.items():
        assert two.counts[answer_type].edges == pytest.approx(counts.edges, abs=1e-6)
    read = [
        read_likelihoods(tmp_path / name / "likelihoods.parquet", one.provenance, "")
        for name in ("one", "two")
    ]
    assert list(read[0]) == list(read[1])
    assert len(read[0]) == 9
    values, contents = zip(*([[m[i] for m in r.values()] for i in (0, 1)] for r in read), strict=True)
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert contents[0] == contents[1]
