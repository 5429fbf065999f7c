"""What a query source holds, as counts and as rows of a table; nothing is trained."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.files import MAX_NAMED, name_some
from vlm_calibration.perturbation.images import ImageError
from vlm_calibration.records import SMALL_BOX, DataError
from vlm_calibration.text.grading import parse_answer

MAX_VALUES = 8
"""Values that a line of the table names at most."""


@dataclass
class Inspection:
    """Counts over the queries of a source, and over the images that were opened.

    Attributes:
        queries: number of usable queries.
        answers: answer type -> how often each gold answer occurs; for open answers, how often each number of words.
        categories: how often each category occurs.
        with_evidence: number of queries with a region of their key object.
        absent: ids of queries about an absent object.
        unlocated: ids of queries that need a region and have none.
        opened: number of images that were opened.
        sizes: (width, height) of the opened images.
        shares: the share of each opened image that its evidence covers, in [0, 1].
        clipped: ids of queries whose region leaves the opened image.
        bad: one message for each record that cannot be used.
        unloadable: what cannot be loaded -> the message about it: `image_id` of a broken image, or id of a query with wrong regions.
    """

    queries: int = 0
    answers: dict[str, Counter[str]] = field(default_factory=dict)
    categories: Counter[str] = field(default_factory=Counter)
    with_evidence: int = 0
    absent: list[str] = field(default_factory=list)
    unlocated: list[str] = field(default_factory=list)
    opened: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    clipped: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    unloadable: dict[str, str] = field(default_factory=dict)


def inspect_source(source: QuerySource, sample: int) -> Inspection:
    """Count all queries of a source, and open the images of `sample` of them, spread evenly.

    Bad records are collected if the source can skip them.

    Raises:
        DataError: the source cannot be read at all, or has no usable query.
    """
    inspection = Inspection()
    source.on_bad_record = "skip"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            queries = source.queries()
        except DataError as error:
            first = "; ".join(getattr(getattr(source, "bad", None), "messages", [])[:MAX_NAMED])
            if not first:
                raise
            raise DataError(f"{error}: {first}") from error
    inspection.bad = list(getattr(getattr(source, "bad", None), "messages", []))
    inspection.queries = len(queries)
    for query in queries:
        answer = {
            "yes_no": parse_answer(query.answer, query.answer_type),
            "short": query.answer,
            "open": str(len(query.answer.split())),
        }[query.answer_type]
        inspection.answers.setdefault(query.answer_type, Counter())[str(answer)] += 1
        if query.category is not None:
            inspection.categories[query.category] += 1
        presence = source.presence(query)
        inspection.with_evidence += presence == "present"
        if presence != "present":
            (inspection.absent if presence == "absent" else inspection.unlocated).append(query.id)
    chosen = np.unique(np.linspace(0, len(queries) - 1, min(sample, len(queries))).round().astype(int))
    for query in (queries[index] for index in chosen.tolist()):
        inspection.opened += 1
        try:
            loaded = source.load(query)
        except DataError as error:
            culprit = source.image_id(query) if isinstance(error.__cause__, ImageError) else query.id
            inspection.unloadable.setdefault(culprit, str(error))
            continue
        if loaded.clipped:
            inspection.clipped.append(query.id)
        height, width = loaded.image.shape[:2]
        inspection.sizes.append((width, height))
        if loaded.evidence:
            inspection.shares.append(float(np.logical_or.reduce(loaded.evidence).mean()))
    return inspection


def table_rows(inspection: Inspection) -> Iterator[tuple[str, str]]:
    """The rows of the table: a heading and its text."""

    def named(ids: list[str]) -> str:
        return f"{len(ids)}: {name_some(ids, len(ids))}"

    yield "queries", str(inspection.queries)
    for kind, answers in inspection.answers.items():
        total = sum(answers.values())
        if kind == "open":
            words = np.repeat([int(n) for n in answers], list(answers.values()))
            yield "open answers", f"{total}: median {np.median(words):.0f} words, at most {words.max()}"
        else:
            yield f"{kind} answers", f"{total}: {_most_common(answers, 'other answers', total)}"
    if inspection.categories:
        yield "categories", _most_common(inspection.categories, "others")
    yield "with a region of their object", f"{inspection.with_evidence / max(1, inspection.queries):.1%}"
    if inspection.absent:
        yield "about an absent object", named(inspection.absent)
    if inspection.unlocated:
        yield "without a region, and stay untouched", named(inspection.unlocated)
    if inspection.sizes:
        widths, heights = zip(*inspection.sizes, strict=True)
        yield (
            f"image sizes ({inspection.opened} opened)",
            f"{min(widths)}..{max(widths)} x {min(heights)}..{max(heights)}, "
            f"median {np.median(widths):.0f} x {np.median(heights):.0f}",
        )
    if inspection.shares:
        low, middle, high = np.quantile(inspection.shares, (0.1, 0.5, 0.9))
        yield "regions' share of the image", f"median {middle:.1%}, 80% within {low:.1%} to {high:.1%}"
    if inspection.clipped:
        of_opened = f"{len(inspection.clipped)} of {inspection.opened} opened"
        names = name_some(inspection.clipped, len(inspection.clipped))
        yield "with a region that leaves the image", f"{of_opened}: {names}"
    yield "bad records", str(len(inspection.bad))
    if small := sum(SMALL_BOX in message for message in inspection.bad):
        yield f"with a box that {SMALL_BOX}", f"{small} of the bad records"
    if inspection.unloadable:
        yield "images or regions that cannot be loaded", str(len(inspection.unloadable))


def _most_common(counter: Counter[str], others: str, total: int | None = None) -> str:
    """The most frequent values with their counts, or shares of a total, and how many values are not among them."""
    parts = [
        f"{value if len(value) <= 30 else f'{value[:27]}...'} {count if total is None else f'{count / total:.1%}'}"
        for value, count in counter.most_common(MAX_VALUES)
    ]
    if len(counter) > MAX_VALUES:
        parts.append(f"{len(counter) - MAX_VALUES} {others}")
    return ", ".join(parts)
