"""Which regions are evidence for a query, and whether its answer states that the object is absent."""

from __future__ import annotations

import pytest

from vlm_calibration.demo.scenes import CLASSES
from vlm_calibration.records import Query, RecordError
from vlm_calibration.text.labels import answer_is_no, check_answer, is_evidence
from vlm_calibration.text.matching import same_phrase


def _query(answer: str = "Yes", kind: str = "yes_no", *objects: str) -> Query:
    return Query("q", "a.png", "A dog?", answer, kind, objects=objects)  # type: ignore[arg-type]


SAME = """dog|Dog dog|DOGS dog|a_dog a_dog|The_Dogs an_apple|apples bus|buses box|boxes berry|berries knife|knives
wolf|wolves leaf|leaves child|children person|People woman|women man|men mouse|mice foot|feet tooth|teeth goose|geese sheep|Sheep
potato|potatoes bench|benches dish|dishes glass|glasses shoe|shoes toe|toes lens|lenses skis|a_ski canvas|canvases cactus|cacti
traffic_light|Traffic_lights hot_dog|hot-dogs wine_glass|the_wine_glasses tie|ties house|houses vase|vases die|dice horse|horses
key|keys fireman|firemen shelf|shelves dress|dresses ox|oxen taxi|taxis quiz|quizzes"""
OTHER = """dog|cat dog|hot_dog car|red_car bus|bush glass|grass cat|cattle ship|sheep ear|bear man|woman ski|sky bear|teddy_bear
tie|toe box|ox leaf|loaf pan|panda dress|address a|the ???|!!!"""


def _pairs(text: str) -> list[list[str]]:
    return [pair.replace("_", " ").split("|") for pair in text.split()]


@pytest.mark.parametrize(("name", "label"), _pairs(SAME))
def test_a_label_names_an_object_in_whatever_case_article_and_number(name: str, label: str) -> None:
    assert same_phrase(name, label)
    assert is_evidence(_query("Yes", "yes_no", "zebra", name), label)
    assert is_evidence(_query("Yes", "yes_no", label), name)


@pytest.mark.parametrize(("name", "label"), _pairs(OTHER))
def test_another_object_is_no_evidence(name: str, label: str) -> None:
    assert not is_evidence(_query("Yes", "yes_no", name), label)
    assert not is_evidence(_query("Yes", "yes_no", label), name)


def test_without_objects_every_region_is_evidence() -> None:
    assert is_evidence(_query(), "anything")


def test_no_two_objects_of_the_demo_are_taken_for_one_another() -> None:
    assert [(a, b) for a in CLASSES for b in CLASSES if a != b and same_phrase(a, b)] == []


@pytest.mark.parametrize(
    ("answer", "kind", "denied"),
    [
        ("No", "yes_no", True),
        ("no.", "yes_no", True),
        ("No, there is none", "yes_no", True),
        ("There is no dog", "yes_no", True),
        ("Yes", "yes_no", False),
        ("Yes, there is no doubt", "yes_no", False),
        ("no", "short", False),
        ("There is no dog.", "open", False),
    ],
)
def test_only_a_no_to_a_yes_no_question_says_that_something_is_absent(
    answer: str, kind: str, denied: bool
) -> None:
    assert answer_is_no(_query(answer, kind)) is denied


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (
            "banana",
            "yes_no",
            "record 'q': the gold answer of a yes/no question must be yes or no, got 'banana'",
        ),
        ("?!", "short", "record 'q': the gold answer of a short question is empty: '?!'"),
        ("...", "open", "record 'q': the gold answer of a open question is empty: '...'"),
    ],
)
def test_an_answer_that_nothing_can_be_graded_by_is_refused(answer: str, kind: str, says: str) -> None:
    with pytest.raises(RecordError) as caught:
        check_answer(_query(answer, kind))
    assert str(caught.value) == says
    for good, its_kind in (("yes!", "yes_no"), ("3", "short"), ("♥", "short"), ("狗", "open")):
        check_answer(_query(good, its_kind))
