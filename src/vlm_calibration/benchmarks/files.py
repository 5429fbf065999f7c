"""Reading the files of benchmarks, JSON arrays or JSON lines: questions, and answers with a stated confidence."""

import operator
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, Self

from vlm_calibration.files import json_lines, name_some, read_json
from vlm_calibration.records import DataError, Query, short_repr
from vlm_calibration.text.confidence import parse_confidence, strip_confidence


class Record(NamedTuple):
    """A JSON object, and its file with line or position in the array."""

    where: str
    data: dict[str, Any]

    def text(self, key: str) -> str:
        """The string under a key, which may be empty, or a DataError."""
        return str(self._value(key, "a string", str))

    def number(self, key: str) -> int:
        """The integer under a key, or a DataError."""
        return int(self._value(key, "a whole number", int))

    def identifier(self, key: str) -> str:
        """The string or integer under a key as a string, or a DataError."""
        return str(self._value(key, "a string or a whole number", str, int))

    def error(self, message: str) -> DataError:
        return DataError(f"{self.where}: {message}")

    def _value(self, key: str, expected: str, *types: type) -> Any:
        if type(value := self.data.get(key)) in types:
            return value
        missing = f"no such key among {', '.join(map(repr, self.data)) or 'none'}"
        found = short_repr(value) if key in self.data else missing
        raise self.error(f"'{key}' must be {expected}, found {found}")


def read_records(path: str | Path) -> list[Record]:
    """The records of a JSON array, or of JSON lines that are not blank; a DataError if there is none or one is no object."""
    path = Path(path)
    if (lines := list(json_lines(path))) and lines[0].content.lstrip().startswith(b"["):
        records = [Record(f"{path}: record {i}", value) for i, value in enumerate(read_json(path), start=1)]
    else:
        records = [Record(line.where, line.read(lambda value: value)) for line in lines]
    for record in records:
        if not isinstance(record.data, dict):
            raise record.error(f"expected a JSON object, found {type(record.data).__name__}")
    if not records:
        raise DataError(f"{path}: no record in this file")
    return records


class Reply(NamedTuple):
    """An answer: its file with line or position, the question's id (None: matched by position), and the confidence in [0, 1] if parsed."""

    where: str
    id: str | None
    text: str
    confidence: float | None


def without_confidence(text: str) -> str:
    """An answer as the official scripts may read it: "Yes. Confidence: 80%" becomes "Yes"; one without confidence stays unchanged."""
    answer = strip_confidence(text)
    return text if answer == text.strip() else answer.rstrip(" .")


def reply(record: Record, identifier: str | None, text: str) -> Reply:
    """The answer in a record. Its key `confidence`, null or a number in [0, 1], comes before the confidence stated in the text."""
    if (value := record.data.get("confidence", parse_confidence(text))) is not None:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            raise record.error(f"'confidence' must be a number in [0, 1] or null, found {value!r}")
        value = float(value)
    return Reply(record.where, identifier, text, value)


def in_order_of(
    replies: Sequence[Reply], ids: Sequence[str], answers: str | Path, questions: str | Path, hint: str = ""
) -> list[Reply]:
    """Sort answers by the order of the questions' `ids`; a DataError about a missing (with `hint`), second or unknown answer."""
    expected = set(ids)
    by_id: dict[str | None, Reply] = {}
    for answer in replies:
        if seen := by_id.get(answer.id):
            raise DataError(f"{answer.where}: a second answer to {answer.id}, the first is at {seen.where}")
        if answer.id not in expected:
            raise DataError(f"{answer.where}: {answer.id} is no id in {questions}")
        by_id[answer.id] = answer
    if missing := [i for i in ids if i not in by_id]:
        number, first = f"{len(missing)} of the {len(ids)}", name_some(missing, len(missing))
        raise DataError(f"{answers}: no answer to {number} questions in {questions}: {first}{hint}")
    return [by_id[i] for i in ids]


OFFICIAL = "official"


@dataclass(frozen=True)
class OfficialCounts(ABC):
    """How often each (category, gold answer, response) occurs."""

    answers: Counter[tuple[str | None, str, str]]

    @classmethod
    def of(cls, queries: Sequence[Query], texts: Sequence[str]) -> Self:
        """Count the answers to yes/no queries, without their stated confidence."""
        responses = (cls.response(without_confidence(text)) for text in texts)
        return cls(Counter((q.category, q.answer, r) for q, r in zip(queries, responses, strict=True)))

    def __add__(self, other: Self) -> Self:
        return type(self)(self.answers + other.answers)

    @staticmethod
    @abstractmethod
    def response(text: str) -> str:
        """What the benchmark's script reads in an answer: "Yes", "No", or "" for neither."""

    @abstractmethod
    def scores(self) -> dict[str, float]:
        """The official scores by name; NaN where the benchmark's script prints none."""


def official_scores(parts: Mapping[str, OfficialCounts]) -> dict[str, float]:
    """The scores of one or several sets of questions (name -> counts), by name.

    `official/accuracy` and so on over all parts, if all belong to one benchmark; with several also of each, `official/random/accuracy`.
    """
    scores: dict[str, float] = {}
    counts: list[Any] = list(parts.values())
    if len({type(part) for part in counts}) == 1:
        scores |= reduce(operator.add, counts).scores()
    if len(counts) > 1:
        for name, part in parts.items():
            scores |= {f"{name}/{key}": value for key, value in part.scores().items()}
    return {f"{OFFICIAL}/{key}": value for key, value in scores.items()}


def blocks_of(scores: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Group the result of `official_scores` by part: "", "random" or "attribute" -> name -> score."""
    blocks: dict[str, dict[str, float]] = {}
    for name, value in scores.items():
        block, _, key = name.removeprefix(f"{OFFICIAL}/").rpartition("/")
        blocks.setdefault(block, {})[key] = value
    return blocks
