"""Rendered conversations: open turns are ended, the generation prompt precedes every response, and nothing else changes."""

from __future__ import annotations

from copy import copy
from typing import Any

import pytest

from vlm_calibration.data.collate import ChatFormat
from vlm_calibration.demo.architecture import CHAT_TEMPLATE
from vlm_calibration.records import DataError
from vlm_calibration.text.prompts import ElicitationPrompt

PROMPT = "<|user|><image>A dog?<|end|><|assistant|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|><image>{{ message['content'][1]['text'] }}<|end|>"
    "{% else %}CONVERSATION{{ message['content'][0]['text'] }}TAIL{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}GENERATION{% endif %}"
)


def _chat(processor: Any, template: str) -> ChatFormat:
    own = copy(processor)
    own.chat_template = template
    return ChatFormat(own, ElicitationPrompt("{question}"))


def _render(processor: Any, prompt_end: str, conversation: str, tail: str) -> tuple[str, str]:
    parts = {"GENERATION": prompt_end, "CONVERSATION": conversation, "TAIL": tail}
    template = TEMPLATE
    for name, text in parts.items():
        template = template.replace(name, "{{ '" + text.replace("\n", "\\n") + "' }}")
    chat = _chat(processor, template)
    return chat.render("A dog?"), chat.render("A dog?", "Yes.")


@pytest.mark.parametrize("tail", ["", " ", "\n", " \n\n"])
def test_a_turn_that_is_left_open_is_ended(processor: Any, tail: str) -> None:
    prompt, answered = _render(processor, "<|assistant|>", "<|assistant|>", tail)
    assert prompt == PROMPT
    assert answered == PROMPT + "Yes.<|end|>"


@pytest.mark.parametrize("tail", ["<|end|>", "<|end|>\n", "</turn>\n", " over"])
def test_the_templates_own_end_of_turn_is_kept(processor: Any, tail: str) -> None:
    """Whether or not it is a special token."""
    _, answered = _render(processor, "<|assistant|>", "<|assistant|>", tail)
    assert answered == PROMPT + "Yes." + tail


@pytest.mark.parametrize(
    ("prompt_end", "conversation", "expected"),
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
def test_the_end_of_the_prompt_precedes_the_response(
    processor: Any, prompt_end: str, conversation: str, expected: str
) -> None:
    prompt, answered = _render(processor, prompt_end, conversation, "<|end|>")
    assert prompt.endswith("?<|end|>" + prompt_end)
    assert answered == PROMPT.removesuffix("<|assistant|>") + expected + "Yes.<|end|>"
    assert answered.startswith(prompt)


def test_the_end_of_the_prompt_follows_any_question(processor: Any) -> None:
    chat = _chat(
        processor, TEMPLATE.replace("GENERATION", "P\n").replace("CONVERSATION", "P \n").replace("TAIL", " ")
    )
    for question in ("", "?", "A dog? " * 30, "QUESTION1", "RESPONSE2", "P \n"):
        for response in ("", "Yes.", "RESPONSE2", "P \nP\n "):
            expected = f"<|user|><image>{question}<|end|>P\n{response}<|end|>"
            assert chat.render(question, response) == expected
            assert chat.conversations(question, [response, "No."])[0] == expected


def test_a_template_that_writes_the_question_in_two_ways_is_refused(processor: Any) -> None:
    template = "{% if add_generation_prompt %}Now: {% endif %}" + CHAT_TEMPLATE
    chat = _chat(processor, template)
    with pytest.raises(DataError, match="the chat template of LlavaProcessor writes a question differently"):
        chat.render("A dog?", "Yes.")


def test_a_template_that_omits_responses_is_left_unchanged(processor: Any) -> None:
    _, answered = _render(processor, "<|assistant|>", "<|assistant|>", "<|end|>")
    template = TEMPLATE.replace("{{ message['content'][0]['text'] }}", "").replace("TAIL", " ")
    chat = _chat(processor, template)
    assert chat.render("A dog?", "Yes.") == "<|user|><image>A dog?<|end|>CONVERSATION "
    assert answered == PROMPT + "Yes.<|end|>"
