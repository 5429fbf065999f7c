"""Losses of the distribution over confidences: against loops, RLCR against REINFORCE, and the others at the optimum that each claims.

An optimum is found by minimising over free logits: for each context, of every text that can be written. The last one is no
candidate, so that the log-probability of all candidates is at most 0 as for a model. A context has several outcomes, each in as many
rows as it is likely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from vlm_calibration.losses.candidates import CandidateLoss, CandidateScores
from vlm_calibration.losses.distribution import RLCR, ExpectedBrier, SoftLabel, TokenizedBrier
from vlm_calibration.losses.preference import preference_statistics

from .tables import DISTRIBUTION_LOSSES, random_table, table

LEVELS = [k / 10 for k in range(11)]
each_loss = pytest.mark.parametrize("loss", DISTRIBUTION_LOSSES, ids=repr)


def _by_loop(loss: CandidateLoss, scores: CandidateScores) -> float:
    queries = []
    for b in range(scores.policy.shape[0]):
        candidates = [k for k in range(scores.policy.shape[1]) if scores.valid[b, k]]
        own = [k for k in candidates if scores.own[b, k]]
        policy, answer, c = (x[b].tolist() for x in (scores.policy, scores.answer, scores.confidence))
        t = float(scores.target[b])
        if isinstance(loss, RLCR):
            several = len(own) < len(candidates)
            mass = {k: math.exp(policy[k] if several else policy[k] - answer[k]) for k in candidates}
            value = 0.0
            for k in candidates:
                y = int(scores.correct[b, k])
                value -= mass[k] / sum(mass.values()) * (y - (c[k] - y) ** 2)
        else:
            mass = {k: math.exp(policy[k] - answer[k]) for k in own}
            pi = {k: mass[k] / sum(mass.values()) for k in own}
            match loss:
                case SoftLabel(width, opposite_weight):
                    q = {k: math.exp(-((c[k] - t) ** 2) / (2 * width**2)) for k in own}
                    value = -sum(q[k] / sum(q.values()) * math.log(pi[k]) for k in own)
                    others = {*candidates} - {*own}
                    q = {k: math.exp(-((c[k] - (1 - t)) ** 2) / (2 * width**2)) for k in others}
                    value -= opposite_weight * sum(
                        q[k] / sum(q.values()) * (policy[k] - answer[k]) for k in q
                    )
                case TokenizedBrier():
                    value = sum(pi[k] * (c[k] - t) ** 2 for k in own)
                case ExpectedBrier():
                    value = (sum(pi[k] * c[k] for k in own) - t) ** 2
                case _:
                    raise AssertionError(loss)
        queries.append(value - math.log(sum(mass.values())))
    return sum(queries) / len(queries)


@each_loss
def test_loss_is_the_loop(loss: CandidateLoss) -> None:
    for seed in range(6):
        scores = random_table(seed, n_candidates=6)
        assert float(loss(scores)) == pytest.approx(_by_loop(loss, scores), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "loss", [*DISTRIBUTION_LOSSES[:-1], pytest.param(RLCR(), id="RLCR, own answer alone")]
)
def test_the_answer_gets_no_gradient(loss: CandidateLoss, dtype: torch.dtype) -> None:
    scores = random_table(2)
    if isinstance(loss, RLCR):
        scores = scores._replace(own=torch.ones_like(scores.own))
    answer, text = (x.to(dtype, copy=True) for x in (scores.answer, scores.policy - scores.answer))
    for leaf in (answer, text):
        leaf.requires_grad_()
    value = loss(scores._replace(policy=answer + text, answer=answer))
    value.backward()
    assert answer.grad is not None
    assert text.grad is not None
    assert not answer.grad.any()
    assert text.grad.any()
    shifted = loss(scores._replace(policy=scores.policy - 0.5, answer=scores.answer - 0.5))
    assert float(shifted) == pytest.approx(float(loss(scores)), rel=1e-12)


def test_the_gradient_of_rlcr_is_the_expectation_of_reinforce() -> None:
    """Over responses drawn from the candidates: each response's estimate, weighted by its probability, in a loop."""
    scores = random_table(4, n_candidates=6)
    n_queries, n_candidates = scores.policy.shape
    logits = torch.randn(n_queries, n_candidates + 1, generator=torch.Generator().manual_seed(0)).double()
    logits.requires_grad_()

    def log_p() -> Tensor:
        return logits.log_softmax(-1)[:, :-1]

    def all_candidates(b: int) -> Tensor:
        return torch.logsumexp(log_p()[b][scores.valid[b]], 0)

    assert scores.valid[2:].sum() > 6
    scores = scores._replace(answer=torch.zeros_like(scores.policy))
    expected = torch.zeros_like(logits)
    for b in range(n_queries):
        drawn = [k for k in range(n_candidates) if scores.valid[b, k]]
        probability = {k: (log_p()[b, k] - all_candidates(b)).exp().item() for k in drawn}
        reward = {}
        for k in drawn:
            y, c = float(scores.correct[b, k]), float(scores.confidence[b, k])
            reward[k] = y - (c - y) ** 2
        for k in drawn:
            estimate = -reward[k] * (log_p()[b, k] - all_candidates(b))
            expected += probability[k] * torch.autograd.grad(estimate, logits)[0] / n_queries
    value = RLCR()(scores._replace(policy=log_p()))
    mass = torch.stack([all_candidates(b) for b in range(n_queries)]).mean()
    (actual,) = torch.autograd.grad(value + mass, logits)
    assert float(expected.abs().max()) > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def minimise(value: Callable[[Tensor], Tensor], size: Sequence[int]) -> Tensor:
    """Free logits, float64 of a given size, where a function of them is least."""
    logits = torch.randn(*size, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(1500):
        optimizer.zero_grad()
        value(logits).backward()
        optimizer.step()
    return logits.detach()


# Of each context, the targets with how often they occur of ten times.
CONTEXTS: list[dict[float, int]] = [
    {1.0: 7, 0.0: 3},
    {1.0: 1, 0.0: 9},
    {0.0: 10},
    {0.9: 6, 0.5: 3, 0.06: 1},  # the mean is no level; median and mode are 0.9
]
MEANS = [0.7, 0.1, 0.0, 0.696]


def fit_confidences(loss: CandidateLoss) -> tuple[Tensor, Tensor]:
    """pi, float64 [4, 11], and Z, float64 [4], where a loss of `CONTEXTS` is least."""
    rows, targets = zip(
        *((i, t) for i, context in enumerate(CONTEXTS) for t, n in context.items() for _ in range(n)),
        strict=True,
    )
    shape = (len(rows), len(LEVELS))
    scores = table([LEVELS] * len(rows), confidence=[LEVELS] * len(rows), target=list(targets))
    answer = torch.tensor([-0.5, -1.0, -2.0, -3.0]).double()[list(rows), None].expand(shape)

    def value(logits: Tensor) -> Tensor:
        s = logits.log_softmax(-1)[list(rows), :-1]
        return loss(scores._replace(policy=s + answer, answer=answer))

    s = minimise(value, (len(CONTEXTS), len(LEVELS) + 1)).log_softmax(-1)[:, :-1]
    return s.softmax(-1), s.logsumexp(-1)


def test_the_optimum_after_the_opposite_answer_is_around_what_the_own_one_leaves() -> None:
    own = torch.arange(2 * len(LEVELS)) < len(LEVELS)
    scores = table([[0.0] * 2 * len(LEVELS)], confidence=[LEVELS * 2], target=[0.8])._replace(own=own[None])

    def log_p(logits: Tensor) -> Tensor:
        return torch.cat([part.log_softmax(-1)[:, :-1] for part in logits.chunk(2, -1)], -1)

    logits = minimise(
        lambda x: SoftLabel(0.05, opposite_weight=0.3)(scores._replace(policy=log_p(x))),
        (1, 2 * len(LEVELS) + 2),
    )
    stated, opposite = log_p(logits)[0].exp().chunk(2)
    assert (LEVELS[int(stated.argmax())], LEVELS[int(opposite.argmax())]) == (0.8, 0.2)
    torch.testing.assert_close(opposite, stated.flip(0), rtol=0, atol=1e-3)
    assert min(stated.sum(), opposite.sum()) > 0.99


@pytest.mark.parametrize("width", [0.05, 0.2])
def test_the_optimum_of_soft_labels_is_their_distribution(width: float) -> None:
    pi, z = fit_confidences(SoftLabel(width))
    for row, context in enumerate(CONTEXTS):
        expected = torch.zeros(len(LEVELS)).double()
        for t, n in context.items():
            q = torch.tensor([math.exp(-(((c - t) / width) ** 2) / 2) for c in LEVELS]).double()
            expected += n / 10 * q / q.sum()
        torch.testing.assert_close(pi[row], expected, rtol=0, atol=1e-3)
    assert z.exp().min() > 0.99


def test_the_optimum_of_the_tokenized_brier_score_is_the_level_nearest_to_the_mean() -> None:
    pi, z = fit_confidences(TokenizedBrier())
    assert [LEVELS[k] for k in pi.argmax(-1).tolist()] == [0.7, 0.1, 0.0, 0.7]
    assert pi.max(-1).values.min() > 0.98
    assert z.exp().min() > 0.99


def test_the_optimum_of_the_expected_brier_score_has_the_mean() -> None:
    pi, z = fit_confidences(ExpectedBrier())
    assert (pi @ torch.tensor(LEVELS).double()).tolist() == [pytest.approx(m, abs=0.005) for m in MEANS]
    assert pi[:2].max() < 0.9, "the distribution is not all on one level"
    assert z.exp().min() > 0.99


@each_loss
def test_rewards_are_log_likelihoods(loss: CandidateLoss) -> None:
    assert not loss.needs_reference
    scores = random_table(6)
    without = scores._replace(reference=None)
    assert float(loss(without)) == float(loss(scores))
    statistics = preference_statistics(loss, without)
    margin = statistics["logp_chosen"] - statistics["logp_rejected"]
    assert float(statistics["reward_margin"]) == pytest.approx(float(margin))
