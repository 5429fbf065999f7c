"""Rendered conversations: all responses at once as one by one, open turns ended, and the generation prompt before every response."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.data.candidates import tokenize_responses
from vlm_calibration.data.collate import ChatFormat
from vlm_calibration.data.noise import Sample
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.records import DataError
from vlm_calibration.text.confidence import render_answer, render_response
from vlm_calibration.text.prompts import ElicitationPrompt

from ..demo.architecture import CHAT_TEMPLATE

PART = "part['text']"
TEMPLATES = {
    "unchanged": CHAT_TEMPLATE,
    "upper case": CHAT_TEMPLATE.replace(PART, f"{PART} | upper"),
    "stripped": CHAT_TEMPLATE.replace(PART, f"{PART} | trim"),
    "doubled": CHAT_TEMPLATE.replace(PART, f"{PART} + ' ' + {PART}"),
    "omitted": CHAT_TEMPLATE.replace(PART, "''"),
    "marked when certain": CHAT_TEMPLATE.replace(PART, f"({PART} + '!' if '100%' in {PART} else {PART})"),
    "with a line break": CHAT_TEMPLATE.replace("<|end|>", "<|end|>\n"),
}


def _chat(processor: Any, template: str) -> ChatFormat:
    own = copy(processor)
    own.chat_template = template
    return ChatFormat(own, ElicitationPrompt("{question}"))


@pytest.fixture(scope="module")
def chats(processor: Any) -> dict[str, ChatFormat]:
    return {name: _chat(processor, template) for name, template in TEMPLATES.items()}


@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    question=st.text("Yes. No%10 Confidence:?é", max_size=30),
    answers=st.lists(st.text("Yes. no%10:é\n", max_size=12), min_size=1, max_size=2),
    percents=st.lists(st.integers(0, 100), min_size=1, max_size=4, unique=True),
)
def test_conversations_are_those_rendered_one_by_one(
    chats: dict[str, ChatFormat], name: str, question: str, answers: list[str], percents: list[int]
) -> None:
    falling = sorted(percents, reverse=True)
    responses = [render_response(a, p / 100) for a in answers for p in falling]
    for texts in (responses, [render_answer(a) for a in answers]):
        one_by_one = [chats[name].render(question, text) for text in texts]
        assert chats[name].conversations(question, texts) == one_by_one


def test_a_template_that_inserts_text_unchanged_runs_twice(
    chats: dict[str, ChatFormat], monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[str] = []
    render = chats["unchanged"].render

    def counted(question: str, response: str) -> str:
        rendered.append(response)
        return render(question, response)

    monkeypatch.setattr(chats["unchanged"], "render", counted)
    chats["unchanged"].conversations("A dog?", [render_response("Yes", c / 10) for c in range(11)])
    assert len(rendered) == 2


def test_a_template_that_changes_text_changes_the_candidates_with_it(
    chats: dict[str, ChatFormat], samples: Sequence[Sample]
) -> None:
    chat, decode = chats["upper case"], chats["upper case"].processor.tokenizer.decode
    _, candidates = tokenize_responses(chat, samples[0].query, ["Yes"], LinearLevels())
    for candidate in candidates:
        percent = round(candidate.confidence * 100)
        assert decode(candidate.tokens).strip() == f"YES. CONFIDENCE: {percent}%<|end|>"
        assert decode(candidate.tokens[: candidate.answer_length]).strip() == "YES."


# --- Where a response begins and ends --------------------------------------------------------------------------------


ENDS = ("<|end|>", "<|end|>\n", "</turn>\n", " over")
PROMPT = "<|user|><image>A dog?<|end|><|assistant|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|><image>{{ message['content'][1]['text'] }}<|end|>"
    "{% else %}CONVERSATION{{ message['content'][0]['text'] }}TAIL{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}GENERATION{% endif %}"
)


def _render(processor: Any, prompt_end: str, conversation: str, tail: str) -> tuple[str, str]:
    parts = {"GENERATION": prompt_end, "CONVERSATION": conversation, "TAIL": tail}
    template = TEMPLATE
    for name, text in parts.items():
        template = template.replace(name, "{{ '" + text.replace("\n", "\\n") + "' }}")
    chat = _chat(processor, template)
    return chat.render("A dog?"), chat.render("A dog?", "Yes.")


@pytest.mark.parametrize(
    ("tail", "expected"),
    [*((tail, "<|end|>") for tail in ("", " ", "\n", " \n\n")), *((t, t) for t in ENDS)],
)
def test_a_turn_that_is_left_open_is_ended_and_the_templates_own_end_is_kept(
    processor: Any, tail: str, expected: str
) -> None:
    """Whether or not it is a special token."""
    prompt, answered = _render(processor, "<|assistant|>", "<|assistant|>", tail)
    assert prompt == PROMPT
    assert answered == PROMPT + "Yes." + expected


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
    template = TEMPLATE.replace("{{ message['content'][0]['text'] }}", "").replace("TAIL", " ")
    chat = _chat(processor, template)
    assert chat.render("A dog?", "Yes.") == "<|user|><image>A dog?<|end|>CONVERSATION "
