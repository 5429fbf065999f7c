"""Records: valid and invalid records, messages that name the culprit, and the groups of a category."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.records import Query, RecordError, category_groups, query_from_dict

MINIMAL = {"id": "a", "image": "a.png", "question": "Dog?", "answer": "Yes", "answer_type": "yes_no"}
REGION = {"label": "dog", "box": [0, 0, 3, 3]}


def test_minimal_and_full_record() -> None:
    """Null means left out."""
    assert query_from_dict(MINIMAL) == Query("a", "a.png", "Dog?", "Yes", "yes_no")
    optional = ("objects", "regions", "category", "synonyms", "absent", "wrong_answers")
    assert query_from_dict({**MINIMAL, **dict.fromkeys(optional)}) == query_from_dict(MINIMAL)
    region = {**REGION, "mask": {"size": [2, 2], "counts": [0, 4]}, "score": 0.5}
    empty = {**REGION, "mask": {"size": None, "counts": None}, "score": None}
    full = query_from_dict(
        {**MINIMAL, "objects": ["dog"], "regions": [region, empty], "category": "x/y", "synonyms": ["yep"]}
    )
    assert full.regions[0].box == (0.0, 0.0, 3.0, 3.0)
    assert (full.regions[0].score, full.regions[1].mask) == (0.5, None)
    assert (full.objects, full.category, full.synonyms) == (("dog",), "x/y", ("yep",))


@pytest.mark.parametrize("key", ["id", "image", "question", "answer", "answer_type"])
def test_a_missing_key_is_named_and_so_is_a_blank_text(key: str) -> None:
    with pytest.raises(RecordError, match=rf"'{key}' is missing"):
        query_from_dict({k: v for k, v in MINIMAL.items() if k != key})
    for blank in ("", " ", "\t\n", "\x1c", "\u00a0\x1f", "\u2003", "a\x00"):
        with pytest.raises(RecordError, match=f"'{key}' must be"):
            query_from_dict({**MINIMAL, key: blank})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"id": 7.0}, "'id' must be a non-empty string of valid characters, found 7.0"),
        ({"id": True}, "'id' must be a non-empty string of valid characters, found True"),
        ({"answer": None}, "'answer' must be a non-empty string of valid characters, found None"),
        ({"answer_type": "boolean"}, "'answer_type' must be one of yes_no, short, open, found 'boolean'"),
        ({"answer_type": ["short"]}, "'answer_type' must be one of"),
        ({"category": 3}, "'category' must be a non-empty string of valid characters, found 3"),
        ({"objects": "dog"}, "'objects' must be a list of non-empty strings of valid characters, found 'd"),
        ({"objects": "x" * 10_000}, "'objects' must be a list of non-empty strings"),
        ({"objects": ["dog", ""]}, "'objects' must be a list of non-empty strings"),
        ({"synonyms": {"a": 1}}, "'synonyms' must be a list of non-empty strings"),
        ({"regions": REGION}, "'regions' should be a valid list"),
        ({"regions": [REGION, "dog"]}, "regions[1] expected an object with the keys label, box"),
        ({"regions": [{"box": [0, 0, 1, 1]}]}, "'regions[0].label' is missing"),
        ({"regions": [{**REGION, "colour": 1}]}, "unknown key 'regions[0].colour'; there are label, box"),
        ({"regions": [{**REGION, "box": [0, 0, 1]}]}, "'regions[0].box' must be four finite numbers"),
        ({"regions": [{**REGION, "box": [0, 0, True, 1]}]}, "box' must be four finite numbers"),
        ({"regions": [{**REGION, "box": [0, 0, float("nan"), 1]}]}, "box' must be four finite numbers"),
        ({"regions": [{**REGION, "box": [2, 0, 2, 1]}]}, "'box' must have x1 > x0"),
        ({"regions": [{**REGION, "box": [0, 3, 2, 1]}]}, "'box' must have x1 > x0 and y1 > y0"),
        ({"regions": [{**REGION, "mask": "abc"}]}, "'regions[0].mask' should be a valid dictionary"),
        ({"regions": [{**REGION, "mask": {"size": [2, 2]}}]}, "'mask' must be a COCO RLE"),
        ({"regions": [{**REGION, "score": 1.5}]}, "'regions[0].score' must be a number in [0, 1], found 1.5"),
        ({"question": "\ud800"}, r"non-empty string of valid characters, found '\ud800'"),
        ({"objects": ["\udfff"]}, "'objects' must be a list of non-empty strings of valid characters"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RecordError) as caught:
        query_from_dict({**MINIMAL, **change})
    assert says in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_whole_number_is_an_id_and_only_an_object_is_a_query() -> None:
    for number in (1, 0, -7, 2**63):
        assert query_from_dict({**MINIMAL, "id": number}).id == str(number)
    for data in ([], "text", 3, None, True):
        with pytest.raises(RecordError, match="expected an object with the keys id, image"):
            query_from_dict(data)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=8,
)


@given(st.sampled_from(sorted(MINIMAL) + ["objects", "regions", "category", "synonyms"]), _JSON)
def test_whatever_a_file_holds_is_a_query_or_a_record_error(key: str, value: Any) -> None:
    regions = ({**REGION, name: value} for name in ("box", "mask", "score"))
    for change in ({key: value}, *({"regions": [region]} for region in (value, *regions))):
        try:
            query = query_from_dict({**MINIMAL, **change})
        except RecordError:
            continue
        assert query == query_from_dict(json.loads(json.dumps(asdict(query))))


def test_category_groups() -> None:
    groups = {None: (), "": (), "a/a": ("a",), "/a//b/": ("a", "b"), "a/b/c": ("a", "b", "c")}
    assert {category: category_groups(category) for category in groups} == groups
