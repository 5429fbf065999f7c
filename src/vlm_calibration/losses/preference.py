"""Preference losses: one response to a query over others, from the log-likelihoods of whole responses.

With the log-ratio of a response, r = log p(response) - log p_ref(response), the losses of pairs are functions of

    h = r_chosen - r_rejected

Every loss is a frozen dataclass of its settings, called with `CandidateScores`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm_calibration.losses.candidates import CandidateLoss, CandidateScores, fill_padding

TIE = 1e-5
"""Distances that differ by at most this are equal: in floats 0.3 - 0.2 is not 0.2 - 0.1."""


def _mean_over_queries(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over the counted values, [B, K], of each query, then over the queries that have any; 0 if no query has."""
    n = counted.sum(-1)
    means = torch.where(counted, values, 0.0).sum(-1) / n.clamp(min=1)
    return means.sum() / (n > 0).sum().clamp(min=1)


class PreferenceLoss(CandidateLoss):
    """Base class of the losses that prefer responses to others.

    A query with nothing to compare does not contribute; if no query does, the loss is 0 with a gradient of 0.
    """

    beta: float
    """Scale of the implicit reward."""
    needs_reference = True

    def rewards(self, scores: CandidateScores) -> Tensor:
        """Implicit reward of each candidate, float [B, K]: beta times its log-ratio."""
        return self.beta * self.log_ratios(scores)

    def log_ratios(self, scores: CandidateScores) -> Tensor:
        """log p - log p_ref of each candidate, float [B, K]."""
        assert scores.reference is not None
        return scores.policy - scores.reference


class PairwiseLoss(PreferenceLoss):
    """Base class of the losses of the chosen response with each rejected one; a query's loss is the mean over its pairs."""

    @abstractmethod
    def pair_losses(self, h: Tensor, distance: Tensor) -> Tensor:
        """The loss of each pair, float [B, K - 1]; `distance`, float [B, K - 1], is that of the rejected response."""

    def forward(self, scores: CandidateScores) -> Tensor:
        ratios = self.log_ratios(scores)
        h = ratios[:, :1] - ratios[:, 1:]
        return _mean_over_queries(self.pair_losses(h, scores.distance[:, 1:]), scores.valid[:, 1:])


@dataclass(frozen=True)
class DPO(PairwiseLoss):
    """Direct preference optimisation (arXiv 2305.18290, equation 7): -log sigmoid(beta h).

    Args:
        beta: strength of the regularisation towards the reference; scale of the reward.
    """

    beta: float = 0.1

    def pair_losses(self, h: Tensor, distance: Tensor) -> Tensor:
        return -logsigmoid(self.beta * h)


@dataclass(frozen=True)
class SimPO(PairwiseLoss):
    """Simple preference optimisation (arXiv 2405.14734, equation 6): -log sigmoid(beta h - gamma), per token, no reference.

    The paper tunes both for each model (beta 2 to 2.5, gamma 0.3 to 1.6); the defaults are its setting for Llama-3-Base.

    Args:
        beta: scale of the reward; much larger than DPO's, because rewards are per token.
        gamma: target reward margin, at least 0. TRL's `simpo_gamma`; the authors' code sets gamma / beta.
    """

    beta: float = 2.0
    gamma: float = 1.0
    needs_reference = False

    def log_ratios(self, scores: CandidateScores) -> Tensor:
        """log p per token of each candidate, float [B, K]."""
        return scores.policy / scores.lengths

    def pair_losses(self, h: Tensor, distance: Tensor) -> Tensor:
        return -logsigmoid(self.beta * h - self.gamma)


@dataclass(frozen=True)
class IPO(PairwiseLoss):
    """Identity preference optimisation (arXiv 2310.12036, equation 17): (h - 1 / (2 beta))^2, of whole responses.

    Args:
        beta: the paper's tau.
    """

    beta: float = 0.1

    def pair_losses(self, h: Tensor, distance: Tensor) -> Tensor:
        return (h - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class Ordinal(PairwiseLoss):
    """DPO with an offset (ODPO, arXiv 2402.10571): -log sigmoid(beta h - offset * distance).

    The paper's offset is alpha times the log of a difference of scores; here it is linear in the distance, which may be 0.

    Args:
        beta: as in `DPO`.
        offset: required reward margin at distance 1, at least 0; 0 is DPO.
    """

    beta: float = 0.1
    offset: float = 1.0

    def pair_losses(self, h: Tensor, distance: Tensor) -> Tensor:
        return -logsigmoid(self.beta * h - self.offset * distance)


@dataclass(frozen=True)
class Listwise(PreferenceLoss):
    """The Plackett-Luce likelihood of ranking all candidates by distance (arXiv 2305.18290, appendix A.3; 2402.01878).

    With the rewards s and distances d, the term of candidate i is the negative log-probability of picking it among itself and
    all candidates that are strictly further away (by more than `TIE`):

        log( exp s_i + sum_{j: d_j > d_i} exp s_j ) - s_i

    A query's loss is the mean of its terms; with two candidates it is DPO.

    Args:
        beta: as in `DPO`.
    """

    beta: float = 0.1

    def forward(self, scores: CandidateScores) -> Tensor:
        s, d, valid = self.rewards(scores), scores.distance, scores.valid
        further = d[:, None, :] > d[:, :, None] + TIE
        further = further & valid[:, None, :] & valid[:, :, None]
        pool = further | torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
        terms = torch.where(pool, s[:, None, :], -torch.inf).logsumexp(-1) - s
        return _mean_over_queries(terms, further.any(-1))


@torch.no_grad()
def preference_statistics(loss: CandidateLoss, scores: CandidateScores) -> dict[str, Tensor]:
    """Statistics to log beside the loss: means over a query's pairs, then over the queries with a pair; nan if there is none.

    `reward_margin` is chosen minus rejected, `reward_accuracy` the share of margins above 0.
    """
    filled = fill_padding(scores)
    rewards, policy, pairs = loss.rewards(filled), filled.policy, filled.valid[:, 1:]
    margin = rewards[:, :1] - rewards[:, 1:]
    statistics = {
        "reward_margin": margin,
        "reward_accuracy": (margin > 0).to(margin.dtype),
        "logp_chosen": policy[:, :1].expand_as(margin),
        "logp_rejected": policy[:, 1:],
    }
    return {
        name: torch.where(pairs.any(), _mean_over_queries(values, pairs), math.nan)
        for name, values in statistics.items()
    }
