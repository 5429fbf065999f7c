"""Many questions from a JSONL file, and their answers in another that grows as they come.

The file of answers is its own record of what is done. It is only ever added to, each batch in one write; a run that was
killed, even within a line, goes on behind the last whole one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Any

from vlm_calibration.data.sources.images import ImageFolder
from vlm_calibration.files import append, writing
from vlm_calibration.records import ANSWER_TYPES, AnswerType, DataError, Query, RecordError, id_text

KNOWN_KEYS = frozenset(f.name for f in fields(Query))


@dataclass(frozen=True)
class Question:
    """A line of a file of questions.

    Attributes:
        id: unique in the file; the number of its line where it has none. where: file and line, for messages.
        image: path below the folder of images. answer_type: None where the file does not say.
    """

    id: str
    where: str
    image: str
    question: str
    answer_type: AnswerType | None


def read_questions(path: Path) -> Iterator[Question]:
    """The questions of a file, one JSON object a line with `image` and `question`, and `id` and `answer_type` if wanted.

    Other keys that a query has are passed over, so that a data set can be asked; blank lines as well.

    Raises:
        DataError: the file cannot be read, a line is not a question (named), or an id comes twice.
    """
    seen: set[str] = set()
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            question = _question(json.loads(line), number, where)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: {error}") from error
        if question.id in seen:
            raise DataError(f"{where}: the id {question.id!r} comes twice")
        seen.add(question.id)
        yield question
    if not seen:
        raise DataError(f"{path}: no question in this file")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            yield from ((n, line) for n, line in enumerate(file, start=1) if line.strip())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _question(data: Any, number: int, where: str) -> Question:
    if not isinstance(data, Mapping):
        raise RecordError("expected an object with 'image' and 'question'")
    if unknown := sorted(set(data) - KNOWN_KEYS):
        raise RecordError(f"unknown key {unknown[0]!r}; a question has image, question, id and answer_type")
    for key in ("image", "question"):
        if not isinstance(data.get(key), str) or not data[key].strip():
            raise RecordError(f"'{key}' must be a non-empty string")
    identifier, kind = id_text(data.get("id", number)), data.get("answer_type")
    if not isinstance(identifier, str) or not identifier:
        raise RecordError("'id' must be a non-empty string")
    if kind is not None and kind not in ANSWER_TYPES:
        raise RecordError(f"'answer_type' must be one of {', '.join(ANSWER_TYPES)}, found {kind!r}")
    return Question(identifier, where, data["image"], data["question"], kind)


class AnswerFile:
    """The answers to a file of questions, one JSON object a line, open for more.

    Attributes:
        settings: keys and values that all its lines share, such as the model that answers.
        done: id -> image and question of every answer in it. to_review: how many of them need review.
    """

    def __init__(self, path: Path, file: FileIO, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = dict(settings)
        self.done: dict[str, tuple[str, str]] = {}
        self.to_review = 0
        self._file = file
        self._read()

    def _read(self) -> None:
        end = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break  # what a run that was killed had not written yet
                end += len(line)
                self._read_line(number, line)
        self._file.truncate(end)

    def _read_line(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            identifier, asked = row["id"], (row["image"], row["question"])
            settings = {key: row.get(key) for key in self.settings}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.path}:{number}: not a line that `ask` wrote: choose another --out"
            ) from error
        for key, value in self.settings.items():
            if settings[key] != value:
                raise DataError(
                    f"{self.path}:{number}: answered with {key} {settings[key]!r}, not {value!r}: choose another --out"
                )
        self.done[identifier] = asked
        self.to_review += row.get("needs_review") is True

    def pending(self, questions: Iterator[Question]) -> Iterator[Question]:
        """Those questions that are not answered yet.

        Raises:
            DataError: an id was answered to another image or question.
        """
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
        """Write the answers to some questions; they are on the disk when this returns.

        Raises:
            DataError: they cannot be written.
        """
        lines = []
        for question, answer in rows:
            asked = {"id": question.id, "image": question.image, "question": question.question}
            lines.append(json.dumps({**asked, **answer, **self.settings}, ensure_ascii=False) + "\n")
            self.done[question.id] = (question.image, question.question)
            self.to_review += answer.get("needs_review") is True
        with writing(self.path):
            append(self._file, "".join(lines).encode())
            os.fsync(self._file.fileno())


@contextmanager
def answer_file(path: Path, settings: Mapping[str, Any]) -> Iterator[AnswerFile]:
    """Open a file of answers, or begin one; nobody else may write to it meanwhile.

    Args:
        settings: keys and values for all its lines; those that are in it must have the same.

    Raises:
        DataError: it cannot be written, is in use, or holds something else.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{path}: another process is writing to it") from error
        yield AnswerFile(path, file, settings)


def image_of(question: Question, folder: ImageFolder) -> Path:
    """Where a question's image is.

    Raises:
        DataError: outside the folder, or there is no such file.
    """
    try:
        folder.check(question.image)
        return folder.path(question.image)
    except RecordError as error:
        raise DataError(f"{question.where}: {error}") from error
