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
    assert ElicitationPrompt('{question} {{"as": ...}}').render(question) == f'{question} {{"as": ...}}'


@pytest.mark.parametrize(
    "template",
    [
        *("How sure are you?", "", "{question} {level}", "{question} {}", "{question[0]}"),
        *("{question.upper}", "{question!r}", "{question:>10}", "{question", "{question}}"),
    ],
)
def test_a_wrong_template_is_refused_by_name(template):
    with pytest.raises(ValueError, match="double literal braces") as error:
        ElicitationPrompt(template)
    assert repr(template) in str(error.value)
