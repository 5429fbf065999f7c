"""Answers to a benchmark in its own format, with a stated confidence where there is one, and whose answer each is.

The benchmarks' scripts know nothing of a stated confidence, which would change how they read an answer ("Confidence: 0.9.
No" is a yes to POPE). They are to be given the answer without it; what states no confidence reaches them untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vlm_calibration.benchmarks.files import Record, some
from vlm_calibration.records import DataError
from vlm_calibration.text.confidence import parse_confidence, strip_confidence


class Reply(NamedTuple):
    """An answer as it was given.

    where: its file and place, for messages. id: of the question; None: the place in the file says which.
    text: as generated. confidence: in [0, 1]; None where none was stated or could be read.
    """

    where: str
    id: str | None
    text: str
    confidence: float | None


def without_confidence(text: str) -> str:
    """What a benchmark's script is to see of an answer.

    A text that states no confidence is returned as it is, to the last blank. Of others the statement is taken out, and
    with it what set it off: blanks at both ends and full stops before it ("Yes. Confidence: 80%" becomes "Yes").
    """
    answer = strip_confidence(text)
    return text if answer == text.strip() else answer.rstrip(" .")


def reply(record: Record, identifier: str | None, text: str) -> Reply:
    """The answer of a record. A `confidence` in the record counts, else the one that the text states.

    Raises:
        DataError: the confidence is neither null nor a number in [0, 1].
    """
    if "confidence" not in record.data:
        return Reply(record.where, identifier, text, parse_confidence(text))
    value = record.data["confidence"]
    if value is None:
        return Reply(record.where, identifier, text, None)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise record.error(f"'confidence' must be a number in [0, 1] or null, found {value!r}")
    return Reply(record.where, identifier, text, float(value))


def in_order_of(
    replies: Sequence[Reply], ids: Sequence[str], answers: str | Path, questions: str | Path, hint: str = ""
) -> list[Reply]:
    """The answer to each of the questions.

    Args:
        replies: answers that all have an id, in any order. ids: of all questions.
        answers, questions: the files of both, for messages. hint: what to do where answers are missing.

    Raises:
        DataError: a question has no answer or several, or there is an answer to no question.
    """
    known = set(ids)
    found: dict[str, Reply] = {}
    for given in replies:
        assert given.id is not None
        if given.id in found:
            first = found[given.id].where
            raise DataError(f"{given.where}: a second answer to {given.id}, the first is at {first}")
        if given.id not in known:
            raise DataError(f"{given.where}: {given.id} is no id in {questions}")
        found[given.id] = given
    if missing := [i for i in ids if i not in found]:
        raise DataError(
            f"{answers}: no answer to {len(missing)} of the {len(ids)} questions in {questions}: {some(missing)}{hint}"
        )
    return [found[i] for i in ids]
