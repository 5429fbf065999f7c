"""Prediction files: what an evaluation writes is what is read back, and what cannot be used is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.estimators.predictions import estimators_of, prediction_from_dict, read_predictions
from vlm_calibration.records import DataError, Prediction, RecordError

LINE: dict[str, Any] = {
    "id": "a",
    "question": "A dog?",
    "answer": "Yes",
    "text": "Yes. 80%",
    "predicted": "yes",
    "confidence": 0.8,
    "correct": True,
    "category": "x/y",
    "noise_step": 0,
    "answer_type": "yes_no",
}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return path


PROBABILITY = st.none() | st.floats(0, 1)


@given(
    text=st.text(),
    confidence=PROBABILITY,
    further=st.fixed_dictionaries(
        {
            "perturbation": st.none() | st.sampled_from(["", "noise", "blur"]),
            "strength": PROBABILITY,
            "image": st.none() | st.text(),
            "estimates": st.dictionaries(st.sampled_from(["expected", "p_true"]), PROBABILITY),
            "probes": st.just({}) | st.fixed_dictionaries({"original": PROBABILITY, "image": st.none()}),
        }
    ),
)
def test_what_is_written_is_read(text: str, confidence: float | None, further: dict[str, Any]) -> None:
    facts = ("a", "?", "Yes", text, None, confidence, False, None, None, "short")
    made = Prediction(*facts, **further)  # type: ignore[arg-type]
    assert prediction_from_dict(json.loads(json.dumps(made.to_dict(), ensure_ascii=False))) == made


def test_files_from_before_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl", LINE, "", {**LINE, "id": "b", "text": "a\u2028b\u0085", "expected": 0.5}
    )
    first, second = read_predictions(path)
    assert (first.image, first.estimates, first.perturbation, first.strength) == (None, {}, None, None)
    assert second.text == "a\u2028b\u0085"
    assert second.confidence_of("expected") == 0.5
    assert second.confidence_of("verbalized") == 0.8
    assert estimators_of([first, second]) == ("verbalized",)
    assert estimators_of([second]) == ("verbalized", "expected")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"confidence": 1.5}, "'confidence' must be a number in [0, 1] or null, found 1.5"),
        ({"expected": float("nan")}, "'expected' must be"),
        ({"strength": True}, "'strength' must be"),
        ({"correct": 1}, "'correct' must be true or false"),
        ({"noise_step": 0.5}, "'noise_step' must be a whole number or null"),
        ({"answer_type": "number"}, "'answer_type' must be one of yes_no, short, open"),
        ({"category": 3}, "'category' must be a string or null"),
        ({"text": None}, "'text' must be a string"),
        ({"probes": 0.5}, "'probes' must be an object with the key 'original', found 0.5"),
        ({"probes": {"original": 0.5, "image": 2}}, "'probes.image' must be a number in [0, 1]"),
        ({"probes": {"image": 0.5}}, "'probes' must be an object with the key 'original'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RecordError) as caught:
        prediction_from_dict({**LINE, **change})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ((LINE, LINE), ":2: the id 'a' comes twice"),
        ((LINE, [1]), ":2: expected an object"),
        ((LINE, {k: v for k, v in LINE.items() if k != "noise_step"}), ":2: no key 'noise_step'"),
        (("", " "), "no prediction in this file"),
    ],
)
def test_the_line_is_named(tmp_path: Path, lines: tuple[Any, ...], says: str) -> None:
    path = write(tmp_path / "p.jsonl", *lines)
    with pytest.raises(DataError) as caught:
        read_predictions(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)
