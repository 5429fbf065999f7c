"""Drift of confidences: are those of new answers still of the same kind as those of a reference? No labels are needed.

`detect_drift` watches a stream and may be asked after every answer: it is a conformal test martingale (Vovk, Nouretdinov & Gammerman,
ICML 2003; Fedorova et al., arXiv 1204.3251). It assumes under the null hypothesis that reference and new answers are exchangeable, and
nothing about their distribution: stated confidences are a few tied percents. It sees changes of location and of shape. An answer whose
confidence could not be parsed is NaN, which is a level of its own below all others.
"""

import math
from bisect import bisect_left, bisect_right
from typing import NamedTuple

import numpy as np

BINS = 5
"""Number of equal bins of [0, 1] that the bet on p-values uses."""
MEMORY = 200.0
"""Mean number of earlier answers that the bet remembers, so that it also notices that a stream has changed."""
PRIOR = 20.0
"""Pseudo-count of each bin. Bins, memory and prior were chosen by simulation on synthetic confidences."""


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
        ValueError: a confidence outside [0, 1], no reference or new answer, or an error outside (0, 1).
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
        ValueError: a confidence outside [0, 1], or no reference or new answer.
    """
    seen, p_values = sorted(_checked(reference)), []
    values = _checked(new)
    for value, u in zip(values, np.random.default_rng(seed).random(len(values)), strict=True):
        below, up_to = bisect_left(seen, value), bisect_right(seen, value)
        p_values.append((below + u * (up_to - below + 1)) / (len(seen) + 1))
        seen.insert(up_to, value)
    return np.array(p_values)


def log_wealth(p_values: np.ndarray) -> np.ndarray:
    """Bet on the histogram of the p-values so far; a fair game if they are independent and uniform.

    A p-value in bin b multiplies the wealth by `BINS * (count_b + PRIOR) / (sum of counts + PRIOR * BINS)`; counts are of the earlier
    p-values, discounted by age.

    Args:
        p_values: float64 [N] in [0, 1).

    Returns:
        float64 [N], its natural logarithm after each p-value.
    """
    counts, logs = [0.0] * BINS, []
    for p in p_values.tolist():
        b = min(int(p * BINS), BINS - 1)
        logs.append(math.log(BINS * (counts[b] + PRIOR) / (sum(counts) + PRIOR * BINS)))
        counts = [(1 - 1 / MEMORY) * count for count in counts]
        counts[b] += 1
    return np.cumsum(logs)


def _checked(confidence: np.ndarray) -> list[float]:
    """The confidences with NaN replaced by a level below all others."""
    values = np.asarray(confidence, dtype=np.float64)
    if not len(values):
        raise ValueError("needs at least one answer")
    parsed = values[~np.isnan(values)]
    if len(parsed) and not (parsed.min() >= 0 and parsed.max() <= 1):
        raise ValueError(f"confidences must be in [0, 1] or NaN, found {parsed.min()} to {parsed.max()}")
    return np.where(np.isnan(values), -1.0, values).tolist()
