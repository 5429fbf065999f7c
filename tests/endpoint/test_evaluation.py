"""An endpoint is a system like any other: equal answers and metrics, whatever the server does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_calibration.cli import main
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.stability import Stability
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.records import DataError

from .conftest import queries
from .demo_server import DemoServer, serving

pytestmark = pytest.mark.slow
Evaluate = Callable[..., Any]
ESTIMATORS = (ExpectedConfidence(), AnswerLikelihood())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    """The files of a run, without those that start with a dot, which must not be there."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    assert not [name for name in found if Path(name).name.startswith(".")]
    return found


def test_an_endpoint_beside_its_own_model(evaluate: Evaluate, url: str, tmp_path: Path) -> None:
    evaluate("run", url, ESTIMATORS, with_base=True)
    local, remote = tmp_path / "run/base", tmp_path / "run/endpoint"
    assert len(lines(local)) == 12
    for mine, served in zip(lines(local), lines(remote), strict=True):
        for name in ("expected", "likelihood"):
            assert served.pop(name) == pytest.approx(mine.pop(name), abs=0.02)
        assert served == mine
    exact = {k: v for k, v in metrics(local).items() if "@" not in k}
    assert {k: v for k, v in metrics(remote).items() if "@" not in k} == exact
    assert metrics(remote)["forward_passes@likelihood"] == 0
    assert not (remote / "notes.json").exists()


def test_faults_and_a_server_that_dies_and_moves_change_no_byte(
    evaluate: Evaluate, url: str, api: DemoServer, tmp_path: Path
) -> None:
    evaluate("plain", url, ESTIMATORS)
    once, plain = set(api.answered), files(tmp_path / "plain")
    api.faults = True
    api.answered.clear()
    api.received.clear()
    api.stopped_after = 4
    with pytest.raises(DataError, match=r"endpoint \('demo' at http://[\d.:]+/v1\): .*out of memory"):
        evaluate("stopped", url, ESTIMATORS, settings={"retries": 1})
    logged = (tmp_path / "stopped/.answered.0.jsonl").read_text().count("\n")
    assert logged
    api.stopped_after = None
    with serving(api) as moved:
        evaluate("stopped", moved, ESTIMATORS)
    assert sum(api.received.values()) > sum(api.answered.values()) + 3, "there were faults"
    assert set(api.answered) == once
    assert list(api.answered.values()).count(1) >= len(once) // 3, "logged batches are not asked again"
    assert files(tmp_path / "stopped") == plain
    api.answered.clear()
    evaluate("stopped", url, ESTIMATORS, start_over=True)
    assert set(api.answered) == once


@pytest.mark.parametrize("missing", ["logprobs", "continues"])
def test_what_the_server_lacks_is_said(
    evaluate: Evaluate, url: str, api: DemoServer, tmp_path: Path, missing: str
) -> None:
    setattr(api, missing, False)
    evaluate("run", url, [*ESTIMATORS, Stability()], probes=["image"])
    folder = tmp_path / "run/endpoint"
    notes = json.loads((folder / "notes.json").read_text())
    # Each percentage is one token of the demo's model, so no answer needs to be continued.
    names = {"expected", "likelihood"} if missing == "logprobs" else set()
    assert set(notes) == {*names, "stability", "probes"}
    found = metrics(folder)
    assert found["ece@stability"] is None
    assert found["ece"] is not None
    if missing == "logprobs":
        assert found["ece@expected"] is None
        assert found["parse_failure_rate@expected"] == 1
        assert {line["likelihood"] for line in lines(folder)} == {None}
        assert main(["report", str(tmp_path / "run")]) == 0


def test_no_model_is_loaded_for_endpoints_alone(
    evaluate: Evaluate, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("vlm_calibration.stages.evaluation.load_base", loaded)
    evaluate("processor", url)
    monkeypatch.setattr("vlm_calibration.data.module.load_processor", loaded)
    clean = queries(processor=None)
    clean.test = {"clean": EvalSplit(DemoSource("test", scenes=2))}
    evaluate("clean", url, base=None, data=clean)
    with_processor = {line["id"]: line for line in lines(tmp_path / "processor/endpoint")}
    found = lines(tmp_path / "clean/endpoint")
    assert [with_processor[line["id"]] for line in found] == found
    with pytest.raises(DataError, match="the size at which an endpoint sees an image is not known"):
        evaluate("noised", url, base=None, data=queries(processor=None))
