"""AMBER (existence, attributes and relations of objects): reading its published files, and the rules of its `inference.py`.

Wang et al., AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation, 2023 (arXiv 2311.07397),
files and script at github.com/junyangwang0410/AMBER. Only the discriminative records, yes/no questions with ids from 1005, are
scored here. The generative records ask for a description, whose nouns the script compares with spaCy and WordNet.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from vlm_calibration.benchmarks.files import Reply, in_order_of, read_records, reply, without_confidence
from vlm_calibration.benchmarks.official import OfficialCounts
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
"""Dimension, with which a category begins -> block that the script prints -> categories in the block."""


class AmberAnnotations(NamedTuple):
    """The annotations of one file: id -> query without image and question, and the ids of the generative records."""

    path: Path
    truths: dict[int, Query]
    generative: set[int]


def read_annotations(path: str | Path) -> AmberAnnotations:
    """Read AMBER's `annotations.json`.

    Raises:
        DataError: the file cannot be read, or a record has an unknown type, a truth other than yes and no, or a repeated id.
    """
    truths: dict[int, Query] = {}
    generative: set[int] = set()
    for record in read_records(path):
        number, kind = record.number("id"), record.text("type")
        if number in truths or number in generative:
            raise record.error(f"duplicate id {number}")
        if kind == GENERATIVE:
            generative.add(number)
            continue
        if kind not in CATEGORIES:
            kinds = ", ".join([GENERATIVE, *CATEGORIES])
            raise record.error(f"'type' must be one of {kinds}, found {kind!r}")
        truth = record.text("truth")
        if truth not in ("yes", "no"):
            raise record.error(f"'truth' must be yes or no, found {truth!r}")
        truths[number] = Query(str(number), "", "", truth.capitalize(), "yes_no", category=CATEGORIES[kind])
    return AmberAnnotations(Path(path), truths, generative)


def read_queries(path: str | Path, annotations: AmberAnnotations) -> tuple[list[Query], int]:
    """The discriminative questions of one of AMBER's `query_*.json`, and the number of generative ones.

    Raises:
        DataError: the file cannot be read, or an id is repeated or not in the annotations.
    """
    queries: dict[int, Query] = {}
    seen: set[int] = set()
    for record in read_records(path):
        number = record.number("id")
        if number in seen:
            raise record.error(f"duplicate id {number}")
        seen.add(number)
        if number in annotations.generative:
            continue
        if number not in annotations.truths:
            raise record.error(f"{number} is no id in {annotations.path}")
        queries[number] = replace(
            annotations.truths[number], image=record.text("image"), question=record.text("query")
        )
    return list(queries.values()), len(seen) - len(queries)


def read_answers(
    path: str | Path, annotations: AmberAnnotations, dimensions: Collection[str] = tuple(DIMENSIONS)
) -> tuple[list[Query], list[Reply], int, int]:
    """Read the answers to all questions of some dimensions, an array of `{id, response}`.

    Returns:
        The annotations of these questions, the answer to each, and how many answers are to generative records and to questions of
        other dimensions.

    Raises:
        DataError: the file cannot be read, or an answer is missing, repeated, has an unknown id or no text.
    """
    asked = {id_: q for id_, q in annotations.truths.items() if _dimension(q) in dimensions}
    if not asked:
        raise DataError(f"{annotations.path}: no question about {' or '.join(dimensions)}")
    replies: list[Reply] = []
    generative = others = 0
    unanswered = {_dimension(query) for query in asked.values()}
    for record in read_records(path):
        number = record.number("id")
        if number in annotations.generative:
            generative += 1
        elif number in annotations.truths and number not in asked:
            others += 1
        else:
            replies.append(reply(record, str(number), record.text("response")))
            if number in asked:
                unanswered.discard(_dimension(asked[number]))
    hint = ""
    if unanswered:
        hint = f"; none is about {' or '.join(sorted(unanswered))}: `--only` scores one dimension alone"
    queries = list(asked.values())
    ordered = in_order_of(replies, [query.id for query in queries], path, annotations.path, hint)
    return queries, ordered, generative, others


def _dimension(query: Query) -> str:
    return str(query.category).split("/", 1)[0]


class AmberCounts(OfficialCounts):
    """Counts with the script's rule and arithmetic; no is the positive class.

    Every denominator starts at 0.001, that of the attributes, a sum of three, at 0.003. Accuracy, precision and recall are
    rounded to one decimal of a percent. F1 is computed from the rounded values, with 0.0001 added to its denominator (0.001
    for existence, where every truth is no).
    """

    @staticmethod
    def response(text: str) -> str:
        """The answer if it is exactly "Yes" or "No"; any other, "Yes." and "no" included, counts as wrong."""
        return text if text in ("Yes", "No") else ""

    def scores(self, dimensions: Collection[str] | None = None) -> dict[str, float]:
        """Accuracy, precision, recall and F1 in percent, as the script prints them.

        Over all answers if no dimension is missing, and for each block with its name in front: `existence/accuracy`. `dimensions`
        are keys of `DIMENSIONS`; None: those with answers.
        """
        if dimensions is None:
            dimensions = {str(category).split("/", 1)[0] for category, _, _ in self.answers}
        scores: dict[str, float] = {}
        if set(dimensions) == set(DIMENSIONS):
            scores |= self._block([set(CATEGORIES.values())])
        for dimension, blocks in DIMENSIONS.items():
            for name, categories in blocks.items() if dimension in dimensions else ():
                block = self._block([{category} for category in categories], name == "existence")
                scores |= {f"{name}/{key}": value for key, value in block.items()}
        return scores

    def _block(self, parts: Sequence[Collection[str]], existence: bool = False) -> dict[str, float]:
        """The scores of the categories in all parts, of which the script counts each by itself."""

        def count(part: Collection[str], golds: Sequence[str], responses: Sequence[str]) -> int:
            return sum(self.answers[combination] for combination in product(part, golds, responses))

        def percent(correct: Sequence[str], golds: Sequence[str], responses: Sequence[str]) -> float:
            hits = sum(count(part, [gold], [gold]) for part in parts for gold in correct)
            denominator = 0.0
            for part in parts:
                denominator += _script_count(count(part, golds, responses))
            return round(hits / denominator * 100, 1)

        accuracy = percent(("Yes", "No"), ("Yes", "No"), ("Yes", "No", ""))
        precision = percent(("No",), ("Yes", "No"), ("No",))
        recall = percent(("No",), ("No",), ("Yes", "No", ""))
        p, r = precision / 100, recall / 100
        f1 = round(2 * p * r / (p + r + (0.001 if existence else 0.0001)) * 100, 1)
        return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}


def _script_count(n: int) -> float:
    """The script's counter after n steps from 0.001, rounding errors included."""
    count = 0.001
    for _ in range(n):
        count += 1
    return count


def official_answers(
    queries: Sequence[Query], replies: Sequence[tuple[str, float | None]]
) -> list[dict[str, Any]]:
    """The rows of an answer file for `inference.py`; `replies` are texts with confidences."""
    return [
        {"id": int(query.id), "response": without_confidence(text), "confidence": confidence}
        for query, (text, confidence) in zip(queries, replies, strict=True)
    ]
