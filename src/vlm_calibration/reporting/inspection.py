"""What a query source holds, as rows of a table; nothing is trained."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from vlm_calibration.data.sources.base import BadRecords, QuerySource
from vlm_calibration.files import MAX_NAMED, name_some
from vlm_calibration.perturbation.images import ImageError
from vlm_calibration.records import SMALL_BOX, DataError, Query
from vlm_calibration.text.grading import parse_answer

MAX_VALUES = 8  # values that a line of the table names


def inspect_source(
    source: QuerySource, sample: int
) -> tuple[list[tuple[str, str]], list[str], dict[str, str]]:
    """Count all queries of a source, and open the images of `sample` of them, spread evenly.

    Returns the table's rows of heading and text; a message for each record that cannot be used; and `image_id` of a broken image, or id
    of a query with wrong regions -> the message about it.

    Bad records are collected if the source can skip them. A source that cannot be read, or has no usable query, is a DataError.
    """
    source.on_bad_record = "skip"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            queries = source.queries()
        except DataError as error:
            if first := "; ".join(_bad(source)[:MAX_NAMED]):
                raise DataError(f"{error}: {first}") from error
            raise
    bad, unloadable = _bad(source), dict[str, str]()
    chosen = np.unique(np.linspace(0, len(queries) - 1, min(sample, len(queries))).round().astype(int))
    rows = [*_query_rows(source, queries), *_image_rows(source, [queries[i] for i in chosen], unloadable)]
    rows.append(("bad records", str(len(bad))))
    if small := sum(SMALL_BOX in message for message in bad):
        rows.append((f"with a box that {SMALL_BOX}", f"{small} of the bad records"))
    if unloadable:
        rows.append(("images or regions that cannot be loaded", str(len(unloadable))))
    return rows, bad, unloadable


def _bad(source: QuerySource) -> list[str]:
    bad = getattr(source, "bad", None)
    return list(bad.messages) if isinstance(bad, BadRecords) else []


def _query_rows(source: QuerySource, queries: Sequence[Query]) -> Iterator[tuple[str, str]]:
    """Answers, categories, and which queries have the region that they are about."""
    answers: dict[str, Counter[str]] = {}
    categories: Counter[str] = Counter()
    words: list[int] = []
    ids: dict[str, list[str]] = {"present": [], "absent": [], "unlocated": []}
    for query in queries:
        if query.answer_type == "open":
            words.append(len(query.answer.split()))
        else:
            answer = parse_answer(query.answer, "yes_no") if query.answer_type == "yes_no" else query.answer
            answers.setdefault(query.answer_type, Counter())[str(answer)] += 1
        if query.category is not None:
            categories[query.category] += 1
        ids[source.presence(query)].append(query.id)
    yield "queries", str(len(queries))
    for kind, counts in answers.items():
        yield f"{kind} answers", f"{counts.total()}: {_most_common(counts, 'other answers', counts.total())}"
    if words:
        yield "open answers", f"{len(words)}: median {np.median(words):.0f} words, at most {max(words)}"
    if categories:
        yield "categories", _most_common(categories, "others")
    yield "with a region of their object", f"{len(ids['present']) / max(1, len(queries)):.1%}"
    headings = {"absent": "about an absent object", "unlocated": "without a region, and stay untouched"}
    for presence, heading in headings.items():
        if some := ids[presence]:
            yield heading, f"{len(some)}: {name_some(some, len(some))}"


def _image_rows(
    source: QuerySource, queries: Sequence[Query], unloadable: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """Sizes of images and regions; what cannot be loaded is added to `unloadable`."""
    sizes: list[tuple[int, ...]] = []
    shares: list[float] = []
    clipped: list[str] = []
    for query in queries:
        try:
            loaded = source.load(query)
        except DataError as error:
            culprit = source.image_id(query) if isinstance(error.__cause__, ImageError) else query.id
            unloadable.setdefault(culprit, str(error))
            continue
        if loaded.clipped:
            clipped.append(query.id)
        sizes.append(loaded.image.shape[:2])
        if loaded.evidence:
            shares.append(float(np.logical_or.reduce(loaded.evidence).mean()))
    if sizes:
        heights, widths = zip(*sizes, strict=True)
        sides = f"{min(widths)}..{max(widths)} x {min(heights)}..{max(heights)}"
        median = f"median {np.median(widths):.0f} x {np.median(heights):.0f}"
        yield f"image sizes ({len(queries)} opened)", f"{sides}, {median}"
    if shares:
        low, middle, high = np.quantile(shares, (0.1, 0.5, 0.9))
        yield "regions' share of the image", f"median {middle:.1%}, 80% within {low:.1%} to {high:.1%}"
    if clipped:
        of_opened = f"{len(clipped)} of {len(queries)} opened"
        yield "with a region that leaves the image", f"{of_opened}: {name_some(clipped, len(clipped))}"


def _most_common(counter: Counter[str], others: str, total: int | None = None) -> str:
    """The most frequent values with their counts, or shares of a total, and how many values are not among them."""
    parts = [
        f"{value if len(value) <= 30 else f'{value[:27]}...'} {count if total is None else f'{count / total:.1%}'}"
        for value, count in counter.most_common(MAX_VALUES)
    ]
    if len(counter) > MAX_VALUES:
        parts.append(f"{len(counter) - MAX_VALUES} {others}")
    return ", ".join(parts)
