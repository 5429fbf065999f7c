"""From samples to tensors: positions of the labels, side of the padding, and samples that are too long.

The response's tokens are checked by decoding them.
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


@pytest.fixture
def own_processor(digit_processor: Any) -> Any:
    """A processor that a test may change."""
    return deepcopy(digit_processor)


def _collate(chat: ChatFormat, samples: Sequence[Sample], max_length: int = 400, **settings: Any) -> SFTBatch:
    return SFTCollator(chat, max_length, **settings)(samples)


def _decode(chat: ChatFormat, ids: torch.Tensor) -> str:
    return chat.processor.tokenizer.decode(ids).strip()


def test_labels_are_the_answer_then_the_masked_confidence_and_the_end(
    chat: ChatFormat, samples: Sequence[Sample]
) -> None:
    batch = _collate(chat, samples)
    assert not batch.confidence_mask[batch.labels == IGNORE].any()
    for row, sample in enumerate(samples):
        labels, mask = batch.labels[row], batch.confidence_mask[row]
        learned = labels != IGNORE
        assert torch.equal(labels[learned], batch.inputs["input_ids"][row][learned])
        assert _decode(chat, labels[learned]) == render_response(sample.answer, sample.confidence) + "<|end|>"
        assert _decode(chat, labels[learned & ~mask]) == render_answer(sample.answer)
        stated = _decode(chat, labels[mask])
        assert re.fullmatch(r"Confidence: \d+%<\|end\|>", stated)
        assert parse_confidence(stated) == sample.confidence
        positions = learned.nonzero()[:, 0]
        assert positions.diff().eq(1).all(), "in one piece"
        assert positions[-1] == batch.inputs["attention_mask"][row].sum() - 1, "at the end"


def test_training_and_generation_have_the_same_prompt_padded_on_the_right_and_on_the_left(
    chat: ChatFormat, samples: Sequence[Sample]
) -> None:
    training, prompts = _collate(chat, samples), PromptCollator(chat)(samples).inputs
    image = chat.processor.tokenizer.convert_tokens_to_ids("<image>")
    for row in range(len(samples)):
        ids, masks = (
            [inputs[name][row] for inputs in (training.inputs, prompts)]
            for name in ("input_ids", "attention_mask")
        )
        assert masks[0].diff().le(0).all()
        assert masks[1].diff().ge(0).all()
        for own_ids, mask in zip(ids, masks, strict=True):
            assert (own_ids[mask == 0] == chat.processor.tokenizer.pad_token_id).all()
        prompt = ids[1][masks[1].bool()]
        assert (prompt == image).sum() == IMAGE_TOKENS
        assert torch.equal(ids[0][: len(prompt)], prompt)
        assert (training.labels[row] != IGNORE).nonzero()[0, 0] == len(prompt)
        assert torch.equal(training.inputs["pixel_values"][row], prompts["pixel_values"][row])
    assert (prompts["attention_mask"][:, 0] == 0).any()


def test_the_batch_carries_queries_confidences_and_perturbations(
    processor: Any, samples: Sequence[Sample]
) -> None:
    chat = ChatFormat(processor, ElicitationPrompt())
    batch = _collate(chat, samples)
    assert (batch.queries, batch.skipped) == (tuple(s.query for s in samples), ())
    assert torch.equal(batch.confidence, torch.tensor([1.0, 0.3, 0.0, 0.85]))
    perturbations = (CLEAN, Perturbation("noise", 0.3), Perturbation("blur", 0.5), Perturbation("noise", 1.0))
    steps = (0, 300, None, 1000)
    changed = zip(samples, perturbations, steps, strict=True)
    prompts = PromptCollator(chat)([s._replace(perturbation=p, noise_step=step) for s, p, step in changed])
    assert (prompts.perturbations, prompts.noise_steps) == (perturbations, steps)
    assert (prompts.queries, prompts.levels) == (batch.queries, (1.0, 0.3, 0.0, 0.85))
    moved = batch.to("meta")
    tensors = [moved.labels, moved.confidence_mask, moved.confidence, moved.is_correct]
    tensors += [*moved.inputs.values(), *prompts.to("meta").inputs.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_the_answer_can_contain_numbers_and_markup(chat: ChatFormat, samples: Sequence[Sample]) -> None:
    for answer in ("80%", "Confidence: 10%", "7", "two\nlines", "<b>dog</b>", "é日本", "Yes!", "a. b. c"):
        query = replace(samples[0].query, answer=answer, answer_type="open")
        batch = _collate(chat, [samples[0]._replace(query=query, confidence=0.8)])
        response = _decode(chat, batch.labels[0][batch.labels[0] != IGNORE])
        assert response == render_response(answer, 0.8) + "<|end|>"
        assert _decode(chat, batch.labels[0][batch.confidence_mask[0]]) == "Confidence: 80%<|end|>"
    ended = _collate(chat, [samples[0]._replace(query=replace(samples[0].query, answer="Yes <|end|> no"))])
    assert _decode(chat, ended.labels[0][ended.confidence_mask[0]]) == "Confidence: 100%<|end|>"


def test_too_long_is_an_error_that_names_the_record_or_skipped_and_listed(
    chat: ChatFormat, samples: Sequence[Sample]
) -> None:
    longest = int(_collate(chat, samples).inputs["attention_mask"][3].sum())
    assert _collate(chat, samples, longest).skipped == ()
    with pytest.raises(DataError, match=f"record 'q3': {longest} tokens, more than max_length {longest - 1}"):
        _collate(chat, samples, longest - 1)
    batch = _collate(chat, samples, longest - 1, on_too_long="skip")
    expected = _collate(chat, samples[:3])
    assert (batch.skipped, batch.queries) == (("q3",), expected.queries)
    assert torch.equal(batch.labels, expected.labels)
    assert all(torch.equal(batch.inputs[k], expected.inputs[k]) for k in expected.inputs)
    nothing = _collate(chat, samples, IMAGE_TOKENS, on_too_long="skip").to("cpu")
    assert (nothing.inputs, nothing.queries, nothing.skipped) == ({}, (), ("q0", "q1", "q2", "q3"))
    assert nothing.labels.numel() == nothing.confidence_mask.numel() == nothing.confidence.numel() == 0
    limit = int(PromptCollator(chat)(samples).inputs["attention_mask"].sum(1).max()) - 1
    prompts = PromptCollator(chat, max_length=limit, on_too_long="skip")(samples)
    assert (prompts.skipped, prompts.queries) == (("q3",), tuple(s.query for s in samples[:3]))
    with pytest.raises(DataError, match=f"record 'q3': .*max_length {limit}"):
        PromptCollator(chat, max_length=limit)(samples)


def test_nothing_is_truncated_even_if_the_tokenizer_would(
    own_processor: Any, samples: Sequence[Sample]
) -> None:
    own_processor.tokenizer.model_max_length = 20
    batch = _collate(ChatFormat(own_processor, ElicitationPrompt()), samples)
    image = own_processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch.inputs["input_ids"] == image).sum(dim=1).tolist() == [IMAGE_TOKENS] * 4


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


def test_a_processor_without_a_template_or_that_changes_the_response_is_refused(
    own_processor: Any, samples: Sequence[Sample]
) -> None:
    class Shouting(LlavaProcessor):
        def __call__(self, text: Any = None, **rest: Any) -> Any:
            return super().__call__(text=[t.replace("Confidence", "CONFIDENCE") for t in text], **rest)

    own_processor.__class__ = Shouting
    with pytest.raises(DataError, match="record 'q0': Shouting changes the text"):
        _collate(ChatFormat(own_processor, ElicitationPrompt()), samples)
    own_processor.chat_template = None
    with pytest.raises(DataError, match="Shouting has no chat template"):
        ChatFormat(own_processor, ElicitationPrompt())
