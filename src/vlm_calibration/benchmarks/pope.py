"""POPE ("is there a dog in the image?"): reading its published files, and the rule of its `evaluate.py`.

Li et al., arXiv 2305.10355; files and script at github.com/AoiDragon/POPE. POPEv2 (Li et al., arXiv 2508.04567) asks about
photographs and about copies of them with the object removed.
"""

import math
import re
from collections.abc import Sequence
from itertools import count, repeat
from pathlib import Path
from typing import Any

from vlm_calibration.benchmarks.files import (
    OfficialCounts,
    Record,
    Reply,
    in_order_of,
    read_records,
    reply,
    without_confidence,
)
from vlm_calibration.records import DataError, Query

_OBJECT = re.compile(r"is there an? (.+?) in the image", re.IGNORECASE)


def read_questions(path: str | Path) -> tuple[list[Query], bool]:
    """Read questions and labels: POPE's JSON lines, the arrays for A-OKVQA and GQA, or POPEv2's annotations.

    Returns the queries in the order of the file, with "" for an image or question that it lacks, and whether their ids are in the
    file; otherwise they are positions from 1. A DataError if it cannot be read, a label is neither yes nor no, or an id is repeated
    or missing in some records.
    """
    records = read_records(path)
    ids = _identifiers(records)
    queries: dict[str, Query] = {}
    for name, record in zip(ids or map(str, count(1)), records, strict=False):
        label = record.text("label")
        if label.strip().lower() not in ("yes", "no"):
            raise record.error(f"'label' must be yes or no, found {label!r}")
        if name in queries:
            first = records[list(queries).index(name)].where
            raise record.error(f"duplicate question_id {name}, first at {first}")
        # POPEv2 has other keys, and its image paths begin with a slash although they are relative to the data set's folder.
        keys = ("image_name", "query") if "image_name" in record.data else ("image", "text")
        image, question = (record.text(key) if key in record.data else "" for key in keys)
        objects = tuple(_OBJECT.findall(question)[:1])
        answer = label.strip().capitalize()
        queries[name] = Query(name, image.lstrip("/"), question, answer, "yes_no", objects)
    return list(queries.values()), ids is not None


def read_answers(path: str | Path, labels: str | Path) -> tuple[list[Query], list[Reply]]:
    """Read the questions of a file, and the answers to all of them: JSON lines with `question_id`, `question` and `answer`.

    If a file has no ids, answers and questions are matched by position, as `evaluate.py` does. A DataError if a file cannot be read,
    or an answer is missing, repeated, has an unknown id or no text.
    """
    queries, numbered = read_questions(labels)
    records = read_records(path)
    ids = _identifiers(records)
    replies = [reply(r, i, r.text("answer")) for i, r in zip(ids or repeat(None), records, strict=False)]
    if ids and numbered:
        return queries, in_order_of(replies, [query.id for query in queries], path, labels)
    if len(replies) != len(queries):
        raise DataError(f"{path}: {len(replies)} answers to the {len(queries)} questions in {labels}")
    rows = zip(records, replies, queries, strict=True)
    for position, (record, answer, asked) in enumerate(rows, start=1 if replies[0].id == "1" else 0):
        if ids and answer.id != str(position):
            raise record.error(f"{labels} has no ids: expected answer {position}, found {answer.id}")
        prompt = record.data.get("question")
        if isinstance(prompt, str) and prompt and _folded(asked.question) not in _folded(prompt):
            raise record.error(f"answers are matched in order, and the question here is {asked.question!r}")
    return queries, replies


class PopeCounts(OfficialCounts):
    """Counts with the rule and the arithmetic of `evaluate.py`; yes is the positive class."""

    @staticmethod
    def response(text: str) -> str:
        """No if "No", "not" or "no" is a word, between blanks and without commas, before the first full stop; otherwise yes.

        >>> [PopeCounts.response(text) for text in ("There is not a dog, no.", "NO", "Sure. No", "")]
        ['No', 'Yes', 'Yes', 'Yes']
        """
        words = text.split(".")[0].replace(",", "").split(" ")
        return "Yes" if {"No", "not", "no"}.isdisjoint(words) else "No"

    def scores(self) -> dict[str, float]:
        """The script's scores, as fractions; NaN where it would fail with a division by zero."""

        def ratio(part: float, whole: float) -> float:
            return part / whole if whole else math.nan

        def count(gold: str, response: str) -> int:
            return self.answers[None, gold, response]

        tp, fn, fp = count("Yes", "Yes"), count("Yes", "No"), count("No", "Yes")
        total = self.answers.total()
        precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
        return {
            "accuracy": ratio(tp + count("No", "No"), total),
            "precision": precision,
            "recall": recall,
            "f1": ratio(2 * precision * recall, precision + recall),
            "yes_ratio": ratio(tp + fp, total),
        }


def official_answers(
    queries: Sequence[Query], replies: Sequence[tuple[str, float | None]]
) -> list[dict[str, Any]]:
    """The rows of an answer file for `evaluate.py`; `replies` are texts with confidences."""
    rows = []
    for query, (text, confidence) in zip(queries, replies, strict=True):
        asked = {"question_id": _as_written(query.id), "question": query.question}
        rows.append({**asked, "answer": without_confidence(text), "confidence": confidence})
    return rows


def official_labels(queries: Sequence[Query]) -> list[dict[str, Any]]:
    """The rows of a label file for `evaluate.py`, which reads neither arrays nor labels such as "No"."""
    return [
        {"question_id": _as_written(q.id), "image": q.image, "text": q.question, "label": q.answer.lower()}
        for q in queries
    ]


def _identifiers(records: Sequence[Record]) -> list[str] | None:
    """The `question_id` of all records, None if they have none; an error if only some do."""
    unnumbered = [record for record in records if "question_id" not in record.data]
    if len(unnumbered) == len(records):
        return None
    if unnumbered:
        raise unnumbered[0].error("no 'question_id', which other records of the file have")
    return [record.identifier("question_id") for record in records]


def _as_written(identifier: str) -> int | str:
    return int(identifier) if re.fullmatch(r"0|[1-9]\d{0,17}", identifier, re.ASCII) else identifier


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
