"""Questions that are unlike those that a threshold was chosen on."""

from __future__ import annotations

import random
import string

import pytest

from vlm_calibration.demo.questions import scene_queries
from vlm_calibration.text.known_questions import KnownQuestions

NAMES = "dog|cat|red car|teddy bear|traffic light|bird|cup|chair|bus|kite|sheep|sofa"
OBJECTS = NAMES.split("|")
QUESTIONS = [f"Is there a {name} in the image?" for name in OBJECTS]
QUESTIONS += [f"What is beside the {name}?" for name in OBJECTS]


@pytest.fixture(scope="module")
def known() -> KnownQuestions:
    return KnownQuestions.of(QUESTIONS * 3)


def test_other_combinations_of_known_words_in_a_known_form_are_familiar(known: KnownQuestions) -> None:
    for question in (*QUESTIONS, "is there a  RED teddy BEAR in the image", "What is beside the red bus?"):
        assert known.unfamiliar(question) is None


@pytest.mark.parametrize(
    ("question", "named"),
    [
        ("Is there a zebra in the image?", "zebra"),
        ("What is beside the dog today?", "today"),
        ("Is there a dog?", "is there a _"),
        ("Is there no dog in the image?", "no"),
        ("Is the dog beside the cat?", "is the _ beside the _"),
        ("What is there in the image?", "what is there in the image"),
        ("", "form ''"),
    ],
)
def test_what_is_new_is_named(known: KnownQuestions, question: str, named: str) -> None:
    assert named in str(known.unfamiliar(question))


def test_where_most_questions_are_new_newness_is_not_checked() -> None:
    draw = random.Random(0)
    questions = [" ".join(draw.choices(string.ascii_lowercase, k=6)) + f" w{n}" for n in range(300)]
    assert KnownQuestions.of(questions).unfamiliar("why not?") is None


def test_further_questions_of_the_same_source_are_seldom_unfamiliar() -> None:
    """Of the demo's scenes: at most the share that `MAX_NEW` allows."""
    asked = [query.question for n in range(150) for query in scene_queries("calibration", n)]
    known = KnownQuestions.of(asked)
    assert known.words
    assert known.forms
    further = [query.question for n in range(100) for query in scene_queries("test", n)]
    assert sum(known.unfamiliar(question) is not None for question in further) <= 0.05 * len(further)
    assert "zebra" in str(known.unfamiliar("Is there a zebra in the image?"))
