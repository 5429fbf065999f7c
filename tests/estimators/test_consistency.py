"""Self-consistency: samples follow the model's probabilities and do not depend on the batch; and the passes of generation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from vlm_calibration.data.collate import ChatFormat
from vlm_calibration.data.noise import Sample
from vlm_calibration.estimators import consistency
from vlm_calibration.estimators.consistency import SelfConsistency, inverse_transform_sampler
from vlm_calibration.models.generation import Generated
from vlm_calibration.text.grading import Grading

from .conftest import ASKED, Answering, samples_of, scenes


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
