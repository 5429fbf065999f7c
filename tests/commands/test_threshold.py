"""`vlm-calibration threshold` on the files of an evaluation: what it chooses, prints, writes and refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from vlm_calibration.estimators.decision import DecisionRule, KnownQuestions, read_rule
from vlm_calibration.estimators.predictions import read_predictions
from vlm_calibration.metrics.risk_control import Limits
from vlm_calibration.models.base import adapter_digest, adapter_weights_digest
from vlm_calibration.records import DataError, Prediction
from vlm_calibration.reporting.card import Card, save_card
from vlm_calibration.reporting.report.data import read_systems
from vlm_calibration.reporting.report.thresholds import (
    category_of,
    choose,
    one_an_image,
    part_of,
    promises_of,
)
from vlm_calibration.reporting.runs import RunRecord
from vlm_calibration.settings import file_digest
from vlm_calibration.text.confidence import DEFAULT_TEMPLATE

from ..command_line import Ended
from ..decision_rules import write_decision_rule

Call = Callable[..., Ended]


def _write(path: Path, n: int, seed: int, split: str = "own", error: float = 0.3, **more: Any) -> None:
    """Predictions about n/2 images, whose error rate falls from `error` to 0 as the confidence rises."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {"question": "A dog?", "answer": "Yes", "text": "", "predicted": None}
    plain |= {"noise_step": None, "answer_type": "yes_no"}
    with path.open("a") as file:
        for i in range(n):
            confidence = round(float(rng.beta(3, 1)), 2)
            row = {**plain, "id": f"{split}:{i}", "image": f"{split}-{i // 2}", "confidence": confidence}
            row |= {"category": f"{split}/{('colour', 'size')[i % 2]}", "expected": 1 - (1 - confidence) ** 2}
            row |= {"correct": bool(rng.random() > error * (1 - confidence)), **more}
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """An evaluation of two adapters, the last one with a calibration split."""
    settings: dict[str, Any] = {"base": None, "adapters": {}, "estimators": []}
    for name in ("sft", "dpo"):
        adapter = tmp_path / "runs" / name / "adapter"
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
        save_file({name: np.zeros(1)}, adapter / "adapter_model.safetensors")
        settings["adapters"][name] = f"runs/{name}/adapter"
        _write(tmp_path / "runs" / "eval" / name / "predictions.jsonl", 3000, 1, "easy")
        _write(tmp_path / "runs" / "eval" / name / "predictions.jsonl", 1000, 2, "hard", error=0.9)
    folder = tmp_path / "runs" / "eval"
    _write(folder / "dpo" / "calibration.jsonl", 4000, 3)
    model = {"class_path": "vlm_calibration.stages.evaluation.EvaluationModule", "init_args": settings}
    data = {"prompt": {"template": DEFAULT_TEMPLATE}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": data}, sort_keys=False))
    recorded = adapter_digest(tmp_path / "runs/dpo/adapter")
    inputs = {"model.init_args.adapters.dpo": recorded}
    RunRecord("test", "EvaluationModule", True, inputs=inputs).write(folder)
    return folder


@pytest.fixture
def call(call: Call, evaluation: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setenv("COLUMNS", "200")
    return partial(call, "threshold")


def _rule(folder: Path) -> DecisionRule:
    rule = read_rule(folder)
    assert rule is not None
    return rule


def test_the_last_system_on_its_calibration_split(call: Call, evaluation: Path, tmp_path: Path) -> None:
    ended = call("runs/eval")
    assert (ended.status, ended.err) == (0, "")
    adapter = tmp_path / "runs/dpo/adapter"
    rule = _rule(adapter)
    answers = read_predictions(evaluation / "dpo" / "calibration.jsonl")
    choice = choose({"": answers}, "verbalized", Limits(0.05)).choices[""]
    assert choice.threshold is not None
    assert choice.scores is not None
    assert choice.scores.n == 2000, "one of the answers about each image counts"
    assert rule.groups[""]["threshold"] == choice.threshold
    weights = adapter_weights_digest(adapter)
    assert (rule.base, rule.weights, rule.prompt) == ("owner/base", weights, DEFAULT_TEMPLATE)
    assert rule.answers == {
        "split": "calibration",
        "digest": file_digest(evaluation / "dpo" / "calibration.jsonl"),
        "n": 4000,
        "images": 2000,
        "without_group": 0,
    }
    assert rule.questions == KnownQuestions.of([answer.question for answer in answers])
    assert rule.questions.described() in ended.out
    assert rule.guarantee in ended.out
    assert "wrote runs/dpo/adapter/thresholds.json" in ended.out
    tested = read_predictions(evaluation / "dpo" / "predictions.jsonl")
    for part in ("easy", "hard"):
        counted = one_an_image([a for a in tested if part_of(a) == part])
        given = [a for a in counted if (a.confidence or 0) >= choice.threshold]
        row = next(line for line in ended.out.splitlines() if f"test: {part}" in line)
        assert f"{sum(not a.correct for a in given) / len(given):.1%} [" in row


def test_the_adapter_s_card_states_the_guarantee_of_the_last_rule(call: Call, tmp_path: Path) -> None:
    adapter = tmp_path / "runs/dpo/adapter"
    save_card(adapter, Card("owner/base"))
    assert call("runs/eval", "--max-error", "0.0001").status == 3
    assert "When to answer" not in (adapter / "README.md").read_text()
    assert call("runs/eval").status == 0
    changed = ("--estimator", "expected", "--max-error", "0.1", "--max-sent-away", "0.6")
    assert call("runs/eval", *changed).status == 0
    rule = _rule(adapter)
    assert (adapter / "README.md").read_text().count(rule.guarantee) == 1
    assert rule.estimator == "expected"
    assert rule.limits == {"max_error": 0.1, "certainty": 0.95, "max_sent_away": 0.6}


def test_the_report_chooses_and_measures_the_same(call: Call, evaluation: Path) -> None:
    ended = call("runs/eval", "--system", "dpo", "--json")
    result = json.loads(ended.out)
    assert (ended.status, result["found"]) == (0, True)
    assert result["written"].endswith("runs/dpo/adapter/thresholds.json")
    assert result["test"]["all"]["n"] == 2000
    rows = promises_of(read_systems(["runs/eval"]))
    assert list(rows) == [("dpo", "verbalized")], "sft has no calibration answers"
    promise = next(p for p in rows["dpo", "verbalized"] if p.limits.max_error == 0.05)
    assert promise.choice.threshold == result["groups"][""]["threshold"]
    assert promise.choice.scores is not None
    assert promise.choice.scores.coverage.value == result["groups"][""]["coverage"][0]
    assert {name: [s.n, s.answers, s.wrong, *s.error] for name, s in promise.tested.items()} == {
        name: [s["n"], s["answers"], s["wrong"], *s["error"]] for name, s in result["test"].items()
    }
    assert list(promise.tested) == ["all", "easy", "hard"]


def test_without_a_calibration_split_the_predictions_are_used_and_named(call: Call, tmp_path: Path) -> None:
    ended = call("runs/eval", "--system", "sft", "--max-error", "0.2").checked()
    assert "no calibration split" in ended.out
    assert "test" not in "".join(line for line in ended.out.splitlines() if line.startswith("│"))
    rule = _rule(tmp_path / "runs/sft/adapter")
    assert rule.answers["split"] == "predictions"
    assert "like the evaluated ones" in rule.guarantee


def test_a_threshold_for_each_category(call: Call, evaluation: Path, tmp_path: Path) -> None:
    _write(evaluation / "dpo" / "calibration.jsonl", 30, 4, "none", category=None)
    ended = call("runs/eval", "--by", "category")
    assert "30 answers have no category and are left out" in ended.out
    rule = _rule(tmp_path / "runs/dpo/adapter")
    assert (rule.by, list(rule.groups)) == ("category", ["colour", "size"])
    assert "Bonferroni over 2" in rule.correction
    assert "test: colour" in ended.out
    assert rule.applied(1.0, "colour") is not None
    assert rule.applied(1.0, None) is None
    assert rule.applied(1.0, "shape") is None


def test_where_there_is_no_threshold_nothing_is_written(call: Call, tmp_path: Path) -> None:
    call = partial(call, "runs/eval")
    ended = call("--max-error", "0.0001")
    assert (ended.status, ended.err) == (3, "")
    assert "No threshold keeps the limits, so nothing is written." in ended.out
    assert not (tmp_path / "runs/dpo/adapter/thresholds.json").exists()
    assert json.loads(call("--max-error", "0.0001", "--json").out)["found"] is False
    assert call().status == 0
    rule = _rule(tmp_path / "runs/dpo/adapter")
    ended = call("--max-error", "0.0001")
    assert f"The thresholds of an earlier run stay in runs/dpo/adapter: {rule.guarantee}" in ended.out


def test_a_promise_that_the_test_breaks_is_said(call: Call, evaluation: Path) -> None:
    for name in ("sft", "dpo"):
        (evaluation / name / "predictions.jsonl").unlink()
        _write(evaluation / name / "predictions.jsonl", 1000, 5, "shifted", confidence=1.0, correct=False)
    assert "these questions are not like those" in call("runs/eval").out


def test_a_rule_without_an_adapter_stays_in_the_evaluation(call: Call, evaluation: Path) -> None:
    """That of the base model, and that of a model behind an address."""
    for n, split in ((3000, "easy"), (1000, "hard")):
        _write(evaluation / "base" / "predictions.jsonl", n, 6, split)
    assert call("runs/eval", "--system", "base", "--max-error", "0.1").status == 0
    assert _rule(evaluation / "base").base == "owner/base"
    config = yaml.safe_load((evaluation / "config.yaml").read_text())
    config["model"]["init_args"] |= {"adapters": {}, "endpoints": {"dpo": {"url": "http://x", "model": "m"}}}
    (evaluation / "config.yaml").write_text(yaml.safe_dump(config))
    assert call("runs/eval", "--system", "dpo").status == 0
    rule = _rule(evaluation / "dpo")
    assert (rule.base, rule.weights) == ("m", "")


def test_an_adapter_that_was_trained_again_is_refused(call: Call, tmp_path: Path) -> None:
    save_file({"other": np.zeros(1)}, tmp_path / "runs/dpo/adapter/adapter_model.safetensors")
    ended = call("runs/eval")
    assert ended.status == 1
    assert "runs/dpo/adapter: not the adapter that runs/eval evaluated" in ended.error()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ("runs/eval --system oracle", 1, "no system 'oracle'"),
        ("runs/eval/dpo", 1, "not an evaluation of `vlm-calibration test`"),
        ("runs/eval --max-error 0", 2, "--max-error: expected a number in (0, 1)"),
        ("runs/eval --max-sent-away 95", 2, "--max-sent-away: expected a number in (0, 1)"),
        ("runs/eval --estimator p_true", 1, "no 'p_true'; it has verbalized, expected"),
    ],
)
def test_mistakes_are_named(call: Call, arguments: str, status: int, says: str) -> None:
    ended = call(*arguments.split())
    assert ended.status == status
    assert says in ended.error()


def test_the_name_of_the_split_is_not_part_of_the_category() -> None:
    def split(identifier: str, category: str | None) -> tuple[str | None, str | None]:
        answer = Prediction(identifier, "?", "Yes", "", None, None, True, category, None, "yes_no")
        return part_of(answer), category_of(answer)

    assert split("own:1", "own/colour") == ("own", "colour")
    assert split("own:1", "own") == ("own", None)
    assert split("1", "colour/red") == (None, "colour/red")
    assert split("1", None) == (None, None)
    assert split("own:1", "owner/colour") == (None, "owner/colour")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"schema": 1}, "schema 1, expected 3"),
        ({"groups": {"": {"threshold": 2}}}, "must be in [0, 1] or null, found 2"),
        ({"groups": {}}, "'groups'"),
        ({"by": "colour"}, "'by'"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_damaged_file_is_named(
    evaluation: Path, tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    path = tmp_path / "runs/dpo/adapter/thresholds.json"
    write_decision_rule(path.parent)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}.*{re.escape(says)}"):
        read_rule(path.parent)
