"""Verbalized confidence: the stated one, and the mean over all that could be stated."""

from __future__ import annotations

import torch

from vlm_calibration.estimators.base import AnsweredBatch, Estimate, Estimator
from vlm_calibration.estimators.predictions import VERBALIZED
from vlm_calibration.perturbation.levels import ConfidenceLevels


class VerbalizedConfidence(Estimator):
    """The confidence that the answer states (Lin et al., arXiv 2205.14334); its passes are those of the answer.

    Every evaluation includes it, as the key `confidence`.
    """

    name = VERBALIZED

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        return Estimate([p.confidence for p in answered.predictions], list(answered.answer_passes))


class ExpectedConfidence(Estimator):
    r"""The mean of the levels that the model can state after its own answer a.

    .. math:: \sum_k c_k \, p(c_k \mid v, q, a) \quad\text{with}\quad p(c_k \mid v, q, a) \propto p(a, c_k \mid v, q)

    All levels are scored in one pass. Greedy decoding states the mode of this distribution; the calibrated statement is its
    mean.

    Args:
        levels: scales whose levels are averaged, beside the scale of the data's noise. Use the levels that the model was taught, and
            for several models those of all of them.
    """

    name = "expected"

    def __init__(self, levels: list[ConfidenceLevels] | None = None) -> None:
        self.levels = levels or []

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        confidence: list[float | None] = []
        for scores in answered.scored:
            if scores is None:
                confidence.append(None)
                continue
            p = torch.softmax(scores.level_log_p.double(), -1)
            mean = float((p * torch.tensor(scores.levels, dtype=torch.float64)).sum())
            # Rounding can move the mean just outside the levels.
            confidence.append(min(max(mean, min(scores.levels)), max(scores.levels)))
        return Estimate(confidence, [scores.passes if scores else 1 for scores in answered.scored])
