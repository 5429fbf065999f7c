"""Estimates from one shared pass equal those from one forward per response; self-consistency, from samples."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from vlm_calibration.data.collate import ChatFormat
from vlm_calibration.data.noise import Sample
from vlm_calibration.estimators import answer_scoring, consistency
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer, reads_both_ways
from vlm_calibration.estimators.base import AnsweredBatch
from vlm_calibration.estimators.consistency import SelfConsistency, inverse_transform_sampler
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.p_true import TEMPLATE, PTrue
from vlm_calibration.estimators.verbal import ExpectedConfidence, VerbalizedConfidence
from vlm_calibration.models import shared_prefix
from vlm_calibration.models.generation import Generated
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.records import DataError, Query
from vlm_calibration.text.confidence import ElicitationPrompt, render_response
from vlm_calibration.text.grading import Grading

from ..demo.architecture import CHAT_TEMPLATE
from .conftest import ASKED, LEVELS, UNANSWERED, Answering, logits, samples_of, scenes
from .naive import Alone

TEXTS = [text for *_, text in ASKED]


@pytest.fixture(scope="module", params=[False, True], ids=["without a cache", "from the cache"])
def answered(
    request: pytest.FixtureRequest, asked: tuple[Any, ChatFormat, list[Sample]], answering: Answering
) -> AnsweredBatch:
    model, chat, samples = asked
    return answering(model, chat, samples[:4], TEXTS, LEVELS, keep_cache=request.param)


@pytest.fixture(scope="module")
def alone(asked: tuple[Any, ChatFormat, list[Sample]]) -> list[Alone]:
    model, chat, samples = asked
    return [Alone(model, chat, s.image, s.query.question) for s in samples[:4]]


@pytest.mark.slow
@torch.no_grad()
def test_estimates_are_those_of_one_forward_per_response(answered: AnsweredBatch, alone: list[Alone]) -> None:
    estimators = (ExpectedConfidence(), AnswerLikelihood(), PTrue())
    estimates = [estimator.estimate(answered) for estimator in estimators]
    assert [estimate.passes for estimate in estimates] == [[1] * 4] * 3
    expected, likelihood, p_true = (estimate.confidence for estimate in estimates)
    answers = ("Yes", "a blue umbrella", "No", "It is white")
    means = [a.expected(answer, (0.9, 0.6, 0.3)) for a, answer in zip(alone, answers, strict=True)]
    assert expected == pytest.approx(means, abs=1e-5)
    assert len({round(c, 2) for c in means}) > 2
    yes, no = (a.against(a.prompt, "Yes.", "No.") for a in (alone[0], alone[2]))
    assert likelihood[3] is None, "the answer is neither yes nor no"
    by_hand = [yes, alone[1].likelihood("a blue umbrella"), 1 - no]
    assert logits(likelihood) == pytest.approx(logits(by_hand), abs=1e-3)
    follow_ups = ("Yes.", "a blue umbrella", "No", "It is white.")
    by_hand = [
        a.against(TEMPLATE.format(question=a.question, answer=answer), "True", "False")
        for a, answer in zip(alone, follow_ups, strict=True)
    ]
    assert logits(p_true) == pytest.approx(logits(by_hand), abs=1e-3)
    assert len({round(z, 2) for z in logits(by_hand)}) > 2


@torch.no_grad()
def test_the_prompt_is_not_computed_again(
    asked: tuple[Any, ChatFormat, list[Sample]], answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, chat, samples = asked
    batch = answering(model, chat, samples[:4], TEXTS, LEVELS, keep_cache=True)

    def refuse(*_: Any) -> None:
        raise AssertionError("scored without the cache")

    passes: list[int] = []
    monkeypatch.setattr(answer_scoring, "score_responses", refuse)
    with model.get_decoder().register_forward_pre_hook(lambda *_: passes.append(1)):
        for estimator in (ExpectedConfidence(), AnswerLikelihood()):
            estimator.estimate(batch)
        if reads_both_ways(model):  # the keys and values of its image depend on the question
            with pytest.raises(AssertionError, match="scored without the cache"):
                PTrue().estimate(batch)
        else:
            PTrue().estimate(batch)
    assert len(passes) == (1 if reads_both_ways(model) else 2), "levels with the likelihood, and P(True)"


@torch.no_grad()
def test_what_is_scored_one_by_one_costs_more(
    demo: tuple[Any, ChatFormat], answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = ExpectedConfidence().estimate(answering(*demo, samples_of(scenes(4)), TEXTS))
    monkeypatch.setattr(shared_prefix, "why_not_shared", lambda model, length: "rows are read in order")
    one_by_one = ExpectedConfidence().estimate(answering(*demo, samples_of(scenes(4)), TEXTS))
    assert one_by_one.passes == [13, 11, 13, 13], "eleven levels, and yes and no"
    assert one_by_one.confidence == pytest.approx(shared.confidence, abs=1e-5)


# --- On the demo's architecture alone -----------------------------------------------------------------------------


@torch.no_grad()
def test_an_empty_answer_has_no_confidence(demo: tuple[Any, ChatFormat], answering: Answering) -> None:
    rows = (UNANSWERED, ASKED[0], (*ASKED[1][:3], "an <image> of a dog"))
    batch = answering(*demo, samples_of(scenes(3), rows), [text for *_, text in rows], keep_cache=True)
    for estimator in (ExpectedConfidence(), AnswerLikelihood(), PTrue()):
        empty, answered, with_image_token = estimator.estimate(batch).confidence
        assert empty is None, estimator.name
        assert answered is not None
        assert with_image_token is None
    assert VerbalizedConfidence().estimate(batch) == ([0.1, 0.8, None], list(batch.answer_passes))


def test_responses_that_replace_unlike_parts_of_the_prompt_have_the_rest_in_front(processor: Any) -> None:
    """The prompt ends in a space, which is part of the token " Yes" but not of the two tokens " A"."""
    spaced = copy(processor)
    spaced.chat_template = CHAT_TEMPLATE.replace("'<|assistant|>'", "'<|assistant|> '").replace(
        "<|assistant|>{% endif %}", "<|assistant|> {% endif %}"
    )
    chat, levels = ChatFormat(spaced, ElicitationPrompt()), (1.0, 0.5, 0.0)
    query = Query("q", "q.png", "A dog?", "Yes", "yes_no")
    tokenized = AnswerTokenizer(chat, LinearLevels(3)).tokenize(query, "A cat")
    responses = [render_response("A cat", c) for c in levels] + ["Yes.", "No."]
    prompt, *conversations = chat.token_ids([chat.render(query.question, r) for r in (None, *responses)])
    assert (tokenized.cut, tokenized.levels) == (1, levels)
    for tokens, conversation in zip(tokenized.tokens, conversations, strict=True):
        whole = [*prompt[: len(prompt) - tokenized.cut], *tokens]
        assert whole == conversation[: len(whole)]
    start = tokenized.offset
    answer = tokenized.tokens[0][start : start + tokenized.candidates[0].answer_length]
    assert chat.processor.tokenizer.decode(answer).strip() == "A cat."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "{question} {answer} {more}"}, "needs {question} and {answer}"),
        ({"template": "{question}"}, "needs {question} and {answer}"),
        ({"template": "{question} {answer"}, "PTrue.template"),
        ({"true": "Yes", "false": "Yes "}, "two different answers"),
    ],
)
def test_a_question_about_the_answer_that_makes_no_sense_is_refused(
    settings: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        PTrue(**settings)


def test_a_template_with_the_question_before_the_image_is_named(
    demo: tuple[Any, ChatFormat], answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, chat = demo
    batch = answering(model, chat, samples_of(scenes(4)), TEXTS)

    def backwards(chat: ChatFormat, question: str, response: str | None = None) -> str:
        prompt = f"<|user|>{chat.prompt.render(question)}<image><|end|><|assistant|>"
        return prompt if response is None else f"{prompt}{response}<|end|>"

    monkeypatch.setattr(ChatFormat, "render", backwards)
    with pytest.raises(DataError, match="q0.*puts the question before it"):
        PTrue().estimate(batch)


# --- Self-consistency: samples follow the model's probabilities and do not depend on the batch ---


@pytest.mark.parametrize(("short", "agreeing"), [("exact", 0.5), ("contains", 1.0)])
def test_the_share_of_samples_that_grading_takes_for_the_answer(
    demo: tuple[Any, ChatFormat],
    answering: Answering,
    monkeypatch: pytest.MonkeyPatch,
    short: Any,
    agreeing: float,
) -> None:
    """The answers are yes, no by its question, a cat, and none; each sample of a query draws numbers of its own."""
    rows = (
        ("A dog?", "Yes", "yes_no", "Yes. Confidence: 80%"),
        ("Is there a dog?", "No", "yes_no", "There is a cat, but no dog"),
        ("What is it?", "cat", "short", "a cat"),
        ("Is it late?", "No", "yes_no", "It is white."),
    )
    answered = answering(*demo, samples_of(scenes(4), rows), [text for *_, text in rows])
    answered = replace(answered, batch=answered.batch._replace(grading=Grading(short=short)))
    sampled = iter(
        [
            ["yes.", "There is a cat without a dog", "cat", "Yes"],
            ["No", "There are zero cats and a dog", "a big cat. Confidence: 80%", "Yes"],
        ]
    )
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(
        consistency, "inverse_transform_sampler", lambda _, numbers, __: drawn.append(numbers)
    )
    monkeypatch.setattr(
        consistency, "generate", lambda *_: Generated(next(sampled), [2, 2, 3, 2], [True] * 4, None)
    )
    assert SelfConsistency(2).estimate(answered) == ([0.5, 0.5, agreeing, None], [4, 4, 6, 4])
    assert len(torch.cat(drawn).unique()) == torch.cat(drawn).numel() > 8


def test_tokens_are_sampled_by_their_probabilities() -> None:
    logits = torch.tensor([[0.3, -1.0, -torch.inf, 2.0, 0.0]]).expand(4000, -1)
    numbers = (torch.arange(4000, dtype=torch.float64) / 4000)[torch.randperm(4000)][:, None]
    ids = torch.zeros(4000, 7, dtype=torch.int64)
    tokens = inverse_transform_sampler(0.8, numbers, 7)(ids, logits).argmax(-1)
    shares = torch.bincount(tokens, minlength=5) / 4000
    assert shares.tolist() == pytest.approx(torch.softmax(logits[0] / 0.8, -1).tolist(), abs=3e-4)
    assert shares[2] == 0


def test_the_ends_of_the_distribution() -> None:
    largest = 1 - 2**-53
    numbers = torch.tensor([[0.0, largest], [largest, 0.0]], dtype=torch.float64)
    logits = torch.tensor([[-torch.inf, 0.1, 0.2, -torch.inf]]).expand(2, -1)
    sampler = inverse_transform_sampler(0.1, numbers, 3)
    assert sampler(torch.zeros(2, 3), logits).argmax(-1).tolist() == [1, 2]
    assert sampler(torch.zeros(2, 4), logits).argmax(-1).tolist() == [2, 1]


@torch.no_grad()
def test_the_samples_of_a_query_do_not_depend_on_the_batch(
    demo: tuple[Any, ChatFormat], answering: Answering
) -> None:
    rows = tuple((q, a, "short", t) for q, a, _, t in ASKED)
    samples = samples_of(scenes(4), rows)
    estimator = SelfConsistency(8, temperature=0.3, seed=3)

    def rated(chosen: list[Sample], seed: int = 3, temperature: float = 0.3) -> dict[str, float | None]:
        batch = answering(*demo, chosen)
        estimator.seed, estimator.temperature = seed, temperature
        confidence = estimator.estimate(batch).confidence
        return {s.query.id: c for s, c in zip(chosen, confidence, strict=True)}

    torch.manual_seed(0)
    together = rated(samples)
    assert len(set(together.values())) > 1
    assert any(c is not None and 0 < c < 1 for c in together.values())
    torch.manual_seed(1)
    assert rated(samples[::-1]) == together
    assert {k: v for s in samples for k, v in rated([s]).items()} == together
    assert rated(samples, seed=4) != together
    assert set(rated(samples, temperature=1e-6).values()) <= {1.0, None}, "as the greedy answers"


@torch.no_grad()
def test_passes_are_counted_to_the_end_of_each_answer(
    demo: tuple[Any, ChatFormat], answering: Answering
) -> None:
    model, chat = demo
    end = chat.processor.tokenizer.eos_token_id
    script = iter([[7, 7, end], [7, end, 8], [8, 9, 9], [9, 9, 9]])

    def follow_script(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        tokens = torch.tensor(next(script))
        return torch.full_like(output, -100.0).scatter_(-1, tokens[:, None, None], 100.0)

    with model.get_output_embeddings().register_forward_hook(follow_script):
        batch = answering(*demo, samples_of(scenes(3), ASKED[:3]), max_new_tokens=4)
    assert list(batch.answer_passes) == [4, 2, 1]
