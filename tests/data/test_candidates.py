"""Candidates of preference optimisation: the stated levels, and that prompt and candidate are whole conversations."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from vlm_calibration.data.candidates import (
    CandidateBatch,
    CandidateCollator,
    CandidateSettings,
    collate_validation,
    stated_levels,
)
from vlm_calibration.data.collate import ChatFormat, PromptCollator
from vlm_calibration.data.noise import Sample
from vlm_calibration.perturbation.level_table import LevelTable
from vlm_calibration.perturbation.levels import NOISE, AnchoredLevels, LinearLevels, Perturbation
from vlm_calibration.records import DataError
from vlm_calibration.text.confidence import parse_confidence, render_answer, render_response
from vlm_calibration.text.prompts import ElicitationPrompt

from ..demo.architecture import CHAT_TEMPLATE, IMAGE_TOKENS
from ..level_tables import noise_counts

TENTHS = tuple(i / 10 for i in range(10, -1, -1))


def test_stated_levels_of_anchored_levels_are_those_of_the_answer_type() -> None:
    accuracies = {"yes_no": (99, 98, 90, 61, 60, 50), "short": (97, 80, 41, 40, 5, 4)}
    counts = {
        kind: noise_counts(*((i / 5, 100, n_correct) for i, n_correct in enumerate(n_corrects)))
        for kind, n_corrects in accuracies.items()
    }
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


def _collate(
    chat: ChatFormat,
    samples: Sequence[Sample],
    wrong_answers: bool = False,
    length: int = 400,
    **settings: Any,
) -> CandidateBatch:
    candidates = CandidateSettings(wrong_answer=wrong_answers)
    return CandidateCollator(chat, LinearLevels(), candidates, length, **settings)(samples)


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


def test_the_batch_carries_conversations_levels_epochs_and_queries(
    chat: ChatFormat, samples: Sequence[Sample]
) -> None:
    batch = _collate(chat, [s._replace(epoch=i) for i, s in enumerate(samples)])
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


def test_a_wrong_answer_beside_each_level(chat: ChatFormat, samples: Sequence[Sample]) -> None:
    wrong = [("No",), ("a pizza", "umbrella"), (), ("A cat, (or two!)", "Two cats. Maybe.")]
    with_wrong = [s._replace(wrong=w) for s, w in zip(samples, wrong, strict=True)]
    batch = _collate(chat, with_wrong, wrong_answers=True)
    _check_candidates(chat, batch, 0, "Yes", "No")
    _check_candidates(chat, batch, 1, "umbrella", "a pizza")
    _check_candidates(chat, batch, 2, "No")
    _check_candidates(chat, batch, 3, "A cat, (or two!)", "Two cats. Maybe.")
    assert batch.is_correct == (True,) * 4
    for row, without in enumerate(_collate(chat, with_wrong).candidates):
        assert batch.candidates[row][: len(without)] == without, "the other responses do not change"


def test_a_wrong_answer_can_replace_the_gold_one_in_the_responses(
    chat: ChatFormat, samples: Sequence[Sample]
) -> None:
    replaced = [samples[0]._replace(wrong_answer="No", wrong=("No",)), samples[1]._replace(wrong=("dog",))]
    batch = _collate(chat, replaced, wrong_answers=True)
    _check_candidates(chat, batch, 0, "No")
    _check_candidates(chat, batch, 1, "umbrella", "dog")
    assert batch.is_correct == (False, True)
    assert batch.queries[0].answer == "Yes"


def test_which_wrong_answer_changes_from_epoch_to_epoch(processor: Any, samples: Sequence[Sample]) -> None:
    settings = CandidateSettings(wrong_answer=True)
    collate = CandidateCollator(
        ChatFormat(processor, ElicitationPrompt()), LinearLevels(n_levels=2), settings, 400
    )

    def drawn(name: str = "q") -> list[str]:
        query = replace(samples[1].query, id=name)
        sample = samples[1]._replace(query=query, wrong=("dog", "cat", "umbrella", "car"))
        answers = []
        for epoch in range(90):
            _, [gold, _, wrong, _] = collate._tokenize(sample._replace(epoch=epoch))
            assert (gold.wrong, wrong.wrong) == (False, True)
            answers.append(processor.tokenizer.decode(wrong.tokens[: wrong.answer_length]).strip(" ."))
        return answers

    answers = drawn()
    assert answers == drawn() != drawn("r")
    counts = Counter(answers)
    assert set(counts) == {"dog", "cat", "car"}, "never the gold answer"
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_too_long_is_skipped_and_listed(chat: ChatFormat, samples: Sequence[Sample]) -> None:
    # The wrong answer alone makes the first one too long.
    long_answer = [samples[0]._replace(wrong=("No, " * 200,)), *samples[1:]]
    whole = _collate(chat, samples)
    rows = zip(whole.lengths.tolist(), whole.candidates, strict=True)
    longest = max(prompt + len(c.tokens) for prompt, row in rows for c in row)
    assert _collate(chat, samples, length=longest, on_too_long="skip").skipped == ()
    assert _collate(chat, samples, length=longest - 1, on_too_long="skip").skipped == ("q3",)
    batch = _collate(chat, long_answer, wrong_answers=True, length=longest, on_too_long="skip")
    expected = _collate(chat, samples[1:], wrong_answers=True)
    assert batch.skipped == ("q0",)
    assert batch._replace(inputs={}, lengths=None, skipped=()) == expected._replace(inputs={}, lengths=None)  # type: ignore[arg-type]
    assert all(torch.equal(batch.inputs[k], expected.inputs[k]) for k in expected.inputs)
    nothing = _collate(chat, samples, length=IMAGE_TOKENS, on_too_long="skip").to("cpu")
    assert (nothing.inputs, nothing.candidates, nothing.queries, nothing.levels) == ({}, (), (), ())
    assert nothing.skipped == ("q0", "q1", "q2", "q3")


def test_a_template_whose_prompt_ends_within_the_first_token_of_the_answer(
    processor: Any, samples: Sequence[Sample]
) -> None:
    # The space ends the prompt, but in the conversation it is part of the token " Yes".
    spaced = copy(processor)
    spaced.chat_template = CHAT_TEMPLATE.replace("'<|assistant|>'", "'<|assistant|> '").replace(
        "<|assistant|>{% endif %}", "<|assistant|> {% endif %}"
    )
    chat = ChatFormat(spaced, ElicitationPrompt())
    assert chat.render("A dog?").endswith("<|assistant|> ")
    with_wrong = [samples[0]._replace(wrong=("A cat",)), *samples[1:]]
    batch = _collate(chat, with_wrong, wrong_answers=True)
    # " A" is two tokens, so the last one's responses replace nothing; the first one has an answer of either kind.
    assert (batch.inputs["attention_mask"].sum(dim=1) - batch.lengths).tolist() == [1, 1, 1, 0]
    _check_candidates(chat, batch, 0, "Yes", "A cat")
    for row in (1, 2, 3):
        _check_candidates(chat, batch, row, samples[row].query.answer)


@pytest.mark.parametrize("paired", [True, False])
def test_validation_is_prompts_and_candidates_of_the_same_samples(
    processor: Any, samples: Sequence[Sample], paired: bool
) -> None:
    chat = ChatFormat(processor, ElicitationPrompt())
    collator = CandidateCollator(chat, LinearLevels(), CandidateSettings(), 400) if paired else None
    batch = collate_validation(PromptCollator(chat), collator, samples)
    assert batch.prompts.queries == tuple(s.query for s in samples)
    assert (batch.candidates and batch.candidates.queries) == (batch.prompts.queries if paired else None)
    moved = batch.to("meta")
    assert moved.prompts.inputs["input_ids"].device.type == "meta"
    assert moved.candidates is None or moved.candidates.lengths.device.type == "meta"
