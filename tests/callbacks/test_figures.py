"""Answers are counted by kind and strength of perturbation; those of splits that are not perturbed belong to no response curve."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vlm_calibration.callbacks.figures import (
    UNPERTURBED,
    add_tables,
    media_of,
    response_table,
    tables_by_perturbation,
)
from vlm_calibration.records import Prediction

ANSWER = Prediction(
    id="q",
    question="Is there a dog?",
    answer="Yes",
    text="Yes. Confidence: 80%",
    predicted="yes",
    confidence=0.8,
    correct=True,
    category=None,
    noise_step=None,
    answer_type="yes_no",
)


class Dataset:
    """Perturbs queries whose id begins with "p"."""

    def is_noised(self, query_id: str) -> bool:
        return query_id.startswith("p")


def _tables(*answers: tuple[str, str | None, float | None, float | None, bool]) -> Any:
    predictions = [
        replace(ANSWER, id=i, perturbation=kind, strength=strength, confidence=confidence, correct=correct)
        for i, kind, strength, confidence, correct in answers
    ]
    return tables_by_perturbation(predictions, Dataset())  # type: ignore[arg-type]


ANSWERS = (
    ("p1", "blur", 0.5, 0.6, True),
    ("p2", "blur", 0.5, 0.2, False),
    ("p3", "noise", 0.5, None, True),
    ("p4", "", 0.0, 0.9, True),
    ("c1", "", 0.0, 1.0, False),
    ("c2", None, None, 1.0, True),
)


def test_answers_are_counted_by_kind_and_strength() -> None:
    tables = _tables(*ANSWERS)
    counted = {("blur", 0.5): 2, ("noise", 0.5): 1, ("", 0.0): 1, UNPERTURBED: 2}
    assert {key: table.n for key, table in tables.items()} == counted
    total = _tables(("p9", "blur", 1.0, 0.1, False))
    add_tables(total, tables)
    add_tables(total, _tables(ANSWERS[0]))
    assert {key: table.n for key, table in total.items()} == {**counted, ("blur", 0.5): 3, ("blur", 1.0): 1}


def test_the_table_has_a_row_for_each_kind_and_strength_with_confidences() -> None:
    tables = {key: table for key, table in _tables(*ANSWERS).items() if key != UNPERTURBED}
    table = response_table(tables)
    assert table.columns == ["kind", "strength", "answers", "accuracy", "mean_confidence"]
    rows = [("untouched", 0.0, 1, 1.0, 0.9), ("blur", 0.5, 2, 0.5, 0.4)]
    assert [row[0] for row in table.data] == [row[0] for row in rows]
    for row, expected in zip(table.data, rows, strict=True):
        assert row[1:] == pytest.approx(expected[1:])


def test_without_perturbed_splits_there_is_no_response_curve() -> None:
    names = {"reliability", "risk_coverage", "confidence_table"}
    assert set(media_of(_tables(*ANSWERS[4:]))) == names
    assert set(media_of(_tables(*ANSWERS))) == names | {"response_curve", "response_table"}
