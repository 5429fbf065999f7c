"""Level fitting with likelihoods: bins of the base model's own likelihood, and the file of the training queries'."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.callbacks.resume import outputs_of
from vlm_calibration.data.collate import PromptCollator
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch
from vlm_calibration.estimators.generating import GenerationRecorder
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.predictions import read_predictions
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.perturbation.answer_likelihoods import Measured, read_likelihoods, write_likelihoods
from vlm_calibration.perturbation.level_table import AnswerTypeCounts, LevelCount, read_table
from vlm_calibration.perturbation.levels import CLEAN, AnchoredLevels, LinearLevels, Perturbation
from vlm_calibration.records import ANSWER_TYPES, DataError, LoadedImage, Prediction, Query
from vlm_calibration.stages import level_fit
from vlm_calibration.stages.answering import answer_batch
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.stages.level_fit import LevelFitModule, count_levels
from vlm_calibration.stages.sft import SFTModule

from ..command_line import Ended, run_plainly
from ..level_tables import noise_counts

Data = Callable[..., PerturbedQueryDataModule]
LEVELS = (CLEAN, Perturbation("noise", 0.5), Perturbation("noise", 1.0), Perturbation("blur", 1.0))
KINDS = {"noise": 1.0, "blur": 1.0}
HELD_OUT = DemoSource("calibration", scenes=4)


# --- Counts in bins -------------------------------------------------------------------------------------------------------


def answers_of(
    likelihoods: Sequence[float], answer_type: str = "short", seed: int = 0
) -> dict[str, np.ndarray]:
    """Columns of answers to as many queries as likelihoods, each at every one of `LEVELS`, in random order."""
    rng = np.random.default_rng(seed)
    n, m = len(likelihoods), len(LEVELS)
    columns = {
        "query": np.repeat(np.arange(n), m),
        "answer_type": np.full(n * m, ANSWER_TYPES.index(answer_type)),
        "level": np.tile(np.arange(m), n),
        "correct": rng.random(n * m) < 0.5,
        "likelihood": np.full(n * m, np.nan),
    }
    columns["likelihood"][::m] = likelihoods
    order = rng.permutation(n * m)
    return {name: values[order] for name, values in columns.items()}


def rows_of(counts: AnswerTypeCounts) -> dict[str, list[tuple[int, int]]]:
    return {kind: [(r.n, r.n_correct) for r in rows] for kind, rows in counts.pooled.items()}


def sizes(counts: AnswerTypeCounts) -> list[int]:
    """The number of queries of each bin."""
    return [by_kind["noise"][0].n for by_kind in counts.bins]


@given(
    st.lists(st.sampled_from([0.0, 0.2, 0.2, 0.5, 0.9, 1.0]) | st.floats(0, 1), min_size=1, max_size=260),
    st.integers(0, 5),
)
def test_every_answer_is_counted_in_the_bin_of_its_likelihood(likelihoods: list[float], seed: int) -> None:
    answers = answers_of(likelihoods, seed=seed)
    counts = count_levels(answers, LEVELS)["short"]
    bin_of = np.searchsorted(counts.edges, likelihoods, side="right")
    for number, by_kind in enumerate(counts.bins):
        own = bin_of[answers["query"]] == number
        for kind, rows in by_kind.items():
            for row in rows:
                level = LEVELS.index(CLEAN if row.strength == 0 else Perturbation(kind, row.strength))
                here = own & (answers["level"] == level)
                assert (row.n, row.n_correct) == (here.sum(), answers["correct"][here].sum())
    assert sum(sizes(counts)) == len(likelihoods)


@pytest.mark.parametrize(
    ("n", "bins"), [(1, 1), (99, 1), (100, 2), (149, 2), (150, 3), (400, 8), (1000, 8), (5000, 8)]
)
def test_bins_hold_alike_many_queries_and_at_least_fifty(n: int, bins: int) -> None:
    likelihoods = np.random.default_rng(0).permutation(n) / n
    counts = count_levels(answers_of(likelihoods.tolist()), LEVELS)["short"]
    assert len(counts.bins) == bins
    assert max(sizes(counts)) - min(sizes(counts)) <= 1
    assert bins == 1 or min(sizes(counts)) >= 50


@pytest.mark.parametrize(
    ("likelihoods", "expected"),
    [
        ([1.0] * 400, [400]),
        ([0.0] * 400, [400]),
        ([0.0] * 300 + [1.0] * 100, [300, 100]),
        ([0.3] * 390 + [0.9] * 10, [400]),
        ([0.1] * 100 + [0.5] * 200 + [1.0] * 100, [100, 200, 100]),
    ],
)
def test_equal_likelihoods_share_a_bin(likelihoods: list[float], expected: list[int]) -> None:
    counts = count_levels(answers_of(likelihoods), LEVELS)["short"]
    assert sizes(counts) == expected


def test_each_answer_type_has_bins_of_its_own() -> None:
    low, high = np.linspace(0, 0.5, 120).tolist(), np.linspace(0.5, 1, 40).tolist()
    parts = [answers_of(low, "yes_no"), answers_of(high, "open", seed=1)]
    parts[1]["query"] += 1000
    counts = count_levels({k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, LEVELS)
    assert list(counts) == ["yes_no", "open"]
    assert [len(counts[t].edges) for t in counts] == [1, 0]
    assert counts["yes_no"].edges[0] == pytest.approx(0.25, abs=0.01)


def test_queries_that_are_never_perturbed_are_counted_apart_and_a_level_that_one_bin_lacks_leaves_fewer_bins() -> (
    None
):
    """As with `absent: clean`, where sure answers of "no" have no perturbed image."""
    answers = answers_of(np.linspace(0, 1, 200).tolist())
    perturbed_sure = (answers["query"] >= 110) & (answers["level"] > 0)
    kept = {name: values[~perturbed_sure] for name, values in answers.items()}
    counts = count_levels(kept, LEVELS)["short"]
    assert 1 <= len(counts.bins) < 4
    assert [n for n, _ in rows_of(counts)["blur"]] == [110, 110]
    untouched = kept["level"] == 0
    assert (counts.merged.untouched[0].n, counts.merged.untouched[0].n_correct) == (
        200,
        kept["correct"][untouched].sum(),
    )
    alone = untouched & (kept["query"] >= 110)
    assert counts.merged.never_perturbed == (LevelCount(0, 90, kept["correct"][alone].sum()),)


def test_a_level_without_an_answer_is_named() -> None:
    answers = answers_of([0.5] * 20)
    kept = {name: values[answers["level"] != 3] for name, values in answers.items()}
    with pytest.raises(DataError, match="no short query with blur of strength 1"):
        count_levels(kept, LEVELS)


# --- A measurement with the tiny model --------------------------------------------------------------------------------------


class AtSigns(DemoSource):
    """Training queries whose ids end as those of levels do."""

    def queries(self) -> Sequence[Query]:
        return [replace(q, id=f"q@{i}") for i, q in enumerate(super().queries())]


@pytest.fixture
def graded(monkeypatch: pytest.MonkeyPatch) -> list[Prediction]:
    """Grades the tiny model's answers at random, less often correct the stronger the perturbation."""
    rng, answers = np.random.default_rng(0), []

    def answer(*arguments: Any) -> list[Any]:
        result = [
            replace(p, correct=bool(rng.random() >= (p.strength or 0))) for p in answer_batch(*arguments)
        ]
        answers.extend(result)
        return result

    monkeypatch.setattr(level_fit, "answer_batch", answer)
    return answers


def fit_levels(
    model: str, queries: PerturbedQueryDataModule, trainer: Callable[..., L.Trainer], folder: Path
) -> LevelFitModule:
    out, likelihoods = folder / "levels.json", folder / "deep" / "likelihoods.parquet"
    module = LevelFitModule(BaseModel(model, dtype="float32"), str(out), str(likelihoods), max_new_tokens=5)
    run = trainer()
    run.test(module, datamodule=queries, verbose=False)
    assert outputs_of(run, module, queries)[:2] == [out, likelihoods]
    return module


POLICY = NoisePolicy(levels=LinearLevels(3), kinds=KINDS, distractor_probability=0.0)


def test_the_file_has_the_likelihood_of_every_training_query(
    model_folder: str,
    data: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    graded: list[Prediction],
) -> None:
    train = AtSigns("train", scenes=5)
    queries = data(levels=HELD_OUT, train=train, noise=POLICY)
    module = fit_levels(model_folder, queries, trainer, tmp_path)
    assert list(queries.tested_queries) == ["levels", "instances"]
    assert len(graded) == 12 * 5 + 15

    levels = AnchoredLevels(tmp_path / "levels.json", likelihoods=tmp_path / "deep/likelihoods.parquet")
    read = read_likelihoods(tmp_path / "deep/likelihoods.parquet", levels.table.provenance, "")
    assert list(read) == [q.id for q in train.queries()]
    assert [m.content for m in read.values()] == [train.content_digest(q) for q in train.queries()]
    assert len({m.likelihood for m in read.values()}) > 3
    # One by one, with the estimator that an evaluation uses.
    chat = queries.chat
    queries.setup("fit")
    for index, query in enumerate(train.queries()):
        sample = (
            queries.train_dataloader()
            .dataset[0, index]
            ._replace(  # type: ignore[index]
                image=train.load(query).image, perturbation=CLEAN, noise_step=0
            )
        )
        batch = PromptCollator(chat)([sample])
        recorder = GenerationRecorder(module.model, keep_cache=True)
        answers = answer_batch(recorder, batch, queries.processor.tokenizer, 5)
        answered = AnsweredBatch(
            *(module.model, batch, answers, recorder.passes, AnswerTokenizer(chat, [LinearLevels()])),
            *(5, recorder.cache),
        )
        with torch.no_grad():
            (expected,) = AnswerLikelihood().estimate(answered).confidence
        assert read[query.id].likelihood == pytest.approx(expected or 0.0, abs=1e-4)


def test_training_states_the_confidence_of_each_query(
    model_folder: str,
    data: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    graded: list[Prediction],
) -> None:
    """Validation and held-out queries, whose likelihood is not known, get the average."""
    fit_levels(model_folder, data(levels=HELD_OUT, noise=POLICY), trainer, tmp_path)
    path, likelihoods = tmp_path / "levels.json", tmp_path / "deep/likelihoods.parquet"
    levels = AnchoredLevels(path, likelihoods=likelihoods)
    queries = data(noise=replace(POLICY, levels=levels))
    run = trainer(max_steps=1)
    run.fit(SFTModule(BaseModel(model_folder, dtype="float32"), max_new_tokens=3), datamodule=queries)
    for dataset, scale in (
        (queries.train_dataloader().dataset, levels),
        (queries.validation_set, levels.averaged),
    ):
        for index, query in enumerate(dataset.queries):  # type: ignore[attr-defined]
            sample = dataset[0, index]
            expected = scale.confidence(sample.perturbation, query.answer_type, query.id)
            assert sample.confidence == expected


def test_a_training_query_without_a_likelihood_stops_the_run_before_a_model_is_loaded(
    model_folder: str,
    data: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
) -> None:
    counts = {t: noise_counts((0, 100, 90), (1, 100, 50)) for t in ("yes_no", "short")}
    provenance = {"weights": None, "prompt": "", "max_pixels": None}
    table = AnchoredLevels.fit(counts, provenance=provenance).table
    source = DemoSource("train", scenes=3)
    first, second, *others = source.queries()
    path = tmp_path / "likelihoods.parquet"
    measured = {q.id: Measured(0.5, source.content_digest(q)) for q in (first, *others)}
    write_likelihoods(path, measured, provenance)
    queries = data(noise=NoisePolicy(levels=AnchoredLevels(table=table, likelihoods=path)))
    with pytest.raises(DataError) as caught:
        trainer(max_steps=1).fit(SFTModule(BaseModel("no/such-model")), datamodule=queries)
    for part in (repr(second.id), str(path), "data.train", "`vlm-calibration levels fit`"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def own_data(folder: Path, colour: str = "red", question: str = "Is there a dog?") -> JsonlSource:
    """Three queries of one's own, of which the second has this image and question."""
    folder.mkdir()
    rows = []
    for number in range(3):
        edited = number == 1
        Image.new("RGB", (8, 8), colour if edited else "red").save(folder / f"{number}.png")
        rows.append(
            {
                "id": f"q{number}",
                "image": f"{number}.png",
                "question": question if edited else "Is there a dog?",
                "answer": "No",
                "answer_type": "yes_no",
            }
        )
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return JsonlSource(str(folder / "train.jsonl"))


def write_measured(path: Path, source: QuerySource) -> None:
    measured = {q.id: Measured(0.5, source.content_digest(q)) for q in source.queries()}
    write_likelihoods(path, measured, {"weights": None, "prompt": "", "max_pixels": None})


@pytest.mark.parametrize(
    ("make", "changes", "culprit"),
    [
        (lambda _, **changes: DemoSource("train", scenes=3, **changes), {"hand": "line"}, "train-000000-yes"),
        (
            lambda _, **changes: DemoSource("train", scenes=3, **changes),
            {"shifted": True},
            "train-000000-yes",
        ),
        (own_data, {"colour": "blue"}, "q1"),
        (own_data, {"question": "Is there a cat?"}, "q1"),
    ],
)
def test_likelihoods_of_other_images_or_questions_stop_the_run_before_a_model_is_loaded(
    data: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    make: Callable[..., QuerySource],
    changes: dict[str, Any],
    culprit: str,
) -> None:
    """Under the same ids; the same data in another folder is the same."""
    counts = {t: noise_counts((0, 100, 90), (1, 100, 50)) for t in ("yes_no", "short")}
    provenance = {"weights": None, "prompt": "", "max_pixels": None}
    path = tmp_path / "likelihoods.parquet"
    write_measured(path, make(tmp_path / "measured"))
    levels = AnchoredLevels(table=AnchoredLevels.fit(counts, provenance=provenance).table, likelihoods=path)
    for name, change in (("same", {}), ("changed", changes)):
        queries = data(train=make(tmp_path / name, **change), noise=NoisePolicy(levels=levels))
        with pytest.raises(DataError) as caught:
            trainer(max_steps=1).fit(SFTModule(BaseModel("no/such-model")), datamodule=queries)
        is_refused = "another question or image" in str(caught.value)
        assert is_refused == bool(change), str(caught.value)
    for part in ("data.train", repr(culprit), str(path), "`vlm-calibration levels fit --overwrite`"):
        assert part in str(caught.value)


class Spread(DemoSource):
    """48 of the demo's training queries, of scenes spread over all."""

    def queries(self) -> Sequence[Query]:
        return [
            query
            for first in range(0, 7200, 450)
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
    assert len(measured) == 48
    assert {q: shipped[q].likelihood for q in measured} == pytest.approx(measured, abs=1e-4)
    assert all(shipped[q.id].content == source.content_digest(q) for q in source.queries())


def test_clean_absent_objects_have_likelihoods_too(
    model_folder: str,
    data: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    graded: list[Prediction],
) -> None:
    policy = replace(POLICY, absent="clean")
    fit_levels(model_folder, data(levels=HELD_OUT, noise=policy), trainer, tmp_path)
    counts = AnchoredLevels(tmp_path / "levels.json").table.counts["yes_no"]
    assert [n for n, _ in rows_of(counts)["blur"]] == [4, 4, 4]
    assert counts.merged.never_perturbed[0].n == 4
    provenance = AnchoredLevels(tmp_path / "levels.json").table.provenance
    read = read_likelihoods(tmp_path / "deep/likelihoods.parquet", provenance, "")
    assert len(read) == 9


class Damaged(DemoSource):
    """Training queries of which the first scene cannot be loaded."""

    on_bad_record = "skip"

    def load(self, query: Query) -> LoadedImage:
        if query.image.endswith("000000"):
            raise DataError(f"record {query.id!r}: damaged")
        return super().load(query)


@pytest.mark.filterwarnings("ignore:data.train")
def test_a_training_query_that_cannot_be_loaded_has_no_likelihood(
    model_folder: str,
    data: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    graded: list[Prediction],
) -> None:
    train = Damaged("train", scenes=3)
    fit_levels(model_folder, data(levels=HELD_OUT, train=train, noise=POLICY), trainer, tmp_path)
    provenance = AnchoredLevels(tmp_path / "levels.json").table.provenance
    read = read_likelihoods(tmp_path / "deep/likelihoods.parquet", provenance, "")
    assert list(read) == [q.id for q in train.queries() if not q.image.endswith("000000")]


def test_likelihoods_need_training_queries(data: Data, trainer: Callable[..., L.Trainer]) -> None:
    module = LevelFitModule(BaseModel("no/such-model"), likelihoods="l.parquet")
    with pytest.raises(DataError, match=r"data\.train is not set"):
        trainer().test(module, datamodule=data(levels=HELD_OUT, train=None), verbose=False)


def test_kinds_that_the_table_lacks_stop_the_run_before_a_model_is_loaded(
    run: Callable[..., Ended], fit: Callable[..., list[str]], tmp_path: Path
) -> None:
    counts = {t: noise_counts((0, 100, 90), (1, 100, 50)) for t in ("yes_no", "short")}
    AnchoredLevels.fit(counts).save(tmp_path / "levels.json")
    levels = {
        "class_path": "vlm_calibration.perturbation.levels.AnchoredLevels",
        "init_args": {"path": str(tmp_path / "levels.json"), "likelihoods": None},
    }
    for kinds, culprit in (({"noise": 1, "blur": 1}, "levels for 'blur'"), ({"rain": 1}, "kind 'rain'")):
        ended = run(*fit(data={"noise": {"levels": levels, "kinds": kinds}}))
        assert culprit in ended.error()
        assert "noise.kinds" in ended.error()
    assert not (tmp_path / "run").exists()


# --- Two processes ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_measure_as_one(run: Callable[..., Ended], root: Path, tmp_path: Path) -> None:
    """The demo's model, which answers; the table is the same file, and the likelihoods agree to float precision."""

    def command(name: str, devices: int) -> list[str]:
        overlay = {
            "trainer": {
                "accelerator": "cpu",
                "callbacks": None,
                "devices": devices,
                "strategy": "ddp" if devices > 1 else "auto",
                "enable_progress_bar": False,
                "default_root_dir": str(tmp_path / name),
            },
            "model": {
                "init_args": {
                    "base": {"name_or_path": str(root / "src/vlm_calibration/demo/model")},
                    "out": str(tmp_path / name / "levels.json"),
                    "likelihoods": str(tmp_path / name / "likelihoods.parquet"),
                    "max_new_tokens": 8,
                }
            },
            "data": {
                "levels": {"init_args": {"scenes": 50, "hard": 0.0}},
                "train": {"init_args": {"scenes": 7}},
                "noise": {
                    "kinds": {"noise": 1, "fade": 1},
                    "levels": {
                        "class_path": "vlm_calibration.perturbation.levels.LinearLevels",
                        "init_args": {"n_levels": 2},
                    },
                },
                "eval_batch_size": 15 // devices,
                "workers": 0,
            },
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
        configs = (str(root / "configs/levels.yaml"), str(tmp_path / f"{name}.yaml"))
        return ["levels", "fit", *(word for path in configs for word in ("--config", path))]

    ended = run(*command("one", 1))
    assert ended.status == 0, ended.err
    ended = run_plainly(command("two", 2), root, tmp_path)
    assert ended.status == 0, ended.err
    one, two = (AnchoredLevels(tmp_path / name / "levels.json") for name in ("one", "two"))
    assert {t: c.bins for t, c in one.table.counts.items()} == {
        t: c.bins for t, c in two.table.counts.items()
    }
    for answer_type, counts in one.table.counts.items():
        assert two.table.counts[answer_type].edges == pytest.approx(counts.edges, abs=1e-6)
    assert len(one.table.counts["yes_no"].bins) == 2, "100 queries"
    read = [
        read_likelihoods(tmp_path / name / "likelihoods.parquet", one.table.provenance, "")
        for name in ("one", "two")
    ]
    assert list(read[0]) == list(read[1])
    assert len(read[0]) == 21
    values, contents = zip(*([[m[i] for m in r.values()] for i in (0, 1)] for r in read), strict=True)
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert contents[0] == contents[1]
