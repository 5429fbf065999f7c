"""The files of an evaluation's progress, and what tells one evaluation from another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlm_calibration.callbacks.fingerprint import fingerprint
from vlm_calibration.callbacks.progress import HEADER, Answered, Progress
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.consistency import SelfConsistency
from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.perturbation.schedules import LinearSchedule
from vlm_calibration.records import DataError
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.text.prompts import ElicitationPrompt

DECISIVE = {"model.base": "a", "data.noise": "b"}


def _answered(*places: int) -> Answered:
    found = [
        EstimatedPrediction(
            f"q{n}", "Größe?\u2028", "Yes", "Yes\n", "yes", 0.29, True, None, 0, "yes_no", None, {"p": 1e-6}
        )
        for n in places
    ]
    return Answered(
        [*places], {"base": found, "one": found[::-1]}, {"base": {"verbalized": [2] * len(places)}}
    )


def _begun(folder: Path, *batches: list[tuple[int, ...]]) -> Progress:
    """Processes that have answered these batches each; the first of them."""
    first = Progress(folder, 0)
    assert first.find(DECISIVE, 9) == (False, [], "")
    first.begin(DECISIVE, anew=True)
    for rank, own in enumerate(batches):
        progress = Progress(folder, rank)
        for places in own:
            progress.append(_answered(*places))
        progress.close()
    return first


def test_what_was_answered_is_found_again(tmp_path: Path) -> None:
    _begun(tmp_path, [(0, 2), (4, 6)], [(1, 3)])
    later = Progress(tmp_path, 0)
    found = later.find(DECISIVE, 9)
    assert found.goes_on
    assert found.places == [0, 2, 4, 6, 1, 3]
    assert found.message == f"{tmp_path}: goes on: 6 of 9 queries were answered before"
    later.begin(DECISIVE, anew=False)
    # What others answer meanwhile is not from before.
    other = Progress(tmp_path, 1)
    other.append(_answered(5, 7))
    assert [*later.before()] == [_answered(0, 2), _answered(4, 6), _answered(1, 3)]
    later.append(_answered(8))
    later.write_predictions("one", tmp_path / "one.jsonl", range(9), 9)
    lines = (tmp_path / "one.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["id"] for line in lines] == [
        "q2",
        "q3",
        "q0",
        "q1",
        "q6",
        "q7",
        "q4",
        "q5",
        "q8",
    ]
    assert lines[8] == json.dumps(_answered(8).answers["one"][0].to_dict(), ensure_ascii=False)
    later.clear()
    assert [p.name for p in tmp_path.iterdir()] == ["one.jsonl"]


def test_a_line_that_is_cut_off_does_not_count_anywhere(tmp_path: Path) -> None:
    _begun(tmp_path, [(0, 1), (2, 3), (4, 5)])
    path = tmp_path / ".answered.0.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (len(lines[0]), len(lines[0]) + 1, len(lines[0] + lines[1]) - 1):
        path.write_bytes(whole[:cut])
        progress = Progress(tmp_path, 0)
        assert progress.find(DECISIVE, 6).places == [0, 1]
        assert [*progress.before()] == [_answered(0, 1)]
        progress.append(_answered(2, 3))
        assert path.read_bytes() == lines[0] + lines[1]
    path.write_bytes(whole[:20])
    assert Progress(tmp_path, 0).find(DECISIVE, 6) == (True, [], ""), "nothing was answered, nothing is said"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"decisive": {**DECISIVE, "data.noise": "c"}}, "changed: data.noise"),
        ({"decisive": {"model.base": "c"}}, "changed: model.base, data.noise"),
        ({"whole": False}, "trainer.limit_test_batches is set"),
    ],
)
def test_others_start_anew(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    _begun(tmp_path, [(0, 1)], [(2, 3)])
    progress = Progress(tmp_path, 0)
    goes_on, places, message = progress.find(**{"decisive": DECISIVE, "total": 9, **settings})
    assert not goes_on
    assert places == []
    assert message == f"{tmp_path}: the evaluation that ended early here starts anew; {says}"
    assert [*progress.before()] == []
    progress.begin(DECISIVE, anew=True)
    assert [p.name for p in tmp_path.iterdir()] == [HEADER]


def _spoilt(path: Path) -> Iterator[tuple[bytes, str]]:
    first, second = path.read_bytes().splitlines(keepends=True)
    at, twice = f"{path}:1: cannot go on", "not answers to 9 queries, each once"
    yield b"\0" * 30 + b"\n" + second, at
    yield b"[]\n" + second, at
    yield first.replace(b'"places": [0, 1]', b'"places": [0]') + second, at
    yield first.replace(b'"one": [', b'"one": [1, ') + second, at
    yield first + first, twice
    yield first.replace(b"[0, 1]", b"[0, 9]"), twice


def test_damage_is_named(tmp_path: Path) -> None:
    _begun(tmp_path, [(0, 1), (2, 3)])
    path = tmp_path / ".answered.0.jsonl"
    for content, says in [*_spoilt(path)]:
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            Progress(tmp_path, 0).find(DECISIVE, 9)
        assert says in str(caught.value)
        assert f"remove {HEADER}, and the evaluation starts anew" in str(caught.value)
    (tmp_path / HEADER).write_text("{")
    with pytest.raises(DataError, match=f"{tmp_path / HEADER}: cannot go on"):
        Progress(tmp_path, 0).find(DECISIVE, 9)
    (tmp_path / HEADER).unlink()
    assert Progress(tmp_path, 0).find(DECISIVE, 9) == (False, [], ""), (
        "lines without a header count for nothing"
    )


def test_predictions_that_are_not_all_there_are_not_written(tmp_path: Path) -> None:
    progress = _begun(tmp_path, [(0, 1)], [(2, 3)])
    for batch, total in ((None, 5), ((3, 4), 5), ((3, 4), 6)):
        if batch:
            Progress(tmp_path, 1).append(_answered(*batch))
        with pytest.raises(DataError, match="does another evaluation write into this folder"):
            progress.write_predictions("base", tmp_path / "predictions.jsonl", range(total), total)
        (tmp_path / ".answered.1.jsonl").write_bytes(
            (tmp_path / ".answered.1.jsonl").read_bytes().splitlines(keepends=True)[0]
        )
    assert not (tmp_path / "predictions.jsonl").exists()


@pytest.fixture
def decisive(model_folder: str, new_adapter: Callable[..., str], root: Path) -> Callable[..., dict[str, str]]:
    adapter, levels = new_adapter(1), str(root / "src/vlm_calibration/demo/levels.json")

    def found(**changes: Any) -> dict[str, str]:
        base = BaseModel(model_folder, **changes.pop("base", {}))
        model = {"adapters": {"one": adapter}, "oracle_levels": levels, "estimators": [SelfConsistency(3)]}
        data = {"test": {"": EvalSplit(DemoSource("test", 2), "drawn")}, "workers": 0}
        trainer: Any = SimpleNamespace(
            precision=changes.pop("precision", "32-true"),
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            limit_test_batches=1.0,
        )
        module = EvaluationModule(base, **{**model, **changes.pop("model", {})})
        queries = PerturbedQueryDataModule(model_folder, **{**data, **changes.pop("data", {})})
        assert not changes
        queries.setup("test")
        return fingerprint(trainer, module, queries)

    return found


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({}, ""),
        ({"data": {"eval_batch_size": 3, "workers": 2, "batch_size": 1}}, ""),
        ({"base": {"dtype": "float32"}}, "model.base"),
        ({"model": {"with_base": False, "oracle_levels": None}}, "model.with_base, model.oracle_levels"),
        ({"model": {"max_new_tokens": 5}}, "model.max_new_tokens"),
        ({"model": {"estimators": [SelfConsistency(4)]}}, "model.estimators"),
        ({"model": {"estimators": [ExpectedConfidence([LinearLevels(3)])]}}, "model.estimators"),
        ({"model": {"estimators": None}}, "model.estimators"),
        ({"model": {"adapters": {}}}, "model.adapters"),
        ({"data": {"test": {"": EvalSplit(DemoSource("test", 2))}}}, "data.test"),
        (
            {"data": {"test": {"": EvalSplit(DemoSource("test", 3), "drawn")}}},
            "data.test, the queries of data.test",
        ),
        ({"data": {"noise": NoisePolicy(seed=1)}}, "data.noise"),
        ({"data": {"noise": NoisePolicy(schedule=LinearSchedule())}}, "data.noise"),
        ({"data": {"noise": NoisePolicy(levels=LinearLevels(3))}}, "data.noise"),
        ({"data": {"prompt": ElicitationPrompt("{question}?")}}, "data.prompt"),
        ({"precision": "bf16-true"}, "trainer.precision"),
    ],
)
def test_what_decides_the_answers(
    decisive: Callable[..., dict[str, str]], changes: dict[str, Any], changed: str
) -> None:
    before, after = decisive(), decisive(**changes)
    assert ", ".join(name for name in before if before[name] != after[name]) == changed


def test_files_count_by_their_content(
    decisive: Callable[..., dict[str, str]], new_adapter: Callable[..., str], root: Path, tmp_path: Path
) -> None:
    before = decisive()
    levels = json.loads((root / "src/vlm_calibration/demo/levels.json").read_text())
    for path in (tmp_path / "same.json", tmp_path / "other.json"):
        path.write_text(json.dumps(levels))
        after = decisive(model={"oracle_levels": str(path)})
        assert (after["model.oracle_levels"] == before["model.oracle_levels"]) == (path.stem == "same")
        levels["provenance"]["seed"] = 5
    for seed in (1, 2):
        after = decisive(model={"adapters": {"one": new_adapter(seed)}})
        assert (after["model.adapters"] == before["model.adapters"]) == (seed == 1)
