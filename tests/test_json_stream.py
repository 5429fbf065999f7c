"""Large JSON files value by value: the same values as `json`, each at its place, whatever is read at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_calibration import json_stream
from vlm_calibration.json_stream import json_elements, json_members, json_records, read_at
from vlm_calibration.records import DataError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
LAYOUTS = st.tuples(st.booleans(), st.sampled_from([None, 0, 3]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json")


def written(folder: Path, content: Any, layout: tuple[bool, int | None], mark: bytes = b"") -> Path:
    path = folder / "x.json"
    text = json.dumps(content, ensure_ascii=layout[0], indent=layout[1])
    path.write_bytes(mark + text.encode())
    return path


@settings(deadline=None)
@given(st.lists(VALUES, max_size=5), LAYOUTS, st.integers(1, 40), st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_elements_of_an_array(
    folder: Path, content: list[Any], layout: tuple[bool, int | None], chunk: int, mark: bytes
) -> None:
    path = written(folder, content, layout, mark)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        items = list(json_elements(path))
    assert [item.value for item in items] == content
    assert [read_at(path, item.offset, item.length) for item in items] == content
    text = path.read_bytes()
    assert [item.number for item in items] == [1 + text.count(b"\n", 0, item.offset) for item in items]


@settings(deadline=None)
@given(st.dictionaries(TEXTS, VALUES, max_size=5), LAYOUTS, st.integers(1, 40))
def test_members_of_an_object(
    folder: Path, content: dict[str, Any], layout: tuple[bool, int | None], chunk: int
) -> None:
    path = written(folder, content, layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        items, opened = list(json_members(path)), list(json_members(path, open_arrays=True))
    assert [(item.key, item.value) for item in items] == list(content.items())
    expected = [
        (key, element)
        for key, value in content.items()
        for element in (value if isinstance(value, list) else [value])
    ]
    assert [(item.key, item.value) for item in opened] == expected


@settings(deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=4), LAYOUTS, st.data(), st.integers(1, 40))
def test_a_file_that_is_cut_off_is_refused(
    folder: Path, content: list[Any], layout: tuple[bool, int | None], data: st.DataObject, chunk: int
) -> None:
    path = written(folder, content, layout)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        with pytest.raises(DataError, match="x.json"):
            list(json_elements(path))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[1,\n2\n3]", 3),
        ("[1,\n]", 2),
        ("[1]\n[2]", 2),
        ("{\n}", 1),
        ("[1,\n{'a': 2}]", 2),
        ("[1,\n\n nul]", 3),
    ],
)
def test_the_line_of_an_error_is_named(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        list(json_elements(path))
    assert str(caught.value).startswith(f"{path}:{line}: not JSON")


def test_an_error_far_from_the_end_of_what_was_read_stops_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[{"a": nil}' + ", 1" * json_stream.CHUNK + "]")
    with pytest.raises(DataError, match="x.json:1"):
        list(json_elements(path))


@pytest.mark.parametrize("text", ['{"a": 1', "{1: 2}", '{"a" 1}', "[]", '{"a": 1,}', '{"a": 1} x'])
def test_what_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match="x.json:1: not JSON"):
        list(json_members(path))


def test_bytes_that_are_not_utf_8_are_named_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'["a",\n"\xff"]')
    with pytest.raises(DataError, match="x.json:2: not UTF-8"):
        list(json_elements(path))


def test_an_array_and_json_lines_give_the_same_records(tmp_path: Path) -> None:
    rows = [{"a": "ü"}, {"a": "\n]"}]
    array, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    array.write_text("\n " + json.dumps(rows, indent=1))
    lines.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    for path in (array, lines):
        assert [item.read(lambda value: value) for item in json_records(path)] == rows
        assert [read_at(path, item.offset, item.length) for item in json_records(path)] == rows


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none.json: cannot be read"):
        list(json_records(tmp_path / "none.json"))
