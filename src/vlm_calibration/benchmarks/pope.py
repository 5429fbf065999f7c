"""POPE ("is there a dog in the image?"): reading its published files, and the rule of its `evaluate.py`.

Li et al., Evaluating Object Hallucination in Large Vision-Language Models, 2023 (arXiv 2305.10355), files and script at
github.com/AoiDragon/POPE. POPEv2 (Li et al., arXiv 2508.04567) asks about photographs and about copies of them with the
object removed.

The script takes an answer up to the first full stop, deletes commas and splits at blanks. If a word is "No", "not" or "no",
the answer is no, otherwise yes: "NO", an empty text and a "No" after a line break are yes. Yes is the positive class.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vlm_calibration.benchmarks.files import (
    Record,
    Reply,
    in_order_of,
    read_records,
    reply,
    without_confidence,
)
from vlm_calibration.records import DataError, Query

SCORES = ("accuracy", "precision", "recall", "f1", "yes_ratio")
"""The scores that the script prints, as unrounded fractions."""

_NO = frozenset(("No", "not", "no"))
_OBJECT = re.compile(r"is there an? (.+?) in the image", re.IGNORECASE)


class PopeQuestion(NamedTuple):
    """A question with its label.

    Attributes:
        where: file and position, for messages.
        id: the id in the file, or the position from 1 if the file has no ids.
        image: path below the image folder; "" if the file names none.
        question: the text; "" if the file has none.
        label: the correct answer.
    """

    where: str
    id: str
    image: str
    question: str
    label: Literal["yes", "no"]

    def query(self) -> Query:
        """Convert to a `Query`; `objects` is set if the question has POPE's wording."""
        objects = tuple(_OBJECT.findall(self.question)[:1])
        return Query(self.id, self.image, self.question, self.label.capitalize(), "yes_no", objects)


@dataclass(frozen=True)
class PopeQuestions:
    """The questions of one file.

    Attributes:
        path: the file.
        questions: in the order of the file.
        numbered: whether the file has ids.
    """

    path: Path
    questions: tuple[PopeQuestion, ...]
    numbered: bool


def read_questions(path: str | Path) -> PopeQuestions:
    """Read questions and labels: POPE's JSON lines, the arrays for A-OKVQA and GQA, or POPEv2's annotations.

    Raises:
        DataError: the file cannot be read, a label is neither yes nor no, or an id is repeated or missing in some records.
    """
    records = read_records(path)
    numbered = _all_or_none(records, "question_id")
    questions = [_question(r, str(i), numbered) for i, r in enumerate(records, start=1)]
    seen: dict[str, str] = {}
    for question in questions:
        if question.id in seen:
            raise DataError(
                f"{question.where}: duplicate question_id {question.id}, first at {seen[question.id]}"
            )
        seen[question.id] = question.where
    return PopeQuestions(Path(path), tuple(questions), numbered)


def read_answers(path: str | Path, questions: PopeQuestions) -> list[Reply]:
    """Read the answers to all questions from JSON lines with `question_id`, `question` and `answer`.

    If a file has no ids, answers and questions are matched by position, as `evaluate.py` does.

    Returns:
        The answers in the order of the questions.

    Raises:
        DataError: the file cannot be read, or an answer is missing, repeated, has an unknown id or no text.
    """
    records = read_records(path)
    numbered = _all_or_none(records, "question_id")
    replies = [reply(r, _identifier(r) if numbered else None, r.text("answer")) for r in records]
    if numbered and questions.numbered:
        return in_order_of(replies, [question.id for question in questions.questions], path, questions.path)
    if len(replies) != len(questions.questions):
        raise DataError(
            f"{path}: {len(replies)} answers to the {len(questions.questions)} questions in {questions.path}; "
            "without a question_id in both files they are matched in order"
        )
    rows = zip(records, replies, questions.questions, strict=True)
    for position, (record, answer, asked) in enumerate(rows, start=1 if replies[0].id == "1" else 0):
        if numbered and answer.id != str(position):
            raise record.error(
                f"{questions.path} has no ids, so answers must be numbered in its order: expected {position}, found {answer.id}"
            )
        prompt = record.data.get("question")
        if isinstance(prompt, str) and prompt and _folded(asked.question) not in _folded(prompt):
            raise record.error(
                f"answers are matched in order, and this one belongs to another question than {asked.where}: {asked.question!r}"
            )
    return replies


def says_no(text: str) -> bool:
    """Whether `evaluate.py` scores an answer as no; it scores every other answer as yes.

    >>> says_no("There is not a dog, no."), says_no("NO"), says_no("Sure. No"), says_no("")
    (True, False, False, False)
    """
    return not _NO.isdisjoint(text.split(".")[0].replace(",", "").split(" "))


@dataclass(frozen=True)
class PopeCounts:
    """Confusion matrix with yes as the positive class: correct and wrong yes, correct and wrong no."""

    tp: int = 0
    fp: int = 0
    tn: int = 0
    fn: int = 0

    def __add__(self, other: PopeCounts) -> PopeCounts:
        """The counts of both sets of answers."""
        return PopeCounts(self.tp + other.tp, self.fp + other.fp, self.tn + other.tn, self.fn + other.fn)

    def scores(self) -> dict[str, float]:
        """`SCORES` by the script's arithmetic; NaN where the script would fail with a division by zero."""

        def ratio(part: float, whole: float) -> float:
            return part / whole if whole else math.nan

        tp, fp, tn, fn = self.tp, self.fp, self.tn, self.fn
        precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
        return {
            "accuracy": ratio(tp + tn, tp + tn + fp + fn),
            "precision": precision,
            "recall": recall,
            "f1": ratio(2 * precision * recall, precision + recall),
            "yes_ratio": ratio(tp + fp, tp + tn + fp + fn),
        }


def count_answers(questions: Sequence[PopeQuestion], texts: Sequence[str]) -> PopeCounts:
    """Score the answers by the rule of `evaluate.py`, without their stated confidence."""
    counts = {"tp": 0, "fp": 0, "tn": 0, "fn": 0}
    for question, text in zip(questions, texts, strict=True):
        no = says_no(without_confidence(text))
        counts[("t" if no == (question.label == "no") else "f") + ("n" if no else "p")] += 1
    return PopeCounts(**counts)


def official_answers(
    questions: Sequence[PopeQuestion], replies: Sequence[tuple[str, float | None]]
) -> list[dict[str, Any]]:
    """The rows of an answer file for `evaluate.py`; `replies` are texts with confidences."""
    return [
        {
            "question_id": _as_written(asked.id),
            "question": asked.question,
            "answer": without_confidence(text),
            "confidence": confidence,
        }
        for asked, (text, confidence) in zip(questions, replies, strict=True)
    ]


def official_labels(questions: Sequence[PopeQuestion]) -> list[dict[str, Any]]:
    """The rows of a label file for `evaluate.py`, which reads neither arrays nor labels such as "No"."""
    return [
        {"question_id": _as_written(q.id), "image": q.image, "text": q.question, "label": q.label}
        for q in questions
    ]


def _question(record: Record, position: str, numbered: bool) -> PopeQuestion:
    label = record.text("label").strip().casefold()
    if label not in ("yes", "no"):
        raise record.error(f"'label' must be yes or no, found {record.shown('label')}")
    # POPEv2 has other keys, and its image paths begin with a slash although they are relative to the data set's folder.
    image, question = ("image_name", "query") if "image_name" in record.data else ("image", "text")
    return PopeQuestion(
        record.where,
        _identifier(record) if numbered else position,
        record.text(image).lstrip("/") if image in record.data else "",
        record.text(question) if question in record.data else "",
        "yes" if label == "yes" else "no",
    )


def _all_or_none(records: Sequence[Record], key: str) -> bool:
    """Whether all records have a key; an error if only some do."""
    has_key = [key in record.data for record in records]
    if any(has_key) and not all(has_key):
        record = records[has_key.index(False)]
        raise record.error(f"no {key!r}, which other records of the file have")
    return has_key[0]


def _identifier(record: Record) -> str:
    value = record.data["question_id"]
    return value if isinstance(value, str) else str(record.number("question_id"))


def _as_written(identifier: str) -> int | str:
    return int(identifier) if re.fullmatch(r"0|[1-9]\d{0,17}", identifier, re.ASCII) else identifier


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
