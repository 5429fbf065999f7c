"""Losses that prefer one response to a query over others, from the log-likelihoods of whole responses.

Every loss is a frozen dataclass of its settings that is called with `CandidateScores`. The arithmetic is in
`comparisons`; here are padding, means and the settings.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlm_calibration.losses.functional import dpo, hinge, ipo, odpo, plackett_luce, simpo
from vlm_calibration.records import DataError


class CandidateScores(NamedTuple):
    """Log-likelihoods of K candidate responses to each of B queries; column 0 is the chosen one.

    policy: float [B, K], sum of log p over the response's tokens. reference: the same under the frozen reference, or None.
    lengths: [B, K], number of tokens, at least 1. distance: float [B, K] in [0, 1], how far the response is from the
    target: 0 for the chosen one, |stated level - target level|, 1 for a wrong answer. valid: bool [B, K], False for
    padding, whose numbers may be anything; column 0 is always valid.
    """

    policy: Tensor
    reference: Tensor | None
    lengths: Tensor
    distance: Tensor
    valid: Tensor


class Pairs(NamedTuple):
    """Log-likelihoods of chosen and rejected responses; those of the reference are 0 for a loss without one."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor


def _filled(scores: CandidateScores) -> CandidateScores:
    """Checked scores in the policy's dtype or float32 if that is wider, with harmless numbers in place of padding.

    Padding goes before any arithmetic: the gradient of an inf or nan that is masked afterwards is nan.
    """
    shape, valid = scores.policy.shape, scores.valid
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"candidates must be a table of queries x candidates, found shape {tuple(shape)}")
    for name, values in scores._asdict().items():
        if values is not None and values.shape != shape:
            raise ValueError(f"{name} has shape {tuple(values.shape)}, but policy has {tuple(shape)}")
    if not bool(valid[:, 0].all()):
        raise ValueError("column 0 is the chosen response and must be valid for every query")

    dtype = torch.promote_types(scores.policy.dtype, torch.float32)

    def fill(values: Tensor, padding: float) -> Tensor:
        return torch.where(valid, values.to(dtype), padding)

    lengths = fill(scores.lengths, 1.0)
    if bool((lengths < 1).any()):
        raise ValueError("every valid candidate needs a length of at least 1 token")
    reference = None if scores.reference is None else fill(scores.reference, 0.0)
    return CandidateScores(fill(scores.policy, 0.0), reference, lengths, fill(scores.distance, 0.0), valid)


def _mean_over_queries(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over what counts of each query, then over the queries with anything that counts; 0 if there is none."""
    n = counted.sum(-1)
    means = torch.where(counted, values, 0.0).sum(-1) / n.clamp(min=1)
    return means.sum() / (n > 0).sum().clamp(min=1)


_RULES = {
    "beta": (lambda value: 0 < value < math.inf, "a finite number above 0"),
    "label_smoothing": (lambda value: 0 <= value < 0.5, "in [0, 0.5)"),
    "gamma": (lambda value: 0 <= value < math.inf, "a finite number of at least 0"),
    "offset": (lambda value: 0 <= value < math.inf, "a finite number of at least 0"),
}


class PreferenceLoss(ABC):
    """A loss of candidate scores, as a scalar.

    Queries count alike, however many candidates they have. One with nothing to compare contributes nothing, and if all
    are such, the loss is a 0 with a gradient of 0.

    Attributes:
        beta: scale of the implicit reward.
        needs_reference: whether `CandidateScores.reference` is used.
        per_token: whether log-likelihoods are divided by the number of tokens.
    """

    beta: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in _RULES and not _RULES[name][0](value):
                raise DataError(f"loss.{name} must be {_RULES[name][1]}, found {value}")

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def per_token(self) -> bool:
        return False

    @abstractmethod
    def __call__(self, scores: CandidateScores) -> Tensor:
        """The loss, a scalar.

        Raises:
            ValueError: scores that are not a table, without a chosen response or without the reference that is needed.
        """

    def rewards(self, scores: CandidateScores) -> Tensor:
        """The implicit reward of each candidate, [B, K]: beta (policy - reference), per token if so set; 0 for padding."""
        policy, reference = self._log_likelihoods(_filled(scores))
        return self.beta * (policy - reference)

    def _log_likelihoods(self, filled: CandidateScores) -> tuple[Tensor, Tensor]:
        """Of policy and reference as this loss takes them: per token or not, and 0 for a reference it does without."""
        if not self.needs_reference:
            reference = torch.zeros_like(filled.policy)
        elif filled.reference is None:
            raise ValueError(f"{type(self).__name__} needs the log-likelihoods of the reference, found None")
        else:
            reference = filled.reference
        scale = filled.lengths if self.per_token else torch.ones_like(filled.lengths)
        return filled.policy / scale, reference / scale


class PairwiseLoss(PreferenceLoss):
    """Every valid candidate but the chosen one makes a pair with it; a query's loss is the mean over its pairs."""

    @abstractmethod
    def pair_losses(self, pairs: Pairs, distance: Tensor) -> Tensor:
        """The loss of each pair, [B, K - 1]; `distance` is the rejected response's."""

    def __call__(self, scores: CandidateScores) -> Tensor:
        filled = _filled(scores)
        policy, reference = self._log_likelihoods(filled)
        pairs = Pairs(policy[:, :1], policy[:, 1:], reference[:, :1], reference[:, 1:])
        return _mean_over_queries(self.pair_losses(pairs, filled.distance[:, 1:]), filled.valid[:, 1:])


@dataclass(frozen=True)
class DPO(PairwiseLoss):
    """Direct preference optimisation (arXiv 2305.18290).

    Args:
        beta: strength of the pull towards the reference; scale of the reward.
        label_smoothing: assumed share of flipped preferences in [0, 0.5); above 0 this is conservative DPO (Mitchell,
            "A note on DPO with noisy preferences & relationship to IPO", 2023).
        reference_free: take the reference to like all responses alike.
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
    Llama-3-Base, whose ratio of 0.5 the authors recommend to start from.

    Args:
        beta: scale of the reward; much larger than DPO's, because rewards are per token.
        gamma: reward margin to aim for, at least 0. TRL's `simpo_gamma`; the authors' code sets gamma / beta.
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
        average: take log-likelihoods per token, as TRL does. The default is the paper's equation, on whole responses;
            for responses of n tokens each, averages with beta are sums with beta / n, and 1 / n^2 of the loss.
    """

    beta: float = 0.1
    average: bool = False

    @property
    def per_token(self) -> bool:
        return self.average

    def pair_losses(self, pairs: Pairs, distance: Tensor) -> Tensor:
        return ipo(*pairs, self.beta)


@dataclass(frozen=True)
class Hinge(PairwiseLoss):
    """The hinge loss of SLiC (arXiv 2305.10425), on ratios to the reference as RSO has it (arXiv 2309.06657).

    Args:
        beta: a pair is left alone once its h reaches 1 / beta, SLiC's margin delta.
    """

    beta: float = 0.1

    def pair_losses(self, pairs: Pairs, distance: Tensor) -> Tensor:
        return hinge(*pairs, self.beta)


@dataclass(frozen=True)
class Ordinal(PairwiseLoss):
    """DPO with an offset (ODPO, arXiv 2402.10571): the further a response is from the target, the larger the margin.

    The paper's offset is alpha times the log of a difference of scores; here it is linear in the distance, which is in
    [0, 1] and may be 0.

    Args:
        beta: as in `DPO`.
        offset: reward margin asked for at distance 1, at least 0; 0 is DPO.
    """

    beta: float = 0.1
    offset: float = 1.0

    def pair_losses(self, pairs: Pairs, distance: Tensor) -> Tensor:
        return odpo(*pairs, distance, self.beta, self.offset)


@dataclass(frozen=True)
class Listwise(PreferenceLoss):
    """The Plackett-Luce likelihood of ranking all candidates by distance (arXiv 2305.18290, appendix A.3; 2402.01878).

    Candidates score their implicit reward; `plackett_luce` says what becomes of ties. A query's loss is the mean of its
    terms, so that it is comparable across numbers of candidates; with two it is DPO.

    Args:
        beta: as in `DPO`.
    """

    beta: float = 0.1

    def __call__(self, scores: CandidateScores) -> Tensor:
        filled = _filled(scores)
        policy, reference = self._log_likelihoods(filled)
        terms, counted = plackett_luce(self.beta * (policy - reference), filled.distance, filled.valid)
        return _mean_over_queries(terms, counted)


@torch.no_grad()
def preference_statistics(loss: PreferenceLoss, scores: CandidateScores) -> dict[str, Tensor]:
    """What to log beside the loss.

    All are means over a query's pairs, then over the queries with a pair, and nan if there is none.

    Returns:
        reward_margin: reward of the chosen response minus the rejected one's. reward_accuracy: whether that is above 0.
        logp_chosen, logp_rejected: log-likelihood of the whole responses.
    """
    filled = _filled(scores)
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
