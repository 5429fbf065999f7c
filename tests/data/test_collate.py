"""From samples to tensors: positions of the labels, side of the padding, samples that are too long, and candidate responses.

The tokens of responses are checked by decoding them.
"""

from __future__ import annotations

import re
from collections import Counter
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import LlavaProcessor

from vlm_calibration.data.candidates import (
    CandidateBatch,
    CandidateCollator,
    CandidateSettings,
    collate_validation,
    stated_levels,
)
from vlm_calibration.data.collate import IGNORE, ChatFormat, PromptCollator, SFTBatch, SFTCollator
from vlm_calibration.perturbation.level_table import LevelTable
from vlm_calibration.perturbation.levels import CLEAN, NOISE, AnchoredLevels, LinearLevels, Perturbation
from vlm_calibration.records import DataError
from vlm_calibration.text.confidence import (
    ElicitationPrompt,
    parse_confidence,
    render_answer,
    render_response,
)

from ..demo.architecture import CHAT_TEMPLATE, IMAGE_TOKENS
from ..level_tables import noise_counts
from .conftest import Samples


@pytest.fixture
def demo_chat(processor: Any) -> ChatFormat:
    return ChatFormat(processor, ElicitationPrompt())


@pytest.fixture
def own_processor(digit_processor: Any) -> Any:
    """A processor that a test may change."""
    return deepcopy(digit_processor)


def _collate(chat: ChatFormat, samples: Samples, max_length: int = 400, **settings: Any) -> SFTBatch:
    return SFTCollator(chat, max_length, **settings)(samples)


def _decode(chat: ChatFormat, ids: torch.Tensor) -> str:
    return chat.processor.tokenizer.decode(ids).strip()


def test_labels_are_the_answer_the_masked_confidence_and_the_end(chat: ChatFormat, samples: Samples) -> None:
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


def test_training_pads_the_same_prompt_right_and_generation_left(chat: ChatFormat, samples: Samples) -> None:
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


def test_the_batch_carries_queries_and_perturbations(demo_chat: ChatFormat, samples: Samples) -> None:
    batch = _collate(demo_chat, samples)
    assert (batch.queries, batch.skipped) == (tuple(s.query for s in samples), ())
    assert torch.equal(batch.confidence, torch.tensor([1.0, 0.3, 0.0, 0.85]))
    perturbations = (CLEAN, Perturbation("noise", 0.3), Perturbation("blur", 0.5), Perturbation("noise", 1.0))
    steps = (0, 300, None, 1000)
    changed = zip(samples, perturbations, steps, strict=True)
    drawn = [s._replace(perturbation=p, noise_step=step) for s, p, step in changed]
    prompts = PromptCollator(demo_chat)(drawn)
    assert (prompts.perturbations, prompts.noise_steps) == (perturbations, steps)
    assert (prompts.queries, prompts.levels) == (batch.queries, (1.0, 0.3, 0.0, 0.85))
    moved = batch.to("meta")
    tensors = [moved.labels, moved.confidence_mask, moved.confidence, moved.is_correct]
    tensors += [*moved.inputs.values(), *prompts.to("meta").inputs.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_the_answer_can_contain_numbers_and_markup(chat: ChatFormat, samples: Samples) -> None:
    for answer in ("80%", "Confidence: 10%", "7", "two\nlines", "<b>dog</b>", "é日本", "Yes!", "a. b. c"):
        query = replace(samples[0].query, answer=answer, answer_type="open")
        batch = _collate(chat, [samples[0]._replace(query=query, confidence=0.8)])
        response = _decode(chat, batch.labels[0][batch.labels[0] != IGNORE])
        assert response == render_response(answer, 0.8) + "<|end|>"
        assert _decode(chat, batch.labels[0][batch.confidence_mask[0]]) == "Confidence: 80%<|end|>"
    ended = _collate(chat, [samples[0]._replace(query=replace(samples[0].query, answer="Yes <|end|> no"))])
    assert _decode(chat, ended.labels[0][ended.confidence_mask[0]]) == "Confidence: 100%<|end|>"


def test_too_long_is_an_error_or_skipped_and_listed(chat: ChatFormat, samples: Samples) -> None:
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


def test_nothing_is_truncated_even_if_the_tokenizer_would(own_processor: Any, samples: Samples) -> None:
    own_processor.tokenizer.model_max_length = 20
    batch = _collate(ChatFormat(own_processor, ElicitationPrompt()), samples)
    image = own_processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch.inputs["input_ids"] == image).sum(dim=1).tolist() == [IMAGE_TOKENS] * 4


@pytest.mark.parametrize("eos", ["<|end|>", "</s>"])
def test_text_after_the_end_of_turn_is_not_learnt(own_processor: Any, samples: Samples, eos: str) -> None:
    tokenizer = own_processor.tokenizer
    tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": ["<|end|>"]})
    own_processor.chat_template = CHAT_TEMPLATE.replace("<|end|>", "<|end|>\n")
    batch = _collate(ChatFormat(own_processor, ElicitationPrompt()), samples)
    for labels in batch.labels:
        assert tokenizer.decode(labels[labels != IGNORE]).endswith("%<|end|>")


def test_a_processor_that_changes_the_response_is_refused(own_processor: Any, samples: Samples) -> None:
    class Shouting(LlavaProcessor):
        def __call__(self, text: Any = None, **rest: Any) -> Any:
            return super().__call__(text=[t.replace("Confidence", "CONFIDENCE") for t in text], **rest)

    own_processor.__class__ = Shouting
    with pytest.raises(DataError, match="record 'q0': Shouting changes the text"):
        _collate(ChatFormat(own_processor, ElicitationPrompt()), samples)
    own_processor.chat_template = None
    with pytest.raises(DataError, match="Shouting has no chat template"):
        ChatFormat(own_processor, ElicitationPrompt())


# --- Candidates of preference optimisation ----------------------------------------------------------------------------

TENTHS = tuple(i / 10 for i in range(10, -1, -1))


def test_stated_levels_of_anchored_levels_are_those_of_the_answer_type() -> None:
    accuracies = {"yes_no": (99, 98, 90, 61, 60, 50), "short": (97, 80, 41, 40, 5, 4)}
    counts = {k: noise_counts(*((i / 5, 100, n) for i, n in enumerate(ns))) for k, ns in accuracies.items()}
    for settings, most in ({"grid": 5}, 6), ({"grid": 1, "groups": 3}, 3), ({"groups": 1}, 1):
        levels = AnchoredLevels(table=LevelTable(counts), **settings)
        for kind in accuracies:
            stated = {levels.confidence(Perturbation(NOISE, s), kind) for s in levels.strengths(NOISE)}
            assert stated_levels(levels, kind) == tuple(sorted(stated, reverse=True))
            assert len(stated) <= most


def test_a_grid_adds_its_percentages_to_the_levels_and_a_percentage_is_stated_once() -> None:
    coarse = AnchoredLevels(table=LevelTable({"yes_no": noise_counts((0, 100, 96), (0.5, 100, 50))}), grid=1)
    assert stated_levels(coarse, "yes_no", 25) == (1.0, 0.96, 0.75, 0.5, 0.25, 0.0)
    assert stated_levels(coarse, "yes_no", 100) == (1.0, 0.96, 0.5, 0.0)
    assert stated_levels(LinearLevels(), "yes_no", 10) == TENTHS
    thirds = set(stated_levels(LinearLevels(4), "yes_no", 1))
    assert {1 / 3, 0.67} <= thirds, "the higher one of two that are stated as 33% or 67%"
    assert len(thirds) == len(stated_levels(LinearLevels(n_levels=201), "yes_no")) == 101
    for grid in (0, 30):
        with pytest.raises(DataError, match=f"data.candidates.grid must be a divisor of 100.* found {grid}"):
            CandidateSettings(grid=grid)


def _candidates(
    chat: ChatFormat, samples: Samples, wrong_answer: bool = False, length: int = 400, **more: Any
) -> CandidateBatch:
    settings = CandidateSettings(wrong_answer=wrong_answer)
    return CandidateCollator(chat, LinearLevels(), settings, length, **more)(samples)


def _unspaced(text: str) -> str:
    """Remove the space that byte-level tokenizers may put before a text."""
    return re.sub(r"(<\|user\|>|<\|assistant\|>|<image>) ", r"\1", text)


def _check_candidates(chat: ChatFormat, batch: CandidateBatch, row: int, *answers: str) -> None:
    """Check that there is one candidate per answer and level, and that prompt and candidate are the whole conversation."""
    stated = [(a, c) for a in answers for c in TENTHS]
    candidates = batch.candidates[row]
    assert [(c.confidence, c.wrong) for c in candidates] == [(c, a != answers[0]) for a, c in stated]
    tokenizer, question = chat.processor.tokenizer, batch.queries[row].question
    prompt = batch.inputs["input_ids"][row][: batch.lengths[row]].tolist()
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert prompt.count(image) == IMAGE_TOKENS
    first = prompt.index(image)
    prompt = prompt[: first + 1] + prompt[first + IMAGE_TOKENS :]
    for (answer, confidence), candidate in zip(stated, candidates, strict=True):
        text = chat.render(question, render_response(answer, confidence))
        assert _unspaced(tokenizer.decode([*prompt, *candidate.tokens])) == _unspaced(text)
        assert [*prompt, *candidate.tokens] == tokenizer(text)["input_ids"]
        decoded_answer = tokenizer.decode(candidate.tokens[: candidate.answer_length])
        assert decoded_answer.strip() == render_answer(answer)
        rest = tokenizer.decode(candidate.tokens[candidate.answer_length :])
        assert re.fullmatch(r"\s*Confidence: \d+%<\|end\|>", rest)
        assert parse_confidence(rest) == confidence
        ending = candidate.tokens[len(candidate.tokens) - candidate.ending_length :]
        assert tokenizer.decode(ending) == "%<|end|>"


def test_the_batch_carries_conversations_levels_and_epochs(chat: ChatFormat, samples: Samples) -> None:
    batch = _candidates(chat, [s._replace(epoch=i) for i, s in enumerate(samples)])
    for row, sample in enumerate(samples):
        _check_candidates(chat, batch, row, sample.query.answer)
    lengths = {len(c.tokens) for c in batch.candidates[0]}
    one_token = "85" in chat.processor.tokenizer.tokenize("85")[0]
    assert len(lengths) == (1 if one_token else 3), "1, 2 or 3 digits"
    assert (batch.levels, batch.is_correct) == ((1.0, 0.3, 0.0, 0.85), (True,) * 4)
    assert (batch.epochs, batch.queries) == ((0, 1, 2, 3), tuple(s.query for s in samples))
    assert (batch.skipped, batch.lengths.dtype) == ((), torch.int64)
    moved = batch.to("meta")
    assert {t.device.type for t in (*moved.inputs.values(), moved.lengths)} == {"meta"}
    assert moved.candidates == batch.candidates


def test_a_wrong_answer_beside_each_level(chat: ChatFormat, samples: Samples) -> None:
    wrong = [("No",), ("a pizza", "umbrella"), (), ("A cat, (or two!)", "Two cats. Maybe.")]
    with_wrong = [s._replace(wrong=w) for s, w in zip(samples, wrong, strict=True)]
    batch = _candidates(chat, with_wrong, wrong_answer=True)
    for row, expected in enumerate((["No"], ["a pizza"], [], ["Two cats. Maybe."])):
        _check_candidates(chat, batch, row, samples[row].query.answer, *expected)
    assert batch.is_correct == (True,) * 4
    for row, without in enumerate(_candidates(chat, with_wrong).candidates):
        assert batch.candidates[row][: len(without)] == without, "the other responses do not change"


def test_a_wrong_answer_can_replace_the_gold_one_in_the_responses(chat: ChatFormat, samples: Samples) -> None:
    replaced = [samples[0]._replace(wrong_answer="No", wrong=("No",)), samples[1]._replace(wrong=("dog",))]
    batch = _candidates(chat, replaced, wrong_answer=True)
    _check_candidates(chat, batch, 0, "No")
    _check_candidates(chat, batch, 1, "umbrella", "dog")
    assert batch.is_correct == (False, True)
    assert batch.queries[0].answer == "Yes"


def test_which_wrong_answer_changes_from_epoch_to_epoch(demo_chat: ChatFormat, samples: Samples) -> None:
    settings, decode = CandidateSettings(wrong_answer=True), demo_chat.processor.tokenizer.decode
    collate = CandidateCollator(demo_chat, LinearLevels(n_levels=2), settings, 400)

    def drawn(name: str = "q") -> list[str]:
        query = replace(samples[1].query, id=name)
        sample = samples[1]._replace(query=query, wrong=("dog", "cat", "umbrella", "car"))
        answers = []
        for epoch in range(90):
            _, [gold, _, wrong, _] = collate._tokenize(sample._replace(epoch=epoch))
            assert (gold.wrong, wrong.wrong) == (False, True)
            answers.append(decode(wrong.tokens[: wrong.answer_length]).strip(" ."))
        return answers

    answers = drawn()
    assert answers == drawn() != drawn("r")
    counts = Counter(answers)
    assert set(counts) == {"dog", "cat", "car"}, "never the gold answer"
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_too_long_is_skipped_and_listed(chat: ChatFormat, samples: Samples) -> None:
    # The wrong answer alone makes the first one too long.
    long_answer = [samples[0]._replace(wrong=("No, " * 200,)), *samples[1:]]
    whole = _candidates(chat, samples)
    rows = zip(whole.lengths.tolist(), whole.candidates, strict=True)
    longest = max(prompt + len(c.tokens) for prompt, row in rows for c in row)
    assert _candidates(chat, samples, length=longest, on_too_long="skip").skipped == ()
    assert _candidates(chat, samples, length=longest - 1, on_too_long="skip").skipped == ("q3",)
    batch = _candidates(chat, long_answer, wrong_answer=True, length=longest, on_too_long="skip")
    expected = _candidates(chat, samples[1:], wrong_answer=True)
    assert batch.skipped == ("q0",)
    assert batch._replace(inputs={}, lengths=None, skipped=()) == expected._replace(inputs={}, lengths=None)  # type: ignore[arg-type]
    assert all(torch.equal(batch.inputs[k], expected.inputs[k]) for k in expected.inputs)
    nothing = _candidates(chat, samples, length=IMAGE_TOKENS, on_too_long="skip").to("cpu")
    assert (nothing.inputs, nothing.candidates, nothing.queries, nothing.levels) == ({}, (), (), ())
    assert nothing.skipped == ("q0", "q1", "q2", "q3")


def test_a_prompt_that_ends_within_the_first_token_of_the_answer(processor: Any, samples: Samples) -> None:
    # The space ends the prompt, but in the conversation it is part of the token " Yes".
    spaced = copy(processor)
    template = CHAT_TEMPLATE.replace("'<|assistant|>'", "'<|assistant|> '")
    spaced.chat_template = template.replace("<|assistant|>{% endif %}", "<|assistant|> {% endif %}")
    chat = ChatFormat(spaced, ElicitationPrompt())
    assert chat.render("A dog?").endswith("<|assistant|> ")
    with_wrong = [samples[0]._replace(wrong=("A cat",)), *samples[1:]]
    batch = _candidates(chat, with_wrong, wrong_answer=True)
    # " A" is two tokens, so the last one's responses replace nothing; the first one has an answer of either kind.
    assert (batch.inputs["attention_mask"].sum(dim=1) - batch.lengths).tolist() == [1, 1, 1, 0]
    _check_candidates(chat, batch, 0, "Yes", "A cat")
    for row in (1, 2, 3):
        _check_candidates(chat, batch, row, samples[row].query.answer)


@pytest.mark.parametrize("paired", [True, False])
def test_validation_is_prompts_and_candidates(demo_chat: ChatFormat, samples: Samples, paired: bool) -> None:
    collator = CandidateCollator(demo_chat, LinearLevels(), CandidateSettings(), 400) if paired else None
    batch = collate_validation(PromptCollator(demo_chat), collator, samples)
    assert batch.prompts.queries == tuple(s.query for s in samples)
    assert (batch.candidates and batch.candidates.queries) == (batch.prompts.queries if paired else None)
    moved = batch.to("meta")
    assert moved.prompts.inputs["input_ids"].device.type == "meta"
    assert moved.candidates is None or moved.candidates.lengths.device.type == "meta"
