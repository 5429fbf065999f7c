"""AMBER (existence, attributes and relations of objects): reading its published files, and the rules of its `inference.py`.

Wang et al., arXiv 2311.07397; files and script at github.com/junyangwang0410/AMBER. Only the discriminative records, yes/no
questions, are scored here; for the others, descriptions, the script compares nouns with spaCy and WordNet.
"""

import operator
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import reduce
from itertools import product, repeat
from pathlib import Path
from typing import Any

from vlm_calibration.benchmarks.files import (
    OfficialCounts,
    Reply,
    in_order_of,
    read_records,
    reply,
    without_confidence,
)
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

DIMENSIONS = ("existence", "attribute", "relation")  # a category is in the dimension with which it begins


def read_annotations(path: str | Path) -> dict[int, Query | None]:
    """Read AMBER's `annotations.json`: id -> query without image and question; None for a generative record.

    A DataError if the file cannot be read, or a record has an unknown type, a truth other than yes and no, or a repeated id.
    """
    truths: dict[int, Query | None] = {}
    for record in read_records(path):
        number, kind = record.number("id"), record.text("type")
        if number in truths:
            raise record.error(f"duplicate id {number}")
        if kind == GENERATIVE:
            truths[number] = None
            continue
        if kind not in CATEGORIES:
            kinds = ", ".join([GENERATIVE, *CATEGORIES])
            raise record.error(f"'type' must be one of {kinds}, found {kind!r}")
        if (truth := record.text("truth")) not in ("yes", "no"):
            raise record.error(f"'truth' must be yes or no, found {truth!r}")
        truths[number] = Query(str(number), "", "", truth.capitalize(), "yes_no", category=CATEGORIES[kind])
    return truths


def read_queries(path: str | Path, annotations: str | Path) -> tuple[list[Query], int]:
    """The discriminative questions of one of AMBER's `query_*.json`, and the number of generative ones.

    A DataError if a file cannot be read, or an id is repeated or not in the annotations.
    """
    truths = read_annotations(annotations)
    queries: dict[int, Query | None] = {}
    for record in read_records(path):
        if (number := record.number("id")) in queries:
            raise record.error(f"duplicate id {number}")
        if number not in truths:
            raise record.error(f"{number} is no id in {annotations}")
        query = truths[number]
        queries[number] = query and replace(query, image=record.text("image"), question=record.text("query"))
    discriminative = [query for query in queries.values() if query]
    return discriminative, len(queries) - len(discriminative)


def read_answers(
    path: str | Path, annotations: str | Path, dimensions: Collection[str] = DIMENSIONS
) -> tuple[list[Query], list[Reply], int, int]:
    """Read the answers to all questions of some dimensions, an array of `{id, response}`.

    Returns these questions' annotations, the answer to each, and how many answers are to generative records and to questions of
    other dimensions. A DataError if a file cannot be read, or an answer is missing, repeated, has an unknown id or no text.
    """
    truths = read_annotations(annotations)
    asked = {number: q for number, q in truths.items() if q and _dimension(q.category) in dimensions}
    if not asked:
        raise DataError(f"{annotations}: no question about {' or '.join(dimensions)}")
    replies: list[Reply] = []
    generative = others = 0
    for record in read_records(path):
        number = record.number("id")
        if number in truths and number not in asked:
            generative += truths[number] is None
            others += truths[number] is not None
        else:
            replies.append(reply(record, str(number), record.text("response")))
    queries, answered = list(asked.values()), {answer.id for answer in replies}
    unanswered = {_dimension(q.category) for q in queries}
    unanswered -= {_dimension(q.category) for q in queries if q.id in answered}
    hint = f"; none is about {' or '.join(sorted(unanswered))}: `--only` scores one dimension alone"
    ids = [query.id for query in queries]
    ordered = in_order_of(replies, ids, path, annotations, hint if unanswered else "")
    return queries, ordered, generative, others


def _dimension(category: str | None) -> str:
    return str(category).split("/", 1)[0]


class AmberCounts(OfficialCounts):
    """Counts with the script's rule and arithmetic; no is the positive class.

    Every denominator starts at 0.001, that of the attributes, a sum of three, at 0.003. Accuracy, precision and recall have one
    decimal of a percent; F1 is that of the rounded values, with 0.0001 (existence: 0.001) added to its denominator.
    """

    @staticmethod
    def response(text: str) -> str:
        """The answer if it is exactly "Yes" or "No"; any other, "Yes." and "no" included, counts as wrong."""
        return text if text in ("Yes", "No") else ""

    def scores(self, dimensions: Collection[str] | None = None) -> dict[str, float]:
        """Accuracy, precision, recall and F1 in percent, as the script prints them, by default of the `dimensions` with answers.

        Over all answers if no dimension is missing, and for each block: `existence/accuracy`.
        """
        if dimensions is None:
            dimensions = {_dimension(category) for category, _, _ in self.answers}
        scores: dict[str, float] = {}
        if set(dimensions) == set(DIMENSIONS):
            scores |= self._block([set(CATEGORIES.values())])
        for dimension in DIMENSIONS:
            if dimension in dimensions:
                categories = [c for c in dict.fromkeys(CATEGORIES.values()) if _dimension(c) == dimension]
                blocks = {dimension: categories, **{c.rpartition("/")[2]: [c] for c in categories}}
                for name, parts in blocks.items():
                    block = self._block([{category} for category in parts], name == "existence")
                    scores |= {f"{name}/{key}": value for key, value in block.items()}
        return scores

    def _block(self, parts: Sequence[Collection[str]], existence: bool = False) -> dict[str, float]:
        """The scores of the categories in all parts, of which the script counts each by itself."""

        def count(golds: Sequence[str], responses: Sequence[str]) -> list[int]:
            return [sum(self.answers[key] for key in product(part, golds, responses)) for part in parts]

        hits = sum(count(["No"], ["No"]))
        accuracy = _percent(hits + sum(count(["Yes"], ["Yes"])), count(["Yes", "No"], ["Yes", "No", ""]))
        precision = _percent(hits, count(["Yes", "No"], ["No"]))
        recall = _percent(hits, count(["No"], ["Yes", "No", ""]))
        p, r = precision / 100, recall / 100
        f1 = round(2 * p * r / (p + r + (0.001 if existence else 0.0001)) * 100, 1)
        return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}


def _percent(hits: int, counts: Sequence[int]) -> float:
    """The script's percentage; its counters go up from 0.001 in steps of 1, with rounding errors, and are added."""
    # Not `sum`, which compensates rounding errors.
    counters = (reduce(operator.add, repeat(1, n), 0.001) for n in counts)
    return round(hits / reduce(operator.add, counters) * 100, 1)


def official_answers(
    queries: Sequence[Query], replies: Sequence[tuple[str, float | None]]
) -> list[dict[str, Any]]:
    """The rows of an answer file for `inference.py`; `replies` are texts with confidences."""
    return [
        {"id": int(query.id), "response": without_confidence(text), "confidence": confidence}
        for query, (text, confidence) in zip(queries, replies, strict=True)
    ]
