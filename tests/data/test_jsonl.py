"""The JSONL source: valid files, and for every kind of invalid file a message with file, line and culprit."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_calibration.data.sources.jsonl import JsonlSource, MissingFileError
from vlm_calibration.perturbation.masks import mask_to_rle
from vlm_calibration.records import DataError

from .conftest import png

Write = Callable[..., Path]
PNG = png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8)))
Record = Callable[..., dict[str, Any]]


def test_records_are_read_in_order(write_jsonl: Write, record: Record) -> None:
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
        ({"image": "../secret.png"}, "record 'two': the image path '../secret.png' leaves the data root"),
        ({"image": "{tmp}/secret.png"}, "record 'two': the image path '{tmp}/secret.png' leaves"),
        ({"image": "link.png"}, "record 'two': the image path 'link.png' leaves the data root"),
        ({"image": "folder/secret.png"}, "record 'two': the image path 'folder/secret.png' leaves"),
        ({"image": "../data-2/a.png"}, "record 'two': the image path '../data-2/a.png' leaves"),
        ({"image": "x" * 5000}, "record 'two': no such image: "),
        ({"answer": "banana"}, "record 'two': the gold answer of a yes/no question"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_a_bad_record_is_named_or_counted(
    write_jsonl: Write, record: Record, tmp_path: Path, bad: Any, says: str
) -> None:
    (tmp_path / "data-2").mkdir()
    for name in ("secret.png", "data-2/a.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "folder").symlink_to(tmp_path)
    if isinstance(bad, dict):
        bad = {**record("two"), **bad}
        bad["image"] = bad["image"].replace("{tmp}", str(tmp_path))
    path = write_jsonl(record("one"), "", bad, record("three"))
    says = f"{path}:3: " + says.replace("{tmp}", str(tmp_path))
    with pytest.raises(DataError) as caught:
        JsonlSource(str(path)).queries()
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match="left out 1 of 3 records") as warned:
        assert [q.id for q in JsonlSource(str(path), on_bad_record="skip").queries()] == ["one", "three"]
    assert f"left out 1 of 3 records: {says}" in str(warned[0].message)


def test_a_file_is_read_in_any_order_and_named_if_it_changes(write_jsonl: Write, record: Record) -> None:
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


def test_skipped_records_are_counted_once_and_a_few_named(write_jsonl: Write, record: Record) -> None:
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


def test_images_lie_below_the_root(write_jsonl: Write, record: Record, tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    Image.new("RGB", (8, 8), "blue").save(images / "deep" / "b.png")
    (images / "inner.png").symlink_to(images / "deep" / "b.png")
    path = write_jsonl(
        record("1", image="deep/b.png"),
        record("2", image="deep/../deep/b.png"),
        record("3", image="inner.png"),
    )
    (tmp_path / "elsewhere").symlink_to(images)
    for root in (images, tmp_path / "elsewhere"):
        source = JsonlSource(str(path), root=str(root))
        loaded = [source.load(q).image for q in source.queries()]
        assert all(image[0, 0].tolist() == [0, 0, 255] for image in loaded)
    with pytest.raises(DataError, match=re.escape(f"{path}:1: record '1': no such image")):
        JsonlSource(str(path)).queries()


def test_load_tells_evidence_from_distractors_and_cuts_boxes_off(write_jsonl: Write, record: Record) -> None:
    """The image has 20 x 10 pixels. A box that rounds to the edge is inside."""
    mask = np.zeros((10, 20), dtype=bool)
    mask[2:5, 3:6] = True
    dog, cat = (
        {"label": "dog", "box": [3, 2, 6, 5], "mask": mask_to_rle(mask)},
        {"label": "cat", "box": [10, 0, 20, 10]},
    )
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
    assert [np.array_equal(m, mask) for m in first.evidence] == [True]
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
def test_what_cannot_be_loaded_is_named(
    write_jsonl: Write, record: Record, content: bytes | None, region: dict[str, Any], says: str
) -> None:
    path = write_jsonl(record("one", regions=[region]))
    sources = [JsonlSource(str(path)), JsonlSource(str(path), on_bad_record="skip")]
    [query] = sources[0].queries()
    image = path.parent / "a.png"
    image.unlink()
    if content is not None:
        image.write_bytes(content)
    for source in sources:
        with pytest.raises(DataError) as caught:
            source.load(query)
        message = str(caught.value)
        assert message.startswith(f"{path}: record 'one': ")
        assert says in message
        assert content == PNG or str(image) in message
        assert "\n" not in message
        assert ("`on_bad_record: skip` leaves" in message) is (source.on_bad_record == "raise")
