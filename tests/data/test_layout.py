"""How conversations are written where a template leaves something open, and that nothing else is touched."""

from __future__ import annotations

from copy import copy
from typing import Any

import pytest

from vlm_calibration.data.collate import ChatFormat
from vlm_calibration.demo.architecture import CHAT_TEMPLATE
from vlm_calibration.records import DataError
from vlm_calibration.text.prompts import ElicitationPrompt

ASKED = "<|user|><image>A dog?<|end|><|assistant|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|><image>{{ message['content'][1]['text'] }}<|end|>"
    "{% else %}BEGUN{{ message['content'][0]['text'] }}TAIL{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}PROMPTED{% endif %}"
)


def _chat(processor: Any, template: str) -> ChatFormat:
    own = copy(processor)
    own.chat_template = template
    return ChatFormat(own, ElicitationPrompt("{question}"))


def _rendered(processor: Any, prompted: str, begun: str, tail: str) -> tuple[str, str]:
    parts = {"PROMPTED": prompted, "BEGUN": begun, "TAIL": tail}
    template = TEMPLATE
    for name, text in parts.items():
        template = template.replace(name, "{{ '" + text.replace("\n", "\\n") + "' }}")
    chat = _chat(processor, template)
    return chat.render("A dog?"), chat.render("A dog?", "Yes.")


@pytest.mark.parametrize("tail", ["", " ", "\n", " \n\n"])
def test_a_turn_that_is_left_open_is_ended(processor: Any, tail: str) -> None:
    asked, answered = _rendered(processor, "<|assistant|>", "<|assistant|>", tail)
    assert asked == ASKED
    assert answered == ASKED + "Yes.<|end|>"


@pytest.mark.parametrize("tail", ["<|end|>", "<|end|>\n", "</turn>\n", " over"])
def test_an_end_of_the_templates_own_is_kept(processor: Any, tail: str) -> None:
    """Whether or not the tokenizer takes it for special."""
    _, answered = _rendered(processor, "<|assistant|>", "<|assistant|>", tail)
    assert answered == ASKED + "Yes." + tail


@pytest.mark.parametrize(
    ("prompted", "begun", "expected"),
    [
        ("<|assistant|>", "<|assistant|>", "<|assistant|>"),
        ("<|assistant|>", "<|assistant|> ", "<|assistant|> "),
        ("<|assistant|>\n", "<|assistant|> \n", "<|assistant|>\n"),
        ("<|assistant|> ", "<|assistant|>", "<|assistant|> "),
        ("<|assistant|>Well, ", "<|assistant|>", "<|assistant|>Well, "),
        ("<|assistant|>", "<|assistant|>Well, ", "<|assistant|>Well, "),
        ("<|assistant|>", "", "<|assistant|>"),
        ("", "<|assistant|>", "<|assistant|>"),
    ],
    ids=repr,
)
def test_what_a_prompt_ends_with_stands_before_the_response(
    processor: Any, prompted: str, begun: str, expected: str
) -> None:
    asked, answered = _rendered(processor, prompted, begun, "<|end|>")
    assert asked.endswith("?<|end|>" + prompted)
    assert answered == ASKED.removesuffix("<|assistant|>") + expected + "Yes.<|end|>"
    assert answered.startswith(asked)


def test_a_question_of_any_length_is_followed_by_the_prompts_end(processor: Any) -> None:
    chat = _chat(processor, TEMPLATE.replace("PROMPTED", "P\n").replace("BEGUN", "P \n").replace("TAIL", " "))
    for question in ("", "?", "A dog? " * 30, "QUESTION1", "RESPONSE2", "P \n"):
        for response in ("", "Yes.", "RESPONSE2", "P \nP\n "):
            expected = f"<|user|><image>{question}<|end|>P\n{response}<|end|>"
            assert chat.render(question, response) == expected
            assert chat.conversations(question, [response, "No."])[0] == expected


def test_a_template_that_writes_the_question_in_two_ways_is_refused(processor: Any) -> None:
    template = "{% if add_generation_prompt %}Now: {% endif %}" + CHAT_TEMPLATE
    chat = _chat(processor, template)
    with pytest.raises(DataError, match="the chat template of LlavaProcessor writes a question in one way"):
        chat.render("A dog?", "Yes.")


def test_a_template_that_leaves_responses_out_is_taken_as_it_is(processor: Any) -> None:
    _, answered = _rendered(processor, "<|assistant|>", "<|assistant|>", "<|end|>")
    template = TEMPLATE.replace("{{ message['content'][0]['text'] }}", "").replace("TAIL", " ")
    chat = _chat(processor, template)
    assert chat.render("A dog?", "Yes.") == "<|user|><image>A dog?<|end|>BEGUN "
    assert answered == ASKED + "Yes.<|end|>"
