"""Tables of scores for the tests of losses, in float64."""

from __future__ import annotations

from typing import Any

import torch

from vlm_calibration.losses.candidates import CandidateLoss, CandidateScores
from vlm_calibration.losses.distribution import RLCR, ExpectedBrier, SoftLabel, TokenizedBrier
from vlm_calibration.losses.preference import DPO, IPO, Listwise, Ordinal, PreferenceLoss, SimPO

PREFERENCE_LOSSES: list[PreferenceLoss] = [
    DPO(beta=0.7),
    SimPO(beta=2.5, gamma=0.3),
    IPO(),
    Ordinal(beta=0.4, offset=2.5),
    Listwise(beta=0.8),
]
DISTRIBUTION_LOSSES: list[CandidateLoss] = [
    SoftLabel(width=0.3),
    SoftLabel(width=0.3, opposite_weight=0.4),
    TokenizedBrier(),
    ExpectedBrier(),
    RLCR(),
]


def table(policy: list[list[float]], **given: list[Any]) -> CandidateScores:
    """Scores in float64.

    Defaults are reference 0, lengths 1, distances [0, 1, 1, ...], all valid, answer 0, confidence 0.5, target 0.5, all correct and
    all own.
    """
    values = torch.tensor(policy, dtype=torch.float64)
    everywhere, zeros = torch.ones_like(values, dtype=torch.bool), torch.zeros_like(values)
    scores = CandidateScores(
        policy=values,
        reference=zeros,
        lengths=everywhere.long(),
        distance=(torch.arange(values.shape[1]) > 0).double().expand_as(values),
        valid=everywhere,
        answer=zeros,
        confidence=zeros + 0.5,
        target=zeros[:, 0] + 0.5,
        correct=everywhere,
        own=everywhere,
    )
    types = {name: getattr(scores, name).dtype for name in given}
    return scores._replace(**{name: torch.tensor(given[name], dtype=types[name]) for name in given})


def random_table(seed: int, n_queries: int = 5, n_candidates: int = 4) -> CandidateScores:
    """Random scores with valid candidates and other answers in any column but the first, and ties in distance.

    The first query has only the chosen candidate; the second has no other answer.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (n_queries, n_candidates)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(size or shape, generator=generator, dtype=torch.float64)

    valid = uniform() < 0.6
    valid[:, 0] = True
    valid[0, 1:] = False
    distance = torch.randint(1, 5, shape, generator=generator) / 4
    distance[:, 0] = 0
    own = uniform() < 0.6
    own[:, 0] = True
    own[1] = True
    answer = -3 * uniform()
    return CandidateScores(
        policy=answer - 3 * uniform(),
        reference=-6 * uniform(),
        lengths=torch.randint(1, 7, shape, generator=generator),
        distance=distance.double(),
        valid=valid,
        answer=answer,
        confidence=uniform(),
        target=uniform(n_queries),
        correct=uniform() < 0.5,
        own=own,
    )
