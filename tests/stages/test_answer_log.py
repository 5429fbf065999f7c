"""The log of the answers of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.records import DataError
from vlm_calibration.stages.answer_log import AnswerLog, ResumeState
from vlm_calibration.stages.evaluation import BatchAnswers

RUN = "a digest"
QUERIES: Any = {
    "test": [SimpleNamespace(id=f"q{n}") for n in range(9)],
    "calibration": [SimpleNamespace(id=f"q{n}") for n in range(3)],
}


def _batch(*numbers: int) -> BatchAnswers:
    """Answers to the queries of these numbers by two systems."""

    def answers(text: str) -> list[EstimatedPrediction]:
        rest: Any = (None, 0, "yes_no", "", 0.0, None, {"p": 1e-6})
        return [
            EstimatedPrediction(f"q{n}", "Größe?\u2028", "Yes", text, "yes", 0.29, True, *rest)
            for n in numbers
        ]

    passes = {"base": {"verbalized": [2] * len(numbers)}}
    return BatchAnswers(answers={"base": answers("Yes\n"), "one": answers("No")}, passes=passes)


def _log(folder: Path, rank: int = 0, run: str | None = RUN) -> AnswerLog:
    return AnswerLog(folder, rank, QUERIES, run)


def _begun(folder: Path, *batches: list[tuple[int, ...]]) -> AnswerLog:
    """The log of the first of some processes that have answered these batches of the test set each."""
    assert _log(folder).find() == ResumeState()
    for rank, own in enumerate(batches):
        log = _log(folder, rank)
        for numbers in own:
            log.add("test", _batch(*numbers))
        log.close()
    return _log(folder)


def test_what_was_answered_is_found_again(tmp_path: Path) -> None:
    _begun(tmp_path, [(0, 2), (4, 6)], [(1, 3)])
    held_out = _log(tmp_path, 2)
    held_out.add("calibration", _batch(2, 0))
    held_out.close()
    later = _log(tmp_path)
    state = later.find()
    assert state.answered == {"test": [0, 2, 4, 6, 1, 3], "calibration": [2, 0]}
    assert state.message == f"{tmp_path}: resuming: 8 of 12 queries were answered before"
    assert [*later.batches("test")] == [_batch(0, 2), _batch(4, 6), _batch(1, 3)]
    assert [*later.batches("calibration")] == [_batch(2, 0)]
    other = _log(tmp_path, 1)
    other.add("test", _batch(5, 7))
    later.add("test", _batch(8))
    later.write_predictions("one", "test", tmp_path / "one.jsonl", 9)
    later.write_predictions("base", "calibration", tmp_path / "held_out.jsonl")
    lines = (tmp_path / "one.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["id"] for line in lines] == [f"q{n}" for n in range(9)]
    assert lines[8] == json.dumps(_batch(8)["answers"]["one"][0].to_dict(), ensure_ascii=False)
    lines = (tmp_path / "held_out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["id"] for line in lines] == ["q0", "q2"]
    later.clear()
    assert {p.name for p in tmp_path.iterdir()} == {"one.jsonl", "held_out.jsonl"}


def test_without_answers_there_is_nothing_to_tell(tmp_path: Path) -> None:
    _log(tmp_path).add("test", BatchAnswers(answers={"base": [], "one": []}, passes={}))
    assert not list(tmp_path.iterdir())
    _begun(tmp_path, [(0, 1)])
    assert _log(tmp_path, run=None).find() == ResumeState(), "without a record, nobody knows whose these are"
    path = tmp_path / ".answered.0.jsonl"
    path.write_bytes(path.read_bytes()[:20])  # a first line that was cut off
    assert _log(tmp_path).find() == ResumeState()


@pytest.mark.parametrize(
    ("run", "complete", "reason"),
    [
        ("another digest", True, "it had other settings or inputs"),
        (RUN, False, "trainer.limit_test_batches is set"),
    ],
)
def test_others_start_over(tmp_path: Path, run: str, complete: bool, reason: str) -> None:
    _begun(tmp_path, [(0, 1)], [(2, 3)])
    log = _log(tmp_path, run=run)
    over = f"{tmp_path}: starting over instead of resuming the interrupted run: {reason}"
    assert log.find(1.0 if complete else 1) == (None, over)
    log.clear()
    assert not list(tmp_path.iterdir())


def _spoilt(path: Path) -> Iterator[tuple[bytes, str]]:
    first, second = path.read_bytes().splitlines(keepends=True)
    at, twice = f"{path}:1: damaged", "not answers to the 9 queries of data.test, each once"
    yield first.replace(b'"one": [', b'"one": [1, ') + second, at
    yield first.replace(b'"one": [', b'"one": [], "two": [') + second, at
    yield first.replace(b'"split": "test"', b'"split": "train"') + second, at
    yield first.replace(b'"passes": {', b'"passes": 1, "p": {') + second, at
    yield first + first, twice
    yield first.replace(b'"q1"', b'"q9"'), twice


def test_damage_is_named(tmp_path: Path) -> None:
    _begun(tmp_path, [(0, 1), (2, 3)])
    path = tmp_path / ".answered.0.jsonl"
    for content, says in [*_spoilt(path)]:
        assert content != path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            _log(tmp_path).find()
        assert says in str(caught.value)
        assert "remove .answered.*.jsonl in this folder" in str(caught.value)


def test_predictions_that_are_not_all_there_are_not_written(tmp_path: Path) -> None:
    logs = (
        _begun(tmp_path / "few", [(0, 1)], [(2, 3)]),
        _begun(tmp_path / "twice", [(0, 1)], [(2, 3), (3, 4)]),
    )
    for log, total in zip((logs[0], logs[1], logs[1]), (5, 5, 6), strict=True):
        with pytest.raises(DataError, match="does another evaluation write into this folder"):
            log.write_predictions("base", "test", tmp_path / "predictions.jsonl", total)
    assert not (tmp_path / "predictions.jsonl").exists()
