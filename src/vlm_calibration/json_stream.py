"""Reading large JSON files value by value, so that a file of a gigabyte is never decoded as a whole.

Published data sets are often one JSON array or object. Each of its values is decoded alone and comes with its position in the file,
by which it can be read again.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from vlm_calibration.files import JsonLine, json_lines, parse_json
from vlm_calibration.records import DataError

T = TypeVar("T")

CHUNK = 1 << 20
"""Bytes that are read at once; more where a single value is larger."""
NEAR_END = 16
"""A syntax error within this many characters of the end of the text read so far may be a value that is cut off there."""

_SPACE = re.compile(r"[ \t\n\r]*")


class JsonItem(NamedTuple):
    """A value inside a JSON file.

    Attributes:
        path: the file.
        number: number of the line in which the value begins, from 1.
        offset: of its first byte in the file.
        length: in bytes.
        key: the key of the object that the value belongs to; None in an array at the top.
        value: the decoded value.
    """

    path: Path
    number: int
    offset: int
    length: int
    key: str | None
    value: Any

    @property
    def where(self) -> str:
        """File and line number, for messages."""
        return f"{self.path}:{self.number}"

    def read(self, convert: Callable[[Any], T]) -> T:
        """Convert the value.

        Raises:
            DataError: `convert` raises a ValueError; names file and line.
        """
        try:
            return convert(self.value)
        except ValueError as error:
            raise DataError(f"{self.where}: {error}") from error


def json_records(path: Path) -> Iterator[JsonItem | JsonLine]:
    """The elements of a JSON array, or the lines of a file of JSON lines, whichever the file is.

    Raises:
        DataError: the file cannot be read, or an array is not valid JSON. A line is decoded, and refused, only by its `read`.
    """
    with _open(path) as reader:
        is_array = reader.peek() == "["
    if is_array:
        yield from json_elements(path)
    else:
        yield from json_lines(path)


def json_elements(path: Path) -> Iterator[JsonItem]:
    """The elements of a file that is one JSON array; see `json_records`."""
    with _open(path) as reader:
        yield from reader.array(None)
        reader.end()


def json_members(path: Path, *, open_arrays: bool = False) -> Iterator[JsonItem]:
    """The members of a file that is one JSON object, in the order of the file.

    Args:
        path: the file.
        open_arrays: yield an item for each element of a member that is an array, in place of one for the array.

    Raises:
        DataError: the file cannot be read, is not valid JSON, or is no object.
    """
    with _open(path) as reader:
        reader.expect("{", "an object")
        for _ in reader.values("}"):
            key = reader.value(None)
            if not isinstance(key.value, str):
                raise DataError(f"{key.where}: not JSON: expected a key in quotes")
            reader.expect(":", "':' after a key")
            if open_arrays and reader.peek() == "[":
                yield from reader.array(key.value)
            else:
                yield reader.value(key.value)
        reader.end()


def read_at(path: Path, offset: int, length: int) -> Any:
    """Decode the JSON value at a position of a file.

    Raises:
        OSError: the file cannot be read.
        RecordError: there is no JSON value at this position (any more).
    """
    with path.open("rb") as file:
        file.seek(offset)
        return parse_json(file.read(length))


@contextmanager
def _open(path: Path) -> Iterator[_Reader]:
    try:
        with path.open("rb") as file:
            yield _Reader(path, file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


class _Reader:
    """A position in a JSON file, with the text that follows it as far as it has been read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.line = 1
        self.offset = 0
        self._text = ""
        self._position = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._at_begin = True

    def peek(self) -> str:
        """The next character that is no white space, "" at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._position)
            assert space is not None
            self._advance(space.end())
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._fill():
                return ""

    def expect(self, character: str, what: str) -> None:
        """Step over a character; DataError if another one follows."""
        if (follows := self.peek()) != character:
            raise self._error(f"expected {what}, found {follows!r}" if follows else f"ends before {what}")
        self._advance(self._position + 1)

    def values(self, closing: str) -> Iterator[None]:
        """Step from value to value of an array or object, to its closing bracket. The caller reads each value."""
        is_first = True
        while self.peek() != closing:
            if not is_first:
                self.expect(",", f"',' or '{closing}'")
            is_first = False
            yield
        self.expect(closing, closing)

    def array(self, key: str | None) -> Iterator[JsonItem]:
        """The elements of an array."""
        self.expect("[", "an array")
        for _ in self.values("]"):
            yield self.value(key)

    def value(self, key: str | None) -> JsonItem:
        """Decode the next value and step over it."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._position)
            except JSONDecodeError as error:
                is_cut = error.pos >= len(self._text) - NEAR_END or error.msg.startswith("Unterminated")
                if is_cut and self._fill():
                    continue
                raise self._error(error.msg, error.pos) from error
            except RecursionError as error:
                raise self._error("nested too deeply") from error
            # A number may go on in the text that has not been read yet.
            if self._text[end - 1] in '}]"' or end < len(self._text) - NEAR_END or not self._fill():
                break
        line, offset = self.line, self.offset
        self._advance(end)
        return JsonItem(self.path, line, offset, self.offset - offset, key, value)

    def end(self) -> None:
        """Make sure that nothing follows."""
        if follows := self.peek():
            raise self._error(f"expected the end of the file, found {follows!r}")

    def _advance(self, position: int) -> None:
        passed = self._text[self._position : position]
        self.line += passed.count("\n")
        self.offset += len(passed) if passed.isascii() else len(passed.encode())
        self._position = position

    def _fill(self) -> bool:
        """Read on; False at the end of the file."""
        rest = self._text[self._position :]
        content = self.file.read(max(CHUNK, len(rest)))
        try:
            text = self._decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            line = self.line + rest.count("\n") + error.object.count(b"\n", 0, error.start)
            raise DataError(f"{self.path}:{line}: not UTF-8: {error}") from error
        if not content:
            return False
        if self._at_begin and text.startswith("\ufeff"):
            text = text[1:]
            self.offset += 3
        self._at_begin = self._at_begin and not text
        self._text, self._position = rest + text, 0
        return True

    def _error(self, message: str, position: int | None = None) -> DataError:
        line = self.line + (self._text.count("\n", self._position, position) if position else 0)
        return DataError(f"{self.path}:{line}: not JSON: {message}")
