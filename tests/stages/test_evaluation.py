"""Evaluating several systems at once: each answers as it does alone, on the same images, and the files are consistent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.predictions import prediction_from_dict
from vlm_calibration.models.adapters import load_adapters, using_adapter
from vlm_calibration.models.generation import generate
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.perturbation.levels import AnchoredLevels, Perturbation
from vlm_calibration.records import DataError
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.stages.scoring import Scorer

from ..level_tables import measured, noise_counts
from .preference import Data, Evaluate, LoadModel, MakeTrainer, NewAdapter

SYSTEMS = ("base", "one", "two", "oracle")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts_alone(model: Any, queries: PerturbedQueryDataModule, system: str) -> list[str]:
    """What a system generates without the others."""
    texts: list[str] = []
    for batch in queries.test_dataloader():
        with using_adapter(model, None if system == "base" else system):
            texts += generate(model, batch.inputs, queries.processor.tokenizer, 5).texts
    return texts


@pytest.mark.slow
def test_systems_side_by_side(
    run_evaluation: Evaluate,
    new_adapter: NewAdapter,
    data: Data,
    trainer: MakeTrainer,
    load_model: LoadModel,
    levels_file: str,
    tmp_path: Path,
) -> None:
    queries, folder = data(), tmp_path / "run"
    # The second one adapts the tower, too, which therefore runs again.
    adapters = {"one": new_adapter(1), "two": new_adapter(2, parts=["language", "tower"])}
    module = run_evaluation(adapters, queries=queries)
    lines = {system: _lines(folder / system / "predictions.jsonl") for system in SYSTEMS}

    # Every query once and in order, whoever answers.
    dataset = queries.test_dataloader().dataset
    for found in lines.values():
        assert [line["id"] for line in found] == [q.id for q in dataset.queries]  # type: ignore[attr-defined]
        assert [line["category"] for line in found] == [q.category for q in dataset.queries]  # type: ignore[attr-defined]
    samples = [dataset[0, i] for i in range(len(dataset))]  # type: ignore[arg-type]
    for line, sample in zip(lines["base"], samples, strict=True):
        assert (line["perturbation"], line["strength"]) == sample.perturbation
        assert line["noise_step"] == sample.noise_step == round(1000 * sample.perturbation.strength)
    assert len({s.perturbation for s in samples}) > 2

    # Each system answers as it does alone.
    model = load_adapters(load_model(), module.adapters)
    alone = {system: texts_alone(model, queries, system) for system in ("base", "one", "two")}
    for system, texts in alone.items():
        assert [line["text"] for line in lines[system]] == texts
    assert alone["base"] != alone["one"] != alone["two"] != alone["base"]

    # The oracle gives the base model's answers with the measured accuracy.
    levels = AnchoredLevels(levels_file)
    for oracle, base in zip(lines["oracle"], lines["base"], strict=True):
        assert {**oracle, "confidence": None} == {**base, "confidence": None}
        assert oracle["confidence"] == levels.accuracy(
            Perturbation(base["perturbation"], base["strength"]), base["answer_type"]
        )

    # The metrics are those of the predictions.
    for system in SYSTEMS:
        scorer = Scorer(module.scorers[0].groups)
        scorer.update([prediction_from_dict(line) for line in lines[system]])
        expected = {k: None if v != v else v for k, v in scorer.compute().items()}
        assert json.loads((folder / system / "metrics.json").read_text(encoding="utf-8")) == expected
        assert expected["n"] == len(samples)
    assert {"clean", "noised", "shifted", "existence", "position"} <= set(module.scorers[0].groups)
    assert {p.name for p in folder.iterdir()} == set(SYSTEMS)

    # A second run is the same.
    before = {p: p.read_bytes() for p in folder.rglob("*.json*")}
    assert len(before) == 2 * len(SYSTEMS)
    trainer(PredictionWriter()).test(module, datamodule=queries, verbose=False)
    assert {p: p.read_bytes() for p in folder.rglob("*.json*")} == before


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
        found[str(with_base)] = _lines(tmp_path / "run/two/predictions.jsonl")
    assert found["True"] == found["False"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"adapters": {"oracle": "x"}}, "the name 'oracle' is taken"),
        ({"adapters": {"../x": "x"}}, "the name '../x' must be"),
        ({"with_base": False}, "nothing to evaluate"),
        ({"with_base": False, "oracle_levels": "x"}, "needs the base model's answers"),
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
    module = EvaluationModule(
        BaseModel(model_folder, dtype="float32"),
        oracle_levels=str(tmp_path / "levels.json"),
        max_new_tokens=3,
    )
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
    model_folder: str,
    data: Data,
    tmp_path: Path,
    kinds: dict[str, float],
    rows: list[tuple[float, int, int]],
    says: str,
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
