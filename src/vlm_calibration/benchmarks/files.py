"""Reading the files of benchmarks, JSON arrays and one JSON object a line alike, each record with the place it stands at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_calibration.records import DataError, id_text

MAX_NAMED = 5
"""Most examples that a message names."""


class Record(NamedTuple):
    """A JSON object, and the file with the line or place in the array that it stands at, for messages."""

    where: str
    data: dict[str, Any]

    def text(self, key: str) -> str:
        """The string under a key; it may be empty. A whole number as `id` is taken as its digits.

        Raises:
            DataError: there is no such key, or it holds something else.
        """
        value = self.data.get(key)
        if key == "id":
            value = id_text(value)
        if not isinstance(value, str):
            raise self.error(f"'{key}' must be a string, found {self.shown(key)}")
        return value

    def number(self, key: str) -> int:
        """The whole number under a key.

        Raises:
            DataError: there is no such key, or it holds something else.
        """
        value = self.data.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(f"'{key}' must be a whole number, found {self.shown(key)}")
        return value

    def error(self, message: str) -> DataError:
        """What to raise about this record."""
        return DataError(f"{self.where}: {message}")

    def shown(self, key: str) -> str:
        """What is under a key, short enough for a message."""
        if key not in self.data:
            return f"no such key among {', '.join(map(repr, self.data)) or 'none'}"
        shown = repr(self.data[key])
        return shown if len(shown) <= 60 else shown[:57] + "..."


def read_records(path: str | Path) -> list[Record]:
    """All records of a file: of a JSON array, or of lines that are JSON objects, among which blank ones do not count.

    Raises:
        DataError: the file cannot be read, is neither, or has no record; the message names the line or the record.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8: {error.reason}") from error
    records = _array(path, text) if text.lstrip()[:1] == "[" else _lines(path, text)
    if not records:
        raise DataError(f"{path}: no record in this file")
    return records


def some(values: Sequence[object]) -> str:
    """The first few of the values, for a message."""
    return ", ".join(map(str, values[:MAX_NAMED])) + (", ..." if len(values) > MAX_NAMED else "")


def _array(path: str | Path, text: str) -> list[Record]:
    return [_record(f"{path}: record {i}", v) for i, v in enumerate(_decoded(path, text, 1), start=1)]


def _lines(path: str | Path, text: str) -> list[Record]:
    # Not splitlines: a JSON string may hold other characters that end a line.
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [_record(f"{path}:{i}", _decoded(path, line, i)) for i, line in lines]


def _record(where: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return Record(where, value)


def _decoded(path: str | Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{first_line + error.lineno - 1}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{first_line}: not JSON that can be read: {error}") from error
