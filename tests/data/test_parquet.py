"""The Parquet source: the same queries and messages as from JSON lines, and images from three places."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm_calibration.data.sources.base import with_regions
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.data.sources.parquet import OPTIONAL, REQUIRED, ParquetSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.perturbation.masks import mask_to_rle
from vlm_calibration.records import DataError, query_from_dict

from .conftest import png

SCHEMA = pa.schema([*REQUIRED.items(), *OPTIONAL.items()])
MASK = np.zeros((10, 20), dtype=bool)
MASK[2:5, 3:6] = True
REGION = {"label": "dog", "box": [3.0, 2.0, 6.0, 5.0], "mask": mask_to_rle(MASK), "score": 0.5}

Record = Callable[..., dict[str, Any]]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows to `data/q.parquet`, and `data/a.png` of 20 x 10 pixels."""
    path = tmp_path / "data/q.parquet"
    path.parent.mkdir()
    Image.new("RGB", (20, 10), "red").save(path.parent / "a.png")

    def written(rows: list[dict[str, Any]], schema: pa.Schema | None = SCHEMA) -> Path:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=3)
        return path

    return written


def test_the_same_queries_as_from_json_lines(write: Write, record: Record) -> None:
    """Also in another process; a list of wrong answers, an empty list and none are told apart."""
    regions = [REGION, {"label": "cat", "box": [0, 0, 5, 5]}]
    rows = [
        record("1", wrong_answers=[]),
        record("2", objects=["dog", "red cup"], regions=regions, wrong_answers=["a", "b"]),
        record("3", category="a/b", synonyms=["yep"], regions=[]),
    ]
    path = write(rows)
    lines = path.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours, theirs = ParquetSource(str(path)), JsonlSource(str(lines))
    assert list(ours.queries()) == list(theirs.queries()) == [query_from_dict(row) for row in rows]
    assert list(pickle.loads(pickle.dumps(ours)).queries()) == list(ours.queries())
    for query in ours.queries():
        for a, b in zip(ours.load(query), theirs.load(query), strict=True):
            assert np.array_equal(a, b)
    assert np.array_equal(ours.load(ours.queries()[1]).evidence[0], MASK)


def test_types_that_other_writers_choose(write: Write, record: Record) -> None:
    """Inferred types: a null column, lists of null, uncompressed counts, fields in another order; and counts as bytes."""
    inferred = [record("1", category=None, objects=[], regions=[]), record("2", category=None, objects=[])]
    assert [q.objects for q in ParquetSource(str(write(inferred, None))).queries()] == [(), ()]
    for counts in ([0, 200], b"0X6"):
        mask = {"counts": counts, "size": [10, 20]}
        region = {"score": 1, "box": [3, 2, 6, 5], "label": "dog", "mask": mask}
        source = ParquetSource(str(write([record("1", regions=[region])], None)))
        assert source.load(source.queries()[0]).evidence[0].all()
    large = pa.schema([pa.field(n, pa.large_string()) for n in REQUIRED])
    assert len(ParquetSource(str(write([record("1")], large))).queries()) == 1
    table = pa.Table.from_pylist([record("1")], schema=pa.schema([*REQUIRED.items()]))
    path = write([record("1")])
    pq.write_table(table.set_column(3, "answer", table.column("answer").dictionary_encode()), path)
    assert ParquetSource(str(path)).queries()[0].answer == "Yes"
    for answer in (Decimal("3.00"), b"Z\xfcrich"):
        with pytest.raises(DataError, match="'answer' must be a non-empty string"):
            ParquetSource(str(write([record("1", answer=answer)], None))).queries()


def test_a_bad_row_is_named(write: Write, record: Record) -> None:
    """What is wrong with a record is said as for JSON lines. A column of whole numbers may be the id."""
    schema = SCHEMA.set(SCHEMA.get_field_index("id"), pa.field("id", pa.int32()))
    rows = [record("", id=7), record("", id=8), record("", id=9)]
    assert [q.id for q in ParquetSource(str(write(rows, schema))).queries()] == ["7", "8", "9"]
    for change, says in (
        ({"id": None}, "'id' must be"),
        ({"id": 7}, "duplicate id '7', first seen in row 0"),
        ({"regions": [REGION, {**REGION, "box": None}]}, "'regions[1].box' must be"),
        ({"image": "../a.png"}, "record '8': the image path '../a.png' leaves the data root"),
    ):
        path = write([rows[0], rows[1] | change, rows[2]], schema)
        with pytest.raises(DataError) as caught:
            ParquetSource(str(path)).queries()
        assert str(caught.value).startswith(f"{path}: row 1: {says}")
        source = ParquetSource(str(path), on_bad_record="skip")
        with pytest.warns(UserWarning, match="left out 1 of 3 records"):
            assert [q.id for q in source.queries()] == ["7", "9"]


def test_a_column_of_another_kind_is_named(write: Write, record: Record) -> None:
    for change, says in (
        ({"colour": "red"}, "unknown column 'colour'; there are id, image"),
        ({"answer": ...}, "no column 'answer'"),
        ({"id": 1.5}, "row 0: 'id' must be a non-empty string"),
        ({"regions": ["dog"]}, "row 0: regions[0] expected an object"),
    ):
        path = write([{k: v for k, v in record("one", **change).items() if v is not ...}], None)
        with pytest.raises(DataError, match=re.escape(f"{path}: {says}")):
            ParquetSource(str(path)).queries()


def test_files_that_cannot_be_read(tmp_path: Path, write: Write, record: Record) -> None:
    for name, content in (("broken", b"no"), ("cut", write([record(str(i)) for i in range(9)]).read_bytes())):
        (tmp_path / name).write_bytes(content[:40] + bytes(60) + content[100:])
    for path, says in (
        (tmp_path / "none.parquet", "no such file"),
        (tmp_path, "not a Parquet file"),
        (tmp_path / "broken", "not a Parquet file"),
        (tmp_path / "cut", "cannot be read: "),
        (write([]), "no usable query in this file"),
    ):
        with pytest.raises(DataError, match=f"{path}: .*{says}"):
            ParquetSource(str(path)).queries()


def test_images_in_the_file(tmp_path: Path, record: Record) -> None:
    """11 rows with embedded images, whose red value is the row; row 5 has no image."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([(n, kind if n == "image" else t) for n, t in REQUIRED.items()])
    rows = []
    for i in range(11):
        content = png(Image.new("RGB", (4, 4), (i, 0, 0))) if i != 5 else None
        rows.append({**record(str(i)), "image": {"bytes": content, "path": None}})
    path = tmp_path / "embedded.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=3)
    source = ParquetSource(str(path))
    queries = list(source.queries())
    for index in (10, 0, 6, 7, 3, 9):
        assert (source.load(queries[index]).image[..., 0] == index).all()
    with pytest.raises(DataError, match="record '5': row-5 holds no image bytes"):
        source.load(queries[5])


def test_images_of_the_source_that_they_came_from(write: Write) -> None:
    demo = DemoSource("test", scenes=2)
    queries = demo.queries()
    region = {"label": queries[0].objects[0], "box": [1.0, 1.0, 9.0, 9.0]}
    path = write([{**asdict(q), "regions": [region]} for q in queries])
    source = ParquetSource(str(path), images=demo)
    for query, original in zip(source.queries(), queries, strict=True):
        loaded = source.load(query)
        image = demo.load(original).image
        assert np.array_equal(loaded.image, image)
        expected = with_regions(query, image)
        assert len(loaded.evidence) == len(expected.evidence)
        assert len(loaded.evidence) + len(loaded.distractors) == 1
