"""Stability: how likely a model holds its answer when the image is mildly perturbed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from jsonargparse.typing import NonNegativeInt

from vlm_calibration.data.noise import ImageCopy
from vlm_calibration.estimators.base import AnsweredBatch, Estimate, Estimator
from vlm_calibration.estimators.likelihood import likelihood_of
from vlm_calibration.perturbation.by_kind import KIND_NAMES
from vlm_calibration.perturbation.levels import Perturbation
from vlm_calibration.records import DataError

STRENGTHS: Mapping[str, Sequence[float]] = {"blur": (0.02,), "noise": (0.1, 0.1, 0.1)}
"""Kind of perturbation -> strength of each copy, by default; chosen on development scenes of the demo."""


class Stability(Estimator):
    r"""The mean likelihood of the answer on perturbed copies of the image.

    :math:`\frac{1}{n} \sum_i p(a \mid v_i, q)` with p as in `AnswerLikelihood`: each copy is one forward pass. The entropy over sampled
    answers (VL-Uncertainty, Zhang et al., arXiv 2411.11919) ranks the demo's answers worse, at seven times the passes. The copies are a
    function of (seed, query id) alone.

    Args:
        strengths: kind of perturbation -> the strength of each copy, in (0, 1]; None: `STRENGTHS`.
        region: perturb the whole image, or the key object, which is unknown in use: for queries that have its region, as
            their source or `data.regions` has it. A query without a region then has no confidence.
        seed: seed of the perturbations.

    Raises:
        DataError: there is no such kind, a strength outside (0, 1], or no copy at all.
    """

    name = "stability"

    def __init__(
        self,
        strengths: dict[str, list[float]] | None = None,
        region: Literal["image", "object"] = "image",
        seed: NonNegativeInt = 0,
    ) -> None:
        given = STRENGTHS if strengths is None else strengths
        self.strengths = {kind: list(own) for kind, own in given.items()}
        self.region, self.seed = region, seed
        if unknown := sorted(set(self.strengths) - set(KIND_NAMES)):
            raise DataError(
                f"Stability.strengths: there is no kind {unknown[0]!r}: expected {', '.join(KIND_NAMES)}"
            )
        perturbations = [Perturbation(kind, s) for kind, own in self.strengths.items() for s in own]
        if not perturbations or not all(0 < p.strength <= 1 for p in perturbations):
            raise DataError(
                f"Stability.strengths must be a strength in (0, 1] for each of one or more copies, found {self.strengths}"
            )
        self.copies = [ImageCopy(p, region, seed, number) for number, p in enumerate(perturbations)]

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        confidence: list[float | None] = [None] * len(answered.predictions)
        passes = [0] * len(answered.predictions)
        for copy in self.copies:
            for row, scores in answered.score_copy(copy, with_levels=False).items():
                passes[row] += scores.passes
                likelihood = likelihood_of(scores, answered.predictions[row].predicted)
                if likelihood is not None and answered.answers[row] is not None:
                    confidence[row] = (confidence[row] or 0.0) + likelihood / len(self.copies)
        # Rounding can move the mean just above 1.
        return Estimate([None if c is None else min(1.0, c) for c in confidence], passes)
