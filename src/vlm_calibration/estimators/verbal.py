"""The confidence that a model puts into words: the one that it states, and its mean over all that it might have stated."""

from __future__ import annotations

import torch

from vlm_calibration.estimators.base import AnsweredBatch, Estimate, Estimator
from vlm_calibration.estimators.predictions import VERBALIZED
from vlm_calibration.perturbation.levels import ConfidenceLevels


class VerbalizedConfidence(Estimator):
    """What the answer states (Lin et al., arXiv 2205.14334); its passes are those of the answer.

    Every evaluation has it, as the key `confidence`, so there is no need to ask for it.
    """

    name = VERBALIZED

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        return Estimate([p.confidence for p in answered.predictions], list(answered.answer_passes))


class ExpectedConfidence(Estimator):
    r"""The mean of the levels that the model might state behind its own answer a.

    .. math:: \sum_k c_k \, p(c_k \mid v, q, a) \quad\text{with}\quad p(c_k \mid v, q, a) \propto p(a, c_k \mid v, q)

    All levels are scored in one pass. Greedy decoding states the mode of this distribution; the calibrated statement is its
    mean.

    Args:
        levels: the mean is over the levels of any of these; None: those of the data's noise, eleven unless it says otherwise. A
            model is best asked about the levels that it was taught, and several models about those of all of them.
    """

    name = "expected"

    def __init__(self, levels: list[ConfidenceLevels] | None = None) -> None:
        self.levels = levels or []

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        confidence: list[float | None] = []
        for found in answered.scored:
            if found is None:
                confidence.append(None)
                continue
            p = torch.softmax(found.level_log_p.double(), -1)
            mean = float((p * torch.tensor(found.levels, dtype=torch.float64)).sum())
            confidence.append(min(max(mean, min(found.levels)), max(found.levels)))  # to the last bit
        return Estimate(confidence, [found.passes if found else 1 for found in answered.scored])
