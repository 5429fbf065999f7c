"""The Parquet source: the same queries and messages as from JSON lines, and images from three places."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from io import BytesIO
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

SCHEMA = pa.schema([*REQUIRED.items(), *OPTIONAL.items()])
MASK = np.zeros((10, 20), dtype=bool)
MASK[2:5, 3:6] = True
REGION = {"label": "dog", "box": [3.0, 2.0, 6.0, 5.0], "mask": mask_to_rle(MASK), "score": 0.5}

Record = Callable[..., dict[str, Any]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows to `data/NAME`, and `data/a.png` of 20 x 10 pixels."""
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (20, 10), "red").save(folder / "a.png")

    def written(
        rows: list[dict[str, Any]], schema: pa.Schema | None = SCHEMA, name: str = "q.parquet"
    ) -> Path:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / name, row_group_size=3)
        return folder / name

    return written


def test_the_same_queries_as_from_json_lines(
    write: Callable[..., Path], record: Record, tmp_path: Path
) -> None:
    rows = [
        record("1"),
        record("2", objects=["dog", "red cup"], regions=[REGION, {"label": "cat", "box": [0, 0, 5, 5]}]),
        record("3", category="a/b", synonyms=["yep"], regions=[]),
    ]
    path = write(rows)
    lines = tmp_path / "data" / "q.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours, theirs = ParquetSource(str(path)), JsonlSource(str(lines))
    assert list(ours.queries()) == list(theirs.queries()) == [query_from_dict(row) for row in rows]
    assert ours.queries()[-1].id == "3"
    assert [q.id for q in ours.queries()[:2]] == ["1", "2"]
    for query in ours.queries():
        for a, b in zip(ours.load(query), theirs.load(query), strict=True):
            assert np.array_equal(a, b)
    assert np.array_equal(ours.load(ours.queries()[1]).evidence[0], MASK)


def test_types_that_other_writers_choose(write: Callable[..., Path], record: Record) -> None:
    """Inferred types: a null column, lists of null, uncompressed counts, fields in another order."""
    inferred = [record("1", category=None, objects=[], regions=[]), record("2", category=None, objects=[])]
    assert [q.objects for q in ParquetSource(str(write(inferred, None))).queries()] == [(), ()]
    region = {"score": 1, "box": [3, 2, 6, 5], "label": "dog", "mask": {"counts": [0, 200], "size": [10, 20]}}
    source = ParquetSource(str(write([record("1", regions=[region])], None)))
    [query] = source.queries()
    assert source.load(query).evidence[0].all()
    large = pa.schema([pa.field(n, pa.large_string()) for n in REQUIRED])
    assert len(ParquetSource(str(write([record("1")], large))).queries()) == 1
    table = pa.Table.from_pylist([record("1")], schema=pa.schema([*REQUIRED.items()]))
    path = write([record("1")])
    pq.write_table(table.set_column(3, "answer", table.column("answer").dictionary_encode()), path)
    assert ParquetSource(str(path)).queries()[0].answer == "Yes"


def test_a_column_of_whole_numbers_as_id(write: Callable[..., Path], record: Record) -> None:
    schema = SCHEMA.set(SCHEMA.get_field_index("id"), pa.field("id", pa.int32()))
    rows = [record("", id=7), record("", id=8)]
    assert [q.id for q in ParquetSource(str(write(rows, schema))).queries()] == ["7", "8"]
    for last, says in ((7, "row 2: duplicate id '7', first seen in row 0"), (None, "row 2: 'id' must be")):
        path = write([*rows, record("", id=last)], schema)
        with pytest.raises(DataError, match=says):
            ParquetSource(str(path)).queries()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no id": ({"id": None}, "'id'"),
    "a missing region": ({"regions": [None]}, "regions[0]"),
    "no box": ({"regions": [REGION, {**REGION, "box": None}]}, "'regions[1].box'"),
    "an image outside": ({"image": "../a.png"}, "leaves the data root"),
    "an id seen before": ({"id": "one"}, "duplicate id 'one', first seen in row 0"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_row_is_named(write: Callable[..., Path], record: Record, what: str) -> None:
    change, says = BAD[what]
    path = write([record("one"), record("two"), record("bad", **change), record("three")])
    with pytest.raises(DataError) as caught:
        ParquetSource(str(path)).queries()
    assert str(caught.value).startswith(f"{path}: row 2: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    source = ParquetSource(str(path), on_bad_record="skip")
    with pytest.warns(UserWarning, match="left out 1 of 4 records"):
        assert [q.id for q in source.queries()] == ["one", "two", "three"]
    assert says in source.bad.messages[0]


def test_a_mask_without_counts_is_named_when_it_is_loaded(write: Callable[..., Path], record: Record) -> None:
    source = ParquetSource(str(write([record("one", regions=[{**REGION, "mask": {"size": [10, 20]}}])])))
    with pytest.raises(DataError, match="record 'one': the mask of region 'dog' is not a COCO RLE"):
        source.load(source.queries()[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"colour": "red"}, "unknown column 'colour'; there are id, image"),
        ({"answer": ...}, "no column 'answer'"),
        ({"id": 1.5}, "row 0: 'id' must be a non-empty string"),
        ({"objects": "dog"}, "row 0: 'objects' must be a list"),
        ({"regions": ["dog"]}, "row 0: regions[0] expected an object"),
        ({"category": 3}, "row 0: 'category' must be a non-empty string"),
    ],
)
def test_a_column_of_another_kind_is_named(
    write: Callable[..., Path], record: Record, change: dict[str, Any], says: str
) -> None:
    row = {key: value for key, value in record("one", **change).items() if value is not ...}
    path = write([row], None)
    with pytest.raises(DataError) as caught:
        ParquetSource(str(path)).queries()
    assert str(caught.value).startswith(f"{path}: {says}")


def test_files_that_cannot_be_read(tmp_path: Path, write: Callable[..., Path]) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"no")
    empty = write([])
    for path, says in (
        (tmp_path / "none.parquet", "no such file"),
        (tmp_path, "not a Parquet file"),
        (tmp_path / "broken.parquet", "not a Parquet file"),
        (empty, "no usable query in this file"),
    ):
        with pytest.raises(DataError, match=str(path)) as caught:
            ParquetSource(str(path)).queries()
        assert says in str(caught.value)


def test_a_source_with_its_rows_travels_to_other_processes(
    write: Callable[..., Path], record: Record
) -> None:
    source = ParquetSource(str(write([record("1"), record("2", regions=[REGION])])))
    before = list(source.queries())
    again = pickle.loads(pickle.dumps(source))
    assert list(again.queries()) == before
    assert again.has_evidence(before[1])


@pytest.fixture
def embedded(tmp_path: Path, record: Record) -> Path:
    """A file of 11 rows with embedded images, whose red value is the row; row 5 has no image."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([(n, kind if n == "image" else t) for n, t in REQUIRED.items()])
    rows = []
    for i in range(11):
        png = BytesIO()
        Image.new("RGB", (4, 4), (i, 0, 0)).save(png, "PNG")
        rows.append({**record(str(i)), "image": {"bytes": png.getvalue() if i != 5 else None, "path": None}})
    path = tmp_path / "embedded.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=3)
    return path


def test_images_in_the_file(embedded: Path) -> None:
    source = ParquetSource(str(embedded))
    queries = list(source.queries())
    for index in (10, 0, 6, 7, 3, 9):
        assert (source.load(queries[index]).image[..., 0] == index).all()
    with pytest.raises(DataError, match="record '5': row-5 holds no image bytes"):
        source.load(queries[5])


def test_images_of_the_source_that_they_came_from(write: Callable[..., Path]) -> None:
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
