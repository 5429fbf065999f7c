"""Endpoints from the command line: `test` and `ask` with an address, killed and resumed, and the key."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from vlm_calibration import cli
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.inference.model import DEMO_MODEL, load_calibrated

from ..command_line import Ended, Server
from .demo_server import MODEL, DemoServer
from .test_evaluation import files

KEY = "sk-secret-7f3a9c"
DEMO = "vlm_calibration.demo.source.DemoSource"


@pytest.fixture
def command(url: str, tmp_path: Path) -> list[str]:
    """An evaluation of the address alone, with short waits."""
    callbacks = ("predictions.PredictionWriter", "results_table.ResultsTable", "progress.Progress")
    trainer = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "default_root_dir": "${runs}/eval",
        "callbacks": [{"class_path": f"vlm_calibration.callbacks.{name}"} for name in callbacks],
    }
    settings = {
        "adapters": {"sft": "nowhere"},
        "max_new_tokens": 16,
        "estimators": [{"class_path": "vlm_calibration.estimators.likelihood.AnswerLikelihood"}],
    }
    source = {"class_path": DEMO, "init_args": {"split": "test", "scenes": 4}}
    config: dict[str, Any] = {
        "seed_everything": 0,
        "trainer": trainer,
        "model": {
            "class_path": "vlm_calibration.stages.evaluation.EvaluationModule",
            "init_args": settings,
        },
        "data": {"test": {"clean": {"source": source}}},
    }
    quick = {"data": {"eval_batch_size": 4, "workers": 0}}
    for name, content in (("eval", config), ("quick", quick)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    names = ("eval.yaml", "system/endpoint", "quick.yaml")
    return ["test", *(a for n in names for a in ("--config", n)), "--url", url, "--served-model", MODEL]


def test_a_killed_evaluation_resumes_and_hides_the_key(
    server: Server, command: list[str], api: DemoServer, tmp_path: Path
) -> None:
    def start(runs: str, *more: str) -> int:
        return server.start([*command, "--runs", runs, *more], tmp_path, {"OPENAI_API_KEY": KEY})

    ended = server.wait(start("whole"))
    assert ended.status == 0, ended.err
    whole = files(tmp_path / "whole/eval")
    assert {"endpoint/predictions.jsonl", "endpoint/metrics.json", "config.yaml"} <= set(whole)
    api.answered.clear()

    log = tmp_path / "killed/eval/.answered.0.jsonl"
    api.stopped_after = 6
    pid = start("killed")
    while not (log.is_file() and log.read_text()):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert server.wait(pid).status not in (0, 1)
    api.stopped_after = None
    ended = server.wait(start("killed", "--resume"))
    assert ended.status == 0, ended.err
    assert list(api.answered.values()).count(1) >= 4, "a logged batch is not asked again"
    for name in ("endpoint/predictions.jsonl", "endpoint/metrics.json"):
        assert files(tmp_path / "killed/eval")[name] == whole[name]

    assert all(headers["authorization"] == f"Bearer {KEY}" for headers in api.headers)
    written = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert KEY not in ended.out + ended.err
    assert not [content for content in written if KEY.encode() in content]


def test_what_cannot_be_used_is_one_line(run: Callable[..., Ended], command: list[str]) -> None:
    ended = run(*command, "--served-model", "other")
    assert (ended.status, "The model `other` does not exist." in ended.error()) == (1, True)
    ended = run("test", "--config", "eval.yaml", *command[-4:])
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
    questions: list[dict[str, str]], url: str, api: DemoServer, capsys: pytest.CaptureFixture[str]
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

    api.answered.clear()
    many = ["ask", "--questions", "questions.jsonl", "--out", "out.jsonl", *served]
    api.stopped_after = 3
    assert cli.main([*many, "--batch-size", "2"]) == 1
    api.stopped_after = None
    assert cli.main(many) == 0
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
