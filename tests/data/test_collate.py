"""From samples to tensors: positions of the labels, side of the padding, and samples that are too long.

The response's tokens are checked by decoding them. Two kinds of tokenizer matter: the demo's, in which a percentage is one
token, and one that splits numbers into digits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlavaProcessor

from vlm_calibration.data.collate import IGNORE, ChatFormat, PromptCollator, SFTBatch, SFTCollator
from vlm_calibration.data.noise import Sample
from vlm_calibration.perturbation.levels import CLEAN, Perturbation
from vlm_calibration.records import DataError
from vlm_calibration.text.confidence import parse_confidence, render_answer, render_response
from vlm_calibration.text.prompts import ElicitationPrompt

from ..demo.architecture import CHAT_TEMPLATE, IMAGE_TOKENS


@pytest.fixture(scope="module", params=["one token a percentage", "digit by digit"])
def chat(request: pytest.FixtureRequest, processor: Any, digit_processor: Any) -> ChatFormat:
    plain = request.param == "one token a percentage"
    return ChatFormat(processor if plain else digit_processor, ElicitationPrompt())


@pytest.fixture
def own_processor(digit_processor: Any) -> Any:
    """A processor that a test may change."""
    return deepcopy(digit_processor)


def _collate(chat: ChatFormat, samples: Sequence[Sample], max_length: int = 400, **settings: Any) -> SFTBatch:
    return SFTCollator(chat, max_length, **settings)(samples)


def _decode(chat: ChatFormat, ids: torch.Tensor) -> str:
    return chat.processor.tokenizer.decode(ids)


def test_labels_are_the_answer_then_the_masked_confidence_and_the_end(
    chat: ChatFormat, samples: Sequence[Sample]
) -> None:
    batch = _collate(chat, samples)
    assert not batch.confidence_mask[batch.labels == IGNORE].any()
    for row, sample in enumerate(samples):
        labels, mask = batch.labels[row], batch.confidence_mask[row]
        learned = labels != IGNORE
        assert torch.equal(labels[learned], batch.inputs["input_ids"][row][learned])
        response = render_response(sample.query.answer, sample.confidence) + "<|end|>"
        assert _decode(chat, labels[learned]).lstrip() == response
        assert _decode(chat, labels[learned & ~mask]).strip() == render_answer(sample.query.answer)
        stated = _decode(chat, labels[mask])
        assert re.fullmatch(r"\s*Confidence: \d+%<\|end\|>", stated)
        assert parse_confidence(stated) == sample.confidence
        positions = learned.nonzero()[:, 0]
        assert positions.diff().eq(1).all(), "in one piece"
        assert positions[-1] == batch.inputs["attention_mask"][row].sum() - 1, "at the end"


def test_training_is_padded_on_the_right_and_generation_on_the_left(
    chat: ChatFormat, samples: Sequence[Sample]
) -> None:
    training = _collate(chat, samples).inputs
    prompts = PromptCollator(chat)(samples).inputs
    for inputs, on_the_right in ((training, True), (prompts, False)):
        lengths = inputs["attention_mask"].sum(dim=1)
        assert len(set(lengths.tolist())) > 1
        for row, length in enumerate(lengths):
            mask = inputs["attention_mask"][row]
            tokens = mask[:length] if on_the_right else mask[len(mask) - length :]
            assert tokens.all()
            assert (inputs["input_ids"][row][mask == 0] == chat.processor.tokenizer.pad_token_id).all()
    assert (training["input_ids"] == chat.processor.tokenizer.convert_tokens_to_ids("<image>")).sum(
        1
    ).tolist() == [IMAGE_TOKENS] * len(samples)


def test_training_and_generation_have_the_same_prompt(chat: ChatFormat, samples: Sequence[Sample]) -> None:
    training = _collate(chat, samples)
    prompts = PromptCollator(chat)(samples)
    for row in range(len(samples)):
        prompt = prompts.inputs["input_ids"][row][prompts.inputs["attention_mask"][row].bool()]
        assert torch.equal(training.inputs["input_ids"][row][: len(prompt)], prompt)
        first = (training.labels[row] != IGNORE).nonzero()[0, 0]
        assert first == len(prompt)
        assert torch.equal(training.inputs["pixel_values"][row], prompts.inputs["pixel_values"][row])


def test_the_batch_carries_queries_confidences_and_perturbations(
    chat: ChatFormat, samples: Sequence[Sample]
) -> None:
    batch = _collate(chat, samples)
    assert batch.queries == tuple(s.query for s in samples)
    assert batch.skipped == ()
    assert batch.confidence.dtype == torch.float32
    assert batch.confidence.tolist() == pytest.approx([1.0, 0.3, 0.0, 0.85])
    perturbations = (CLEAN, Perturbation("noise", 0.3), Perturbation("blur", 0.5), Perturbation("noise", 1.0))
    steps = (0, 300, None, 1000)
    changed = zip(samples, perturbations, steps, strict=True)
    prompts = PromptCollator(chat)([s._replace(perturbation=p, noise_step=step) for s, p, step in changed])
    assert prompts.perturbations == perturbations
    assert (prompts.noise_steps, prompts.levels) == (steps, (1.0, 0.3, 0.0, 0.85))
    assert prompts.queries == batch.queries
    moved = batch.to("meta")
    assert {
        t.device.type for t in [*moved.inputs.values(), moved.labels, moved.confidence_mask, moved.confidence]
    } == {"meta"}
    assert {t.device.type for t in prompts.to("meta").inputs.values()} == {"meta"}


def test_the_answer_can_contain_numbers_and_markup(chat: ChatFormat, samples: Sequence[Sample]) -> None:
    for answer in ("80%", "Confidence: 10%", "7", "two\nlines", "<b>dog</b>", "é日本", "Yes!", "a. b. c"):
        query = replace(samples[0].query, answer=answer, answer_type="open")
        batch = _collate(chat, [Sample(query, samples[0].image, 0.8, CLEAN, 0)])
        response = _decode(chat, batch.labels[0][batch.labels[0] != IGNORE]).strip()
        assert response == render_response(answer, 0.8) + "<|end|>"
        assert _decode(chat, batch.labels[0][batch.confidence_mask[0]]).lstrip() == "Confidence: 80%<|end|>"
    ended = _collate(chat, [samples[0]._replace(query=replace(samples[0].query, answer="Yes <|end|> no"))])
    assert _decode(chat, ended.labels[0][ended.confidence_mask[0]]).lstrip() == "Confidence: 100%<|end|>"


@pytest.mark.parametrize("change", [{"question": "<image>\nA dog?"}, {"answer": "<image>"}])
@pytest.mark.parametrize("collator", [lambda chat: SFTCollator(chat, 400), PromptCollator])
def test_text_with_the_image_token_is_refused(
    chat: ChatFormat, samples: Sequence[Sample], change: dict[str, str], collator: Any
) -> None:
    query = replace(samples[1].query, **change)  # type: ignore[arg-type]
    [name] = change
    with pytest.raises(DataError, match=f"record 'q1': '{name}' holds '<image>'"):
        collator(chat)([samples[0], samples[1]._replace(query=query)])


def test_too_long_is_an_error_that_names_the_record_or_skipped_and_listed(
    chat: ChatFormat, samples: Sequence[Sample]
) -> None:
    lengths = [int(_collate(chat, [s]).inputs["attention_mask"].sum()) for s in samples]
    assert max(lengths) == lengths[3]
    assert _collate(chat, samples, lengths[3]).skipped == ()
    says = f"record 'q3': {lengths[3]} tokens, more than max_length {lengths[3] - 1}"
    with pytest.raises(DataError, match=says):
        _collate(chat, samples, lengths[3] - 1)
    batch = _collate(chat, samples, lengths[3] - 1, on_too_long="skip")
    expected = _collate(chat, samples[:3])
    assert (batch.skipped, batch.queries) == (("q3",), expected.queries)
    assert torch.equal(batch.labels, expected.labels)
    assert all(torch.equal(batch.inputs[k], expected.inputs[k]) for k in expected.inputs)
    nothing = _collate(chat, samples, IMAGE_TOKENS, on_too_long="skip").to("cpu")
    assert (nothing.inputs, nothing.queries, nothing.skipped) == ({}, (), ("q0", "q1", "q2", "q3"))
    assert nothing.labels.numel() == nothing.confidence_mask.numel() == nothing.confidence.numel() == 0


def test_nothing_is_truncated_even_if_the_tokenizer_would(
    own_processor: Any, samples: Sequence[Sample]
) -> None:
    own_processor.tokenizer.model_max_length = 20
    batch = _collate(ChatFormat(own_processor, ElicitationPrompt()), samples)
    image = own_processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch.inputs["input_ids"] == image).sum(dim=1).tolist() == [IMAGE_TOKENS] * 4


def test_a_processor_without_a_template_is_refused(own_processor: Any) -> None:
    own_processor.chat_template = None
    with pytest.raises(DataError, match="LlavaProcessor has no chat template"):
        ChatFormat(own_processor, ElicitationPrompt())


@pytest.mark.parametrize("eos", ["<|end|>", "</s>"])
def test_text_after_the_end_of_turn_is_not_learnt(
    own_processor: Any, samples: Sequence[Sample], eos: str
) -> None:
    tokenizer = own_processor.tokenizer
    tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": ["<|end|>"]})
    own_processor.chat_template = CHAT_TEMPLATE.replace("<|end|>", "<|end|>\n")
    batch = _collate(ChatFormat(own_processor, ElicitationPrompt()), samples)
    for labels in batch.labels:
        assert tokenizer.decode(labels[labels != IGNORE]).endswith("%<|end|>")


def test_a_processor_that_changes_the_response_is_refused(
    own_processor: Any, samples: Sequence[Sample]
) -> None:
    class Shouting(LlavaProcessor):
        def __call__(self, text: Any = None, **rest: Any) -> Any:
            return super().__call__(text=[t.replace("Confidence", "CONFIDENCE") for t in text], **rest)

    own_processor.__class__ = Shouting
    with pytest.raises(DataError, match="record 'q0': Shouting changes the text"):
        _collate(ChatFormat(own_processor, ElicitationPrompt()), samples)
