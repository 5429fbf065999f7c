import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.text.confidence import render_response
from vlm_calibration.text.grading import Grade, grade, parse_answer

YES_NO = {
    # a word at the start decides
    "Yes": "yes",
    "yes.": "yes",
    "YES!": "yes",
    "**Yes**": "yes",
    "Yeah": "yes",
    "Absolutely.": "yes",
    "Definitely yes": "yes",
    "No": "no",
    "No.": "no",
    "Nope": "no",
    "Definitely not": "no",
    "Probably not": "no",
    "None": "no",
    "The answer is yes.": "yes",
    "Answer: No": "no",
    "I think no": "no",
    "Yes, there is no dog": "yes",
    "No, there is a cat": "no",
    # idioms
    "Yes, there is no doubt": "yes",
    "Yes, without a doubt.": "yes",
    "There is no doubt that there is a dog": "yes",
    # both
    "Yes and no": None,
    "Yes or no": None,
    "Yes/no": None,
    "Yes. No.": None,
    "No, yes": None,
    "Yes, but also no": None,
    "Yes, no": None,
    # cannot tell
    "I don't know": None,
    "I'm not sure": None,
    "Not sure": None,
    "It cannot be determined": None,
    "Maybe": None,
    "No idea": None,
    "It is hard to tell": None,
    # later clause
    "A dog? Yes.": "yes",
    "Is there a dog? No.": "no",
    "A dog, a cat. Yes. No.": None,
    # statements
    "There is no dog": "no",
    "There isn't any": "no",
    "I don't see a dog": "no",
    "I cannot see a dog": "no",
    "It is not red": "no",
    "There is a dog": "yes",
    "I see a dog, not a cat": "yes",
    "The image shows a dog": "yes",
    "Certainly, there is a dog.": "yes",
    "It is white": None,
    "A dog": None,
    "Is there a dog": None,
    "": None,
    "80%": None,
    # with a confidence
    "Yes. Confidence: 80%": "yes",
    "Confidence: 0.9. No": "no",
    "Answer: No\nConfidence: 80%": "no",
    "I am 80% sure there is a dog": "yes",
    "Yes 95%": "yes",
    '{"answer": "No", "confidence": 0.9}': "no",
}


@pytest.mark.parametrize(("text", "answer"), YES_NO.items())
def test_yes_no_answers(text, answer):
    assert parse_answer(text, "yes_no") == answer
    assert grade(text, "Yes", "yes_no") == Grade(answer, answer == "yes")
    assert grade(text, "no.", "yes_no") == Grade(answer, answer == "no")


RIGHT = [
    ("a dog", "dog"),
    ("Dogs.", "dog"),
    ("the DOG", "A dog"),
    ("It is a dog.", "dog"),
    ("It's a dog", "dog"),
    ("The answer is: dog", "dog"),
    ("Answer: It is a dog", "dog"),
    ("I see a dog.", "dog"),
    ("The object at the top left is a dog.", "dog"),
    ("At the top left, there is a dog", "dog"),
    ("In the top left corner of the image is a dog", "dog"),
    ("There is a dog at the top left of the image. It is brown.", "dog"),
    ("dog\nI can see its tail", "dog"),
    ("A dog. Confidence: 80%", "dog"),
    ('{"answer": "dog", "confidence": 0.9}', "dog"),
    ("two", "2"),
    ("2", "two"),
    ("Twenty-one", "21"),
    ("1,000", "1000"),
    ("50 %", "50%"),
    ("3.5", "3.5"),
    ("10:30", "10:30"),
    ("A", "a"),
    ("t-shirt", "T shirt"),
    ("Dr. Pepper", "dr pepper"),
    ("There is a light. It never goes out", "There is a light. It never goes out"),
    ("on the left", "on the left"),
    ("It is on the left", "on the left"),
    ("Ｄｏｇ", "dog"),
    ("犬", "犬"),
    ("don't walk", "Don’t walk"),
    ("shoes", "shoe"),
    ("buses", "bus"),
    ("boxes", "box"),
    ("knives", "knife"),
    ("berries", "berry"),
    ("cookies", "cookie"),
    ("tomatoes", "tomato"),
    ("people", "person"),
    ("firemen", "fireman"),
    ("horses", "horse"),
]
WRONG = [
    ("cat", "dog"),
    ("hot dog", "dog"),
    ("a dog or a cat", "dog"),
    ("dog, cat", "dog"),
    ("dog and cat", "dog"),
    ("It's not a dog", "dog"),
    ("There is no dog", "dog"),
    ("I don't know", "dog"),
    ("doghouse", "dog"),
    ("50", "50%"),
    ("-5", "5"),
    ("3.5", "35"),
    ("bus", "bush"),
    ("", "dog"),
    ("...", "dog"),
    ("Confidence: 80%", "dog"),
]


@pytest.mark.parametrize("answer_type", ["short", "open"])
@pytest.mark.parametrize(("text", "gold"), RIGHT)
def test_right_short_answers(text, gold, answer_type):
    assert grade(text, gold, answer_type).correct


@pytest.mark.parametrize("answer_type", ["short", "open"])
@pytest.mark.parametrize(("text", "gold"), WRONG)
def test_wrong_short_answers(text, gold, answer_type):
    assert not grade(text, gold, answer_type).correct


def test_synonyms_of_the_record_count():
    assert grade("a puppy", "dog", "short", ["Puppies", "hound"]) == Grade("puppy", True)
    assert not grade("a kitten", "dog", "short", ["puppy"]).correct
    assert not grade("", "dog", "short", [""]).correct


@pytest.mark.parametrize(
    ("text", "predicted"),
    [
        ("It is a Red  Bicycle!", "red bicycle"),
        ("two dogs", "2 dogs"),
        ("!", None),
        ("", None),
        ("It is", "it is"),
    ],
)
def test_the_predicted_short_answer_is_readable(text, predicted):
    assert parse_answer(text, "short") == predicted


@pytest.mark.parametrize("gold", ["dog", "", "yes and no"])
def test_a_gold_yes_no_answer_must_be_one(gold):
    with pytest.raises(ValueError, match="must be yes or no"):
        grade("yes", gold, "yes_no")


def test_a_gold_answer_must_not_be_empty():
    with pytest.raises(ValueError, match="gold answer of a short question is empty"):
        grade("dog", " . ", "short")


def test_an_unknown_answer_type_is_refused():
    with pytest.raises(ValueError, match="known: yes_no, short, open"):
        parse_answer("yes", "number")


@given(st.text(), st.sampled_from(["yes_no", "short", "open"]))
def test_any_text_can_be_graded(text, answer_type):
    result = grade(text, "no", answer_type)
    assert result.predicted == parse_answer(text, answer_type)
    if answer_type == "yes_no":
        assert result.predicted in ("yes", "no", None)


WORDS = st.lists(
    st.sampled_from(["dog", "cat", "tall", "bear", "grass", "berry", "bus", "two", "zebra"]),
    min_size=1,
    max_size=3,
)


@given(WORDS.map(" ".join), st.floats(0, 1))
def test_a_rendered_gold_answer_is_right(gold, confidence):
    assert grade(render_response(gold, confidence), gold, "short").correct


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        " ",
        ".",
        ",",
        "'",
        "-",
        "1",
        "1,",
        "1,111",
        "% ",
        "the ",
        "in the top left ",
        "there is ",
        "not ",
        "?",
        "\n",
        "犬",
    ],
)
def test_grading_time_is_linear_on_adversarial_text(piece):
    body = (piece * (100_000 // len(piece) + 1))[:100_000]
    start = time.process_time()
    for text in (f"It is {body}", f"Yes. {body} dog"):
        parse_answer(text, "short")
        parse_answer(text, "yes_no")
    # Takes up to 1 s; anything quadratic takes minutes.
    assert time.process_time() - start < 10
