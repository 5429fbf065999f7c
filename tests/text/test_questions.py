"""Questions: the prompt around one, published conventions, and questions unlike those that a threshold was chosen on.

Also which regions are evidence for a query, and which objects its answer says are absent.
"""

from __future__ import annotations

import random
import re
import string
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.data.convert.reading import combine_answers, infer_answer_type, strip_format_request
from vlm_calibration.demo.questions import scene_queries
from vlm_calibration.demo.scenes import CLASSES
from vlm_calibration.estimators.decision import KnownQuestions
from vlm_calibration.records import Query, RecordError
from vlm_calibration.text import labels
from vlm_calibration.text.confidence import ElicitationPrompt, render_response
from vlm_calibration.text.labels import absent_objects, check_answer, is_evidence, unlocated_objects
from vlm_calibration.text.matching import same_phrase


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
    for kind, answers in kinds.items():
        assert {infer_answer_type(answer) for answer in answers} == {kind}


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


# --- Evidence, absent objects, and forms of questions ------------------------------------------------------------------------


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
    assert is_evidence(_query(), label), "without objects every region is evidence"


def test_no_two_objects_of_the_demo_are_taken_for_one_another() -> None:
    assert [(a, b) for a in CLASSES for b in CLASSES if a != b and same_phrase(a, b)] == []


def test_only_a_no_to_a_yes_no_question_says_that_something_is_absent() -> None:
    for answer in ("No", "no.", "No, there is none", "There is no dog"):
        assert labels.answer_is_no(_query(answer, "yes_no"))
        assert not labels.answer_is_no(_query(answer, "short"))
    for answer in ("Yes", "Yes, there is no doubt"):
        assert not labels.answer_is_no(_query(answer, "yes_no"))


def test_an_answer_that_nothing_can_be_graded_by_is_refused() -> None:
    for answer, kind in (("banana", "yes_no"), ("?!", "short"), ("...", "open")):
        with pytest.raises(RecordError, match=rf"record 'q': .*(?:: |got ){re.escape(repr(answer))}"):
            check_answer(_query(answer, kind))
    for good, kind in (("yes!", "yes_no"), ("3", "short"), ("♥", "short"), ("狗", "open")):
        check_answer(_query(good, kind))


@pytest.mark.parametrize(
    ("question", "answer", "objects", "absent"),
    [
        ("Is there a dog on the sofa?", "No", ("sofa", "dog"), ("dog",)),
        ("Is there a dog on the sofa?", "Yes", ("sofa", "dog"), ()),
        ("Do you see any dogs?", "no.", ("a dog",), ("a dog",)),
        ("Are there no dogs?", "Yes", ("dog",), ("dog",)),
        ("Are there no dogs?", "No", ("dog",), ()),
        ("Is the dog on the sofa?", "No", ("dog", "sofa"), ()),
        ("Is the car red?", "No", ("car",), ()),
        ("Are there two dogs?", "No", ("dogs",), ()),
        ("Is there direct contact between the dog and the cat?", "No", ("dog", "cat"), ()),
        ("Is there a poodle?", "No", ("dog",), ("dog",)),
        ("Is there a dog?", "No", (), ()),
    ],
)
def test_an_object_is_absent_if_the_existence_that_is_asked_for_is_denied(
    question: str, answer: str, objects: tuple[str, ...], absent: tuple[str, ...]
) -> None:
    query = Query("q", "x", question, answer, "yes_no", objects)
    assert absent_objects(query) == absent
    assert not labels.denies_existence(replace(query, answer_type="short"))
    assert unlocated_objects(query, [*objects, "tree"]) == []
    assert unlocated_objects(query, ["tree"]) == [name for name in objects if name not in absent]


def test_what_the_query_says_of_absence_comes_before_the_form_of_its_question() -> None:
    query = Query("q", "x", "Is there a dog near a cat?", "No", "yes_no", ("dog", "cat"), absent=("a cat",))
    assert absent_objects(query) == ("a cat",)
    assert unlocated_objects(query, []) == ["dog"]
    assert is_evidence(Query("q", "x", "So?", "No", "yes_no", absent=("dog",)), "dog")
    assert not is_evidence(Query("q", "x", "So?", "No", "yes_no", absent=("dog",)), "cat")


def _form(question: str, *objects: str) -> str:
    return labels.question_form(Query("q", "x", question, "1", "short", objects))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("What colour is the car?", "car"), ("what color is a bus?", "bus"), False),
        (("What colour is the car?", "car"), ("What colour is a red bus?", "bus", "red bus"), True),
        (("How many dogs are there?", "dog"), ("How many traffic lights are in it?", "traffic lights"), True),
        (("How many dogs are there?", "dog"), ("How much is the dog?", "dog"), False),
        (("What is the man holding?", "man"), ("What is the woman holding?", "woman"), True),
        (("What is the man holding?", "man"), ("What is the man wearing?", "man"), False),
        (("Where is it?",), ("Where is it?",), True),
    ],
)
def test_questions_that_differ_in_their_objects_are_of_one_form(
    one: tuple[str, ...], other: tuple[str, ...], same: bool
) -> None:
    assert (_form(*one) == _form(*other)) == same


def test_stated_confidences_and_boxes_are_refused_and_other_answers_are_not() -> None:
    stated = ["I am 90% sure it is a dog", "Yes, with 80% confidence", "信心: 80%"]
    stated += [render_response("A dog", percent / 100) for percent in range(101)]
    for answer in (*stated, "[0.35, 0.2, 0.51, 1]", "(1,2,3,4)"):
        with pytest.raises(RecordError):
            check_answer(_query(answer, "open"))
    sure = ("The man looks confident.", "I am not sure.", "A sure-footed goat")
    for answer in (*sure, "50%", "Yes, 50%", "0.5", "1, 2, 3, 4"):
        check_answer(_query(answer, "open"))
