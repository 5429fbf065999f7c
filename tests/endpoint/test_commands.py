"""Endpoints from the command line: `test` and `ask` with an address, killed and resumed, and the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vlm_calibration import cli
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.inference.model import DEMO_MODEL, load_calibrated

from ..command_line import Ended, Server, write_evaluation
from .demo_server import MODEL, DemoServer
from .test_evaluation import files

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
    server: Server, command: list[str], api: DemoServer, tmp_path: Path
) -> None:
    def evaluate(runs: str, *more: str) -> Ended:
        environment = {"OPENAI_API_KEY": KEY}
        return server.wait(server.start([*command, "--runs", runs, *more], tmp_path, environment))

    ended = evaluate("whole")
    assert ended.status == 0, ended.err
    whole = files(tmp_path / "whole/eval")
    assert {"endpoint/predictions.jsonl", "endpoint/metrics.json", "config.yaml"} <= set(whole)
    api.answered.clear()

    api.stopped_after = 6
    failed = evaluate("failed", "--model.init_args.endpoints.endpoint.retries", "0")
    assert "out of memory" in failed.error()
    api.stopped_after = None
    ended = evaluate("failed", "--resume")
    assert ended.status == 0, ended.err
    assert list(api.answered.values()).count(1) >= 4, "a logged batch is not asked again"
    for name in ("endpoint/predictions.jsonl", "endpoint/metrics.json"):
        assert files(tmp_path / "failed/eval")[name] == whole[name]

    assert all(headers["authorization"] == f"Bearer {KEY}" for headers in api.headers)
    written = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert KEY not in ended.out + ended.err + failed.out + failed.err
    assert not [content for content in written if KEY.encode() in content]


def test_what_cannot_be_used_is_one_line(run: Callable[..., Ended], command: list[str]) -> None:
    ended = run(*command, "--served-model", "other")
    assert (ended.status, "The model `other` does not exist." in ended.error()) == (1, True)
    ended = run(*command[:3], *command[-4:])
    assert ended.status == 2
    assert "has no effect: give --config system/endpoint as well" in ended.error()
    ended = run(*command[:-4])
    assert (ended.status, "--url is not given" in ended.error()) == (1, True)


# --- ask --------------------------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Six questions about two scenes, in `questions.jsonl`."""
    monkeypatch.chdir(tmp_path)
    source, rows = DemoSource("test", scenes=2), []
    for query in source.queries():
        Image.fromarray(source.load(query).image).save(f"{query.image}.png")
        rows.append({"id": query.id, "image": f"{query.image}.png", "question": query.question})
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.slow
def test_ask_answers_as_the_model_itself(
    questions: list[dict[str, str]], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    served = ("--url", url, "--served-model", MODEL, "--max-new-tokens", "16")
    row, model = questions[0], load_calibrated(str(DEMO_MODEL), device="cpu", max_new_tokens=16)
    expected = model.ask(row["image"], row["question"])
    assert cli.main(["ask", row["image"], row["question"], *served, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["answer"], found["confidence"]) == (
        expected.text,
        expected.answer,
        expected.confidence,
    )
    assert found["expected"] == pytest.approx(expected.expected, abs=0.02)
    assert dict(map(tuple, found["distribution"]))[expected.confidence] > 0.2
    assert found["model"] == f"{MODEL} at {url}"

    assert cli.main(["ask", "--questions", "questions.jsonl", "--out", "out.jsonl", *served]) == 0
    answers = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    own = list(model.ask_many((r["image"], r["question"]) for r in questions))
    assert [a["text"] for a in answers] == [a.text for a in own]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--url", "http://h/v1"), "--url and --served-model belong together"),
        (
            ("--url", "http://h/v1", "--served-model", "m", "--adapter", "a"),
            "--adapter is for a model that is loaded here",
        ),
        (("--url", "http://h/v1", "--served-model", "m", "--abstain"), "the model has no thresholds.json"),
    ],
)
def test_options_of_ask_that_do_not_fit(
    questions: list[dict[str, str]], options: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ask", questions[0]["image"], "A dog?", *options]) != 0
    assert says in capsys.readouterr().err
