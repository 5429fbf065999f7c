"""What published data leave to convention: format requests, answer types, several answers, and confidences in answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.records import RecordError
from vlm_calibration.text.confidence import render_response
from vlm_calibration.text.conventions import (
    check_trainable,
    combine_answers,
    infer_answer_type,
    strip_format_request,
)


@pytest.mark.parametrize(
    ("question", "stripped"),
    [
        ("What is it?\nAnswer the question using a single word or phrase.", "What is it?"),
        ("What is it? Answer the question with a single word.", "What is it?"),
        ("What is it?Please answer using a single word or phrase.", "What is it?"),
        ("Answer the question using a single word or phrase.\nWhat is it?", "What is it?"),
        ("A\nB. Answer the question using a single word or phrase. ", "A\nB."),
        ("Which answer uses a single word or phrase?", "Which answer uses a single word or phrase?"),
        (
            "Answer the question using a single word or phrase.",
            "Answer the question using a single word or phrase.",
        ),
        (
            "What?\nA. dog\nAnswer with the option's letter from the given choices directly.",
            "What?\nA. dog\nAnswer with the option's letter from the given choices directly.",
        ),
    ],
)
def test_the_request_for_a_single_word_is_removed(question: str, stripped: str) -> None:
    assert strip_format_request(question) == stripped


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("Yes", "yes_no"),
        ("no.", "yes_no"),
        ("No, the man is wearing a red hat.", "yes_no"),
        ("Yes and no", "short"),
        ("No, yes", "short"),
        ("No parking", "short"),
        ("Nothing", "short"),
        ("a red bicycle", "short"),
        ("2", "short"),
        ("A man rides a bicycle.", "open"),
    ],
)
def test_the_type_of_an_answer(answer: str, kind: str) -> None:
    assert infer_answer_type(answer) == kind


@given(st.sampled_from(["Yes", "A dog", "It is a long answer to a question."]), st.integers(0, 100))
def test_our_own_statements_are_refused(answer: str, percent: int) -> None:
    with pytest.raises(RecordError):
        check_trainable(render_response(answer, percent / 100))


@pytest.mark.parametrize("answer", ["[0.35, 0.2, 0.51, 1]", "(1,2,3,4)"])
def test_boxes_are_refused(answer: str) -> None:
    with pytest.raises(RecordError):
        check_trainable(answer)


@pytest.mark.parametrize("answer", ["I am 90% sure it is a dog", "Yes, with 80% confidence", "信心: 80%"])
def test_stated_confidences_are_refused(answer: str) -> None:
    with pytest.raises(RecordError):
        check_trainable(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "50%",
        "Yes, 50%",
        "The man looks confident.",
        "I am not sure.",
        "A sure-footed goat",
        "0.5",
        "1, 2, 3, 4",
    ],
)
def test_other_answers_are_not(answer: str) -> None:
    check_trainable(answer)


def test_several_answers() -> None:
    assert combine_answers(["dog", "dogs", "puppy"]) == ("dog", ("puppy",))
    annotators = ["dog"] * 4 + ["puppy"] * 3 + ["cat"] * 2 + ["the dog"] * 3
    assert combine_answers(annotators) == ("dog", ("puppy",))
    with pytest.raises(RecordError):
        combine_answers(["", " "])
