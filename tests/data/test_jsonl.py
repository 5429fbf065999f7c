"""The JSONL source: valid files, and for every kind of invalid file a message with file, line and culprit."""

from __future__ import annotations

import json
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.data.sources.query_file import MissingFileError
from vlm_calibration.perturbation.masks import mask_to_rle
from vlm_calibration.records import ANSWER_TYPES, DataError, Query, Region

Write = Callable[..., Path]
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
        ('{"id": "x"} {"id": "y"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
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
        ({"answer": "?!", "answer_type": "open"}, "record 'two': the gold answer of a open question"),
        ({"answer": "Yes. Confidence: 90%"}, "record 'two': the answer 'Yes. Confidence: 90%' states"),
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
    assert [q.id for q in source.scan("first pass")] == [q.id for q in source.scan("second pass")]
    queries = source.queries()
    assert [q.id for q in (*queries[::-1], queries[1], *queries[:0])] == ["three", "two", "one", "two"]
    with pytest.raises(IndexError):
        queries[3]
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match=re.escape(f"{path}: changed while in use, at byte 0: not JSON")):
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
    with pytest.raises(
        MissingFileError, match=re.escape(f"{path}: no such file; {tmp_path} has no file")
    ) as error:
        JsonlSource(str(path)).queries()
    assert error.value.path == path
    assert "`vlm-calibration data split FILE`" in str(error.value)
    for name in ("all.jsonl", "calibration.parquet", "photo.jpg"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(MissingFileError, match=r"has 'all.jsonl', 'calibration.parquet'; .* data/parquet`$"):
        JsonlSource(str(path)).queries()
    with pytest.raises(MissingFileError, match=re.escape(f"no folder {tmp_path / 'none'} either")):
        JsonlSource(str(tmp_path / "none" / "train.jsonl")).queries()
    with pytest.raises(MissingFileError) as error:
        JsonlSource(str(tmp_path / "mine.jsonl")).queries()
    assert "data split" not in str(error.value)
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


def test_load_tells_evidence_from_distractors(write_jsonl: Write, record: Record) -> None:
    mask = np.zeros((10, 20), dtype=bool)
    mask[2:5, 3:6] = True
    regions = [
        {"label": "dog", "box": [3, 2, 6, 5], "mask": mask_to_rle(mask)},
        {"label": "cat", "box": [10, 0, 20, 10]},
    ]
    path = write_jsonl(
        record("1", objects=["dog"], regions=regions),
        record("2", regions=regions),
        record("3", objects=["cup"]),
    )
    source = JsonlSource(str(path))
    first, second, third = source.queries()
    loaded = source.load(first)
    assert loaded.image.shape == (10, 20, 3)
    assert loaded.image.dtype == np.uint8
    assert [np.array_equal(m, mask) for m in loaded.evidence] == [True]
    assert [int(m.sum()) for m in loaded.distractors] == [100]
    assert [len(source.load(second).evidence), len(source.load(second).distractors)] == [2, 0]
    assert [source.has_evidence(q) for q in (first, second, third)] == [True, True, False]


def test_what_of_a_box_leaves_the_image_is_cut_off(write_jsonl: Write, record: Record) -> None:
    """The image has 20 x 10 pixels. A box that rounds to the edge is inside."""
    boxes = [[-5, -5, 10, 5], [15, 5, 30, 30], [0, 0, 20.4, 10.4], [2, 2, 8, 8]]
    path = write_jsonl(*(record(str(i), regions=[{"label": "dog", "box": b}]) for i, b in enumerate(boxes)))
    source = JsonlSource(str(path))
    loaded = [source.load(q) for q in source.queries()]
    assert [image.clipped for image in loaded] == [True, True, False, False]
    assert [int(image.evidence[0].sum()) for image in loaded] == [50, 25, 200, 36]
    assert loaded[0].evidence[0][:5, :10].all()
    assert loaded[1].evidence[0][5:, 15:].all()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "truncated"),
        (lambda path: path.write_text("<html>"), "not an image"),
        (lambda path: path.unlink(), "no such file"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(
    write_jsonl: Write, record: Record, damage: Callable[[Path], None], says: str
) -> None:
    path = write_jsonl(record("one", image="b.jpg"))
    image = path.parent / "b.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(image)
    source = JsonlSource(str(path))
    [query] = source.queries()
    damage(image)
    with pytest.raises(DataError) as caught:
        source.load(query)
    message = str(caught.value)
    assert message.startswith(f"{path}: record 'one': ")
    assert str(image) in message
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("region", "says"),
    [
        ({"label": "dog", "box": [0, 0, 1, 1], "mask": {"size": [7, 7], "counts": [0, 49]}}, "size [7, 7]"),
        (
            {"label": "dog", "box": [0, 0, 1, 1], "mask": {"size": [10, 20], "counts": "~~~"}},
            "not a COCO RLE",
        ),
        ({"label": "dog", "box": [30, 30, 40, 40]}, "covers no pixel of the 20 x 10 image"),
    ],
)
def test_a_region_that_does_not_fit_is_named(
    write_jsonl: Write, record: Record, region: dict[str, Any], says: str
) -> None:
    path = write_jsonl(record("one", regions=[region]))
    for policy in ("raise", "skip"):
        source = JsonlSource(str(path), on_bad_record=policy)  # type: ignore[arg-type]
        with pytest.raises(DataError) as caught:
            source.load(source.queries()[0])
        assert str(caught.value).startswith(f"{path}: record 'one': ")
        assert says in str(caught.value)
        assert ("`on_bad_record: skip` leaves" in str(caught.value)) is (policy == "raise")


_TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30
).filter(str.strip)
_EDGE = st.floats(0, 500, allow_nan=False)


@st.composite
def _regions(draw: st.DrawFn) -> Region:
    x, y = draw(_EDGE), draw(_EDGE)
    box = (x, y, x + draw(st.floats(3.5, 100)), y + draw(st.floats(3.5, 100)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    mask = draw(st.none() | st.just(mask_to_rle(rng.random((9, 7)) < 0.4)))
    return Region(draw(_TEXT), box, mask, draw(st.none() | st.floats(0, 1)))


_QUERIES = st.builds(
    Query,
    id=_TEXT,
    image=st.just("a.png"),
    question=_TEXT,
    answer=_TEXT.map(lambda text: f"x {text}"),
    answer_type=st.sampled_from(ANSWER_TYPES),
    objects=st.lists(_TEXT, max_size=3).map(tuple),
    regions=st.lists(_regions(), max_size=3).map(tuple),
    category=st.none() | _TEXT,
    synonyms=st.lists(_TEXT, max_size=3).map(tuple),
).map(lambda query: replace(query, answer="No") if query.answer_type == "yes_no" else query)


@pytest.mark.slow
@given(st.lists(_QUERIES, min_size=1, max_size=4, unique_by=lambda q: q.id), st.booleans())
def test_queries_survive_a_file(queries: list[Query], ascii_only: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.png").touch()
        path = Path(folder, "queries.jsonl")
        lines = [json.dumps(asdict(q), ensure_ascii=ascii_only) for q in queries]
        path.write_bytes("\n".join(lines).encode())
        assert list(JsonlSource(str(path)).queries()) == queries
