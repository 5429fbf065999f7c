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
def test_response_nll_is_the_loop(batch: tuple[list[float], list[int], list[float], int]) -> None:
    values, rows, weights, n_rows = batch
    loss = response_nll(
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(rows),
        torch.tensor(weights, dtype=torch.float64),
        n_rows,
    )
    assert float(loss) == pytest.approx(_by_hand(values, rows, weights, n_rows), abs=1e-9)


def test_gradient_of_each_token() -> None:
    values = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    response_nll(values, torch.tensor([0, 0, 1]), torch.tensor([1.0, 0.0, 0.5]), 2).backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-1 / 2 / 2, 0.0, -0.5 / 1 / 2])


@pytest.mark.parametrize(("rows", "n_rows"), [([0, 0], 2), ([], 1), ([], 0), ([1, 1], 2)])
def test_a_response_without_tokens_is_refused(rows: list[int], n_rows: int) -> None:
    ones = torch.ones(len(rows))
    with pytest.raises(ValueError, match="at least one label token"):
        response_nll(-ones, torch.tensor(rows, dtype=torch.int64), ones, n_rows)


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
