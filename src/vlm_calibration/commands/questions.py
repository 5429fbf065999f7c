"""Questions from a file of JSON lines, and the file of their answers, from which a killed run resumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_calibration.append_log import AppendLog
from vlm_calibration.files import JsonLine, json_lines
from vlm_calibration.records import AnswerType, DataError, Query, RecordError, query_from_dict

KEYS = ("id", "image", "question", "category")
"""What an answer repeats of its question."""


class Question(NamedTuple):
    """A line of a file of questions.

    Attributes:
        where: file and line number, for messages.
        query: the question without a gold answer; its id is the line number if the file gives none.
        answer_type: None if the file does not give it.
    """

    where: str
    query: Query
    answer_type: AnswerType | None


def read_questions(path: Path) -> Iterator[Question]:
    """The questions of a file: one JSON object a line with the keys of a query, of which `image` and `question` are needed.

    Raises:
        DataError: the file cannot be read, a line is not a question (named), or an id comes twice.
    """
    seen: set[str] = set()
    for line in json_lines(path):

        def question(data: Any, line: JsonLine = line) -> Question:
            if not isinstance(data, Mapping):
                raise RecordError("expected an object with 'image' and 'question'")
            given = {key: value for key, value in data.items() if value is not None}
            query = query_from_dict({"id": line.number, "answer": "?", "answer_type": "open", **given})
            return Question(line.where, query, given.get("answer_type"))

        read = line.read(question)
        if read.query.id in seen:
            raise line.error(f"the id {read.query.id!r} comes twice")
        seen.add(read.query.id)
        yield read
    if not seen:
        raise DataError(f"{path}: no question in this file")


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
            query = question.query
            asked = self.done.get(query.id)
            if asked is None:
                yield question
            elif asked != (query.image, query.question):
                raise DataError(
                    f"{question.where}: {self.path} holds an answer to another question under the id {query.id!r}: "
                    "choose another --out"
                )

    def add(self, rows: Sequence[tuple[Question, Mapping[str, Any]]]) -> None:
        """Append the answers to some questions; they are on the disk when this returns. Raises a DataError if they cannot be written."""
        written = [
            {**{key: getattr(question.query, key) for key in KEYS}, **answer} for question, answer in rows
        ]
        self.append(*written, sync=True)
        for row in written:
            self._count(row)
