"""`vlm-calibration score`: official scores against a second implementation of the rules, our metrics against those of raw values."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_calibration.metrics import functional

from ..benchmarks import official_rules
from ..benchmarks.test_amber import ANNOTATIONS, TYPES
from ..benchmarks.test_pope import Written
from ..benchmarks.test_pope import written as written
from ..command_line import Run
from ..metrics.test_torchmetrics import NAMES

SCORES = ("accuracy", "precision", "recall", "f1")
REPORTED = {*NAMES, "yes_ratio", *SCORES}

Scored = Callable[..., dict[str, Any]]


@pytest.fixture
def scored(call: Run) -> Scored:
    """Runs the command; returns the flat object that it prints."""

    def run(*arguments: object) -> dict[str, Any]:
        ended = call("score", *map(str, arguments), "--json")
        assert (ended.status, ended.out.count("\n")) == (0, 1), "nothing but the object is on standard output"
        return json.loads(ended.out)

    return run


def _pope(n: int = 200, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Labels, and answers with a confidence in a key of its own, not in their text."""
    rng = random.Random(seed)
    question = {"image": "a.jpg", "text": "Is there a dog in the image?"}
    labels = [{"question_id": i, **question, "label": rng.choice(["yes", "no"])} for i in range(1, n + 1)]
    texts = ("Yes", "No", "no", "Yes, there is.", "There is not.", "NO", "", "\nNo", "Maybe")
    answers = [
        {"question_id": i, "answer": rng.choice(texts), "confidence": rng.randint(0, 100) / 100}
        for i in range(1, n + 1)
    ]
    return labels, answers


def _amber(n: int = 300, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rng = random.Random(seed)
    annotations = [
        {"id": i, "type": rng.choice(TYPES), "truth": rng.choice(["yes", "no"])} for i in range(1, n + 1)
    ]
    answers = [
        {"id": x["id"], "response": rng.choice(["Yes", "No", "No.", "yes", ""]), "confidence": rng.random()}
        for x in annotations
    ]
    return annotations, answers


def _official(values: dict[str, Any]) -> dict[str, Any]:
    return {name[9:]: value for name, value in values.items() if name.startswith("official/")}


def test_pope(written: Written, scored: Scored) -> None:
    labels, answers = _pope()
    shuffled = random.Random(1).sample(answers, len(answers))
    values = scored("pope", written("a.jsonl", shuffled), "--labels", written("l.json", labels))
    assert _official(values) == official_rules.pope(labels, answers)
    assert list(values)[:5] == [f"official/{k}" for k in (*SCORES, "yes_ratio")]
    assert {name for name in values if "/" not in name} == REPORTED
    assert (values["n"], type(values["n"])) == (200, int)

    parsed = {"": None, "Maybe": None, "Yes": "yes", "Yes, there is.": "yes"}
    parsed |= dict.fromkeys(("No", "no", "There is not.", "NO", "\nNo"), "no")
    is_correct = [parsed[a["answer"]] == x["label"] for x, a in zip(labels, answers, strict=True)]
    assert values["accuracy"] == sum(is_correct) / 200
    assert values["yes_ratio"] == sum(parsed[a["answer"]] == "yes" for a in answers) / 200
    confidence = torch.tensor([a["confidence"] for a in answers], dtype=torch.float64)
    correct = torch.tensor(is_correct)
    for name, metric in (("ece", functional.expected_calibration_error), ("auroc", functional.auroc)):
        assert values[name] == pytest.approx(float(metric(confidence, correct)), rel=1e-12), name


def test_undefined_official_scores_are_null(written: Written, scored: Scored) -> None:
    labels = [{"question_id": 1, "label": "yes"}, {"question_id": 2, "label": "no"}]
    answers = [{"question_id": i, "answer": "No"} for i in (1, 2)]
    values = scored("pope", written("a.jsonl", answers), "--labels", written("l.json", labels))
    undefined = {"precision": None, "recall": 0.0, "f1": None}
    assert _official(values) == {"accuracy": 0.5, **undefined, "yes_ratio": 0.0}
    assert values["ece"] is None, "no confidence is stated"


def test_amber(written: Written, scored: Scored) -> None:
    annotations, answers = _amber()
    truth = written("t.json", annotations, lines=False)
    files = (written("a.json", answers, lines=False), "--annotations", truth)
    values = scored("amber", *files)
    expected = official_rules.amber(annotations, answers)
    assert _official(values) == expected
    blocks = ("", "existence/", "attribute/", "state/", "number/", "action/", "relation/")
    assert set(expected) == {f"{block}{k}" for block in blocks for k in SCORES}
    groups = ("existence", "attribute", "state", "number", "action", "relation")
    assert {f"{k}/{group}" for k in REPORTED for group in groups} <= set(values)
    existence = [a for a in annotations if a["type"] == "discriminative-hallucination"]
    assert values["n/existence"] == len(existence)
    only = scored("amber", *files, "--only", "existence")
    assert _official(only) == {k: v for k, v in expected.items() if k.startswith("existence/")}
    assert only["n"] == len(existence)


def test_generative_answers_are_left_out_with_a_note(written: Written, call: Run) -> None:
    answers = written("a.json", [{"id": a["id"], "response": "No"} for a in ANNOTATIONS], lines=False)
    truth = written("t.json", ANNOTATIONS, lines=False)
    ended = call("score", "amber", str(answers), "--annotations", str(truth), "--json")
    assert "1 generative records (descriptions) are left out: AMBER's own script scores them" in ended.err
    assert json.loads(ended.out)["n"] == 6


GRADED = {"question": "What is it?", "answer": "sofa", "category": "indoor", "answer_type": "short"}
SAID = (("Couch. Confidence: 90%", 0.9, True), ("Chair. Confidence: 80%", 0.8, False), ("Sofa", None, True))
PREDICTIONS: list[dict[str, Any]] = [
    {**GRADED, "id": str(i), "text": text, "predicted": None, "confidence": confidence, "correct": correct}
    for i, (text, confidence, correct) in enumerate(SAID)
]


def test_predictions_as_they_were_graded(written: Written, scored: Scored) -> None:
    rows = [{**row, "noise_step": 0, "expected": 0.5 + row["correct"] / 4} for row in PREDICTIONS]
    values = scored("jsonl", written("p.jsonl", rows))
    assert (values["n"], values["accuracy"], values["parse_failure_rate"]) == (3, 2 / 3, 1 / 3)
    assert values["ece"] == pytest.approx((0.8 + 0.1) / 2)
    assert values["accuracy/indoor"] == 2 / 3
    assert values["ece@expected"] == pytest.approx((2 * 0.25 + 0.5) / 3)
    assert values["auroc@expected/indoor"] == 1.0
    assert not any(name.startswith("official") for name in values)


def test_predictions_graded_anew_by_the_queries(written: Written, scored: Scored) -> None:
    query = {"image": "none.png", "question": "What is it?", "answer": "sofa", "answer_type": "short"}
    queries: list[dict[str, Any]] = [{"id": str(i), **query} for i in range(3)]
    answers = [{"id": row["id"], "text": row["text"]} for row in PREDICTIONS][::-1]
    files = (written("p.jsonl", answers), "--labels")
    assert scored("jsonl", *files, written("q.jsonl", queries))["accuracy"] == 1 / 3
    queries[0]["synonyms"] = ["couch"]
    values = scored("jsonl", *files, written("q.jsonl", queries))
    assert (values["accuracy"], values["mean_confidence"]) == (2 / 3, pytest.approx(0.85))


def test_files_for_the_benchmarks_own_scripts(written: Written, scored: Scored, tmp_path: Path) -> None:
    """They have the same metrics; tests of the benchmarks compare them with the scripts."""
    labels, answers = _pope(50)
    for given, text in zip(answers, ("Confidence: 0.9. No", "No. Confidence: 70%"), strict=False):
        del given["confidence"]
        given["answer"] = text
    labels[0]["label"] = "No"
    files = (written("a.jsonl", answers[::-1]), "--labels", written("l.json", labels, lines=False))
    out = tmp_path / "out.json"
    values = scored("pope", *files, "--write-official", str(out))
    assert scored("pope", str(out), "--labels", str(tmp_path / "out.labels.jsonl")) == values

    annotations, responses = _amber(80)
    responses[0] = {"id": 1, "response": "No. Confidence: 80%"}
    truth = ("--annotations", written("t.json", annotations, lines=False))
    values = scored(
        "amber", written("r.json", responses, lines=False), *truth, "--write-official", str(tmp_path)
    )
    assert scored("amber", str(tmp_path / "answers.json"), *truth) == values


def test_as_tables(written: Written, call: Run) -> None:
    labels, answers = _pope(20)
    files = (written("a.jsonl", answers), "--labels", written("l.json", labels))
    out = call("score", "pope", *map(str, files)).out
    official = f"{official_rules.pope(labels, answers)['accuracy']:.4f}"
    assert [text for text in ("Official scores", official, "All 20 answers") if text not in out] == []


@pytest.mark.parametrize(
    ("arguments", "says", "status"),
    [
        (["pope", "a.jsonl"], "missing: --labels", 2),
        (["jsonl", "a.jsonl"], "a.jsonl:1: ", 1),
        (["jsonl", "a.jsonl", "--labels", "a.jsonl"], "a.jsonl:1: unknown key", 1),
        (["jsonl", "a.jsonl", "--labels", "q.jsonl"], "a.jsonl:1: 'id' must be a string", 1),
        (["jsonl", "t.jsonl", "--labels", "q.jsonl"], "record '1': the gold answer of a yes/no", 1),
        (["jsonl", "t.jsonl", "--labels", "qq.jsonl"], "qq.jsonl:2: duplicate id '1'", 1),
    ],
)
def test_a_mistake_ends_in_one_line(
    written: Written, call: Run, arguments: list[str], says: str, status: int
) -> None:
    query = {"id": "1", "image": "a.png", "question": "A dog?", "answer": "perhaps", "answer_type": "yes_no"}
    written("a.jsonl", [{"question_id": 1, "answer": "Yes"}])
    written("t.jsonl", [{"id": "1", "text": "Yes"}])
    written("q.jsonl", [query])
    written("qq.jsonl", [query, query])
    ended = call("score", *arguments)
    assert (ended.status, ended.out) == (status, "")
    assert says in ended.error()


@pytest.mark.slow
def test_the_command_starts_without_a_trainer(written: Written) -> None:
    labels, answers = _pope(20)
    code = (
        "import sys; from vlm_calibration.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'lightning', 'transformers', 'torchmetrics', 'peft', 'wandb'} & set(sys.modules);"
        "sys.exit(f'{status} {heavy}' if status or heavy else 0)"
    )
    command = ["score", "pope", written("a.jsonl", answers), "--labels", written("l.json", labels), "--json"]
    ran = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["n"] == 20
