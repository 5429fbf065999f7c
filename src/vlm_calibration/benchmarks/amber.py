"""AMBER (existence, attributes and relations of objects): reading its published files, and the rules of its script.

Wang et al., AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation, 2023 (arXiv 2311.07397),
files and script at github.com/junyangwang0410/AMBER.

Only the discriminative records, yes/no questions with ids from 1005, are scored here. The generative records ask for a
description, whose nouns the script compares with spaCy and WordNet; they are counted and skipped.

The script `inference.py` accepts the answers "Yes" and "No". Any other answer, "Yes." and "no" included, counts as wrong.
No is the positive class. `AmberCounts` describes the script's arithmetic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vlm_calibration.benchmarks.files import Reply, in_order_of, read_records, reply, without_confidence
from vlm_calibration.records import DataError, Query

CATEGORIES = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute/state",
    "discriminative-attribute-number": "attribute/number",
    "discriminative-attribute-action": "attribute/action",
    "discriminative-relation": "relation",
    # The label of relations that do not hold.
    "relation": "relation",
}
"""Type in the annotations -> category of the query."""

GENERATIVE = "generative"
GENERATIVE_NOTE = (
    "{n} generative records (descriptions) are left out: AMBER's own script scores them, with spaCy and NLTK"
)
SCORES = ("accuracy", "precision", "recall", "f1")
"""The scores that the script prints, in percent with one decimal."""

DIMENSIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "existence": {"existence": ("existence",)},
    "attribute": {
        "attribute": ("attribute/state", "attribute/number", "attribute/action"),
        "state": ("attribute/state",),
        "number": ("attribute/number",),
        "action": ("attribute/action",),
    },
    "relation": {"relation": ("relation",)},
}
"""Dimension -> block that the script prints -> categories in the block."""


def dimension_of(category: str) -> str:
    """The key of `DIMENSIONS` that a category belongs to."""
    return category.split("/", 1)[0]


class AmberQuestion(NamedTuple):
    """A record of a query file.

    Attributes:
        where: file and position, for messages.
        id: id of the question.
        image: path below the image folder.
        question: the text.
    """

    where: str
    id: int
    image: str
    question: str


class AmberTruth(NamedTuple):
    """An annotation.

    Attributes:
        id: id of the question.
        category: a value of `CATEGORIES`.
        truth: the correct answer.
    """

    id: int
    category: str
    truth: Literal["yes", "no"]

    def query(self, question: AmberQuestion | None = None) -> Query:
        """Convert to a `Query`, with empty image and question if no question is given."""
        _, _, image, text = question or ("", self.id, "", "")
        return Query(str(self.id), image, text, self.truth.capitalize(), "yes_no", category=self.category)


class AmberAnnotations(NamedTuple):
    """The annotations of one file.

    Attributes:
        path: the file.
        truths: id -> annotation, in the order of the file.
        generative: ids of the generative records.
    """

    path: Path
    truths: dict[int, AmberTruth]
    generative: set[int]


class AmberAnswers(NamedTuple):
    """The answers of one file.

    Attributes:
        truths: the annotations that are scored.
        replies: the answer to each of `truths`.
        generative: number of answers to generative records.
        others: number of answers to questions of other dimensions.
    """

    truths: list[AmberTruth]
    replies: list[Reply]
    generative: int
    others: int


def read_annotations(path: str | Path) -> AmberAnnotations:
    """Read AMBER's `annotations.json`.

    Raises:
        DataError: the file cannot be read, or a record has an unknown type, a truth other than yes and no, or a repeated id.
    """
    truths: dict[int, AmberTruth] = {}
    generative: set[int] = set()
    for record in read_records(path):
        number, kind = record.number("id"), record.text("type")
        if number in truths or number in generative:
            raise record.error(f"duplicate id {number}")
        if kind == GENERATIVE:
            generative.add(number)
            continue
        if kind not in CATEGORIES:
            raise record.error(
                f"'type' must be one of {', '.join([GENERATIVE, *CATEGORIES])}, found {kind!r}"
            )
        truth = record.text("truth")
        if truth not in ("yes", "no"):
            raise record.error(f"'truth' must be yes or no, found {truth!r}")
        truths[number] = AmberTruth(number, CATEGORIES[kind], "yes" if truth == "yes" else "no")
    return AmberAnnotations(Path(path), truths, generative)


def read_queries(path: str | Path) -> list[AmberQuestion]:
    """Read one of AMBER's `query_*.json`, generative records included.

    Raises:
        DataError: the file cannot be read, or an id is repeated.
    """
    questions: dict[int, AmberQuestion] = {}
    for record in read_records(path):
        number = record.number("id")
        if number in questions:
            raise record.error(f"duplicate id {number}, first at {questions[number].where}")
        questions[number] = AmberQuestion(record.where, number, record.text("image"), record.text("query"))
    return list(questions.values())


def read_answers(
    path: str | Path, annotations: AmberAnnotations, dimensions: Collection[str] = tuple(DIMENSIONS)
) -> AmberAnswers:
    """Read the answers to all questions of some dimensions, an array of `{id, response}`.

    Raises:
        DataError: the file cannot be read, or an answer is missing, repeated, has an unknown id or no text.
    """
    truths = [truth for truth in annotations.truths.values() if dimension_of(truth.category) in dimensions]
    if not truths:
        raise DataError(f"{annotations.path}: no question about {' or '.join(dimensions)}")
    answers: list[Reply] = []
    generative = others = 0
    scored = {truth.id for truth in truths}
    for record in read_records(path):
        number = record.number("id")
        if number in annotations.generative:
            generative += 1
        elif number in annotations.truths and number not in scored:
            others += 1
        else:
            answers.append(reply(record, str(number), record.text("response")))
    asked = {str(truth.id): dimension_of(truth.category) for truth in truths}
    unanswered = set(asked.values()) - {asked[answer.id] for answer in answers if answer.id in asked}
    hint = ""
    if unanswered:
        hint = f"; none is about {' or '.join(sorted(unanswered))}: `--only` scores one dimension alone"
    replies = in_order_of(answers, list(asked), path, annotations.path, hint)
    return AmberAnswers(truths, replies, generative, others)


@dataclass(frozen=True)
class AmberCounts:
    """Counts of answers, with the script's arithmetic.

    Every denominator starts at 0.001, that of the attributes, a sum of three, at 0.003. Accuracy, precision and recall are
    rounded to one decimal of a percent. F1 is computed from the rounded values, with 0.0001 added to its denominator (0.001
    for existence, where every truth is no).

    Args:
        answers: number of answers by category, truth ("yes" or "no") and response ("Yes", "No", "" for any other).
    """

    answers: Counter[tuple[str, str, str]]

    def __add__(self, other: AmberCounts) -> AmberCounts:
        """The counts of both sets of answers."""
        return AmberCounts(self.answers + other.answers)

    def scores(self, dimensions: Collection[str] | None = None) -> dict[str, float]:
        """`SCORES` in percent, as the script prints them.

        Args:
            dimensions: keys of `DIMENSIONS`; None: those with answers.

        Returns:
            The scores over all answers if no dimension is missing, and the scores of each block with its name in front:
            `existence/accuracy`.
        """
        if dimensions is None:
            dimensions = {dimension_of(category) for category, _, _ in self.answers}
        scores: dict[str, float] = {}
        if set(dimensions) == set(DIMENSIONS):
            scores |= self._block([CATEGORIES.values()])
        for dimension, blocks in DIMENSIONS.items():
            for name, categories in blocks.items() if dimension in dimensions else ():
                block = self._block([[category] for category in categories], name == "existence")
                scores |= {f"{name}/{key}": value for key, value in block.items()}
        return scores

    def _block(self, parts: Sequence[Collection[str]], existence: bool = False) -> dict[str, float]:
        """The scores of the categories in all parts, of which the script counts each by itself."""

        def count(part: Collection[str], counted: Callable[[str, str], bool]) -> int:
            return sum(n for (c, *said), n in self.answers.items() if c in part and counted(*said))

        def percent(correct: Callable[[str, str], bool], counted: Callable[[str, str], bool]) -> float:
            denominator = 0.0
            for part in parts:
                denominator += _script_count(count(part, counted))
            return round(sum(count(part, correct) for part in parts) / denominator * 100, 1)

        def correct_no(truth: str, response: str) -> bool:
            return truth == "no" and response == "No"

        accuracy = percent(lambda truth, response: response.lower() == truth, lambda truth, response: True)
        precision = percent(correct_no, lambda truth, response: response == "No")
        recall = percent(correct_no, lambda truth, response: truth == "no")
        p, r = precision / 100, recall / 100
        f1 = round(2 * p * r / (p + r + (0.001 if existence else 0.0001)) * 100, 1)
        return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}


def _script_count(n: int) -> float:
    """The script's counter after n steps from 0.001, rounding errors included."""
    count = 0.001
    for _ in range(n):
        count += 1
    return count


def count_answers(truths: Sequence[AmberTruth], texts: Sequence[str]) -> AmberCounts:
    """Score the answers by the rule of `inference.py`, without their stated confidence."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for (_, category, truth), text in zip(truths, texts, strict=True):
        response = without_confidence(text)
        counts[category, truth, response if response in ("Yes", "No") else ""] += 1
    return AmberCounts(counts)


def official_answers(
    truths: Sequence[AmberTruth], replies: Sequence[tuple[str, float | None]]
) -> list[dict[str, Any]]:
    """The rows of an answer file for `inference.py`; `replies` are texts with confidences."""
    return [
        {"id": truth.id, "response": without_confidence(text), "confidence": confidence}
        for truth, (text, confidence) in zip(truths, replies, strict=True)
    ]
