"""Questions: the prompt around one, published conventions, and questions unlike those that a threshold was chosen on."""

from __future__ import annotations

import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.demo.questions import scene_queries
from vlm_calibration.records import RecordError
from vlm_calibration.text.conventions import combine_answers, infer_answer_type, strip_format_request
from vlm_calibration.text.known_questions import KnownQuestions
from vlm_calibration.text.prompts import ElicitationPrompt


def test_the_default_asks_for_the_answer_and_then_a_percentage_and_plants_no_number() -> None:
    prompt = ElicitationPrompt().render("Is there a dog?")
    assert prompt.startswith("Is there a dog?\n")
    instruction = prompt.removeprefix("Is there a dog?\n")
    assert instruction.index("Answer") < instruction.index("confidence") < instruction.index("%")
    assert not any(character.isdigit() for character in instruction)
    assert len(instruction.split()) < 40


@given(st.text())
def test_the_question_is_inserted_as_it_is(question: str) -> None:
    assert ElicitationPrompt("<{question}>").render(question) == f"<{question}>"
    assert ElicitationPrompt('{question} {{"as": ...}}').render(question) == f'{question} {{"as": ...}}'


@pytest.mark.parametrize(
    "template",
    [
        *("How sure are you?", "", "{question} {level}", "{question} {}", "{question[0]}"),
        *("{question.upper}", "{question!r}", "{question:>10}", "{question", "{question}}"),
    ],
)
def test_a_wrong_template_is_refused_by_name(template: str) -> None:
    with pytest.raises(ValueError, match="double literal braces") as error:
        ElicitationPrompt(template)
    assert repr(template) in str(error.value)


# --- Published data: format requests, answer types and several answers ------------------------------------------------------


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


# --- Unfamiliar questions -------------------------------------------------------------------------------------------------


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
