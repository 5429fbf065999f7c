"""An interrupted evaluation resumes from the log of its answers, and ends with the files of an uninterrupted one."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import yaml

from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.predictions import read_predictions
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.records import DataError, Prediction
from vlm_calibration.stages.answer_log import AnswerLog, ResumeState
from vlm_calibration.stages.evaluation import BatchAnswers, EvaluationModule

from ..command_line import Ended, callback, instance
from ..level_tables import measured
from ..wandb_log import demo
from .conftest import Data, Evaluate, NewAdapter, Stop

SYSTEMS = ("base", "one", "oracle")


def _part(scenes: int, noise: str = "none", shifted: bool = False) -> dict[str, Any]:
    return {"source": demo("test", scenes, shifted=shifted), "noise": noise}


@pytest.fixture
def evaluation(
    root: Path, model_folder: str, new_adapter: NewAdapter, tmp_path: Path
) -> Callable[..., list[str]]:
    """Function that returns the arguments of an evaluation of 15 queries in folder `name` by three systems.

    One of them is an adapter in `tmp_path`; callbacks are before the writer or behind it.
    """
    shutil.copytree(new_adapter(1), tmp_path / "adapter")
    measured(model_folder).save(tmp_path / "levels.json")
    kinds = ("verbal.ExpectedConfidence", "likelihood.AnswerLikelihood", "consistency.SelfConsistency")
    estimators = [instance(f"estimators.{k}") for k in kinds[:2]] + [
        instance(f"estimators.{kinds[2]}", samples=2)
    ]

    def arguments(
        name: str, *disaster: dict[str, Any], behind: bool = False, batch: int = 3, **model: Any
    ) -> list[str]:
        asked = callback("disasters.WriteAsked", path=str(tmp_path / f"{name}.asked."))
        writer = callback("predictions.PredictionWriter")
        overlay = {
            "trainer": {
                "accelerator": "cpu",
                "logger": False,
                "enable_progress_bar": False,
                "default_root_dir": str(tmp_path / name),
                "callbacks": [asked, *(() if behind else disaster), writer, *(disaster if behind else ())],
            },
            "model": {
                "init_args": {
                    "base": {"name_or_path": model_folder},
                    "adapters": {"one": str(tmp_path / "adapter")},
                    "oracle_levels": str(tmp_path / "levels.json"),
                    "max_new_tokens": 3,
                    "estimators": estimators,
                    **model,
                }
            },
            "data": {
                "test": {"clean": _part(2), "noised": _part(2, "drawn"), "shifted": _part(1, shifted=True)},
                "calibration": None,
                "noise": {"kinds": {"noise": 1}},
                "eval_batch_size": batch,
                "workers": 0,
            },
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(overlay), encoding="utf-8")
        return ["test", "--config", str(root / "configs/eval/demo.yaml"), "--config", str(path)]

    return arguments


def _files(folder: Path) -> dict[str, bytes]:
    """The content of all files except the configuration and the record, which name the folder and its models."""
    paths = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {
        name: path.read_bytes() for name, path in paths.items() if name not in ("config.yaml", "run.json")
    }


@pytest.mark.slow
def test_two_processes_are_killed_and_one_resumes_twice(
    run: Callable[..., Ended],
    run_each: Callable[..., tuple[Ended, Ended]],
    evaluation: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    both = run_each(*evaluation("whole", batch=2), "--trainer.strategy", "ddp")
    assert [ended.status for ended in both] == [0, 0], [ended.err for ended in both]
    whole, asked = _files(tmp_path / "whole"), tmp_path / "cut.asked.0"
    assert sorted(whole) == sorted(
        f"{s}/{name}" for s in SYSTEMS for name in ("metrics.json", "predictions.jsonl")
    )

    # One process is killed; the other one fails when it has answered its own queries.
    kill = callback("disasters.KillTest", batch=2, when="answered", rank=1)
    first, second = run_each(*evaluation("cut", kill, batch=2), "--trainer.strategy", "ddp")
    assert second.status == -signal.SIGKILL, second.err
    assert first.status not in (0, -signal.SIGKILL), first.err
    stop = callback("disasters.KillTest", batch=0, when="answered", number=int(signal.SIGTERM))
    for disaster, status, before, n_asked in (((stop,), 143, 12, 1), ((), 0, 13, 2)):
        asked.write_text("")
        ended = run(*evaluation("cut", *disaster, batch=1))
        assert ended.status == status, ended.err
        messages = re.findall(r"resuming: .*|.*starting over.*", ended.err)
        assert messages == [f"resuming: {before} of 15 queries were answered before"]
        assert asked.read_text().count("\n") == n_asked
    assert set(_files(tmp_path / "cut")) == set(whole)
    for system in SYSTEMS:
        cut, uncut = (read_predictions(tmp_path / n / system / "predictions.jsonl") for n in ("cut", "whole"))
        assert [replace(p, estimates={}) for p in cut] == [replace(p, estimates={}) for p in uncut]
        for a, b in zip(cut, uncut, strict=True):
            assert a.estimates == pytest.approx(b.estimates, abs=1e-5)
        metrics = [json.loads((tmp_path / n / system / "metrics.json").read_text()) for n in ("cut", "whole")]
        assert metrics[0] == pytest.approx(metrics[1], abs=2e-4)


@pytest.fixture
def evaluate(run_evaluation: Evaluate, new_adapter: NewAdapter, tmp_path: Path) -> Callable[..., None]:
    """Evaluates in this process, in folder `name`."""
    adapter = tmp_path / "adapter"
    shutil.copytree(new_adapter(1), adapter)

    def run(name: str, *callbacks: L.Callback, queries: Any = None, limit: Any = None, **model: Any) -> None:
        trained = {"default_root_dir": tmp_path / name, "limit_test_batches": limit}
        settings = {"max_new_tokens": 3, "estimators": [ExpectedConfidence()], **model}
        run_evaluation({"one": str(adapter)}, *callbacks, queries=queries, trained=trained, **settings)

    return run


@pytest.mark.slow
def test_errors_and_interrupts_keep_what_was_answered_and_a_calibration_set_moves_no_score(
    evaluate: Callable[..., None],
    data: Data,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """An error, after which half of a batch is on the disk, then Ctrl-C, then an error when the files are written."""

    def queries() -> PerturbedQueryDataModule:
        source = DemoSource("calibration", scenes=2)
        return data(calibration={"clean": EvalSplit(source), "noised": EvalSplit(source, "drawn")})

    caplog.set_level(logging.INFO)
    evaluate("plain")
    evaluate("whole", queries=queries())
    files, expected = _files(tmp_path / "whole"), _files(tmp_path / "plain")
    held_out = {name: files.pop(name) for name in [f"{system}/calibration.jsonl" for system in SYSTEMS]}
    assert files == expected
    answers = read_predictions(tmp_path / "whole/one/calibration.jsonl")
    ids = [q.id for q in DemoSource("calibration", 2).queries()]
    assert [p.id for p in answers] == [f"{part}:{i}" for part in ("clean", "noised") for i in ids]
    assert {p.noise_step for p in answers[:6]} == {0} != {p.noise_step for p in answers[6:]}

    with pytest.raises(ZeroDivisionError):
        evaluate("cut", Stop(2, ZeroDivisionError), queries=queries())
    log = tmp_path / "cut/.answered.0.jsonl"
    log.write_bytes(log.read_bytes()[:-100])
    with pytest.raises(SystemExit):
        evaluate("cut", Stop(1, KeyboardInterrupt, loader=1), queries=queries())
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(EvaluationModule, "on_test_end", Mock(side_effect=ZeroDivisionError))
        evaluate("cut", queries=queries())
    evaluate("cut", queries=queries())
    assert re.findall(r"resuming: .* before", caplog.text) == [
        f"resuming: {n} of 27 queries were answered before" for n in (4, 19, 27)
    ]
    assert _files(tmp_path / "cut") == {**files, **held_out}

    evaluate("cut")
    assert _files(tmp_path / "cut") == expected, "what an earlier evaluation was calibrated on is gone"

    with pytest.raises(ZeroDivisionError):
        evaluate("limited", Stop(1, ZeroDivisionError), limit=2)
    evaluate("limited", limit=1)
    assert "starting over instead of resuming" in caplog.text
    for system in SYSTEMS:
        assert len(read_predictions(tmp_path / "limited" / system / "predictions.jsonl")) == 4


@pytest.mark.slow
def test_where_nothing_is_asked_nothing_is_lost(evaluate: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        evaluate("cut", Stop(2, ZeroDivisionError))
    before = _files(tmp_path / "cut")
    assert list(before) == [".answered.0.jsonl"]
    evaluate("cut", limit=0)
    assert _files(tmp_path / "cut") == before
    (tmp_path / "adapter/adapter_config.json").unlink()
    with pytest.raises(ValueError, match="no adapter at"):
        evaluate("cut")
    assert _files(tmp_path / "cut") == before


# --- The log of the answers ---

RUN = "a digest"
QUERIES: Any = {
    "test": [SimpleNamespace(id=f"q{n}") for n in range(9)],
    "calibration": [SimpleNamespace(id=f"q{n}") for n in range(3)],
}


def _batch(*numbers: int) -> BatchAnswers:
    """Answers to the queries of these numbers by two systems."""

    def answers(text: str) -> list[Prediction]:
        rest: Any = (None, 0, "yes_no", "", 0.0, None, {"p": 1e-6})
        return [Prediction(f"q{n}", "Größe?\u2028", "Yes", text, "yes", 0.29, True, *rest) for n in numbers]

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
