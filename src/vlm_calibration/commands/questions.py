"""Questions from a file of JSON lines, and the file of their answers, from which a killed run resumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vlm_calibration.append_log import AppendLog
from vlm_calibration.files import json_lines
from vlm_calibration.records import AnswerType, DataError, RecordError, query_from_dict


class Question(NamedTuple):
    """A line of a file of questions.

    Attributes:
        id: unique in the file; the line number if the file gives none.
        where: file and line number, for messages.
        image: path relative to the folder of images.
        question: the text.
        answer_type: None if the file does not give it.
        category: None if the file does not give it.
    """

    id: str
    where: str
    image: str
    question: str
    answer_type: AnswerType | None
    category: str | None


def read_questions(path: Path) -> Iterator[Question]:
    """The questions of a file: one JSON object a line with the keys of a query, of which `image` and `question` are needed.

    Raises:
        DataError: the file cannot be read, a line is not a question (named), or an id comes twice.
    """
    seen: set[str] = set()
    for line in json_lines(path):
        question = line.read(partial(_question, number=line.number, where=line.where))
        if question.id in seen:
            raise line.error(f"the id {question.id!r} comes twice")
        seen.add(question.id)
        yield question
    if not seen:
        raise DataError(f"{path}: no question in this file")


def _question(data: Any, number: int, where: str) -> Question:
    if not isinstance(data, Mapping):
        raise RecordError("expected an object with 'image' and 'question'")
    given = {key: value for key, value in data.items() if value is not None}
    query = query_from_dict({"id": number, "answer": "?", "answer_type": "open", **given})
    return Question(query.id, where, query.image, query.question, given.get("answer_type"), query.category)


class AnswerFile(AppendLog):
    """The answers to a file of questions, one JSON object a line; a restarted run appends the missing ones.

    Args:
        path: the file.
        settings: keys and values of all its lines, such as the model that answers.

    Attributes:
        done: id -> image and question of every answer in it.
        to_review: how many answers go to a person for review.

    Raises:
        DataError: the file cannot be written, another process writes to it, or a line is not an answer under these settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(path, settings, "choose another --out")
        self.done: dict[str, tuple[str, str]] = {}
        self.to_review = 0
        self.open()
        try:
            for line, row in self.lines():
                if not isinstance(row.get("id"), str) or not {"image", "question"} <= row.keys():
                    raise self.damaged(line.where, "not an answer that `ask` wrote")
                self._count(row)
        except DataError:
            self.close()
            raise

    def _count(self, row: Mapping[str, Any]) -> None:
        self.done[row["id"]] = (row["image"], row["question"])
        self.to_review += row.get("decision") == "review"

    def pending(self, questions: Iterator[Question]) -> Iterator[Question]:
        """The questions that have no answer yet; one of another image or text than that of the same id is a DataError."""
        for question in questions:
            asked = self.done.get(question.id)
            if asked is None:
                yield question
            elif asked != (question.image, question.question):
                raise DataError(
                    f"{question.where}: {self.path} holds an answer to another question under the id {question.id!r}: "
                    "choose another --out"
                )

    def add(self, rows: Sequence[tuple[Question, Mapping[str, Any]]]) -> None:
        """Append the answers to some questions; they are on the disk when this returns. Raises a DataError if they cannot be written."""
        written = [
            {"id": q.id, "image": q.image, "question": q.question, "category": q.category, **answer}
            for q, answer in rows
        ]
        self.append(*written, sync=True)
        for row in written:
            self._count(row)
