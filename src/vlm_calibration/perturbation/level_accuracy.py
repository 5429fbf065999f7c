"""From the counts of a level table to accuracies: monotone fits, evenly spread strengths, and groups of similar accuracies."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression

from vlm_calibration.perturbation.level_table import AnswerTypeCounts

Accuracies = Mapping[str, np.ndarray]
"""Kind of perturbation -> accuracies in [0, 1] by strength, float64; the first is that of untouched images."""


class AccuracyCurves(NamedTuple):
    """Fitted accuracies.

    Attributes:
        untouched: on untouched images, of all queries.
        perturbed: by kind and strength, of the queries that are perturbed.
    """

    untouched: float
    perturbed: Accuracies


class AnswerTypeFit:
    """The fitted accuracies of one answer type.

    Attributes:
        strengths: kind -> its measured strengths.
        pooled: over all queries.
        bins: in each bin of the likelihood.
        edges: likelihoods between the bins.
    """

    def __init__(self, counts: AnswerTypeCounts) -> None:
        self.strengths = {kind: [row.strength for row in rows] for kind, rows in counts.bins[0].items()}
        (self.pooled,) = _curves(counts.merged)
        self.bins = _curves(counts)
        self.edges = counts.edges


def fit_kinds(accuracy: Accuracies, n: Accuracies) -> dict[str, np.ndarray]:
    """Accuracies that fall with the strength of each kind, all from the same value of untouched images.

    The weighted least-squares fit under these order constraints. For a given value at strength 0, the best fit of a kind is its
    isotonic regression cut off at that value; so that value pools with all blocks above it, as in the pool-adjacent-violators
    algorithm. With one kind this is isotonic regression.

    Args:
        accuracy: measured accuracies by kind; the first value is the same for all kinds.
        n: the number of answers behind each.
    """
    chains = {
        kind: isotonic_regression(values[1:], weights=n[kind][1:], increasing=False).x
        if len(values) > 1
        else values[1:]
        for kind, values in accuracy.items()
    }
    first = next(iter(accuracy))
    total, weight = accuracy[first][0] * n[first][0], float(n[first][0])
    blocks = [block for kind, chain in chains.items() for block in zip(chain, n[kind][1:], strict=True)]
    for value, block_weight in sorted(blocks, reverse=True):
        if value <= total / weight:
            break
        total, weight = total + value * block_weight, weight + block_weight
    untouched = total / weight
    return {
        kind: np.clip([untouched, *np.minimum(chain, untouched)], 0.0, 1.0) for kind, chain in chains.items()
    }


def fit_bins(counts: AnswerTypeCounts) -> list[dict[str, np.ndarray]]:
    """`fit_kinds` in each bin of the likelihood, after accuracies were made to rise with the likelihood at every strength."""
    accuracy: dict[str, np.ndarray] = {}
    n: dict[str, np.ndarray] = {}
    for kind in counts.bins[0]:
        rows = np.array([bin_[kind] for bin_ in counts.bins], dtype=np.float64)  # [bins, strengths, 3]
        n[kind] = rows[..., 1]
        accuracy[kind] = rows[..., 2] / rows[..., 1]
        for column in range(rows.shape[1]):
            fit = isotonic_regression(accuracy[kind][:, column], weights=n[kind][:, column])
            accuracy[kind][:, column] = fit.x
    return [
        fit_kinds({kind: a[i] for kind, a in accuracy.items()}, {kind: w[i] for kind, w in n.items()})
        for i in range(len(counts.bins))
    ]


def _curves(counts: AnswerTypeCounts) -> list[AccuracyCurves]:
    """The fits of all bins with the accuracy on untouched images, to which queries that are never perturbed contribute as measured."""
    fits = fit_bins(counts)
    untouched = np.array([next(iter(fit.values()))[0] for fit in fits])
    others = np.array([row.n for row in counts.never_perturbed])
    if others.any():
        n = np.array([row.n for row in counts.untouched], dtype=np.float64)
        correct = untouched * (n - others) + [row.n_correct for row in counts.never_perturbed]
        untouched = np.asarray(isotonic_regression(correct / n, weights=n).x)
    return list(map(AccuracyCurves, untouched.tolist(), fits))


def spread_strengths(strengths: Sequence[float], accuracies: Sequence[np.ndarray]) -> tuple[float, ...]:
    """As many strengths as were measured, at which accuracies are evenly spaced between untouched images and the lowest one.

    Args:
        strengths: the measured strengths of a kind, rising from 0.
        accuracies: the fitted accuracies of each answer type at these strengths. Each is scaled to [0, 1], and their mean counts.

    Returns:
        Strengths in rising order, the first 0; rounded to a thousandth, and fewer where several coincide.
    """
    scaled = [(a - a[-1]) / (a[0] - a[-1]) for a in accuracies if a[0] > a[-1]]
    if not scaled:
        return tuple(strengths)
    curve = np.mean(scaled, axis=0)
    chosen = [0.0]
    for target in np.linspace(1, 0, len(strengths))[1:]:
        above = int(np.argmax(curve <= target + 1e-12))  # the first strength that falls to the target
        low, high = curve[above], curve[above - 1]
        share = (high - target) / (high - low)
        strength = round(float(strengths[above - 1] + share * (strengths[above] - strengths[above - 1])), 3)
        strength = min(strength, strengths[-1])  # accuracies are not known above it
        if strength > chosen[-1]:
            chosen.append(strength)
    return tuple(chosen)


def group_means(values: Sequence[float], groups: int) -> list[tuple[float, float]]:
    """Split numbers into at most `groups` groups with the least sum of squared differences from their means (Jenks' natural breaks).

    Exact dynamic programming over the distinct values in falling order.

    Returns:
        The smallest number and the mean of each group, in falling order.
    """
    distinct, repeats = (part[::-1] for part in np.unique(values, return_counts=True))
    weight, first, second = (
        np.concatenate([[0.0], np.cumsum(repeats * distinct**power)]) for power in range(3)
    )
    n = len(distinct)
    groups = min(groups, n)
    best = np.full((groups + 1, n + 1), math.inf)
    best[0, 0] = 0.0
    starts = np.zeros((groups + 1, n + 1), dtype=np.int64)
    for group in range(1, groups + 1):
        for end in range(group, n + 1):
            begin = np.arange(end)
            sums = first[end] - first[begin]
            errors = second[end] - second[begin] - sums**2 / (weight[end] - weight[begin])
            cost = best[group - 1, :end] + errors  # the last group is [begin, end)
            starts[group, end] = int(cost.argmin())
            best[group, end] = cost.min()
    means: list[tuple[float, float]] = []
    end = n
    for group in range(groups, 0, -1):
        start = int(starts[group, end])
        mean = np.average(distinct[start:end], weights=repeats[start:end])
        means.append((float(distinct[end - 1]), float(mean)))
        end = start
    return means[::-1]
