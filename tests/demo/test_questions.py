"""What the demo model knows of a question, and the right answers to questions about a scene."""

from __future__ import annotations

import pytest

from vlm_calibration.demo.questions import (
    FORMS,
    SPLITS,
    known_question,
    question_about,
    right_answer,
    scene_queries,
    scene_seed,
    unknown_part,
)
from vlm_calibration.demo.scenes import CLASSES, CORNERS, scene_layout


def test_every_question_of_the_demo_is_known_and_has_its_right_answer() -> None:
    for split in SPLITS:
        for index in range(40):
            names, corners, *_ = scene_layout(scene_seed(split, index))
            objects = dict(zip(names, (CORNERS[corner] for corner in corners), strict=True))
            for query in scene_queries(split, index):
                assert unknown_part(query.question) is None
                known = known_question(query.question)
                assert known is not None
                assert question_about(*known) == query.question
                assert right_answer(query.question, objects) == query.answer


def test_capitals_spaces_and_the_question_mark_do_not_matter() -> None:
    for form, words in FORMS.items():
        question = question_about(form, words[-1])
        for variant in (question.lower(), question[:-1], f"  {question} ", question.replace(" ", "  ")):
            assert known_question(variant) == (form, words[-1])


@pytest.mark.parametrize(
    ("question", "unknown"),
    [
        ("Is there a zebra in the image?", "the word 'zebra'"),
        ("Are there dogs or cats?", "the words 'are', 'dogs', 'or', 'cats'"),
        ("What is in the middle?", "the word 'middle'"),
        ("Ist da ein Hund?", "the words 'ist', 'da', 'ein', 'hund'"),
    ],
)
def test_unknown_words_are_named_with_what_is_known(question: str, unknown: str) -> None:
    message = unknown_part(question)
    assert message is not None
    assert f"the demo model does not know {unknown}; it knows" in message
    for word in (*CLASSES, *CORNERS, "Which object is at the ... of the image?"):
        assert word in message
    assert known_question(question) is None
    assert right_answer(question, {"dog": "top left"}) is None


def test_an_unknown_form_is_answered_with_the_known_forms_of_its_object() -> None:
    message = unknown_part("Is the cat at the top left?") or ""
    assert "this form of question" in message
    assert '"Do you see a cat?"' in message
    assert "dog" not in message
    assert '"What is at the ...?"' in (unknown_part("What is the image?") or "")
    assert right_answer("What is at the top right?", {"dog": "top left"}) is None, "the corner is empty"
