"""POPE ("is there a dog in the image?"): its files as they are published, and the rule of its `evaluate.py`.

Li et al., Evaluating Object Hallucination in Large Vision-Language Models, 2023 (arXiv 2305.10355), files and script at
github.com/AoiDragon/POPE. POPEv2 (Li et al., arXiv 2508.04567) asks the same of photographs and of their copies from
which the object was taken out.

The script reads an answer up to its first full stop, deletes commas and splits at blanks. With a word "No", "not" or "no"
among them it is a no, all else is a yes: "NO", an empty text, a "No" behind a line break. Yes is the positive class.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vlm_calibration.benchmarks.answers import Reply, in_order_of, reply, without_confidence
from vlm_calibration.benchmarks.files import Record, read_records
from vlm_calibration.records import DataError, Query

SCORES = ("accuracy", "precision", "recall", "f1", "yes_ratio")
"""What the script prints, as fractions that are not rounded."""

_NO = frozenset(("No", "not", "no"))
_OBJECT = re.compile(r"is there an? (.+?) in the image", re.IGNORECASE)


class PopeQuestion(NamedTuple):
    """A question with its label.

    where: its file and place, for messages. id: as in the file, or else the place in it, from 1. image: path below the
    image folder, "" where the file names none. question: as asked, "" likewise.
    """

    where: str
    id: str
    image: str
    question: str
    label: Literal["yes", "no"]

    def query(self) -> Query:
        """As a query, with the object asked about where the question is in POPE's words."""
        found = _OBJECT.search(self.question)
        objects = (found[1],) if found else ()
        return Query(self.id, self.image, self.question, self.label.capitalize(), "yes_no", objects)


@dataclass(frozen=True)
class PopeQuestions:
    """The questions of one file; `numbered` says whether the file gives them ids."""

    path: Path
    questions: tuple[PopeQuestion, ...]
    numbered: bool

    @property
    def ids(self) -> list[str]:
        return [question.id for question in self.questions]


def read_questions(path: str | Path) -> PopeQuestions:
    """A file of questions and labels: POPE's JSON lines, the arrays for A-OKVQA and GQA, or POPEv2's annotations.

    Raises:
        DataError: it cannot be read, a label is neither yes nor no, or an id is there twice or not in every record.
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
    """The answers to all of the questions, in their order, from JSON lines with `question_id`, `question` and `answer`.

    Without ids in both files, answers and questions are in the same order, as `evaluate.py` takes them.

    Raises:
        DataError: the file cannot be read, an answer is missing, doubled, of no question or no text.
    """
    records = read_records(path)
    numbered = _all_or_none(records, "question_id")
    replies = [reply(r, _identifier(r) if numbered else None, r.text("answer")) for r in records]
    if numbered and questions.numbered:
        return in_order_of(replies, questions.ids, path, questions.path)
    if len(replies) != len(questions.questions):
        raise DataError(
            f"{path}: {len(replies)} answers to the {len(questions.questions)} questions in {questions.path}; "
            "without a question_id in both files they are matched in order"
        )
    first = 1 if replies[0].id == "1" else 0
    for place, (record, given, asked) in enumerate(
        zip(records, replies, questions.questions, strict=True), start=first
    ):
        if numbered and given.id != str(place):
            raise record.error(
                f"{questions.path} has no ids, so answers must be numbered in its order: expected {place}, found {given.id}"
            )
        if not _asks(record.data.get("question"), asked.question):
            raise record.error(
                f"answers are matched in order, and this is to another question than {asked.where}: {asked.question!r}"
            )
    return replies


def says_no(text: str) -> bool:
    """Whether `evaluate.py` takes an answer for a no; it takes every other one for a yes.

    >>> says_no("There is not a dog, no."), says_no("NO"), says_no("Sure. No"), says_no("")
    (True, False, False, False)
    """
    return not _NO.isdisjoint(text.split(".")[0].replace(",", "").split(" "))


@dataclass(frozen=True)
class PopeCounts:
    """Right and wrong answers by what was said: `tp` and `fp` are yes, `tn` and `fn` are no."""

    tp: int = 0
    fp: int = 0
    tn: int = 0
    fn: int = 0

    def __add__(self, other: PopeCounts) -> PopeCounts:
        """The counts of both sets of answers."""
        return PopeCounts(self.tp + other.tp, self.fp + other.fp, self.tn + other.tn, self.fn + other.fn)

    def scores(self) -> dict[str, float]:
        """`SCORES` in the script's arithmetic; NaN where it would divide by zero, which ends the script."""
        tp, fp, tn, fn = self.tp, self.fp, self.tn, self.fn
        precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
        return {
            "accuracy": _ratio(tp + tn, tp + tn + fp + fn),
            "precision": precision,
            "recall": recall,
            "f1": _ratio(2 * precision * recall, precision + recall),
            "yes_ratio": _ratio(tp + fp, tp + tn + fp + fn),
        }


def count_answers(questions: Sequence[PopeQuestion], texts: Sequence[str]) -> PopeCounts:
    """Judge the answers by the rule of `evaluate.py`, each without the confidence that it states."""
    counts = {"tp": 0, "fp": 0, "tn": 0, "fn": 0}
    for question, text in zip(questions, texts, strict=True):
        no = says_no(without_confidence(text))
        counts[("t" if no == (question.label == "no") else "f") + ("n" if no else "p")] += 1
    return PopeCounts(**counts)


def official_answers(
    questions: Sequence[PopeQuestion], replies: Sequence[tuple[str, float | None]]
) -> list[dict[str, Any]]:
    """The lines of an answer file that `evaluate.py` scores as we do; replies are texts with confidences."""
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
    """The lines of a label file that `evaluate.py` reads; arrays and labels such as "No" are beyond it."""
    return [
        {"question_id": _as_written(q.id), "image": q.image, "text": q.question, "label": q.label}
        for q in questions
    ]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _question(record: Record, place: str, numbered: bool) -> PopeQuestion:
    label = record.text("label").strip().casefold()
    if label not in ("yes", "no"):
        raise record.error(f"'label' must be yes or no, found {record.shown('label')}")
    # POPEv2 has other names, and image paths that begin with a slash but mean the data set's folder.
    image, question = ("image_name", "query") if "image_name" in record.data else ("image", "text")
    return PopeQuestion(
        record.where,
        _identifier(record) if numbered else place,
        record.text(image).lstrip("/") if image in record.data else "",
        record.text(question) if question in record.data else "",
        "yes" if label == "yes" else "no",
    )


def _all_or_none(records: Sequence[Record], key: str) -> bool:
    there = [key in record.data for record in records]
    if any(there) and not all(there):
        record = records[there.index(False)]
        raise record.error(f"no {key!r}, which other records of the file have")
    return there[0]


def _identifier(record: Record) -> str:
    value = record.data["question_id"]
    return value if isinstance(value, str) else str(record.number("question_id"))


def _as_written(identifier: str) -> int | str:
    return int(identifier) if re.fullmatch(r"0|[1-9]\d{0,17}", identifier, re.ASCII) else identifier


def _asks(given: Any, question: str) -> bool:
    """Whether a question in an answer file may be this one: in any case, and in a longer prompt."""
    if not isinstance(given, str) or not given:
        return True
    return " ".join(question.casefold().split()) in " ".join(given.casefold().split())
