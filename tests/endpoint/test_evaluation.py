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
from vlm_calibration.estimators.consistency import SelfConsistency
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.p_true import PTrue
from vlm_calibration.estimators.stability import Stability
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.records import DataError

from .conftest import queries
from .demo_server import DemoServer, serving

pytestmark = pytest.mark.slow
Evaluate = Callable[..., Any]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_an_endpoint_beside_its_own_model(evaluate: Evaluate, url: str, tmp_path: Path) -> None:
    estimators = [ExpectedConfidence(), AnswerLikelihood()]
    evaluate("run", url, estimators, with_base=True)
    local, remote = tmp_path / "run/base", tmp_path / "run/endpoint"
    assert len(lines(local)) == 12
    approximate = ("expected", "likelihood")
    for mine, served in zip(lines(local), lines(remote), strict=True):
        for name in approximate:
            assert served.pop(name) == pytest.approx(mine.pop(name), abs=0.02)
        assert served == mine
    exact = {k: v for k, v in metrics(local).items() if "@" not in k}
    assert {k: v for k, v in metrics(remote).items() if "@" not in k} == exact


def files(folder: Path) -> dict[str, bytes]:
    """The files of a run, without those that start with a dot, which must not be there."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    assert not [name for name in found if Path(name).name.startswith(".")]
    return found


ESTIMATORS = (ExpectedConfidence(), AnswerLikelihood(), PTrue(), SelfConsistency(2))


@pytest.fixture
def plain(evaluate: Evaluate, url: str, api: DemoServer, tmp_path: Path) -> dict[str, bytes]:
    """The files of a run without faults, after which the server has forgotten its requests."""
    evaluate("plain", url, ESTIMATORS)
    for counter in (api.answered, api.received, api.seen):
        assert set(counter.values()) <= {1}
        counter.clear()
    return files(tmp_path / "plain")


def test_all_faults_at_once_change_no_byte(
    evaluate: Evaluate, url: str, api: DemoServer, plain: dict[str, bytes], tmp_path: Path
) -> None:
    api.rate, api.delay = 0.1, 1.0
    evaluate("faults", url, ESTIMATORS, settings={"timeout": 0.9, "concurrency": 8})
    assert files(tmp_path / "faults") == plain
    assert sum(api.received.values()) > 2 * len(api.received), "there were faults"
    assert set(api.answered.values()) <= {1}, "an answered request was sent again"


def test_a_run_that_fails_loses_nothing_and_asks_nothing_twice(
    evaluate: Evaluate, url: str, api: DemoServer, plain: dict[str, bytes], tmp_path: Path
) -> None:
    asked = 0
    for limit in (1, 7, 20, 40):
        api.stopped_after = limit
        with pytest.raises(
            DataError, match=r"endpoint \('demo' at http://[\d.:]+/v1\): status 500: out of memory"
        ) as caught:
            evaluate("stopped", url, ESTIMATORS, settings={"retries": 1})
        assert "\n" not in str(caught.value)
        log = [
            json.loads(line) for line in (tmp_path / "stopped/.responses.0.jsonl").read_text().splitlines()
        ]
        asked = sum(api.answered.values())
        assert len(log) == asked >= limit
    api.stopped_after = None
    evaluate("stopped", url, ESTIMATORS)
    assert set(api.answered.values()) == {1}
    assert sum(api.answered.values()) > asked
    assert files(tmp_path / "stopped") == plain


def test_another_address_of_the_same_model_goes_on(
    evaluate: Evaluate, url: str, api: DemoServer, plain: dict[str, bytes], tmp_path: Path
) -> None:
    api.stopped_after = 20
    with pytest.raises(DataError):
        evaluate("moved", url, ESTIMATORS, settings={"retries": 0})
    api.stopped_after = None
    with serving(api) as moved:
        assert moved != url
        evaluate("moved", moved, ESTIMATORS)
    assert set(api.answered.values()) == {1}
    assert files(tmp_path / "moved") == plain


def test_other_settings_use_the_responses_again(
    evaluate: Evaluate, url: str, api: DemoServer, tmp_path: Path
) -> None:
    api.stopped_after = 5
    with pytest.raises(DataError):
        evaluate("run", url, [AnswerLikelihood()], settings={"retries": 0})
    api.stopped_after = None
    evaluate("run", url, [AnswerLikelihood(), PTrue()])
    assert set(api.answered.values()) == {1}
    with_both = files(tmp_path / "run")
    evaluate("again", url, [AnswerLikelihood(), PTrue()])
    assert files(tmp_path / "again") == with_both


def test_starting_over_asks_everything_again(evaluate: Evaluate, url: str, api: DemoServer) -> None:
    api.stopped_after = 4
    with pytest.raises(DataError):
        evaluate("run", url, settings={"retries": 0})
    api.stopped_after = None
    evaluate("run", url, start_over=True)
    assert max(api.answered.values()) == 2


def test_max_requests(evaluate: Evaluate, url: str, api: DemoServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="max_requests: 5 requests were sent"):
        evaluate("run", url, settings={"max_requests": 5})
    assert sum(api.received.values()) == 5
    assert len((tmp_path / "run/.responses.0.jsonl").read_text().splitlines()) == 5
    evaluate("run", url)
    assert set(api.received.values()) == {1}


def test_without_log_probabilities_the_files_say_why(
    evaluate: Evaluate, url: str, api: DemoServer, plain: dict[str, bytes], tmp_path: Path
) -> None:
    api.logprobs = False
    evaluate("run", url, ESTIMATORS, probes=["image"])
    folder = tmp_path / "run/endpoint"
    notes = json.loads((folder / "notes.json").read_text())
    assert set(notes) == {"expected", "likelihood", "p_true", "probes"}
    assert notes["expected"] == notes["p_true"] == "the server gives no log-probabilities (logprobs)"
    found = metrics(folder)
    assert found["ece@expected"] is None
    assert found["parse_failure_rate@expected"] == 1
    assert found["ece@self_consistency"] is not None
    complete = json.loads(plain["endpoint/metrics.json"])
    assert found["ece"] == complete["ece"]
    assert {line["expected"] for line in lines(folder)} == {None}
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/report.html").is_file()


def test_an_estimator_that_scores_given_answers_is_named(
    evaluate: Evaluate, url: str, tmp_path: Path
) -> None:
    evaluate("run", url, [Stability()])
    notes = json.loads((tmp_path / "run/endpoint/notes.json").read_text())
    assert notes == {"stability": "an endpoint does not score a given answer, which this estimator needs"}


def test_no_model_is_loaded_for_endpoints_alone(
    evaluate: Evaluate, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("vlm_calibration.stages.evaluation.load_base", loaded)
    evaluate("processor", url)
    monkeypatch.setattr("vlm_calibration.data.module.load_processor", loaded)
    source = DemoSource("test", scenes=2)
    clean = queries(processor=None)
    clean.test = {"clean": EvalSplit(source)}
    evaluate("clean", url, base=None, data=clean)
    with_processor = {line["id"]: line for line in lines(tmp_path / "processor/endpoint")}
    assert [with_processor[line["id"]] for line in lines(tmp_path / "clean/endpoint")] == lines(
        tmp_path / "clean/endpoint"
    )
    with pytest.raises(DataError, match="the size at which an endpoint sees an image is not known"):
        evaluate("noised", url, base=None, data=queries(processor=None))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "other"}, "status 404: The model `other` does not exist."),
        (
            {"reports_as": "another"},
            "answers with the model 'demo' instead of 'another'; gave up after 1 attempts",
        ),
    ],
)
def test_a_wrong_model_is_one_line(evaluate: Evaluate, url: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        evaluate("run", url, settings={"retries": 0, **settings})
    assert str(caught.value).endswith(says)
