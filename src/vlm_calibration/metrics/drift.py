"""Drift of confidences: are those of new answers still like those of a reference? No labels are needed."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

GRID_STEPS = 1000
"""Confidences are compared in tenths of a percent, which the last digits of a floating-point computation do not change."""


class Drift(NamedTuple):
    """The largest difference between the shares of both sides up to a confidence, in [0, 1], and the probability of it without drift."""

    difference: float
    p_value: float


def drift_test(reference: npt.ArrayLike, new: npt.ArrayLike, permutations: int = 999) -> Drift:
    """Test whether new answers are draws from the same source as a reference, by the Kolmogorov-Smirnov statistic.

    The p-value is the share of random divisions of all answers into two sides of these sizes with at least this difference, so it is exact
    for a few tied percents too; it is at least 1 / (permutations + 1). It assumes independent answers: give one of those about an image.
    Confidences are float64 [M] and [N] in [0, 1]; NaN, one that could not be parsed, is a level of its own below all others.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (reference, new)]
    values = np.concatenate(sides)
    level = np.unique(np.where(np.isnan(values), -1, np.rint(values * GRID_STEPS)), return_inverse=True)[1]
    total = np.bincount(level)

    def difference(counts: np.ndarray) -> np.ndarray:
        """The statistic [...] of the counts of new answers at each level [..., L]."""
        shares = counts.cumsum(-1) / len(sides[1]) - (total - counts).cumsum(-1) / len(sides[0])
        return np.abs(shares).max(-1)

    observed = difference(np.bincount(level[len(sides[0]) :], minlength=len(total)))
    rng, as_large, batch = np.random.default_rng(0), 0, 1000
    for start in range(0, permutations, batch):
        size = min(batch, permutations - start)
        drawn = rng.multivariate_hypergeometric(total, len(sides[1]), size=size, method="marginals")
        as_large += int((difference(drawn) >= observed - 1e-12).sum())
    return Drift(float(observed), (1 + as_large) / (1 + permutations))
