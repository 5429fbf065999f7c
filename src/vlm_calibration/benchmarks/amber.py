"""AMBER (existence, attributes and relations of objects): its files as they are published, and the rules of its script.

Wang et al., AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation, 2023 (arXiv 2311.07397),
files and script at github.com/junyangwang0410/AMBER.

Of its records only the discriminative ones, yes/no questions with ids from 1005, are scored here. The generative ones ask
for a description whose nouns the script compares with spaCy and WordNet; they are known, counted and left to it.

The script `inference.py` takes "Yes" and "No" for answers. Anything else, "Yes." and "no" included, is wrong and counts.
No is the positive class. Its other habits are in `AmberCounts`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vlm_calibration.benchmarks.answers import Reply, in_order_of, reply, without_confidence
from vlm_calibration.benchmarks.files import read_records
from vlm_calibration.records import DataError, Query

CATEGORIES = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute/state",
    "discriminative-attribute-number": "attribute/number",
    "discriminative-attribute-action": "attribute/action",
    "discriminative-relation": "relation",
    # So the relations are labelled that do not hold.
    "relation": "relation",
}
"""Type in the annotations -> what results are broken down by."""

GENERATIVE = "generative"
GENERATIVE_NOTE = (
    "{n} generative records (descriptions) are left out: AMBER's own script scores them, with spaCy and NLTK"
)
SCORES = ("accuracy", "precision", "recall", "f1")
"""What the script prints, in percent with one decimal."""

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
"""Dimension -> the blocks that the script prints for it -> the categories in each."""

F1, EXISTENCE_F1 = 0.0001, 0.001
"""What is added to the denominator of F1."""


def dimension_of(category: str) -> str:
    """The key of `DIMENSIONS` that a category belongs to."""
    return category.split("/", 1)[0]


class AmberTruth(NamedTuple):
    """An annotation: the question's category, a value of `CATEGORIES`, and its right answer."""

    id: int
    category: str
    truth: Literal["yes", "no"]

    def query(self, question: AmberQuestion | None = None) -> Query:
        """As a query; without a text and an image where the question is not known."""
        _, _, image, text = question or ("", self.id, "", "")
        return Query(str(self.id), image, text, self.truth.capitalize(), "yes_no", category=self.category)


@dataclass(frozen=True)
class AmberAnnotations:
    """The annotations of one file by id, and the ids of its generative records."""

    path: Path
    truths: dict[int, AmberTruth]
    generative: frozenset[int]

    def of(self, dimensions: Collection[str]) -> list[AmberTruth]:
        """Those of some dimensions, in the order of the file."""
        return [truth for truth in self.truths.values() if dimension_of(truth.category) in dimensions]


class AmberQuestion(NamedTuple):
    """A record of a query file. where: its file and place. image: path below the image folder."""

    where: str
    id: int
    image: str
    question: str


class AmberAnswers(NamedTuple):
    """Answers in the order of the annotations that they were asked of, and how many others the file holds."""

    truths: list[AmberTruth]
    replies: list[Reply]
    generative: int
    others: int


def read_annotations(path: str | Path) -> AmberAnnotations:
    """AMBER's `annotations.json`.

    Raises:
        DataError: it cannot be read, or a record has an unknown type, a truth other than yes and no, or a known id.
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
    return AmberAnnotations(Path(path), truths, frozenset(generative))


def read_queries(path: str | Path) -> list[AmberQuestion]:
    """One of AMBER's `query_*.json`, generative records included.

    Raises:
        DataError: it cannot be read, or an id is there twice.
    """
    questions: dict[int, AmberQuestion] = {}
    for record in read_records(path):
        question = AmberQuestion(
            record.where, record.number("id"), record.text("image"), record.text("query")
        )
        if question.id in questions:
            raise record.error(f"duplicate id {question.id}, first at {questions[question.id].where}")
        questions[question.id] = question
    return list(questions.values())


def read_answers(
    path: str | Path, annotations: AmberAnnotations, dimensions: Collection[str] = tuple(DIMENSIONS)
) -> AmberAnswers:
    """The answers to all questions of some dimensions, from an array of `{id, response}`.

    Raises:
        DataError: the file cannot be read, or an answer is missing, doubled, of no question or no text.
    """
    wanted = annotations.of(dimensions)
    if not wanted:
        raise DataError(f"{annotations.path}: no question about {' or '.join(dimensions)}")
    ours: list[Reply] = []
    generative = others = 0
    scored = {truth.id for truth in wanted}
    for record in read_records(path):
        number = record.number("id")
        if number in annotations.generative:
            generative += 1
        elif number in annotations.truths and number not in scored:
            others += 1
        else:
            ours.append(reply(record, str(number), record.text("response")))
    answered = {given.id for given in ours}
    silent = {dimension_of(t.category) for t in wanted} - {
        dimension_of(t.category) for t in wanted if str(t.id) in answered
    }
    hint = (
        f"; none is about {' or '.join(sorted(silent))}: `--only` scores one dimension alone"
        if silent
        else ""
    )
    replies = in_order_of(ours, [str(truth.id) for truth in wanted], path, annotations.path, hint)
    return AmberAnswers(wanted, replies, generative, others)


@dataclass(frozen=True)
class CategoryCounts:
    """Answers of one category: all, the right ones, those to a no, those that say no, and those that say so rightly."""

    n: int = 0
    right: int = 0
    truth_no: int = 0
    said_no: int = 0
    right_no: int = 0

    def __add__(self, other: CategoryCounts) -> CategoryCounts:
        """The counts of both sets of answers."""
        return CategoryCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class AmberCounts:
    """Answers by category, with the script's arithmetic.

    Every denominator starts at 0.001, that of the attributes, a sum of three, at 0.003. Accuracy, precision and recall are
    rounded to one decimal of a percent, and F1 is computed from the rounded ones, with 0.0001 in its denominator and 0.001
    for existence, where every truth is a no.
    """

    categories: Mapping[str, CategoryCounts]

    def __add__(self, other: AmberCounts) -> AmberCounts:
        """The counts of both sets of answers."""
        names = dict.fromkeys([*self.categories, *other.categories])
        return AmberCounts({name: self._of(name) + other._of(name) for name in names})

    def _of(self, category: str) -> CategoryCounts:
        return self.categories.get(category, CategoryCounts())

    def scores(self, dimensions: Collection[str] | None = None) -> dict[str, float]:
        """`SCORES` in percent, as the script prints them for some dimensions, by default those with answers.

        Returns:
            those over all answers by their own names if no dimension is missing, then those of each block of the
            dimensions with its name in front: `existence/accuracy`.
        """
        if dimensions is None:
            dimensions = {dimension_of(category) for category in self.categories}
        found: dict[str, float] = {}
        if set(dimensions) == set(DIMENSIONS):
            found |= _block([sum(self.categories.values(), start=CategoryCounts())])
        for dimension, blocks in DIMENSIONS.items():
            for name, parts in blocks.items() if dimension in dimensions else ():
                scores = _block(
                    [self._of(part) for part in parts], EXISTENCE_F1 if name == "existence" else F1
                )
                found |= {f"{name}/{key}": value for key, value in scores.items()}
        return found


def count_answers(truths: Sequence[AmberTruth], texts: Sequence[str]) -> AmberCounts:
    """Judge the answers by the rule of `inference.py`, each without the confidence that it states."""
    found: dict[str, CategoryCounts] = {}
    for (_, category, truth), text in zip(truths, texts, strict=True):
        response = without_confidence(text)
        no, said_no = truth == "no", response == "No"
        right = said_no if no else response == "Yes"
        counted = CategoryCounts(1, int(right), int(no), int(said_no), int(no and said_no))
        found[category] = found.get(category, CategoryCounts()) + counted
    return AmberCounts(found)


def official_answers(
    truths: Sequence[AmberTruth], replies: Sequence[tuple[str, float | None]]
) -> list[dict[str, Any]]:
    """The array of an answer file that `inference.py` scores as we do; replies are texts with confidences."""
    return [
        {"id": truth.id, "response": without_confidence(text), "confidence": confidence}
        for truth, (text, confidence) in zip(truths, replies, strict=True)
    ]


def _block(parts: Sequence[CategoryCounts], smoothing: float = F1) -> dict[str, float]:
    accuracy = _percent(sum(p.right for p in parts), [p.n for p in parts])
    precision = _percent(sum(p.right_no for p in parts), [p.said_no for p in parts])
    recall = _percent(sum(p.right_no for p in parts), [p.truth_no for p in parts])
    p, r = precision / 100, recall / 100
    f1 = round(2 * p * r / (p + r + smoothing) * 100, 1)
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}


def _percent(part: int, wholes: Sequence[int]) -> float:
    denominator = 0.0
    for whole in wholes:
        denominator += _counted(whole)
    return round(part / denominator * 100, 1)


def _counted(n: int) -> float:
    """What the script holds after counting to n from 0.001, rounding errors included."""
    count = 0.001
    for _ in range(n):
        count += 1
    return count
