"""Reading the files of published data sets record by record, and naming the place of what is wrong in them."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import ijson

from vlm_calibration.files import json_lines
from vlm_calibration.records import AnswerType, DataError, RecordError
from vlm_calibration.text.grading import parse_answer
from vlm_calibration.text.matching import match_key

Queries: TypeAlias = Callable[[], list[dict[str, Any]]]
"""Returns a record's queries as objects with the keys of a query, `image` the name of a file or its bytes; raises a `RecordError` for one
that cannot be asked. A missing key or a value of another type needs no check: see `explained`."""
Source: TypeAlias = Iterator[tuple[str, Queries]]
"""The place of each record, such as "FILE:7", and its queries."""


@dataclass(frozen=True)
class Output:
    """The file to write

    Attributes:
        out: file of queries to write, .jsonl; embedded images go to the folder OUT_images beside it
        images: folder that names of image files are relative to (default: the folder of OUT, to which their paths become relative)
        skip_bad: count bad records and leave them out instead of stopping at the first
        overwrite: replace an existing file
    """

    out: Path
    images: Path | None = None
    skip_bad: bool = False
    overwrite: bool = False


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn a `RecordError`, a missing key or a value of another type into a DataError that begins with the record's place."""
    try:
        yield
    except DataError:
        raise
    except KeyError as error:
        raise DataError(f"{where}: no key {error}") from error
    except RecordError as error:
        raise DataError(f"{where}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: not of this format: {error}") from error


def json_values(path: Path, prefix: str) -> Iterator[tuple[str, Any]]:
    """The place and value of all values in a JSON file at a prefix of ijson, such as "questions.item"; a DataError without any."""
    place, index = prefix.removesuffix("item").removesuffix("."), -1
    with _opened(path) as file:
        for index, value in enumerate(ijson.items(file, prefix, use_float=True)):
            yield f"{path}: {place}[{index}]", value
    if index < 0:
        raise DataError(f"{path}: no {place or 'record'} in this file")


def json_members(path: Path) -> Iterator[tuple[str, Any]]:
    """The keys and values of a file that is one JSON object; a DataError without any."""
    key = None
    with _opened(path) as file:
        for key, value in ijson.kvitems(file, "", use_float=True):
            yield key, value
    if key is None:
        raise DataError(f"{path}: expected an object of records")


def json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """The place and value of each record of a JSON array, or the place and undecoded bytes of each of JSON lines."""
    if (first := next(json_lines(path), None)) and first.content.lstrip().startswith(b"["):
        yield from json_values(path, "item")
    else:
        yield from ((line.where, line.content) for line in json_lines(path))


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file behind its byte order mark, if it has one."""
    try:
        with path.open("rb") as file:
            if file.read(3) != BOM_UTF8:
                file.seek(0)
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ijson.JSONError as error:
        raise DataError(f"{path}: not JSON: {' '.join(str(error).split())}") from error


AnswerTypeChoice = Literal["infer", "yes_no", "short", "open"]
"""An answer type for all answers of a source, or `infer`: see `infer_answer_type`."""

MIN_AGREEING = 3
"""Number of annotators from which VQA's metric counts an answer as fully correct (Antol et al., arXiv 1505.00468)."""

_FORMAT_REQUEST = (
    r"(?:please )?(?:give (?:a|an) |answer )(?:the question |short answer )?(?:with|using|in|by)"
    r"(?: only)? (?:a single|one|a) word(?: or (?:a )?(?:short )?phrase)?\.?"
)
_AT_END = re.compile(rf"(?:(?<=\s)|(?<=[.?!])){_FORMAT_REQUEST}\s*\Z", re.IGNORECASE)
_AT_BEGIN = re.compile(rf"\A\s*{_FORMAT_REQUEST}(?:(?<=\.)\s+|\s*\n\s*)(?=\S)", re.IGNORECASE)
_YES_NO = re.compile(r"\s*(?:yes|no)\s*(?:[.,;:!—–-]|\Z)", re.IGNORECASE)


def strip_format_request(question: str) -> str:
    """Remove LLaVA-1.5's "Answer the question using a single word or phrase." from either end of a question.

    Requests that the answer depends on, such as "Answer with the option's letter from the given choices directly.", stay.
    """
    return _AT_BEGIN.sub("", _AT_END.sub("", question)).strip() or question.strip()


def infer_answer_type(answer: str) -> AnswerType:
    """The type by form: "yes_no" for yes or no, explained or not; "short" up to four words; else "open"."""
    if _YES_NO.match(answer) and parse_answer(answer, "yes_no") is not None:
        return "yes_no"
    return "short" if len(answer.split()) <= 4 else "open"


def combine_answers(answers: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The gold answer of a question with several answers, and the other correct ones.

    Fewer than ten are variants that are all correct, the first is the gold answer. Ten or more are those of annotators, as in VQAv2:
    the most frequent is the gold answer, and others count if at least `MIN_AGREEING` annotators give them.
    RecordError if there is no answer.
    """
    if not (given := [answer.strip() for answer in answers if answer and answer.strip()]):
        raise RecordError("the list of answers is empty")
    if len(answers) < 10:
        return given[0], tuple(dict.fromkeys(a for a in given[1:] if match_key(a) != match_key(given[0])))
    gold = Counter(given).most_common(1)[0][0]
    return gold, agreed_answers(given, gold)


def agreed_answers(answers: Sequence[str], gold: str) -> tuple[str, ...]:
    """The answers of annotators, other than the gold answer, that at least `MIN_AGREEING` of them give."""
    counts = Counter(answers)
    return tuple(a for a, n in counts.items() if n >= MIN_AGREEING and match_key(a) != match_key(gold))
