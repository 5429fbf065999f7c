"""What a model believes about the levels, given an image, a question and an answer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlm_calibration.data.pairs import Candidate


class LevelDistribution(NamedTuple):
    """total: float [B, K], log p of each of the candidates, which state every level once for each answer."""

    total: Tensor
    candidates: tuple[tuple[Candidate, ...], ...]

    def over_levels(self, row: int) -> tuple[Tensor, list[int]]:
        """log-probabilities of the levels of one query, normalised over them, and their candidates' indices."""
        indices = [k for k, c in enumerate(self.candidates[row]) if not c.wrong]
        return torch.log_softmax(self.total[row, indices].float(), -1), indices

    def expected(self, row: int) -> float:
        """The mean confidence of one query over its levels, in [0, 1]."""
        log_p, indices = self.over_levels(row)
        levels = log_p.new_tensor([self.candidates[row][k].confidence for k in indices])
        return float((log_p.exp() * levels).sum())

    def own(self, row: int) -> int:
        """Index of the candidate that greedy decoding would come to."""
        log_p, indices = self.over_levels(row)
        return indices[int(log_p.argmax())]


@torch.no_grad()
def divergence(believed: LevelDistribution, before: LevelDistribution) -> Tensor:
    """KL divergence of the stated level from what was believed before, in nats, a mean over queries."""
    values = []
    for row in range(len(believed.candidates)):
        now, was = believed.over_levels(row)[0], before.over_levels(row)[0]
        values.append((now.exp() * (now - was)).sum())
    return torch.stack(values).mean()
