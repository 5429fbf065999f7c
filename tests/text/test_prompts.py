import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.text.prompts import ElicitationPrompt


def test_the_default_asks_for_the_answer_and_then_a_percentage_and_plants_no_number():
    prompt = ElicitationPrompt().render("Is there a dog?")
    assert prompt.startswith("Is there a dog?\n")
    instruction = prompt.removeprefix("Is there a dog?\n")
    assert instruction.index("Answer") < instruction.index("confidence") < instruction.index("%")
    assert not any(character.isdigit() for character in instruction)
    assert len(instruction.split()) < 40


@given(st.text())
def test_the_question_is_inserted_as_it_is(question):
    assert ElicitationPrompt("<{question}>").render(question) == f"<{question}>"


def test_doubled_braces_are_literal():
    assert (
        ElicitationPrompt('{question} As {{"answer": ...}}.').render("Q {x}") == 'Q {x} As {"answer": ...}.'
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("How sure are you?", "lacks the placeholder {question}"),
        ("", "lacks the placeholder {question}"),
        ("{question} {level}", "unknown placeholders ['level']"),
        ("{question} {}", "unknown placeholders ['']"),
        ("{question[0]}", "unknown placeholders ['question[0]']"),
        ("{question.upper}", "unknown placeholders"),
        ("{question!r}", "takes no format or conversion"),
        ("{question:>10}", "takes no format or conversion"),
        ("{question", "double literal braces"),
        ("{question}}", "double literal braces"),
    ],
)
def test_a_wrong_template_is_refused_by_name(template, message):
    with pytest.raises(ValueError, match="prompt template") as error:
        ElicitationPrompt(template)
    assert message in str(error.value)
    assert repr(template) in str(error.value)


def test_prompts_are_values():
    assert ElicitationPrompt("a {question}") == ElicitationPrompt("a {question}") != ElicitationPrompt()
    assert pickle.loads(pickle.dumps(ElicitationPrompt())) == ElicitationPrompt()
