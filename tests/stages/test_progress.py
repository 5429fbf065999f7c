"""An interrupted evaluation resumes from its answers, and ends with the files of an uninterrupted one."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.predictions import read_predictions
from vlm_calibration.estimators.verbal import ExpectedConfidence

from ..command_line import Ended, callback
from ..level_tables import measured
from .preference import Data, Evaluate, NewAdapter, Stop

pytestmark = pytest.mark.slow

SYSTEMS = ("base", "one", "oracle")
FILES = [f"{system}/{name}" for system in SYSTEMS for name in ("predictions.jsonl", "metrics.json")]
DDP = ("--trainer.strategy", "ddp")
WRITER = callback("predictions.PredictionWriter")


def _part(scenes: int, noise: str = "none", shifted: bool = False) -> dict[str, Any]:
    settings = {"split": "test", "scenes": scenes, "shifted": shifted}
    source = {"class_path": "vlm_calibration.demo.source.DemoSource", "init_args": settings}
    return {"source": source, "noise": noise}


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
    estimators: list[dict[str, Any]] = [{"class_path": f"vlm_calibration.estimators.{k}"} for k in kinds]
    estimators[2]["init_args"] = {"samples": 2}

    def arguments(
        name: str, *disaster: dict[str, Any], behind: bool = False, batch: int = 3, **model: Any
    ) -> list[str]:
        asked = callback("disasters.WriteAsked", path=str(tmp_path / f"{name}.asked."))
        overlay = {
            "trainer": {
                "accelerator": "cpu",
                "logger": False,
                "enable_progress_bar": False,
                "default_root_dir": str(tmp_path / name),
                "callbacks": [asked, *(() if behind else disaster), WRITER, *(disaster if behind else ())],
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


def _kill(batch: int, when: str, **settings: Any) -> dict[str, Any]:
    return callback("disasters.KillTest", batch=batch, when=when, **settings)


def _files(folder: Path) -> dict[str, bytes]:
    """The content of all files except the configuration and the record, which name the folder and its models."""
    paths = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {
        name: path.read_bytes() for name, path in paths.items() if name not in ("config.yaml", "run.json")
    }


def _messages(ended: Ended) -> list[str]:
    """The messages of all processes about an earlier run."""
    return re.findall(r"resuming: .*|.*starting over.*", ended.err)


def test_killed_again_and_again(
    run: Callable[..., Ended], evaluation: Callable[..., list[str]], tmp_path: Path
) -> None:
    ended = run(*evaluation("whole"))
    assert ended.status == 0, ended.err
    whole = _files(tmp_path / "whole")
    assert sorted(whole) == sorted(FILES)
    ids = (tmp_path / "whole.asked.0").read_text().splitlines()
    assert len(set(ids)) == len(ids) == 15
    log = tmp_path / "cut.asked.0"

    # (disaster, whether it comes behind the writer, exit status), batches answered before and asked in this run
    runs: list[tuple[Any, bool, int, int, int]] = [
        (_kill(1, "writing"), False, -signal.SIGXFSZ, 0, 2),
        (_kill(0, "answered", number=int(signal.SIGTERM)), False, 143, 1, 1),
        (_kill(0, "ending"), True, -signal.SIGKILL, 2, 3),
        (None, False, 0, 5, 0),
    ]
    for number, (disaster, behind, status, before, asked) in enumerate(runs):
        log.write_text("")
        ended = run(*evaluation("cut", *([disaster] if disaster else []), behind=behind))
        assert ended.status == status, f"{number}: {ended.err}"
        expected = [f"resuming: {3 * before} of 15 queries were answered before"] if before else []
        assert _messages(ended) == expected, number
        assert log.read_text().splitlines() == ids[3 * before : 3 * (before + asked)], number
        if number == 0:
            written = (tmp_path / "cut/.answered.0.jsonl").read_bytes()
            assert written.count(b"\n") == 1
            assert not written.endswith(b"\n"), "this was killed while it wrote"
    assert _files(tmp_path / "cut") == whole


def test_two_processes_and_then_one(
    run: Callable[..., Ended],
    run_each: Callable[..., tuple[Ended, Ended]],
    evaluation: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    first, second = run_each(*evaluation("whole", batch=2), *DDP)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    whole = _files(tmp_path / "whole")
    assert sorted(whole) == sorted(FILES)

    # One process is killed; the other one fails when it has answered its own queries.
    first, second = run_each(*evaluation("one", _kill(2, "answered", rank=1), batch=2), *DDP)
    assert second.status == -signal.SIGKILL, second.err
    assert first.status not in (0, -signal.SIGKILL), first.err
    (tmp_path / "one.asked.0").unlink()
    ended = run(*evaluation("one", batch=4))
    assert ended.status == 0, ended.err
    assert _messages(ended) == ["resuming: 12 of 15 queries were answered before"]
    assert (tmp_path / "one.asked.0").read_text().count("\n") == 3
    assert set(_files(tmp_path / "one")) == set(whole)
    for system in SYSTEMS:
        one, two = (read_predictions(tmp_path / n / system / "predictions.jsonl") for n in ("one", "whole"))
        assert [replace(p, estimates={}) for p in one] == [replace(p, estimates={}) for p in two]
        for a, b in zip(one, two, strict=True):
            assert a.estimates == pytest.approx(b.estimates, abs=1e-5)
        metrics = [json.loads((tmp_path / n / system / "metrics.json").read_text()) for n in ("one", "whole")]
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


def test_errors_and_interrupts_keep_what_was_answered_and_a_calibration_set_moves_no_score(
    evaluate: Callable[..., None], data: Data, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Five batches of the test set, the last one of three queries, and three of the calibration set; an error, then Ctrl-C."""

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
    with pytest.raises(SystemExit):
        evaluate("cut", Stop(1, KeyboardInterrupt, loader=1), queries=queries())
    evaluate("cut", queries=queries())
    assert re.findall(r"resuming: .* before", caplog.text) == [
        f"resuming: {n} of 27 queries were answered before" for n in (8, 19)
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
