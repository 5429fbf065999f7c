"""An endpoint is a system like any other: equal answers and metrics, whatever the server does; in Python, and by `test` and `ask`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_calibration.cli import main
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.stability import Stability
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.inference.model import DEMO_MODEL, load_calibrated
from vlm_calibration.records import DataError

from ..command_line import Ended, write_evaluation
from .conftest import queries
from .demo_server import MODEL, DemoServer, serving

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
        evaluate("stopped", url, ESTIMATORS, retries=1)
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
    monkeypatch.setattr("vlm_calibration.stages.evaluation.load_base", lambda *_: pytest.fail("loaded"))
    evaluate("processor", url)
    monkeypatch.setattr("vlm_calibration.data.module.load_processor", lambda *_: pytest.fail("loaded"))
    clean = queries(processor=None)
    clean.test = {"clean": EvalSplit(DemoSource("test", scenes=2))}
    evaluate("clean", url, base=None, data=clean)
    with_processor = {line["id"]: line for line in lines(tmp_path / "processor/endpoint")}
    found = lines(tmp_path / "clean/endpoint")
    assert [with_processor[line["id"]] for line in found] == found
    with pytest.raises(DataError, match="the size at which an endpoint sees an image is not known"):
        evaluate("noised", url, base=None, data=queries(processor=None))


# --- The command line ---


KEY = "sk-secret-7f3a9c"


@pytest.fixture
def command(url: str, tmp_path: Path) -> list[str]:
    """An evaluation of the address alone, in batches of four."""
    callbacks = ("predictions.PredictionWriter", "results_table.ResultsTable", "progress.Progress")
    estimators = [{"class_path": "vlm_calibration.estimators.likelihood.AnswerLikelihood"}]
    settings = {"adapters": {"sft": "nowhere"}, "max_new_tokens": 16, "estimators": estimators}
    test = write_evaluation(tmp_path / "eval.yaml", "${runs}/eval", 4, callbacks, **settings)
    options = ("--config", "system/endpoint", "--data.eval_batch_size", "4")
    return [*test, *options, "--url", url, "--served-model", MODEL]


def test_a_failed_evaluation_resumes_and_hides_the_key(
    call: Callable[..., Ended],
    command: list[str],
    api: DemoServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    command += ["--runs", "runs"]
    api.stopped_after = 6
    failed = call(*command, "--model.init_args.endpoints.endpoint.retries", "0")
    assert "out of memory" in failed.error()
    api.stopped_after = None
    ended = call(*command, "--resume").checked()
    assert list(api.answered.values()).count(1) >= 4, "a logged batch is not asked again"
    expected = {"endpoint/predictions.jsonl", "endpoint/metrics.json", "config.yaml"}
    assert expected <= set(files(tmp_path / "runs/eval"))

    assert all(headers["authorization"] == f"Bearer {KEY}" for headers in api.headers)
    written = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert KEY not in ended.out + ended.err + failed.out + failed.err
    assert not [content for content in written if KEY.encode() in content]


def test_what_cannot_be_used_is_one_line(call: Callable[..., Ended], command: list[str]) -> None:
    for arguments, status, says in (
        ([*command, "--served-model", "other"], 1, "The model `other` does not exist."),
        ([*command[:3], *command[-4:]], 2, "has no effect: give --config system/endpoint as well"),
    ):
        ended = call(*arguments)
        assert (ended.status, says in ended.error()) == (status, True)


def test_ask_answers_as_the_model_itself(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source, asked = DemoSource("test", scenes=2), []
    for query in source.queries():
        Image.fromarray(source.load(query).image).save(f"{query.image}.png")
        asked.append({"id": query.id, "image": f"{query.image}.png", "question": query.question})
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    served = ("--url", url, "--served-model", MODEL)
    many = ("ask", "--questions", "questions.jsonl", "--out", "out.jsonl")
    assert main([*many, *served, "--max-new-tokens", "16"]) == 0
    answers = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    model = load_calibrated(str(DEMO_MODEL), device="cpu", max_new_tokens=16)
    own = list(model.ask_many((row["image"], row["question"]) for row in asked))
    for found, expected in zip(answers, own, strict=True):
        for name in ("text", "answer", "confidence"):
            assert found[name] == getattr(expected, name)
        assert found["expected"] == pytest.approx(expected.expected, abs=0.02)
        likeliest, _ = max(found["distribution"], key=lambda pair: pair[1])
        assert likeliest == expected.confidence
    capsys.readouterr()
    assert main(["ask", asked[0]["image"], asked[0]["question"], *served, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == f"{MODEL} at {url}"
    for options, says in (
        (served[:2], "--url and --served-model belong together"),
        ((*served, "--adapter", "a"), "--adapter is for a model that is loaded here"),
        ((*served, "--abstain"), "the model has no thresholds.json"),
    ):
        assert main(["ask", asked[0]["image"], "A dog?", *options]) != 0
        assert says in capsys.readouterr().err
