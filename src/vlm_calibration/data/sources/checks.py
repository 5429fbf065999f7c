"""Which rows of a table may be bad records, found column by column: a million rows take about a second.

A row found here is then read as a record, and what is wrong with it is said in the same words as for a line of JSON. So these
checks may suspect a good row, but must not miss a bad one that `query_from_dict` would refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm_calibration.records import ANSWER_TYPES
from vlm_calibration.text.grading import parse_answer

TEXTS = ("id", "image", "question", "answer")
LISTS = ("objects", "synonyms")


def suspects(table: pa.Table) -> np.ndarray:
    """Numbers of the rows that may be bad, int64, ascending. The table is one of `ParquetSource`."""
    found: list[np.ndarray] = []
    begin = 0
    for batch in table.to_batches(max_chunksize=100_000):
        found += [begin + np.asarray(rows, dtype=np.int64) for rows in _suspects_of(batch)]
        begin += batch.num_rows
    ids = table.column("id")
    if pc.count_distinct(ids).as_py() < len(ids):
        found.append(_repeated(ids))
    return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)


def _suspects_of(batch: pa.RecordBatch) -> Iterator[np.ndarray]:
    columns = {name: _plain(batch.column(name)) for name in batch.schema.names}
    for name in TEXTS:
        if name in columns:
            yield _where(_unfit(columns[name]))
    yield _where(pc.invert(pc.fill_null(pc.is_in(columns["answer_type"], pa.array(ANSWER_TYPES)), False)))
    yield _where(_ungradable(columns["answer"], columns["answer_type"]))
    if "category" in columns:
        yield _where(pc.and_(pc.is_valid(columns["category"]), _unfit(columns["category"])))
    for name in LISTS:
        if name in columns:
            items, owners = columns[name].flatten(), _owners(columns[name])
            yield owners[_where(_unfit(items))]
    if "regions" in columns:
        yield from _regions(columns["regions"])


def _regions(column: Any) -> Iterator[np.ndarray]:
    """Rows with a region that may be bad."""
    regions, owners = column.flatten(), _owners(column)
    yield owners[_where(pc.is_null(regions))]
    fields = {field.name: pc.struct_field(regions, field.name) for field in regions.type}
    yield owners[_where(pc.is_null(fields["label"]))]
    whole = pc.fill_null(pc.equal(pc.list_value_length(fields["box"]), 4), False)
    yield owners[_where(pc.invert(whole))]
    numbers = fields["box"].filter(whole).flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    x0, y0, x1, y1 = numbers.reshape(-1, 4).T
    with np.errstate(invalid="ignore"):
        fine = np.isfinite(numbers).reshape(-1, 4).all(axis=1) & (x1 > x0) & (y1 > y0)
    yield owners[_where(whole)][~fine]
    if "score" in fields and not pa.types.is_null(fields["score"].type):
        score = fields["score"]
        inside = pc.and_(pc.greater_equal(score, 0), pc.less_equal(score, 1))
        yield owners[_where(pc.invert(pc.fill_null(inside, True)))]


def _unfit(texts: Any) -> Any:
    """Where a text is missing, blank, or holds a null character."""
    blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)
    return pc.or_(pc.fill_null(blank, True), pc.fill_null(pc.match_substring(texts, "\0"), False))


def _ungradable(answers: Any, kinds: Any) -> Any:
    """Where a yes/no answer is neither, or another answer has neither letter nor digit."""
    yes_no = pc.fill_null(pc.equal(kinds, "yes_no"), False)
    given = [a for a in pc.unique(answers.filter(yes_no)).to_pylist() if a is not None]
    neither = [a for a in given if parse_answer(a, "yes_no") is None]
    wordless = pc.invert(pc.match_substring_regex(answers, r"[\pL\pN]"))
    return pc.if_else(yes_no, pc.is_in(answers, pa.array(neither, pa.string())), pc.fill_null(wordless, True))


def _repeated(ids: Any) -> np.ndarray:
    """Every row whose id is that of an earlier one."""
    seen: set[str] = set()
    rows = []
    for row, value in enumerate(ids.to_pylist()):
        if value in seen:
            rows.append(row)
        seen.add(value)
    return np.array(rows, dtype=np.int64)


def _owners(lists: Any) -> np.ndarray:
    """For each item of the flattened lists, the row that it belongs to."""
    return pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)


def _where(condition: Any) -> np.ndarray:
    return np.flatnonzero(condition.to_numpy(zero_copy_only=False))


def _plain(column: Any) -> Any:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
