"""Stability: how likely a model holds its answer when the image is mildly perturbed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

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

    VL-Uncertainty (Zhang et al., arXiv 2411.11919) blurs the image, samples an answer to each copy, and takes the entropy over
    their meanings. Here the answer to the image itself is rated, and each copy is one forward pass that scores it:
    :math:`\frac{1}{n} \sum_i p(a \mid v_i, q)` with p as in `AnswerLikelihood`. On the demo this ranks answers better than the
    share of answers to the same copies that agree, or their entropy, at a seventh of the passes. The copies are a function of
    (seed, query id) alone.

    Args:
        strengths: kind of perturbation -> the strength of each copy, in (0, 1]; None: `STRENGTHS`. Kinds without randomness, such
            as blur, make the same copy of equal strengths.
        region: perturb the whole image, or the key object, which is unknown in use: for queries that have its region, as
            their source or `data.regions` has it. A query without a region then has no confidence.
        seed: seed of the perturbations.

    Raises:
        DataError: there is no such kind, a strength outside (0, 1], no copy at all, or a negative seed.
    """

    name = "stability"

    def __init__(
        self,
        strengths: dict[str, list[float]] | None = None,
        region: Literal["image", "object"] = "image",
        seed: int = 0,
    ) -> None:
        given = STRENGTHS if strengths is None else strengths
        self.strengths = {kind: list(of_kind) for kind, of_kind in given.items()}
        self.region = region
        self.seed = seed
        if unknown := sorted(set(self.strengths) - set(KIND_NAMES)):
            raise DataError(
                f"Stability.strengths: there is no kind {unknown[0]!r}: expected {', '.join(KIND_NAMES)}"
            )
        perturbations = [Perturbation(kind, s) for kind, of_kind in self.strengths.items() for s in of_kind]
        if not perturbations or not all(0 < p.strength <= 1 for p in perturbations):
            raise DataError(
                f"Stability.strengths must be a strength in (0, 1] for each of one or more copies, found {self.strengths}"
            )
        if seed < 0:
            raise DataError(f"Stability.seed must be at least 0, found {seed}")
        self.copies = [ImageCopy(p, region, seed, number) for number, p in enumerate(perturbations)]

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        """The mean likelihood of each answer.

        Raises:
            ValueError: the copies were not made, see `AnsweredBatch.score_copy`.
        """
        confidence: list[float | None] = [None] * len(answered.predictions)
        passes = [0] * len(answered.predictions)
        for copy in self.copies:
            for row, scores in answered.score_copy(copy, with_levels=False).items():
                passes[row] += scores.passes
                if answered.answers[row] is None:
                    continue
                likelihood = likelihood_of(scores, answered.predictions[row].predicted)
                if likelihood is not None:
                    confidence[row] = (confidence[row] or 0.0) + likelihood / len(self.copies)
        # Rounding can move the mean just above 1.
        return Estimate([None if c is None else min(1.0, c) for c in confidence], passes)
