"""Evaluating several systems at once: each answers as it does alone, on the same images; estimators, probes and scores."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import PeftModel

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
from vlm_calibration.estimators.teacher import taught_confidences
from vlm_calibration.estimators.verbal import ExpectedConfidence, VerbalizedConfidence
from vlm_calibration.metrics.functional import brier_score
from vlm_calibration.models.adapters import load_adapters, using_adapter
from vlm_calibration.models.base import BaseModel
from vlm_calibration.models.generation import generate
from vlm_calibration.perturbation.levels import AnchoredLevels, Perturbation
from vlm_calibration.records import DataError, Prediction, category_groups
from vlm_calibration.reporting.report.data import summarize_predictions
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.stages.scoring import Scorer

from ..command_line import read_lines
from ..level_tables import measured, noise_counts
from ..trainers import plain_trainer
from .conftest import Data, Evaluate, LoadModel, MakeTrainer, NewAdapter

SYSTEMS = ("base", "one", "two", "oracle")
NAMES = ("expected", "likelihood", "p_true", "self_consistency", "stability")


def _metrics(folder: Path, further: bool) -> dict[str, Any]:
    """The metrics of a system that are of estimators and probes, or all others."""
    values: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {k: v for k, v in values.items() if (k.startswith("probe_") or "@" in k) == further}


class Evaluated(NamedTuple):
    """An evaluation of four systems, its data, and the run directory."""

    module: EvaluationModule
    queries: PerturbedQueryDataModule
    folder: Path


@pytest.fixture(scope="module")
def evaluated(
    model_folder: str, data: Data, new_adapter: NewAdapter, tmp_path_factory: pytest.TempPathFactory
) -> Evaluated:
    """With estimators and probes, on nine queries in three parts, of which one is noised, and a calibration set of three.

    The second adapter adapts the tower, too, which therefore runs again.
    """
    folder = tmp_path_factory.mktemp("evaluated")
    measured(model_folder).save(folder / "levels.json")
    module = EvaluationModule(
        BaseModel(model_folder, dtype="float32"),
        {"one": new_adapter(1), "two": new_adapter(2, parts=["language", "tower"])},
        oracle_levels=str(folder / "levels.json"),
        max_new_tokens=5,
        estimators=[ExpectedConfidence(), AnswerLikelihood(), PTrue(), SelfConsistency(2), Stability()],
        probes=[*PROBES[::-1]],
    )
    source, shifted = DemoSource("test", scenes=1), DemoSource("test", scenes=1, shifted=True)
    parts = {"clean": EvalSplit(source), "noised": EvalSplit(source, "drawn"), "shifted": EvalSplit(shifted)}
    held_out = {"held_out": EvalSplit(DemoSource("calibration", scenes=1))}
    queries = data(test=parts, calibration=held_out)
    plain_trainer(folder / "run", PredictionWriter()).test(module, datamodule=queries, verbose=False)
    return Evaluated(module, queries, folder / "run")


@pytest.mark.slow
def test_systems_side_by_side(evaluated: Evaluated, load_model: LoadModel) -> None:
    module, queries, folder = evaluated
    lines = {system: read_lines(folder / system / "predictions.jsonl") for system in SYSTEMS}

    # Every query once and in order, whoever answers.
    loader, _ = queries.test_dataloader()
    dataset: Any = loader.dataset
    for found in lines.values():
        assert [line["id"] for line in found] == [q.id for q in dataset.queries]
        assert [line["category"] for line in found] == [q.category for q in dataset.queries]
    samples = [dataset[0, i] for i in range(len(dataset))]
    for line, sample in zip(lines["base"], samples, strict=True):
        assert (line["perturbation"], line["strength"]) == sample.perturbation
        assert line["noise_step"] == sample.noise_step == round(1000 * sample.perturbation.strength)
    assert len({s.perturbation for s in samples}) > 2

    # Each system answers as it does alone.
    alone = {}
    for system in ("base", "one", "two"):
        model = load_model()
        if system != "base":
            model = PeftModel.from_pretrained(model, module.adapters[system]).eval()
        texts = [generate(model, b.inputs, queries.processor.tokenizer, 5).texts for b in loader]
        alone[system] = [text for of_batch in texts for text in of_batch]
        assert [line["text"] for line in lines[system]] == alone[system]
    assert alone["base"] != alone["one"] != alone["two"] != alone["base"]

    # The oracle gives the base model's answers with the measured accuracy, and is no model to estimate or probe.
    levels = AnchoredLevels(folder.parent / "levels.json")
    for oracle, own in zip(lines["oracle"], lines["base"], strict=True):
        lost = Perturbation(own["perturbation"], own["strength"])
        assert oracle == {
            **{k: own[k] for k in oracle},
            "confidence": levels.accuracy(lost, own["answer_type"]),
        }
        assert not set(oracle) & {*NAMES, "probes"}
    assert not _metrics(folder / "oracle", further=True)

    # The metrics are those of the predictions.
    for system in SYSTEMS:
        scorer = Scorer(module.scorers[0].groups)
        scorer.update([prediction_from_dict(line) for line in lines[system]])
        expected = {k: None if v != v else v for k, v in scorer.compute().items()}
        assert _metrics(folder / system, further=False) == expected
        assert expected["n"] == len(samples)
    assert {"clean", "noised", "shifted", "existence", "position"} <= set(module.scorers[0].groups)
    assert {p.name for p in folder.iterdir()} == set(SYSTEMS)


@pytest.mark.slow
def test_the_tower_runs_once_a_batch_however_many_systems_there_are(
    model_folder: str, new_adapter: NewAdapter, data: Data, trainer: MakeTrainer, tmp_path: Path
) -> None:
    adapters = {"one": new_adapter(1), "two": new_adapter(2)}
    found: dict[str, list[dict[str, Any]]] = {}
    for chosen, with_base in ((adapters, True), ({"two": adapters["two"]}, False)):
        base = BaseModel(model_folder, dtype="float32")
        module = EvaluationModule(base, chosen, with_base=with_base, max_new_tokens=5)
        module.configure_model()
        runs: list[int] = []
        # A hook inside the tower; one on the shared module would run even if its output is reused.
        tower = module.model.get_base_model().model.vision_tower
        tower.encoder.layers[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        (logged,) = trainer(PredictionWriter()).test(module, datamodule=data(), verbose=False)
        assert {name.split("/")[1] for name in logged} == {*chosen, *(["base"] if with_base else [])}
        assert len(runs) == 4, "15 queries in batches of 4"
        found[str(with_base)] = read_lines(tmp_path / "run/two/predictions.jsonl")
    assert found["True"] == found["False"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"adapters": {"oracle": "x"}}, "the name 'oracle' is taken"),
        ({"adapters": {"base": "x"}}, "the name 'base' is taken"),
        ({"adapters": {"../x": "x"}}, "the name '../x' must be"),
        ({"with_base": False}, "nothing to evaluate"),
        ({"with_base": False, "oracle_levels": "x"}, "needs the base model's answers"),
        ({"estimators": [PTrue(), PTrue(true="Yes", false="No")]}, "'p_true' appears twice"),
        ({"estimators": [VerbalizedConfidence()]}, "'verbalized' appears twice"),
        ({"probes": ["sound"]}, "no probe 'sound'"),
        ({"probes": ["image", "image"]}, "'image' appears twice"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        EvaluationModule(BaseModel("nowhere"), **settings)
    assert says in str(caught.value)


def test_levels_that_miss_an_answer_type_are_an_error_before_anything_is_answered(
    model_folder: str, data: Data, trainer: MakeTrainer, tmp_path: Path
) -> None:
    table = measured(model_folder, {"yes_no": noise_counts((0, 10, 9), (1, 10, 5))})
    table.save(tmp_path / "levels.json")
    module = EvaluationModule(BaseModel(model_folder), oracle_levels=str(tmp_path / "levels.json"))
    with pytest.raises(DataError, match="no levels were measured for answer type 'short'"):
        trainer(PredictionWriter()).test(module, datamodule=data(), verbose=False)
    assert not list((tmp_path / "run").rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("kinds", "rows", "says"),
    [
        ({"noise": 1.0, "blur": 1.0}, [(0, 100, 95), (1, 100, 50)], "no levels for 'blur'; measured: noise"),
        ({"noise": 1.0}, [(0, 100, 95), (0.8, 100, 50)], "strength must be in [0, 0.8]"),
    ],
)
def test_an_oracle_without_levels_for_a_part_is_refused(
    model_folder: str, data: Data, tmp_path: Path, kinds: dict[str, float], rows: list[Any], says: str
) -> None:
    """Parts with untouched images need none."""
    counts = dict.fromkeys(("yes_no", "short"), noise_counts(*rows))
    measured(model_folder, counts).save(tmp_path / "levels.json")
    module = EvaluationModule(BaseModel(model_folder), oracle_levels=str(tmp_path / "levels.json"))
    source = DemoSource("test", scenes=1)
    clean = EvalSplit(source)
    module.check_data(data(test={"clean": clean, "hard": clean}))
    with pytest.raises(DataError) as caught:
        module.check_data(data(test={"clean": clean, "hard": EvalSplit(source, "drawn", kinds)}))
    assert says in str(caught.value)
    assert "model.oracle_levels, for data.test.hard: " in str(caught.value)


@pytest.mark.slow
def test_every_estimator_has_its_key_and_its_metrics(evaluated: Evaluated) -> None:
    folder = evaluated.folder
    estimates: dict[str, list[Any]] = {}
    for system in ("base", "one"):
        lines = read_lines(folder / system / "predictions.jsonl")
        assert [tuple(line)[-7:] for line in lines] == [("image", *NAMES, "probes")] * 9
        predictions = [prediction_from_dict(line) for line in lines]
        estimates[system] = [p.estimates for p in predictions]
        assert all((p["stability"] is None) == (p["likelihood"] is None) for p in estimates[system])
        assert [p["stability"] for p in estimates[system]] != [p["likelihood"] for p in estimates[system]]

        metrics = _metrics(folder / system, further=True)
        shifted = [p for p in predictions if "shifted" in (p.category or "").split("/")]
        for suffix, part in (("", predictions), ("/shifted", shifted)):
            for name in NAMES:
                rated = [(c, p.correct) for p in part if (c := p.estimates[name]) is not None]
                failed = 1 - len(rated) / len(part)
                assert metrics[f"parse_failure_rate@{name}{suffix}"] == pytest.approx(failed)
                if rated:
                    confidence, correct = (torch.tensor(column) for column in zip(*rated, strict=True))
                    brier = float(brier_score(confidence.double(), correct))
                    assert metrics[f"brier@{name}{suffix}"] == pytest.approx(brier, abs=1e-4)
        assert [metrics[f"forward_passes@{n}"] for n in (*NAMES[:3], "stability")] == [1, 1, 1, 4]
        assert 1 <= metrics["forward_passes@verbalized"] <= 5
        assert 2 <= metrics["forward_passes@self_consistency"] <= 10
        taught = taught_confidences(predictions, read_predictions(folder / system / "calibration.jsonl"))
        if not taught:
            assert not any("@teacher" in name for name in metrics)
        else:
            pairs = [(c, p.correct) for c, p in zip(taught, predictions, strict=True) if c is not None]
            assert metrics["brier@teacher"] == pytest.approx(
                float(brier_score(*map(torch.tensor, zip(*pairs, strict=True))))
            )
    assert estimates["base"] != estimates["one"]


@pytest.mark.slow
def test_every_answer_of_a_model_has_its_probed_confidences(
    evaluated: Evaluated, load_model: LoadModel
) -> None:
    module, queries, folder = evaluated
    model = load_adapters(load_model(), module.adapters)
    tokenizer, (test, _) = AnswerTokenizer(queries.chat), queries.test_dataloader()
    for system in ("base", "one"):
        predictions = read_predictions(folder / system / "predictions.jsonl")
        assert [tuple(p.probes) for p in predictions] == [("original", *PROBES)] * 9
        with torch.no_grad(), using_adapter(model, None if system == "base" else system):
            for number, batch in enumerate(test):
                part = predictions[4 * number : 4 * number + 4]
                answered = AnsweredBatch(model, batch, part, [0] * len(part), tokenizer, 5)
                assert answered.read_probes(PROBES)[0] == [p.probes for p in part]
                for estimator in module.estimators[1:5]:
                    estimates = [p.estimates[estimator.name] for p in part]
                    assert estimator.estimate(answered).confidence == pytest.approx(estimates, abs=1e-5)
        assert not any(p.probes for p in read_predictions(folder / system / "calibration.jsonl"))

        metrics = _metrics(folder / system, further=True)
        assert 3 <= metrics["forward_passes@probes"] <= 5 + 5, (
            "a rival other than yes or no is generated, in five tokens"
        )
        again = {k: v for k, v in summarize_predictions(predictions).items() if k.startswith("probe_")}
        assert again
        assert {k: metrics[k] for k in again} == {k: None if v != v else v for k, v in again.items()}
        probed = [p.probes for p in predictions if p.probes["original"] is not None]
        assert metrics["probe_image_n"] == len(probed)
        if probed:
            change = sum(p["image"] - p["original"] for p in probed) / len(probed)  # type: ignore[operator]
            assert metrics["probe_image_change"] == pytest.approx(change)
        assert "probe_object_change/noised" in metrics


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
    run_evaluation: Evaluate, monkeypatch: pytest.MonkeyPatch, chosen: Any, fractional: int, refused: bool
) -> None:
    """`fractional` of the 15 answers state fractions of a percent, all others whole percents."""
    stated = iter([0.875] * fractional + [0.29] * (15 - fractional))

    def answers(*arguments: Any) -> list[Any]:
        return [replace(answer, confidence=next(stated)) for answer in grade_answers(*arguments)]

    monkeypatch.setattr(base, "grade_answers", answers)
    with pytest.raises(DataError, match="'base'.* 87.5%") if refused else nullcontext():
        run_evaluation({}, **chosen)


def test_the_calibration_set_is_not_copied_for_probes(model_folder: str) -> None:
    stable = Stability()
    module = EvaluationModule(BaseModel(model_folder), estimators=[stable], probes=["image", "answer"])
    assert [len(copies) for copies in module.data_needs.copies.values()] == [5, 4]
    assert module.data_needs.copies["calibration"] == stable.copies
    assert EvaluationModule(BaseModel(model_folder)).data_needs.copies == {"test": [], "calibration": []}


# --- The scorer ---

CATEGORIES = ("clean/existence", "clean/position", "shifted/blur/existence", "shifted/jpeg/position", None)


def _predictions(n: int = 200, seed: int = 0) -> list[Prediction]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        category = CATEGORIES[int(rng.integers(len(CATEGORIES)))]
        short = category is not None and category.endswith("position")
        gold = "dog" if short else ("Yes", "No")[int(rng.integers(2))]
        predicted = [gold.lower(), "cat" if short else "no", None][int(rng.choice(3, p=[0.6, 0.3, 0.1]))]
        confidence = None if rng.random() < 0.1 else int(rng.integers(101)) / 100
        made.append(
            Prediction(
                *(f"q{i}", "?", gold, "", predicted, confidence, predicted == gold.lower(), category, 0),
                answer_type="short" if short else "yes_no",
            )
        )
    return made


PREDICTIONS = _predictions()
GROUPS = sorted({g for c in CATEGORIES for g in category_groups(c)})


def _scored(predictions: list[Prediction], size: int, groups: list[str]) -> dict[str, float]:
    scorer = Scorer(groups)
    for start in range(0, len(predictions), size):
        scorer.update(predictions[start : start + size])
    return scorer.compute()


def test_new_groups_forget_and_nothing_adds_nothing() -> None:
    scorer = Scorer(GROUPS)
    scorer.update(PREDICTIONS)
    scorer.set_groups(["clean"])
    scorer.update([])
    scorer.update(PREDICTIONS[:20])
    expected = _scored(PREDICTIONS[:20], 20, ["clean"])
    assert scorer.compute() == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


@pytest.mark.filterwarnings("error")
def test_what_is_undefined_is_nan_without_a_warning() -> None:
    always = [p for p in PREDICTIONS if p.correct and p.confidence is not None]
    found = _scored(always, 50, [])
    assert math.isnan(found["auroc"])
    assert found["accuracy"] == 1.0
