"""Likelihood and loss of responses against explicit loops; of every loss of candidates gradients, padding, precision, settings."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.losses.candidates import CandidateLoss, fill_padding
from vlm_calibration.losses.distribution import SoftLabel
from vlm_calibration.losses.preference import DPO, IPO, Listwise, Ordinal, SimPO, preference_statistics
from vlm_calibration.losses.sequence import AnswerWeight, response_nll, token_log_likelihood, token_weights
from vlm_calibration.records import DataError

from .tables import DISTRIBUTION_LOSSES, PREFERENCE_LOSSES, random_table, table

each_loss = pytest.mark.parametrize("loss", [*PREFERENCE_LOSSES, *DISTRIBUTION_LOSSES], ids=repr)


@each_loss
def test_gradient(loss: CandidateLoss) -> None:
    scores = random_table(5, n_queries=3)
    policy, answer = scores.policy.clone().requires_grad_(), scores.answer.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p, a: loss(scores._replace(policy=p, answer=a)), (policy, answer))


@each_loss
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_may_hold_anything(loss: CandidateLoss, garbage: float) -> None:
    clean = random_table(7)
    tables, values, gradients, rewards = [], [], [], []
    for padding in (0.0, garbage):
        filled = {
            name: getattr(clean, name).masked_fill(~clean.valid, padding)
            for name in ("policy", "reference", "distance", "answer", "confidence")
        }
        filled["lengths"] = clean.lengths.masked_fill(~clean.valid, 1 if padding == 0 else 0)
        for name in ("correct", "own"):
            filled[name] = getattr(clean, name).masked_fill(~clean.valid, padding != 0)
        policy = filled["policy"].requires_grad_()
        scores = clean._replace(**filled)
        tables.append(fill_padding(scores))
        value = loss(scores)
        value.backward()
        values.append(value)
        gradients.append(policy.grad)
        rewards.append(torch.stack([*preference_statistics(loss, scores).values()]))
    assert all(torch.equal(a, b) for a, b in zip(*tables, strict=True))
    assert values[0].isfinite()
    assert values[0] == values[1]
    assert torch.equal(gradients[0], gradients[1])
    assert not gradients[1][~clean.valid].any()
    assert torch.equal(rewards[0], rewards[1])


@each_loss
def test_half_precision_is_computed_in_float32(loss: CandidateLoss) -> None:
    full = random_table(3)
    names = ("policy", "reference", "answer")
    half = full._replace(**{name: getattr(full, name).bfloat16() for name in names})
    value = loss(half)
    assert value.dtype == torch.float32
    rounded = full._replace(**{name: getattr(half, name).double() for name in names})
    assert float(value) == pytest.approx(float(loss(rounded)), rel=1e-5)
    assert loss(full).dtype == torch.float64


@each_loss
@pytest.mark.parametrize("size", [-1e4, 1e4])
@pytest.mark.parametrize("own", [True, False])
def test_large_margins_stay_finite(loss: CandidateLoss, size: float, own: bool) -> None:
    scores = table([[0, 0, 0]], confidence=[[0, 0.5, 1]], target=[0], own=[[True, True, own]])
    policy = torch.tensor([[size, 0.0, -size]], requires_grad=True)
    scores = scores._replace(
        policy=policy, distance=scores.confidence, reference=torch.zeros(1, 3), answer=torch.zeros(1, 3)
    )
    value = loss(scores)
    assert value.dtype == torch.float32
    value.backward()
    assert value.isfinite()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        *((kind, "beta", [0.0, -0.1, math.inf, math.nan]) for kind in (DPO, SimPO, IPO, Ordinal, Listwise)),
        (SimPO, "gamma", [-0.1, math.inf, math.nan]),
        (Ordinal, "offset", [-0.1, math.inf, math.nan]),
        (SoftLabel, "width", [-0.1, 0.0, 0.0009, 1.1, math.nan]),
        (SoftLabel, "opposite_weight", [-0.1, math.inf, math.nan]),
    ],
)
def test_bad_settings(kind: Callable[..., CandidateLoss], name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(DataError, match=rf"loss\.{name} must be .*, found {value}"):
            kind(**{name: value})


# --- responses


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
    of_tokens = torch.tensor(weights, dtype=torch.float64)
    loss = response_nll(log_likelihood, torch.tensor(rows), of_tokens, n_rows)
    total = 0.0
    for b in range(n_rows):
        tokens = [i for i, row in enumerate(rows) if row == b]
        total += sum(-weights[i] * values[i] for i in tokens) / len(tokens)
    assert float(loss.detach()) == pytest.approx(total / n_rows, abs=1e-9)
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
