"""Preference losses: one response to a query over others, from the log-likelihoods of whole responses.

Every loss is a frozen dataclass of its settings, called with `CandidateScores`. The formulas are in `functional`; this
module handles settings, padding and means.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlm_calibration.losses.candidates import CandidateLoss, CandidateScores, fill_padding
from vlm_calibration.losses.functional import dpo, ipo, odpo, plackett_luce, simpo


class Pairs(NamedTuple):
    """Log-likelihoods of chosen and rejected responses, per token if the loss is.

    Attributes:
        chosen: float [B, 1].
        rejected: float [B, K - 1].
        ref_chosen: float [B, 1], under the reference; 0 for a loss without reference.
        ref_rejected: float [B, K - 1], under the reference; 0 for a loss without reference.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor


def _mean_over_queries(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over the counted values of each query, then over the queries that have any; 0 if no query has.

    Args:
        values: float [B, K].
        counted: bool [B, K].
    """
    n = counted.sum(-1)
    means = torch.where(counted, values, 0.0).sum(-1) / n.clamp(min=1)
    return means.sum() / (n > 0).sum().clamp(min=1)


class PreferenceLoss(CandidateLoss):
    """Base class of the losses that prefer responses to others.

    A query with nothing to compare does not contribute; if no query does, the loss is 0 with a gradient of 0.

    Attributes:
        beta: scale of the implicit reward.
        per_token: whether log-likelihoods are divided by the number of tokens.
    """

    beta: float

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def per_token(self) -> bool:
        return False

    def rewards(self, scores: CandidateScores) -> Tensor:
        """Implicit reward of each candidate, float [B, K]: beta (policy - reference), per token if the loss is; 0 for padding."""
        policy, reference = self._log_likelihoods(fill_padding(scores))
        return self.beta * (policy - reference)

    def _log_likelihoods(self, filled: CandidateScores) -> tuple[Tensor, Tensor]:
        """Log-likelihoods under policy and reference, float [B, K] each: per token if the loss is; 0 if it has no reference."""
        if not self.needs_reference:
            reference = torch.zeros_like(filled.policy)
        elif filled.reference is None:
            raise ValueError(f"{type(self).__name__} needs the log-likelihoods of the reference, found None")
        else:
            reference = filled.reference
        scale = filled.lengths if self.per_token else torch.ones_like(filled.lengths)
        return filled.policy / scale, reference / scale


class PairwiseLoss(PreferenceLoss):
    """Base class of the losses of pairs: the chosen response with each rejected one; a query's loss is the mean over its pairs."""

    @abstractmethod
    def pair_losses(self, pairs: Pairs, distance: Tensor) -> Tensor:
        """The loss of each pair, float [B, K - 1]; `distance`, float [B, K - 1], is that of the rejected response."""

    def __call__(self, scores: CandidateScores) -> Tensor:
        filled = fill_padding(scores)
        policy, reference = self._log_likelihoods(filled)
        pairs = Pairs(policy[:, :1], policy[:, 1:], reference[:, :1], reference[:, 1:])
        return _mean_over_queries(self.pair_losses(pairs, filled.distance[:, 1:]), filled.valid[:, 1:])


@dataclass(frozen=True)
class DPO(PairwiseLoss):
    """Direct preference optimisation (arXiv 2305.18290).

    Args:
        beta: strength of the regularisation towards the reference; scale of the reward.
        label_smoothing: assumed share of flipped preferences in [0, 0.5); above 0 this is conservative DPO (Mitchell,
            "A note on DPO with noisy preferences & relationship to IPO", 2023).
        reference_free: use a reference that prefers no response.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_free: bool = False

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free

    def pair_losses(self, pairs: Pairs, distance: Tensor) -> Tensor:
        return dpo(*pairs, self.beta, self.label_smoothing)


@dataclass(frozen=True)
class SimPO(PairwiseLoss):
    """Simple preference optimisation (arXiv 2405.14734): log-likelihood per token, a target margin, no reference.

    The paper tunes beta and gamma for each model (2 to 2.5 and 0.3 to 1.6). The defaults are its setting for
    Llama-3-Base; the authors recommend its ratio of 0.5 to start from.

    Args:
        beta: scale of the reward; much larger than DPO's, because rewards are per token.
        gamma: target reward margin, at least 0. TRL's `simpo_gamma`; the authors' code sets gamma / beta.
    """

    beta: float = 2.0
    gamma: float = 1.0

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def per_token(self) -> bool:
        return True

    def pair_losses(self, pairs: Pairs, distance: Tensor) -> Tensor:
        return simpo(pairs.chosen, pairs.rejected, self.beta, self.gamma)


@dataclass(frozen=True)
class IPO(PairwiseLoss):
    """Identity preference optimisation (arXiv 2310.12036, equation 17), which regresses h to 1 / (2 beta).

    Args:
        beta: the paper's tau.
        average: use log-likelihoods per token, as TRL does. The default is the paper's equation, on whole responses. If all
            responses have n tokens, the loss of averages with beta is 1 / n^2 of the loss of sums with beta / n.
    """

    beta: float = 0.1
    average: bool = False

    @property
    def per_token(self) -> bool:
        return self.average

    def pair_losses(self, pairs: Pairs, distance: Tensor) -> Tensor:
        return ipo(*pairs, self.beta)


@dataclass(frozen=True)
class Ordinal(PairwiseLoss):
    """DPO with an offset (ODPO, arXiv 2402.10571): the margin grows with the rejected response's distance to the target.

    The paper's offset is alpha times the log of a difference of scores; here it is linear in the distance, which is in
    [0, 1] and may be 0.

    Args:
        beta: as in `DPO`.
        offset: required reward margin at distance 1, at least 0; 0 is DPO.
    """

    beta: float = 0.1
    offset: float = 1.0

    def pair_losses(self, pairs: Pairs, distance: Tensor) -> Tensor:
        return odpo(*pairs, distance, self.beta, self.offset)


@dataclass(frozen=True)
class Listwise(PreferenceLoss):
    """The Plackett-Luce likelihood of ranking all candidates by distance (arXiv 2305.18290, appendix A.3; 2402.01878).

    The score of a candidate is its implicit reward; see `plackett_luce` for ties. A query's loss is the mean of its terms,
    so that it is comparable across numbers of candidates; with two candidates it is DPO.

    Args:
        beta: as in `DPO`.
    """

    beta: float = 0.1

    def __call__(self, scores: CandidateScores) -> Tensor:
        filled = fill_padding(scores)
        policy, reference = self._log_likelihoods(filled)
        terms, counted = plackett_luce(self.beta * (policy - reference), filled.distance, filled.valid)
        return _mean_over_queries(terms, counted)


@torch.no_grad()
def preference_statistics(loss: CandidateLoss, scores: CandidateScores) -> dict[str, Tensor]:
    """Statistics to log beside the loss: means over a query's pairs, then over the queries with a pair; nan if there is none.

    Returns:
        `reward_margin`: reward of the chosen response minus that of the rejected one; `reward_accuracy`: the share of
        margins above 0; `logp_chosen` and `logp_rejected`: log-likelihood of the whole responses.
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
