"""Likelihood and loss of responses against explicit loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.losses.sequence import AnswerWeight, response_nll, token_log_likelihood, token_weights


def _by_hand(log_likelihood: list[float], rows: list[int], weights: list[float], n_rows: int) -> float:
    total = 0.0
    for b in range(n_rows):
        tokens = [i for i, row in enumerate(rows) if row == b]
        total += sum(-weights[i] * log_likelihood[i] for i in tokens) / len(tokens)
    return total / n_rows


def test_token_log_likelihood_is_a_log_softmax() -> None:
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 10, 3, 3, 7, 1, 5])
    log_likelihood = token_log_likelihood(logits, targets)
    for i in range(7):
        row = [math.exp(x) for x in logits[i].double().tolist()]
        assert float(log_likelihood[i]) == pytest.approx(math.log(row[targets[i]] / sum(row)), abs=1e-5)
    assert log_likelihood.dtype == torch.float32
    assert token_log_likelihood(logits.bfloat16(), targets).dtype == torch.float32
    assert token_log_likelihood(logits[:0], targets[:0]).shape == (0,)


@st.composite
def _batches(draw: st.DrawFn) -> tuple[list[float], list[int], list[float], int]:
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    rows = draw(st.permutations([b for b, n in enumerate(lengths) for _ in range(n)]))
    numbers = st.floats(-9, 0, allow_subnormal=False)
    values = draw(st.lists(numbers, min_size=len(rows), max_size=len(rows)))
    weights = draw(st.lists(st.floats(0, 3, allow_subnormal=False), min_size=len(rows), max_size=len(rows)))
    return values, list(rows), weights, len(lengths)


@given(_batches())
def test_response_nll_and_its_gradient_are_the_loops(
    batch: tuple[list[float], list[int], list[float], int],
) -> None:
    values, rows, weights, n_rows = batch
    log_likelihood = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    loss = response_nll(
        log_likelihood, torch.tensor(rows), torch.tensor(weights, dtype=torch.float64), n_rows
    )
    assert float(loss.detach()) == pytest.approx(_by_hand(values, rows, weights, n_rows), abs=1e-9)
    loss.backward()
    assert log_likelihood.grad is not None
    gradient = [-weight / rows.count(row) / n_rows for weight, row in zip(weights, rows, strict=True)]
    assert log_likelihood.grad.tolist() == pytest.approx(gradient, abs=1e-9)


@pytest.mark.parametrize("answer_weight", ["constant", "confidence"])
def test_tokens_of_a_wrong_answer_weigh_nothing_and_its_confidence_as_much_as_any(
    answer_weight: AnswerWeight,
) -> None:
    draw = torch.Generator().manual_seed(0)
    mask, correct = (torch.rand(60, generator=draw) < 0.5 for _ in range(2))
    confidence = torch.rand(60, generator=draw)
    weights = token_weights(mask, confidence, correct, answer_weight, confidence_weight=0.25)
    for weight, states, c, is_correct in zip(weights, mask, confidence, correct, strict=True):
        answer = (1.0 if answer_weight == "constant" else c) if is_correct else 0.0
        assert weight == (0.25 if states else answer)
