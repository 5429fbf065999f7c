"""Rendered conversations: all responses at once as one by one, open turns ended, and the generation prompt before every response.

The collators with families of models are compared with the processor's own conversations.
"""

from __future__ import annotations

import re
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.data.candidates import CandidateCollator, CandidateSettings, tokenize_responses
from vlm_calibration.data.collate import IGNORE, ChatFormat, PromptCollator, SFTCollator
from vlm_calibration.data.dataset import EvalSplit, PerturbedQueries
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.records import DataError
from vlm_calibration.text.confidence import ElicitationPrompt, render_answer, render_response

from ..command_line import Patch
from ..demo.architecture import CHAT_TEMPLATE
from ..models.families import FOUR
from ..models.processors import Family, cached_family
from .conftest import Listed, Samples

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


Chats = dict[str, ChatFormat]


@pytest.fixture(scope="module")
def chats(processor: Any) -> Chats:
    return {name: _chat(processor, template) for name, template in TEMPLATES.items()}


@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    question=st.text("Yes. No%10 Confidence:?é", max_size=30),
    answers=st.lists(st.text("Yes. no%10:é\n", max_size=12), min_size=1, max_size=2),
    percents=st.lists(st.integers(0, 100), min_size=1, max_size=4, unique=True),
)
def test_conversations_are_those_rendered_one_by_one(
    chats: Chats, name: str, question: str, answers: list[str], percents: list[int]
) -> None:
    falling = sorted(percents, reverse=True)
    responses = [render_response(a, p / 100) for a in answers for p in falling]
    for texts in (responses, [render_answer(a) for a in answers]):
        one_by_one = [chats[name].render(question, text) for text in texts]
        assert chats[name].conversations(question, texts) == one_by_one


def test_a_template_that_inserts_text_unchanged_runs_twice(chats: Chats, monkeypatch: Patch) -> None:
    rendered: list[str] = []
    render = chats["unchanged"].render

    def counted(question: str, response: str) -> str:
        rendered.append(response)
        return render(question, response)

    monkeypatch.setattr(chats["unchanged"], "render", counted)
    chats["unchanged"].conversations("A dog?", [render_response("Yes", c / 10) for c in range(11)])
    assert len(rendered) == 2


def test_a_template_that_changes_text_changes_the_candidates_with_it(chats: Chats, samples: Samples) -> None:
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
    template = TEMPLATE
    for name, text in (("GENERATION", prompt_end), ("CONVERSATION", conversation), ("TAIL", tail)):
        template = template.replace(name, "{{ '" + text.replace("\n", "\\n") + "' }}")
    chat = _chat(processor, template)
    return chat.render("A dog?"), chat.render("A dog?", "Yes.")


@pytest.mark.parametrize(
    ("tail", "expected"),
    [*((tail, "<|end|>") for tail in ("", " ", "\n", " \n\n")), *((t, t) for t in ENDS)],
)
def test_an_open_turn_is_ended_and_the_templates_own_end_is_kept(
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
    template = TEMPLATE.replace("GENERATION", "P\n").replace("CONVERSATION", "P \n").replace("TAIL", " ")
    chat = _chat(processor, template)
    for question in ("", "?", "A dog? " * 30, "QUESTION1", "RESPONSE2", "P \n"):
        for response in ("", "Yes.", "RESPONSE2", "P \nP\n "):
            expected = f"<|user|><image>{question}<|end|>P\n{response}<|end|>"
            assert chat.render(question, response) == expected
            assert chat.conversations(question, [response, "No."])[0] == expected


def test_a_template_that_writes_the_question_in_two_ways_is_refused(processor: Any) -> None:
    chat = _chat(processor, "{% if add_generation_prompt %}Now: {% endif %}" + CHAT_TEMPLATE)
    with pytest.raises(DataError, match="the chat template of LlavaProcessor writes a question differently"):
        chat.render("A dog?", "Yes.")


def test_a_template_that_omits_responses_is_left_unchanged(processor: Any) -> None:
    template = TEMPLATE.replace("{{ message['content'][0]['text'] }}", "").replace("TAIL", " ")
    chat = _chat(processor, template)
    assert chat.render("A dog?", "Yes.") == "<|user|><image>A dog?<|end|>CONVERSATION "


# --- Families of models that differ, and PaliGemma, which has no chat template; built offline at toy size --------------------

REPHRASED = {
    "llava_clip": ("ASSISTANT: {} ", "ASSISTANT: {}</s>"),
    "llava_onevision": ("assistant \n{}<|im_end|>", "assistant\n{}<|im_end|>"),
}
"""Templates that write the response of a conversation differently from us, and our form."""


# PaliGemma 2 has no chat template.
@pytest.fixture(scope="module", params=[*FOUR, "paligemma2"])
def family(request: pytest.FixtureRequest) -> Family:
    return cached_family(request.param)


@pytest.fixture(scope="module")
def chat(family: Family) -> ChatFormat:
    return ChatFormat(family.processor, ElicitationPrompt("{question} How sure are you?"))


@pytest.fixture(scope="module")
def unlike(samples: Samples) -> Samples:
    """Samples with images of different sizes and shapes."""
    rng = np.random.default_rng(1)
    sizes = ((20, 20), (33, 16), (48, 20), (14, 70))
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return [sample._replace(image=image) for sample, image in zip(samples, images, strict=True)]


def test_image_tokens_are_as_many_as_needed(family: Family, chat: ChatFormat, unlike: Samples) -> None:
    image = family.processor.tokenizer.convert_tokens_to_ids(family.image_token)
    together = (SFTCollator(chat, 1000)(unlike).inputs["input_ids"] == image).sum(dim=1)
    alone = [int((SFTCollator(chat, 1000)([s]).inputs["input_ids"] == image).sum()) for s in unlike]
    assert together.tolist() == alone
    assert min(alone) > 0
    assert (len(set(alone)) > 1) == family.varies


def test_a_conversation_is_the_templates(family: Family, chat: ChatFormat) -> None:
    """Except for an unfinished turn, and for text before the model's answer that is missing before a given answer."""
    if family.processor.chat_template is None:
        assert chat.render("A dog?", "Yes.") == "<image><bos>A dog? How sure are you?\nYes.<eos>"
        return
    asked = [{"type": "image"}, {"type": "text", "text": chat.prompt.render("A dog?")}]
    answered = [{"type": "text", "text": "Yes."}]
    conversation = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    theirs = family.processor.apply_chat_template(conversation, tokenize=False)
    written, ours = (text.format("Yes.") for text in REPHRASED.get(family.name, ("", "")))
    assert theirs.endswith(written)
    assert chat.render("A dog?", "Yes.") == theirs.removesuffix(written) + ours
    both = [chat.render("A dog?", response) for response in ("Yes.", "No.")]
    assert chat.conversations("A dog?", ["Yes.", "No."]) == both


def test_inputs_are_those_of_the_processor(family: Family, chat: ChatFormat, unlike: Samples) -> None:
    """PaliGemma's processor writes the conversation itself, from the prompt and the response as a `suffix`."""
    responses = [render_response(s.answer, s.confidence) for s in unlike]
    texts = [chat.render(s.query.question, r) for s, r in zip(unlike, responses, strict=True)]
    more: dict[str, Any] = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    if family.processor.chat_template is None:
        texts = [f"<image>{chat.prompt.render(s.query.question)}" for s in unlike]
        more["suffix"] = responses
    bos = family.processor.tokenizer.bos_token or "none"
    more["add_special_tokens"] = not texts[0].startswith((bos, "<image>"))
    theirs = family.processor(images=[[s.image] for s in unlike], text=texts, **more)
    batch = SFTCollator(chat, 1000)(unlike)
    labels = theirs.pop("labels", batch.labels)
    assert torch.equal(batch.labels, labels)
    assert batch.inputs.keys() == theirs.keys()
    for name, values in theirs.items():
        assert torch.equal(batch.inputs[name], values), name


def test_pairs_are_the_conversations(family: Family, chat: ChatFormat, unlike: Samples) -> None:
    unlike = [s._replace(confidence=c) for s, c in zip(unlike, (1.0, 0.3, 0.0, 0.8), strict=True)]
    training = SFTCollator(chat, 1000)(unlike)
    pairs = CandidateCollator(chat, LinearLevels(), CandidateSettings(), 1000)(unlike)
    for row, sample in enumerate(unlike):
        labels, length = training.labels[row], int(pairs.lengths[row])
        assert int((labels != IGNORE).nonzero()[0]) == length
        for name, values in pairs.inputs.items():
            if values.shape == pairs.inputs["input_ids"].shape:
                assert torch.equal(values[row, :length], training.inputs[name][row, :length]), name
        [same] = [c for c in pairs.candidates[row] if c.confidence == sample.confidence]
        assert list(same.tokens) == labels[labels != IGNORE].tolist()


def test_an_image_that_the_processor_refuses_is_named(unlike: Samples) -> None:
    """By the collators, and by the dataset, which perturbs images at the model's resolution."""
    processor = cached_family("qwen2_5_vl").processor
    chat = ChatFormat(processor, ElicitationPrompt())
    line = unlike[2]._replace(image=np.zeros((2, 500, 3), dtype=np.uint8))
    pairs = CandidateCollator(chat, LinearLevels(), CandidateSettings(), 1000)
    for collate in (SFTCollator(chat, 1000), PromptCollator(chat), pairs):
        with pytest.raises(DataError, match=r"^record 'q2': .*ratio must be smaller than 200, got 250"):
            collate([unlike[0], line, unlike[1]])  # type: ignore[operator]
    split = EvalSplit(Listed(line.query, size=(2, 500)))
    with pytest.raises(DataError, match=r"^record 'q2': an image of 500 x 2 pixels: .*smaller than 200"):
        PerturbedQueries({"": split}, NoisePolicy(), processor.image_processor)[0, 0]


def test_what_no_sample_alone_is_refused_for_is_raised_as_it_is(unlike: Samples, monkeypatch: Patch) -> None:
    chat = ChatFormat(cached_family("gemma3").processor, ElicitationPrompt())
    inputs = chat.inputs

    def together(texts: list[str], *rest: Any) -> Any:
        if len(texts) > 1:
            raise ValueError("not together")
        return inputs(texts, *rest)

    monkeypatch.setattr(chat, "inputs", together)
    with pytest.raises(ValueError, match="^not together$"):
        PromptCollator(chat)(unlike)


def test_image_tokens_are_refused_in_text(family: Family, chat: ChatFormat, unlike: Samples) -> None:
    for token in {family.processor.image_token, family.image_token}:
        for name in ("question", "answer"):
            query = replace(unlike[1].query, **{name: f"What is {token}?"})  # type: ignore[arg-type]
            with pytest.raises(DataError, match=f"record 'q1': '{name}' holds '{re.escape(token)}'"):
                PromptCollator(chat)([unlike[0], unlike[1]._replace(query=query)])
        with pytest.raises(DataError, match=f"record 'q1': 'wrong answer' holds '{re.escape(token)}'"):
            chat.check(unlike[1].query, ["Yes", f"a {token}"])
