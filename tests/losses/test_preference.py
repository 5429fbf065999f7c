"""Preference losses against arithmetic spelled out and against loops over pairs and rankings."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vlm_calibration.losses.candidates import CandidateScores
from vlm_calibration.losses.preference import (
    DPO,
    IPO,
    Listwise,
    Ordinal,
    PreferenceLoss,
    SimPO,
    preference_statistics,
)

from .tables import PREFERENCE_LOSSES, random_table, table

each_loss = pytest.mark.parametrize("loss", PREFERENCE_LOSSES, ids=repr)


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log(1 + math.exp(x))


def _pair_by_loop(loss: PreferenceLoss, scores: CandidateScores, b: int, k: int) -> float:
    """The loss of the pair of candidates 0 and k of query b."""
    policy, lengths = scores.policy[b].tolist(), scores.lengths[b].tolist()
    assert scores.reference is not None
    reference = scores.reference[b].tolist()
    h = policy[0] - reference[0] - policy[k] + reference[k]
    match loss:
        case DPO(beta):
            return softplus(-beta * h)
        case SimPO(beta, gamma):
            return softplus(gamma - beta / lengths[0] * policy[0] + beta / lengths[k] * policy[k])
        case IPO(beta):
            return (h - 0.5 / beta) ** 2
        case Ordinal(beta, offset):
            return softplus(-(beta * h - offset * float(scores.distance[b, k])))
    raise AssertionError(loss)


def _ranking_by_loop(loss: Listwise, scores: CandidateScores, b: int) -> list[float]:
    """The terms of query b."""
    assert scores.reference is not None
    terms = []
    candidates = [k for k in range(scores.policy.shape[1]) if scores.valid[b, k]]
    reward = {k: loss.beta * float(scores.policy[b, k] - scores.reference[b, k]) for k in candidates}
    for i in candidates:
        further = [j for j in candidates if scores.distance[b, j] > scores.distance[b, i]]
        if further:
            total = sum(math.exp(reward[j]) for j in [i, *further])
            terms.append(-math.log(math.exp(reward[i]) / total))
    return terms


def _by_loop(loss: PreferenceLoss, scores: CandidateScores) -> float:
    queries = []
    for b in range(scores.policy.shape[0]):
        if isinstance(loss, Listwise):
            values = _ranking_by_loop(loss, scores, b)
        else:
            rejected = [k for k in range(1, scores.policy.shape[1]) if scores.valid[b, k]]
            values = [_pair_by_loop(loss, scores, b, k) for k in rejected]
        if values:
            queries.append(sum(values) / len(values))
    return sum(queries) / len(queries)


@each_loss
def test_loss_is_the_loop(loss: PreferenceLoss) -> None:
    for seed in range(4):
        scores = random_table(seed)
        assert float(loss(scores)) == pytest.approx(_by_loop(loss, scores), abs=1e-10)


@each_loss
@pytest.mark.parametrize("n_candidates", [1, 3])
def test_without_a_pair_the_loss_is_0_with_a_gradient(loss: PreferenceLoss, n_candidates: int) -> None:
    lonely = [[True] + [False] * (n_candidates - 1)] * 2
    policy = table([[-3.0] + [math.nan] * (n_candidates - 1)] * 2).policy.requires_grad_()
    scores = table([[0.0] * n_candidates] * 2, valid=lonely)._replace(policy=policy)
    value = loss(scores)
    assert value == 0
    assert value.shape == ()
    value.backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == [[0.0] * n_candidates] * 2
    assert all(math.isnan(x) for x in preference_statistics(loss, scores).values())


def test_listwise_is_plackett_luce() -> None:
    scores = table([[-1, -2.5, -0.5, -4]], reference=[[-2, -2, -1.5, -1]], distance=[[0, 0.6, 0.2, 1.0]])
    rewards = [0.8 * x for x in (1, -0.5, 1, -3)]

    def probability(order: tuple[int, ...]) -> float:
        remaining, total = list(order), 1.0
        for i in order:
            total *= math.exp(rewards[i]) / sum(math.exp(rewards[j]) for j in remaining)
            remaining.remove(i)
        return total

    assert sum(probability(order) for order in itertools.permutations(range(4))) == pytest.approx(1)
    # nearest first: 0, 2, 1, 3; the last is no choice, which leaves three terms
    assert float(Listwise(beta=0.8)(scores)) == pytest.approx(-math.log(probability((0, 2, 1, 3))) / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_equally_far_on_both_sides_tie_in_floats(dtype: torch.dtype) -> None:
    target = torch.tensor(0.2, dtype=dtype)
    distance = (torch.tensor([[0.2, 0.1, 0.3, 1.0]], dtype=dtype) - target).abs()
    assert distance[0, 1] != distance[0, 2]
    policy = torch.tensor([[-1.0, -2.0, -2.0, -3.0]], dtype=dtype, requires_grad=True)
    scores = table([[-1, -2, -2, -3]])._replace(policy=policy, distance=distance)
    Listwise(beta=1.0)(scores).backward()
    assert policy.grad is not None
    assert policy.grad[0, 1] == policy.grad[0, 2]


def test_statistics_spelled_out() -> None:
    scores = table(
        [[-1, -2, 1], [-1, -4, 7], [-8, 7, 7]],
        lengths=[[2, 2, 2], [1, 1, 1], [4, 1, 1]],
        valid=[[True, True, True], [True, True, False], [True, False, False]],
    )
    loss = DPO(beta=0.5)
    statistics = {name: float(value) for name, value in preference_statistics(loss, scores).items()}
    # margins 0.5 and -1 of the first query, 1.5 of the second; the third has no pair
    assert statistics == pytest.approx(
        {
            "reward_margin": ((0.5 - 1) / 2 + 1.5) / 2,
            "reward_accuracy": (1 / 2 + 1) / 2,
            "logp_chosen": -1,
            "logp_rejected": ((-2 + 1) / 2 - 4) / 2,
        }
    )
    learning = scores._replace(policy=scores.policy.requires_grad_())
    assert not any(x.requires_grad for x in preference_statistics(loss, learning).values())
    # equal rewards are no win
    assert float(preference_statistics(loss, table([[-1, -1]]))["reward_accuracy"]) == 0


def test_rewards_and_which_losses_need_the_reference() -> None:
    # One pair: log p of -2 and -5, under the reference -2.5 and -4, of 2 and 4 tokens.
    pair = table([[-2, -5]], reference=[[-2.5, -4]], lengths=[[2, 4]])
    for loss in (DPO(beta=0.1), IPO(beta=0.1), Listwise(beta=0.1)):
        assert loss.rewards(pair).tolist() == [pytest.approx([0.05, -0.1])]
    assert SimPO(beta=2.0).rewards(pair).tolist() == [pytest.approx([-2.0, -2.5])]
    without = random_table(1)._replace(reference=None)
    assert float(SimPO()(without)) == float(SimPO()(random_table(1)))
    assert [loss for loss in PREFERENCE_LOSSES if not loss.needs_reference] == [SimPO(beta=2.5, gamma=0.3)]
