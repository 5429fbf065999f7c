"""What published data leave to convention: format requests, answer types and several answers."""

from __future__ import annotations

import pytest

from vlm_calibration.records import RecordError
from vlm_calibration.text.conventions import combine_answers, infer_answer_type, strip_format_request


def test_the_request_for_a_single_word_is_removed() -> None:
    request = "Answer the question using a single word or phrase."
    for question, stripped in (
        (f"What is it?\n{request}", "What is it?"),
        ("What is it? Answer the question with a single word.", "What is it?"),
        ("What is it?Please answer using a single word or phrase.", "What is it?"),
        (f"{request}\nWhat is it?", "What is it?"),
        (f"A\nB. {request} ", "A\nB."),
    ):
        assert strip_format_request(question) == stripped
    choice = "What?\nA. dog\nAnswer with the option's letter from the given choices directly."
    for question in ("Which answer uses a single word or phrase?", request, choice):
        assert strip_format_request(question) == question


def test_the_type_of_an_answer() -> None:
    kinds = {
        "yes_no": ["Yes", "no.", "No, the man is wearing a red hat."],
        "short": ["Yes and no", "No, yes", "No parking", "Nothing", "a red bicycle", "2"],
        "open": ["A man rides a bicycle."],
    }
    assert {kind: [infer_answer_type(a) for a in answers] for kind, answers in kinds.items()} == {
        kind: [kind] * len(answers) for kind, answers in kinds.items()
    }


def test_several_answers() -> None:
    assert combine_answers(["dog", "dogs", "puppy"]) == ("dog", ("puppy",))
    annotators = ["dog"] * 4 + ["puppy"] * 3 + ["cat"] * 2 + ["the dog"] * 3
    assert combine_answers(annotators) == ("dog", ("puppy",))
    with pytest.raises(RecordError):
        combine_answers(["", " "])
