"""`vlm-calibration monitor`: what it compares and prints, its exit statuses and its errors."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_calibration.files import write_rows
from vlm_calibration.metrics.drift import drift_test

from ..command_line import Ended

LEVELS = (0.5, 0.7, 0.8, 0.9, 0.95, None)
LOW = (0.3, 0.5, 0.5, 0.7)
Rows = list[dict[str, Any]]
Monitored = Callable[..., tuple[int, dict[str, Any]]]


def answers(n: int, seed: int, levels: Sequence[float | None] = LEVELS, category: str | None = None) -> Rows:
    rng = random.Random(seed)
    plain = {"question": "Is there a dog?", "answer": "Yes", "text": "Yes", "predicted": "yes"}
    plain |= {"noise_step": None, "answer_type": "yes_no"}
    return [
        {
            **plain,
            "id": f"{seed}-{i}",
            "correct": True,
            "confidence": rng.choice(levels),
            "category": category or rng.choice(["easy/existence", "hard/existence"]),
            "expected": rng.random(),
        }
        for i in range(n)
    ]


def write(path: Path, rows: Rows) -> Path:
    write_rows(path, rows, lines=True)
    return path


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """Two systems; "sft" has a calibration set, which states other confidences than its answers to the test set."""
    folder = tmp_path / "eval"
    rows = [{**row, "id": f"2-{i}"} for i, row in enumerate(answers(300, 1))]
    write(folder / "base" / "predictions.jsonl", rows)
    write(folder / "sft" / "predictions.jsonl", answers(300, 2, LOW))
    write(folder / "sft" / "calibration.jsonl", answers(300, 3))
    return folder


@pytest.fixture
def monitored(call: Callable[..., Ended], evaluation: Path) -> Monitored:
    """Writes new answers and runs the command; returns its status and the object that it prints."""

    def run(new: Rows, *arguments: object, system: str = "sft") -> tuple[int, dict[str, Any]]:
        path = write(evaluation.with_name("new.jsonl"), new)
        command = ("monitor", "--reference", str(evaluation / system), "--new", str(path))
        ended = call(*command, "--json", *map(str, arguments))
        assert ended.err == ""
        return ended.status, json.loads(ended.out)

    return run


def confidences(rows: Rows, key: str = "confidence") -> np.ndarray:
    return np.array([math.nan if row[key] is None else row[key] for row in rows])


def test_answers_of_the_same_kind(monitored: Monitored) -> None:
    new = answers(400, 4)
    rows = [{"confidence": row["confidence"]} for row in new]
    status, result = monitored(rows, "--system", "sft", system=".")
    reference, stream = confidences(answers(300, 3)), confidences(new)
    test = drift_test(reference, stream)
    assert (status, result["drift"], result["groups"]) == (0, False, {})
    assert result["overall"] == {
        "reference_n": 300,
        "new_n": 400,
        "reference_mean_confidence": pytest.approx(np.nanmean(reference)),
        "new_mean_confidence": pytest.approx(np.nanmean(stream)),
        "reference_unparsed": int(np.isnan(reference).sum()),
        "new_unparsed": int(np.isnan(stream).sum()),
        "difference": test.difference,
        "p_value": test.p_value,
        "drift": False,
    }


def test_the_order_of_the_lines_does_not_matter_and_an_image_counts_once(monitored: Monitored) -> None:
    """Sorted answers, with a question each that is asked again three times about the same image."""
    rows = sorted(answers(100, 4), key=lambda row: row["confidence"] or 0)
    asked = [{**row, "id": f"{row['id']}-{i}", "image": row["id"]} for i in range(3) for row in rows]
    status, result = monitored(asked, "--by", "category")
    assert (status, result["overall"]["new_n"]) == (0, 100)
    random.Random(0).shuffle(asked)
    assert monitored(asked, "--by", "category")[1] == result
    assert monitored(answers(300, 3))[1]["overall"]["p_value"] == 1


def test_a_drift_of_one_category_ends_with_status_3(monitored: Monitored) -> None:
    hard = answers(300, 6, LOW, "hard/existence")
    rows = [*answers(300, 5, category="easy"), *hard, *answers(10, 7, category="foreign")]
    status, result = monitored(rows, "--by", "category")
    assert (status, result["drift"]) == (3, True)
    drifts = {group: figures["drift"] for group, figures in result["groups"].items()}
    assert drifts == {"easy": False, "existence": True, "hard": True}
    assert result["without_reference"] == ["foreign"]


def test_all_comparisons_share_the_error(monitored: Monitored) -> None:
    """A difference that alarms alone does not do so beside three groups, nor with more certainty."""
    new = answers(60, 29, (0.5, 0.7, 0.7, 0.8, 0.8, 0.9))
    p = monitored(new)[1]["overall"]["p_value"]
    assert 0.01 < p < 0.05
    assert [
        monitored(new, *more)[1]["overall"]["drift"]
        for more in ((), ("--by", "category", "--certainty", 1 - 2 * p), ("--certainty", 1 - p / 2))
    ] == [True, False, False]


def test_without_a_calibration_set_the_predictions_are_the_reference(
    evaluation: Path, monitored: Monitored
) -> None:
    (evaluation / "sft" / "calibration.jsonl").unlink()
    assert monitored(answers(300, 4))[0] == 3


def test_the_answers_of_ask_by_type_and_another_estimator(monitored: Monitored) -> None:
    """They have no gold answer, and an image each."""
    kept = ("id", "question", "answer_type", "confidence", "expected")
    rows = [{**{k: row[k] for k in kept}, "image": f"{i}.png"} for i, row in enumerate(answers(200, 4, LOW))]
    status, result = monitored(rows, "--by", "answer_type", "--estimator", "expected")
    assert (status, result["groups"]["yes_no"]["new_n"]) == (0, 200)
    assert result["overall"]["new_mean_confidence"] == pytest.approx(confidences(rows, "expected").mean())
    assert monitored(rows)[0] == 3, "by the stated confidence"


@pytest.mark.parametrize(("levels", "status", "verdict"), [(LEVELS, 0, ": no drift"), (LOW, 3, ": drift")])
def test_it_prints_a_line_for_each_group(
    evaluation: Path, call: Callable[..., Ended], levels: Sequence[float | None], status: int, verdict: str
) -> None:
    path = write(evaluation.with_name("new.jsonl"), answers(200, 4, levels))
    command = ("monitor", "--reference", str(evaluation / "sft"), "--new", str(path), "--by", "category")
    ended = call(*command)
    assert ended.status == status
    rows = dict(line.split(": ", 1) for line in ended.out.splitlines())
    assert {"overall", "easy", "hard", "existence"} <= set(rows)
    assert rows["overall"].endswith(verdict)


CONFIDENT = {"confidence": 0.5, "category": "easy"}


@pytest.mark.parametrize(
    ("rows", "options", "named"),
    [
        ([CONFIDENT, {"text": "Yes"}], [], ("new.jsonl:2", "'confidence'")),
        ([{"confidence": 1.5}], [], ("new.jsonl:1", "1.5")),
        ([{"confidence": True}], [], ("new.jsonl:1", "True")),
        ([{"confidence": "90%"}], [], ("new.jsonl:1", "'90%'")),
        ([[0.5]], [], ("new.jsonl:1", "[0.5]")),
        ([], [], ("new.jsonl",)),
        ([CONFIDENT, {"confidence": 0.5}], ["--by", "category"], ("new.jsonl:2", "'category'")),
        ([{"confidence": 0.5, "image": 7}], [], ("new.jsonl:1", "7")),
        ([{"confidence": 0.5, "category": 7}], ["--by", "category"], ("new.jsonl:1", "7")),
        ([{"confidence": 0.5, "category": "sea"}], ["--by", "category"], ("new.jsonl", "'sea'", "'easy'")),
        ([CONFIDENT], ["--estimator", "expected"], ("new.jsonl:1", "'expected'")),
        ([CONFIDENT], ["--estimator", "expcted"], ("--estimator", "expected")),
        ([CONFIDENT], ["--system", "stf"], ("--system", "did you mean sft")),
        ([CONFIDENT], ["--system", ""], ("--system", "base, sft")),
        ([CONFIDENT], None, ("--system, one of base, sft",)),
    ],
)
def test_what_cannot_be_used_is_named(
    evaluation: Path, call: Callable[..., Ended], rows: Any, options: list[str] | None, named: tuple[str, ...]
) -> None:
    path = write(evaluation.with_name("new.jsonl"), rows)
    options = [] if options is None else options if "--system" in options else ["--system", "sft", *options]
    error = call("monitor", "--reference", str(evaluation), "--new", str(path), *options).error()
    assert [text for text in named if text not in error] == []
