"""The JSONL and the Parquet source: valid files, and for every kind of invalid file a message with file, line and culprit.

Parquet gives the same queries and messages as JSON lines, and images from three places.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import warnings
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
from vlm_calibration.data.sources.jsonl import JsonlSource, MissingFileError
from vlm_calibration.data.sources.parquet import OPTIONAL, REQUIRED, ParquetSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.perturbation.masks import mask_to_rle
from vlm_calibration.records import DataError, query_from_dict

from .conftest import Write, encode, record, refused

PNG = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8)))
MASK = np.zeros((10, 20), dtype=bool)
MASK[2:5, 3:6] = True


def test_records_are_read_in_order(write_jsonl: Write) -> None:
    """Behind a byte order mark, past blank lines, with a whole number as id, and without a last line break."""
    first = b"\xef\xbb\xbf" + json.dumps(record("b")).encode()
    path = write_jsonl(first, "", record("a", id=7), "   ", record("ä"))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    source = JsonlSource(str(path))
    assert [q.id for q in source.queries()] == ["b", "7", "ä"]
    assert [q.id for q in pickle.loads(pickle.dumps(source)).queries()] == ["b", "7", "ä"]
    path = write_jsonl(record("a", id=7), record("7"))
    with pytest.raises(DataError, match="q.*:2: duplicate id '7', first seen on line 1"):
        JsonlSource(str(path)).queries()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{not json", "not JSON"),
        ('{"id": ' + "1" * 5000 + "}", "not JSON"),
        ('{"id": "caf\xe9"}'.encode("latin-1"), "not UTF-8"),
        ("[1, 2]", "expected an object"),
        ({"id": "one"}, "duplicate id 'one', first seen on line 1"),
        ({"image": "."}, "record 'two': no such image: "),
        ({"image": "{tmp}/secret.png"}, "record 'two': the image path '{tmp}/secret.png' leaves"),
        (
            {"image": "linked/../../secret.png"},
            "record 'two': the image path 'linked/../../secret.png' leaves",
        ),
        ({"image": "../data-2/a.png"}, "record 'two': the image path '../data-2/a.png' leaves"),
        ({"image": "x" * 5000}, "record 'two': no such image: "),
        ({"answer": "banana"}, "record 'two': the gold answer of a yes/no question"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_a_bad_record_is_named_or_counted(write_jsonl: Write, tmp_path: Path, bad: Any, says: str) -> None:
    (tmp_path / "data-2").mkdir()
    for name in ("secret.png", "data-2/a.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "data-2")
    if isinstance(bad, dict):
        bad = {**record("two"), **bad}
        bad["image"] = bad["image"].replace("{tmp}", str(tmp_path))
    path = write_jsonl(record("one"), "", bad, record("three"))
    says = f"{path}:3: " + says.replace("{tmp}", str(tmp_path))
    with refused(says):
        JsonlSource(str(path)).queries()
    with pytest.warns(UserWarning, match="left out 1 of 3 records") as warned:
        assert [q.id for q in JsonlSource(str(path), on_bad_record="skip").queries()] == ["one", "three"]
    assert f"left out 1 of 3 records: {says}" in str(warned[0].message)


def test_a_file_is_read_in_any_order_and_named_if_it_changes(write_jsonl: Write) -> None:
    path = write_jsonl(record("one"), "", record("two"), record("three"))
    source = JsonlSource(str(path))
    scanned = list(source.scan("first pass"))
    queries = source.queries()
    assert list(source.scan("second pass")) == list(queries) == scanned
    assert [q.id for q in (*queries[::-1], queries[1], *queries[:0])] == ["three", "two", "one", "two"]
    with pytest.raises(IndexError):
        queries[3]
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match=re.escape(f"{path}: changed while in use, at byte 0: not JSON")):
        queries[0]
    path.unlink()
    with pytest.raises(DataError, match=re.escape(f"{path}: changed while in use")):
        queries[0]


def test_skipped_records_are_counted_once_and_a_few_named(write_jsonl: Write) -> None:
    """Data workers, which receive a copy of the source, do not warn again."""
    source = JsonlSource(str(write_jsonl(record("one"), *["{"] * 40)), on_bad_record="skip")
    with pytest.warns(UserWarning, match="left out 40 of 41 records") as warned:
        assert len(source.queries()) == 1
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(source.queries()) == len(pickle.loads(pickle.dumps(source)).queries()) == 1
    assert str(warned[0].message).count("not JSON") == 5


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("lines", [[], ["", " "], ["{"]])
def test_a_file_without_queries_is_refused(write_jsonl: Write, lines: list[str]) -> None:
    path = write_jsonl(*lines)
    with pytest.raises(DataError, match=re.escape(f"{path}: no usable query")):
        JsonlSource(str(path), on_bad_record="skip").queries()


def test_a_missing_file_is_named_with_what_the_folder_has(tmp_path: Path) -> None:
    path = tmp_path / "calibration.jsonl"
    with pytest.raises(MissingFileError) as error:
        JsonlSource(str(path)).queries()
    assert str(error.value).startswith(f"{path}: no such file; {tmp_path} has no file")
    assert "`vlm-calibration data split FILE`" in str(error.value)
    assert error.value.path == path
    for name in ("all.jsonl", "calibration.parquet", "photo.jpg"):
        (tmp_path / name).write_bytes(b"")
    for name, says in (
        ("calibration.jsonl", r"has 'all.jsonl', 'calibration.parquet'; .* data/parquet`$"),
        ("mine.jsonl", "has 'all.jsonl', 'calibration.parquet'$"),
        ("none/train.jsonl", re.escape(f"no folder {tmp_path / 'none'} either")),
    ):
        with pytest.raises(MissingFileError, match=says):
            JsonlSource(str(tmp_path / name)).queries()
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}: cannot be read: ")):
        JsonlSource(str(tmp_path)).queries()


def test_images_lie_below_the_root(write_jsonl: Write, tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    Image.new("RGB", (8, 8), "blue").save(images / "deep" / "b.png")
    (images / "inner.png").symlink_to(images / "deep" / "b.png")
    (tmp_path / "outside").mkdir()
    shutil.copy(images / "deep" / "b.png", tmp_path / "outside")
    (images / "linked").symlink_to(tmp_path / "outside")
    images_of = ("deep/b.png", "deep/../deep/b.png", "inner.png", "linked/b.png")
    path = write_jsonl(*(record(str(i), image=image) for i, image in enumerate(images_of, start=1)))
    (tmp_path / "elsewhere").symlink_to(images)
    for root in (images, tmp_path / "elsewhere"):
        source = JsonlSource(str(path), root=str(root))
        assert [source.load(q).image[0, 0].tolist() for q in source.queries()] == [[0, 0, 255]] * 4
    with pytest.raises(DataError, match=re.escape(f"{path}:1: record '1': no such image")):
        JsonlSource(str(path)).queries()


def test_load_tells_evidence_from_distractors_and_cuts_boxes_off(write_jsonl: Write) -> None:
    """The image has 20 x 10 pixels. A box that rounds to the edge is inside."""
    dog = {"label": "dog", "box": [3, 2, 6, 5], "mask": mask_to_rle(MASK)}
    cat = {"label": "cat", "box": [10, 0, 20, 10]}
    boxes = [[-5, -5, 10, 5], [15, 5, 30, 30], [0, 0, 20.4, 10.4], [2, 2, 8, 8]]
    path = write_jsonl(
        record("1", objects=["dog"], regions=[dog, cat]),
        record("2", regions=[dog, cat]),
        record("3", objects=["cup"]),
        *(record(str(i), regions=[{"label": "dog", "box": box}]) for i, box in enumerate(boxes, start=4)),
    )
    source = JsonlSource(str(path))
    queries = source.queries()
    assert [source.has_evidence(q) for q in queries[:3]] == [True, True, False]
    first, second, _, *clipped = [source.load(query) for query in queries]
    assert (first.image.shape, first.image.dtype) == ((10, 20, 3), np.uint8)
    assert [np.array_equal(m, MASK) for m in first.evidence] == [True]
    assert [int(m.sum()) for m in first.distractors] == [100]
    assert (len(second.evidence), len(second.distractors)) == (2, 0)
    assert [loaded.clipped for loaded in clipped] == [True, True, False, False]
    assert [int(loaded.evidence[0].sum()) for loaded in clipped] == [50, 25, 200, 36]
    assert clipped[0].evidence[0][:5, :10].all()
    assert clipped[1].evidence[0][5:, 15:].all()


DOG = {"label": "dog", "box": [0, 0, 4, 4]}


@pytest.mark.parametrize(
    ("content", "region", "says"),
    [
        (b"<html>", DOG, "not an image"),
        (None, DOG, "no such file"),
        (PNG[:300], DOG, "truncated"),
        (PNG, {**DOG, "mask": {"size": [7, 7], "counts": [0, 49]}}, "size [7, 7]"),
        (PNG, {**DOG, "mask": {"size": [10, 20], "counts": "~~~"}}, "not a COCO RLE"),
        (PNG, {**DOG, "box": [30, 30, 40, 40]}, "covers no pixel of the 20 x 10 image"),
    ],
)
def test_what_cannot_be_loaded_is_named(write_jsonl: Write, content: Any, region: Any, says: str) -> None:
    path = write_jsonl(record("one", regions=[region]))
    sources = [JsonlSource(str(path)), JsonlSource(str(path), on_bad_record="skip")]
    [query] = sources[0].queries()
    image = path.parent / "a.png"
    image.unlink()
    if content is not None:
        image.write_bytes(content)
    for source in sources:
        with refused(f"{path}: record 'one': ", says, "" if content == PNG else str(image)) as caught:
            source.load(query)
        assert ("`on_bad_record: skip` leaves" in str(caught.value)) is (source.on_bad_record == "raise")


# --- Parquet ---------------------------------------------------------------------------------------------------------

SCHEMA = pa.schema([*REQUIRED.items(), *OPTIONAL.items()])
REGION = {"label": "dog", "box": [3.0, 2.0, 6.0, 5.0], "mask": mask_to_rle(MASK), "score": 0.5}


@pytest.fixture
def write(write_jsonl: Write) -> Write:
    """Write rows to `data/q.parquet`, beside `data/a.png` of 20 x 10 pixels."""
    path = write_jsonl().with_name("q.parquet")

    def written(rows: list[dict[str, Any]], schema: pa.Schema | None = SCHEMA) -> Path:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=3)
        return path

    return written


def test_the_same_queries_as_from_json_lines(write: Write) -> None:
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


def test_types_that_other_writers_choose(write: Write) -> None:
    """Inferred types: a null column, lists of null, uncompressed counts, fields in another order; and counts as bytes."""
    inferred = [record("1", category=None, objects=[], regions=[]), record("2", category=None, objects=[])]
    assert [q.objects for q in ParquetSource(str(write(inferred, None))).queries()] == [(), ()]
    for counts in ([0, 200], b"0X6"):
        mask = {"counts": counts, "size": [10, 20]}
        region = {"score": 1, "box": [3, 2, 6, 5], "label": "dog", "mask": mask}
        source = ParquetSource(str(write([record("1", regions=[region])], None)))
        assert source.load(source.queries()[0]).evidence[0].all()
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        path = write([record("1")], pa.schema([pa.field(n, kind) for n in REQUIRED]))
        assert ParquetSource(str(path)).queries()[0].answer == "Yes"
    for answer in (Decimal("3.00"), b"Z\xfcrich"):
        with pytest.raises(DataError, match="'answer' must be a non-empty string"):
            ParquetSource(str(write([record("1", answer=answer)], None))).queries()


def test_a_bad_row_is_named(write: Write) -> None:
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
        with refused(f"{path}: row 1: {says}"):
            ParquetSource(str(path)).queries()
        source = ParquetSource(str(path), on_bad_record="skip")
        with pytest.warns(UserWarning, match="left out 1 of 3 records"):
            assert [q.id for q in source.queries()] == ["7", "9"]


def test_a_column_of_another_kind_is_named(write: Write) -> None:
    for change, says in (
        ({"colour": "red"}, "unknown column 'colour'; there are id, image"),
        ({"answer": ...}, "no column 'answer'"),
        ({"id": 1.5}, "row 0: 'id' must be a non-empty string"),
        ({"regions": ["dog"]}, "row 0: regions[0] expected an object"),
    ):
        path = write([{k: v for k, v in record("one", **change).items() if v is not ...}], None)
        with pytest.raises(DataError, match=re.escape(f"{path}: {says}")):
            ParquetSource(str(path)).queries()


def test_files_that_cannot_be_read(tmp_path: Path, write: Write) -> None:
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


def test_images_in_the_file(tmp_path: Path) -> None:
    """11 rows with embedded images, whose red value is the row; row 5 has no image."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([(n, kind if n == "image" else t) for n, t in REQUIRED.items()])
    contents = [encode(Image.new("RGB", (4, 4), (i, 0, 0))) if i != 5 else None for i in range(11)]
    rows = [record(str(i), image={"bytes": content, "path": None}) for i, content in enumerate(contents)]
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
    region = {"label": demo.queries()[0].objects[0], "box": [1.0, 1.0, 9.0, 9.0]}
    path = write([{**asdict(q), "regions": [region]} for q in demo.queries()])
    source = ParquetSource(str(path), images=demo)
    for query, original in zip(source.queries(), demo.queries(), strict=True):
        loaded, image = source.load(query), demo.load(original).image
        assert np.array_equal(loaded.image, image)
        assert len(loaded.evidence) == len(with_regions(query, image).evidence)
        assert len(loaded.evidence) + len(loaded.distractors) == 1
