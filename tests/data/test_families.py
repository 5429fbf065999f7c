"""The collators with families of models that differ, and PaliGemma, which has no chat template; built offline at toy size.

The tests decode the response, and compare the collators with the processor's own conversations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vlm_calibration.data.candidates import CandidateCollator, CandidateSettings
from vlm_calibration.data.collate import IGNORE, ChatFormat, PromptCollator, SFTCollator
from vlm_calibration.data.dataset import EvalSplit, PerturbedQueries
from vlm_calibration.data.noise import NoisePolicy, Sample
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.records import DataError
from vlm_calibration.text.confidence import render_response
from vlm_calibration.text.prompts import ElicitationPrompt

from ..models.families import FOUR
from ..models.processors import Family, cached_family
from .conftest import Listed

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
def unlike(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Samples with images of different sizes and shapes."""
    rng = np.random.default_rng(1)
    return [
        sample._replace(image=rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        for sample, size in zip(samples, [(20, 20), (33, 16), (48, 20), (14, 70)], strict=True)
    ]


def test_image_tokens_are_as_many_as_the_image_needs(
    family: Family, chat: ChatFormat, unlike: Sequence[Sample]
) -> None:
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
    assert chat.conversations("A dog?", ["Yes.", "No."]) == [
        chat.render("A dog?", r) for r in ("Yes.", "No.")
    ]


def test_inputs_are_those_of_the_processor(
    family: Family, chat: ChatFormat, unlike: Sequence[Sample]
) -> None:
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


def test_pairs_are_the_conversations(family: Family, chat: ChatFormat, unlike: Sequence[Sample]) -> None:
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


def test_an_image_that_the_processor_refuses_is_named(unlike: Sequence[Sample]) -> None:
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


def test_what_no_sample_alone_is_refused_for_is_raised_as_it_is(
    unlike: Sequence[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = ChatFormat(cached_family("gemma3").processor, ElicitationPrompt())
    inputs = chat.inputs

    def together(texts: list[str], *rest: Any) -> Any:
        if len(texts) > 1:
            raise ValueError("not together")
        return inputs(texts, *rest)

    monkeypatch.setattr(chat, "inputs", together)
    with pytest.raises(ValueError, match="^not together$"):
        PromptCollator(chat)(unlike)


def test_the_image_tokens_of_each_family_are_refused_in_text(
    family: Family, chat: ChatFormat, unlike: Sequence[Sample]
) -> None:
    for token in {family.processor.image_token, family.image_token}:
        for name in ("question", "answer"):
            query = replace(unlike[1].query, **{name: f"What is {token}?"})  # type: ignore[arg-type]
            with pytest.raises(DataError, match=f"record 'q1': '{name}' holds '{re.escape(token)}'"):
                PromptCollator(chat)([unlike[0], unlike[1]._replace(query=query)])
        with pytest.raises(DataError, match=f"record 'q1': 'wrong answer' holds '{re.escape(token)}'"):
            chat.check(unlike[1].query, ["Yes", f"a {token}"])
