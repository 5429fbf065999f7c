"""Drift of confidences: are those of new answers still of the same kind as those of a reference? No labels are needed.

`two_sample_p_value` compares two sets of answers once. `detect_drift` watches a stream and may be asked after every answer: it is a
conformal test martingale (Vovk, Nouretdinov & Gammerman, ICML 2003; Fedorova et al., arXiv 1204.3251; Vovk et al., arXiv 2102.10439).
Both assume under the null hypothesis that reference and new answers are exchangeable, and nothing about their distribution: stated
confidences are a few tied percents. Both see changes of location and of shape. An answer whose confidence could not be parsed is NaN,
which is a level of its own below all others.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.signal import lfilter

BINS = (5, 10)
"""Numbers of equal bins of [0, 1] that the bets on p-values use."""
BETS = ((math.inf, 5.0), (100.0, 20.0))
"""Mean number of earlier answers that a bet remembers, and its pseudo-count of each bin. The first gains from a small change in all
answers, the second notices early that a stream has changed. Bins and bets were chosen by simulation on synthetic confidences."""
MAX_LEVELS = 200
"""More distinct confidences than this are grouped by quantiles in the two-sample test."""
_UNPARSED = -1.0
_CHUNK = 256


class Drift(NamedTuple):
    """The wealth of a bettor against "nothing has changed", and its alarm.

    Attributes:
        log_wealth: float64 [N], natural logarithm of the wealth after each new answer; the wealth before the first one is 1.
        alarm: number of the answer, from 1, at which the wealth first reached 1 / error; None if it never did.
    """

    log_wealth: np.ndarray
    alarm: int | None


def detect_drift(reference: np.ndarray, new: np.ndarray, error: float, seed: int = 0) -> Drift:
    """Test after every new answer whether the stream is still exchangeable with the reference.

    If it is, the probability of an alarm at any time is at most `error` (Ville's inequality), over the draw of the reference, of the
    stream and of the random ranks of ties. The result for a stream is that for each longer one, cut off.

    Args:
        reference: float64 [M], confidences in [0, 1] or NaN.
        new: float64 [N], in the order of the stream.
        error: largest probability of a false alarm, in (0, 1).
        seed: of the random ranks of ties.

    Raises:
        ValueError: a confidence outside [0, 1], no reference, or an error outside (0, 1).
    """
    if not 0 < error < 1:
        raise ValueError(f"error must be in (0, 1), found {error}")
    wealth = log_wealth(conformal_p_values(reference, new, seed))
    reached = np.flatnonzero(wealth >= -math.log(error))
    return Drift(wealth, int(reached[0]) + 1 if len(reached) else None)


def conformal_p_values(reference: np.ndarray, new: np.ndarray, seed: int = 0) -> np.ndarray:
    """The rank of each new answer among the reference and the new answers up to itself, in [0, 1).

    `(below + u * equal) / (M + i)` for answer i, with u uniform in [0, 1). Under exchangeability these are independent and uniform, ties
    or not (Vovk et al., ICML 2003, theorem 1).

    Args:
        reference: float64 [M], confidences in [0, 1] or NaN.
        new: float64 [N].
        seed: of u.

    Raises:
        ValueError: a confidence outside [0, 1], or no reference.
    """
    old_values, new_values = _checked(reference), _checked(new)
    levels = np.unique(np.concatenate([old_values, new_values]))
    counts = np.bincount(np.searchsorted(levels, old_values), minlength=len(levels))
    level = np.searchsorted(levels, new_values)
    below, equal = np.empty(len(level)), np.empty(len(level))
    # Counts of all levels are updated once a chunk; within a chunk, answers are compared with each other.
    for start in range(0, len(level), _CHUNK):
        chunk = level[start : start + _CHUNK]
        earlier = np.tri(len(chunk), k=-1, dtype=bool)
        of_chunk = slice(start, start + len(chunk))
        below[of_chunk] = (np.cumsum(counts) - counts)[chunk] + (
            earlier & (chunk[None, :] < chunk[:, None])
        ).sum(1)
        equal[of_chunk] = counts[chunk] + 1 + (earlier & (chunk[None, :] == chunk[:, None])).sum(1)
        counts += np.bincount(chunk, minlength=len(levels))
    u = np.random.default_rng(seed).random(len(level))
    return (below + u * equal) / (len(old_values) + np.arange(1, len(level) + 1))


def log_wealth(p_values: np.ndarray) -> np.ndarray:
    """Bet on the histogram of the p-values so far; a fair game if they are independent and uniform.

    For each number of bins B, memory and pseudo-count a, a p-value in bin b multiplies the wealth by `B * (count_b + a) / (sum of counts +
    a * B)`; counts are of the earlier p-values, discounted by age (Dirichlet-multinomial if the memory is infinite). The result is the
    mean wealth over all of `BINS` and `BETS`.

    Args:
        p_values: float64 [N] in [0, 1).

    Returns:
        float64 [N], its natural logarithm after each p-value.
    """
    rows = np.arange(len(p_values))
    logs = []
    for bins in BINS:
        bin_of = (p_values * bins).astype(np.int64).clip(max=bins - 1)
        drawn = np.zeros((len(rows), bins))
        drawn[rows, bin_of] = 1.0
        for memory, prior in BETS:
            kept = 1.0 - 1.0 / memory
            # Row i holds the counts before answer i.
            counts = lfilter([0.0, 1.0], [1.0, -kept], drawn, axis=0)
            share = (counts[rows, bin_of] + prior) / (counts.sum(1) + prior * bins)
            logs.append(np.cumsum(np.log(bins * share)))
    return np.logaddexp.reduce(logs, axis=0) - math.log(len(logs))


def two_sample_p_value(
    reference: np.ndarray, new: np.ndarray, replicates: int = 9999, seed: int = 0
) -> float:
    """P-value of the two-sample Anderson-Darling test, by permutation, and so valid for ties.

    It holds for a set of answers that is looked at once; for a growing one, take `detect_drift`.

    Args:
        reference: float64 [M], confidences in [0, 1] or NaN.
        new: float64 [N].
        replicates: number of random permutations R; the least p-value is 1 / (R + 1).
        seed: of the permutations.

    Raises:
        ValueError: a confidence outside [0, 1], or one of the sets is empty.
    """
    old_values, new_values = _checked(reference), _checked(new)
    pooled = np.concatenate([old_values, new_values])
    levels = np.unique(pooled)
    if len(levels) > MAX_LEVELS:
        levels = np.unique(np.quantile(pooled, np.linspace(0, 1, MAX_LEVELS + 1)[1:], method="higher"))
    total, drawn = (
        np.bincount(np.searchsorted(levels, values), minlength=len(levels)) for values in (pooled, new_values)
    )
    if len(levels) == 1:
        return 1.0
    rng = np.random.default_rng(seed)
    permuted = rng.multivariate_hypergeometric(total, len(new_values), replicates, method="marginals")
    statistic = anderson_darling(total, drawn)
    # Equal statistics may differ in the last digits.
    at_least = int((anderson_darling(total, permuted) >= statistic * (1 - 1e-9)).sum())
    return (1 + at_least) / (1 + replicates)


def anderson_darling(total: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The two-sample Anderson-Darling statistic for tied values (Scholz & Stephens, 1987, equation 7).

    Args:
        total: int [L], answers of both samples at each of at least two levels, each positive.
        drawn: int [..., L], those of one sample.

    Returns:
        float64 [...]; 0 if both samples have the same distribution.
    """
    n = int(total.sum())
    size = drawn.sum(-1)
    middle = np.cumsum(total) - total / 2
    middle_drawn = np.cumsum(drawn, -1) - drawn / 2
    gap = n * middle_drawn - size[..., None] * middle
    variance = middle * (n - middle) - n * total / 4
    factor = (n - 1) / n * (1 / size + 1 / (n - size))
    return factor * (total / n * gap**2 / variance).sum(-1)


def _checked(confidence: np.ndarray) -> np.ndarray:
    """The confidences with NaN replaced by a level below all others."""
    values = np.asarray(confidence, dtype=np.float64)
    if not len(values):
        raise ValueError("needs at least one answer")
    parsed = values[~np.isnan(values)]
    if len(parsed) and not (parsed.min() >= 0 and parsed.max() <= 1):
        raise ValueError(f"confidences must be in [0, 1] or NaN, found {parsed.min()} to {parsed.max()}")
    return np.where(np.isnan(values), _UNPARSED, values)
