"""Find the rows of a table that may be invalid, column by column: about a second for a million rows.

Each such row is then read by `query_from_dict`, which decides and gives the same message as for a JSON line. These checks may
report a valid row, but must not miss a row that `query_from_dict` refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm_calibration.records import ANSWER_TYPES, MIN_BOX
from vlm_calibration.text.grading import parse_answer
from vlm_calibration.text.labels import COORDINATES, STATES_CONFIDENCE

TEXTS = ("id", "image", "question", "answer")
LISTS = ("objects", "synonyms", "absent", "wrong_answers")


def suspects(table: pa.Table) -> np.ndarray:
    """Indices of the rows of a `ParquetSource` table that may be invalid, int64, ascending."""
    suspect_rows: list[np.ndarray] = []
    begin = 0
    for batch in table.to_batches(max_chunksize=100_000):
        suspect_rows += [begin + np.asarray(rows, dtype=np.int64) for rows in _check_batch(batch)]
        begin += batch.num_rows
    ids = table.column("id")
    if pc.count_distinct(ids).as_py() < len(ids):
        suspect_rows.append(_repeated(ids))
    return np.unique(np.concatenate(suspect_rows)) if suspect_rows else np.empty(0, dtype=np.int64)


def _check_batch(batch: pa.RecordBatch) -> Iterator[np.ndarray]:
    columns = {name: _plain(batch.column(name)) for name in batch.schema.names}
    for name in TEXTS:
        if name in columns:
            yield _where(_invalid_text(columns[name]))
    yield _where(pc.invert(pc.fill_null(pc.is_in(columns["answer_type"], pa.array(ANSWER_TYPES)), False)))
    yield _where(_ungradable(columns["answer"], columns["answer_type"]))
    if "category" in columns:
        yield _where(pc.and_(pc.is_valid(columns["category"]), _invalid_text(columns["category"])))
    for name in LISTS:
        if name in columns:
            items, owners = columns[name].flatten(), _owners(columns[name])
            yield owners[_where(_invalid_text(items))]
    if "regions" in columns:
        yield from _check_regions(columns["regions"])


def _check_regions(column: Any) -> Iterator[np.ndarray]:
    """Rows with a region that may be invalid."""
    regions, owners = column.flatten(), _owners(column)
    yield owners[_where(pc.is_null(regions))]
    fields = {field.name: pc.struct_field(regions, field.name) for field in regions.type}
    yield owners[_where(pc.is_null(fields["label"]))]
    has_four = pc.fill_null(pc.equal(pc.list_value_length(fields["box"]), 4), False)
    yield owners[_where(pc.invert(has_four))]
    numbers = fields["box"].filter(has_four).flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    x0, y0, x1, y1 = numbers.reshape(-1, 4).T
    with np.errstate(invalid="ignore"):
        valid = np.isfinite(numbers).reshape(-1, 4).all(axis=1) & (x1 > x0) & (y1 > y0)
        valid &= (x1 - x0) * (y1 - y0) >= MIN_BOX
    yield owners[_where(has_four)][~valid]
    if "score" in fields and not pa.types.is_null(fields["score"].type):
        score = fields["score"]
        inside = pc.and_(pc.greater_equal(score, 0), pc.less_equal(score, 1))
        yield owners[_where(pc.invert(pc.fill_null(inside, True)))]


def _invalid_text(texts: Any) -> Any:
    """Mask of the texts that are missing, blank, or contain a null character."""
    blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)
    return pc.or_(pc.fill_null(blank, True), pc.fill_null(pc.match_substring(texts, "\0"), False))


def _ungradable(answers: Any, kinds: Any) -> Any:
    """Mask of the answers that may state a confidence or be a box, of yes/no answers that are neither, and of others without a word."""
    yes_no = pc.fill_null(pc.equal(kinds, "yes_no"), False)
    answers_given = [a for a in pc.unique(answers.filter(yes_no)).to_pylist() if a is not None]
    neither = [a for a in answers_given if parse_answer(a, "yes_no") is None]
    wordless = pc.invert(pc.match_substring_regex(answers, r"[\pL\pN]"))
    ungradable = pc.if_else(
        yes_no, pc.is_in(answers, pa.array(neither, pa.string())), pc.fill_null(wordless, True)
    )
    return pc.or_(ungradable, may_state_confidence(answers))


def may_state_confidence(answers: Any) -> Any:
    """Mask of the answers of which `check_answer` reads more than whether they have a word."""
    pattern = f"{STATES_CONFIDENCE}|^{COORDINATES}$"
    return pc.fill_null(pc.match_substring_regex(answers, pattern, ignore_case=True), False)


def _repeated(ids: Any) -> np.ndarray:
    """Rows whose id occurs in an earlier row."""
    seen: set[str] = set()
    rows = []
    for row, value in enumerate(ids.to_pylist()):
        if value in seen:
            rows.append(row)
        seen.add(value)
    return np.array(rows, dtype=np.int64)


def _owners(lists: Any) -> np.ndarray:
    """The row of each item of the flattened lists."""
    return pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)


def _where(condition: Any) -> np.ndarray:
    return np.flatnonzero(condition.to_numpy(zero_copy_only=False))


def _plain(column: Any) -> Any:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
