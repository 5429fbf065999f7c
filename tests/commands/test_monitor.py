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

from vlm_calibration.cli import main
from vlm_calibration.files import write_rows
from vlm_calibration.metrics.drift import drift_test

LEVELS = (0.5, 0.7, 0.8, 0.9, 0.95, None)
LOW = (0.3, 0.5, 0.5, 0.7)
Rows = list[dict[str, Any]]


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
def monitored(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs the command; returns its status and the object that it prints."""

    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        status = main(["monitor", *map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert err == ""
        return status, json.loads(out)

    return run


def confidences(rows: Rows, key: str = "confidence") -> np.ndarray:
    return np.array([math.nan if row[key] is None else row[key] for row in rows])


def test_answers_of_the_same_kind(evaluation: Path, monitored: Callable[..., Any], tmp_path: Path) -> None:
    new = answers(400, 4)
    path = write(tmp_path / "new.jsonl", [{"confidence": row["confidence"]} for row in new])
    status, result = monitored("--reference", evaluation, "--system", "sft", "--new", path)
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


def test_the_order_of_the_lines_does_not_matter_and_an_image_counts_once(
    evaluation: Path, monitored: Callable[..., Any], tmp_path: Path
) -> None:
    """Sorted answers, with a question each that is asked again three times about the same image."""
    rows = sorted(answers(100, 4), key=lambda row: row["confidence"] or 0)
    asked = [{**row, "id": f"{row['id']}-{i}", "image": row["id"]} for i in range(3) for row in rows]
    path = write(tmp_path / "new.jsonl", asked)
    status, result = monitored("--reference", evaluation / "sft", "--new", path, "--by", "category")
    assert (status, result["overall"]["new_n"]) == (0, 100)
    random.Random(0).shuffle(asked)
    write(path, asked)
    assert monitored("--reference", evaluation / "sft", "--new", path, "--by", "category")[1] == result
    write(path, answers(300, 3))
    assert monitored("--reference", evaluation / "sft", "--new", path)[1]["overall"]["p_value"] == 1


def test_a_drift_of_one_category_ends_with_status_3(
    evaluation: Path, monitored: Callable[..., Any], tmp_path: Path
) -> None:
    hard = answers(300, 6, LOW, "hard/existence")
    rows = [*answers(300, 5, category="easy"), *hard, *answers(10, 7, category="foreign")]
    path = write(tmp_path / "new.jsonl", rows)
    command = ("--reference", evaluation / "sft", "--new", path, "--by", "category")
    status, result = monitored(*command)
    assert (status, result["drift"]) == (3, True)
    drifts = {group: figures["drift"] for group, figures in result["groups"].items()}
    assert drifts == {"easy": False, "existence": True, "hard": True}
    assert result["without_reference"] == ["foreign"]


def test_all_comparisons_share_the_error(
    evaluation: Path, monitored: Callable[..., Any], tmp_path: Path
) -> None:
    """A difference that alarms alone does not do so beside three groups, nor with more certainty."""
    path = write(tmp_path / "new.jsonl", answers(60, 29, (0.5, 0.7, 0.7, 0.8, 0.8, 0.9)))
    command = ("--reference", evaluation / "sft", "--new", path)
    p = monitored(*command)[1]["overall"]["p_value"]
    assert 0.01 < p < 0.05
    assert [
        monitored(*command, *more)[1]["overall"]["drift"]
        for more in ((), ("--by", "category", "--certainty", str(1 - 2 * p)), ("--certainty", str(1 - p / 2)))
    ] == [True, False, False]


def test_without_a_calibration_set_the_predictions_are_the_reference(
    evaluation: Path, monitored: Callable[..., Any], tmp_path: Path
) -> None:
    (evaluation / "sft" / "calibration.jsonl").unlink()
    path = write(tmp_path / "new.jsonl", answers(300, 4))
    assert monitored("--reference", evaluation / "sft", "--new", path)[0] == 3


def test_the_answers_of_ask_by_type_and_another_estimator(
    evaluation: Path, monitored: Callable[..., Any], tmp_path: Path
) -> None:
    """They have no gold answer, and an image each."""
    kept = ("id", "question", "answer_type", "confidence", "expected")
    rows = [{**{k: row[k] for k in kept}, "image": f"{i}.png"} for i, row in enumerate(answers(200, 4, LOW))]
    path = write(tmp_path / "asked.jsonl", rows)
    command = ("--reference", evaluation / "sft", "--new", path)
    status, result = monitored(*command, "--by", "answer_type", "--estimator", "expected")
    assert (status, result["groups"]["yes_no"]["new_n"]) == (0, 200)
    assert result["overall"]["new_mean_confidence"] == pytest.approx(confidences(rows, "expected").mean())
    assert monitored(*command)[0] == 3, "by the stated confidence"


@pytest.mark.parametrize(("levels", "status", "verdict"), [(LEVELS, 0, ": no drift"), (LOW, 3, ": drift")])
def test_it_prints_a_line_for_each_group(
    evaluation: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    levels: Sequence[float | None],
    status: int,
    verdict: str,
) -> None:
    path = write(tmp_path / "new.jsonl", answers(200, 4, levels))
    command = ["monitor", "--reference", str(evaluation / "sft"), "--new", str(path), "--by", "category"]
    assert main(command) == status
    rows = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
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
    evaluation: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: Any,
    options: list[str] | None,
    named: tuple[str, ...],
) -> None:
    path = write(tmp_path / "new.jsonl", rows)
    options = [] if options is None else options if "--system" in options else ["--system", "sft", *options]
    assert main(["monitor", "--reference", str(evaluation), "--new", str(path), *options]) == 1
    [error] = capsys.readouterr().err.splitlines()
    assert [text for text in named if text not in error] == []
