"""Bootstrap confidence intervals from a table.

Resampling N answers with replacement is one multinomial draw of the table's cells, so a replicate costs the
same for a thousand answers as for a billion, and a metric takes all replicates as one batch.

An interval always contains its value. Most metrics have the expanded percentile interval (Hesterberg, 2015). Calibration
errors are sums of absolute gaps, which sampling noise inflates: the measured error is too large, and that of a resample is larger
still. Their interval inverts a test instead (Carpenter, 1999). It holds the errors that are compatible with the measured
one, among populations whose gaps are the measured ones, all shrunk or grown by the same number of standard errors.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtr, stdtrit
from torch import Tensor

from vlm_calibration.metrics.functional import METRICS, REPORTED
from vlm_calibration.metrics.groups import ConfidenceGroups, GapNorm, MetricSpec
from vlm_calibration.metrics.summary import check_names, warn_undefined_values
from vlm_calibration.metrics.table import ConfidenceTable

_BATCH_CELLS = 1 << 19
"""Number of confidences in a batch of replicates, approximately; bounds memory for fine grids."""

_HALVINGS = 10
_MAX_SHIFT = 8.0
"""Largest number of standard errors by which a population's gaps may exceed the measured ones."""


class Interval(NamedTuple):
    """A value with its confidence bounds; all NaN where the metric is undefined.

    Attributes:
        value: the metric of the answers.
        low: lower bound, at most `value`.
        high: upper bound, at least `value`.
    """

    value: float
    low: float
    high: float


def resample(table: ConfidenceTable, replicates: int, seed: int) -> ConfidenceGroups:
    """Draw B tables of N answers from the N answers of a table with replacement, unparsed ones included.

    Args:
        table: at least one answer.
        replicates: number of draws B.
        seed: of `numpy.random.default_rng`; the draws are a function of the table, B and the seed.

    Returns:
        groups whose counts are int64 [B, L, 2] and whose `unparsed` is int64 [B].

    Raises:
        ValueError: if the table is empty or `replicates` is below 1.
    """
    if table.n == 0:
        raise ValueError("cannot resample a table without answers")
    if replicates < 1:
        raise ValueError(f"replicates must be positive, got {replicates}")
    groups = table.groups()
    cells = np.append(groups.counts.numpy().reshape(-1), table.unparsed)
    draws = torch.from_numpy(
        np.random.default_rng(seed).multinomial(table.n, cells / table.n, size=replicates)
    )
    counts = draws[:, :-1].reshape(replicates, -1, 2)
    return groups._replace(counts=counts, unparsed=draws[:, -1])


def bootstrap_replicates(groups: ConfidenceGroups, function: Callable[[ConfidenceGroups], Tensor]) -> Tensor:
    """A function of groups on every replicate, float64 [B], in batches of bounded memory."""
    step = max(1, _BATCH_CELLS // max(len(groups.value), 512))
    batches = [
        function(groups._replace(counts=groups.counts[i : i + step], unparsed=groups.unparsed[i : i + step]))
        for i in range(0, len(groups.counts), step)
    ]
    return torch.cat(batches)


def bootstrap_intervals(
    table: ConfidenceTable,
    metrics: Iterable[str] | Mapping[str, Callable[[ConfidenceGroups], Tensor]] = REPORTED,
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Bootstrap confidence intervals for metrics of a table.

    Args:
        table: the answers.
        metrics: names from `METRICS`, or functions of `ConfidenceGroups` by name, which get percentile intervals.
        replicates: number of resampled tables.
        level: nominal coverage, in (0, 1).
        seed: see `resample`.

    Returns:
        name to `Interval`. Replicates on which a metric is undefined are left out. A metric that is undefined
        on the table has NaN bounds, with one warning for all such metrics.

    Raises:
        ValueError: on an unknown metric, a level outside (0, 1), or an empty table.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if isinstance(metrics, Mapping):
        functions = dict(metrics)
    else:
        functions = {name: METRICS[name] for name in check_names(metrics)}
    draws, groups = resample(table, replicates, seed), table.groups()
    intervals = {
        name: interval_of(function, groups, draws, level=level) for name, function in functions.items()
    }
    warn_undefined_values({name: interval.value for name, interval in intervals.items()})
    return intervals


def interval_of(
    function: Callable[[ConfidenceGroups], Tensor],
    groups: ConfidenceGroups,
    draws: ConfidenceGroups,
    replicates: Tensor | None = None,
    rarer: int | None = None,
    level: float = 0.95,
) -> Interval:
    """Confidence interval of one metric from given resamples.

    Args:
        function: a function of groups, or a `MetricSpec`.
        groups: the answers.
        draws: B resamples of the answers, drawn one by one or in clusters: counts [B, L, 2] over the same confidences.
        replicates: the metric of the draws, float [B], if it is computed already.
        rarer: see `percentile_interval`; by default that of answers drawn one by one.
        level: nominal coverage, in (0, 1).
    """
    value = float(function(groups))
    if value != value:
        return Interval(value, value, value)
    if isinstance(function, MetricSpec) and function.gaps is not None:
        low, high = _compatible_errors(function.gaps, groups, draws, level)
        return _containing(value, low * value, min(high * value, function.upper))
    if replicates is None:
        replicates = bootstrap_replicates(draws, function)
    if rarer is None:
        rarer = int(groups.counts.sum(0).amin())
    return percentile_interval(value, replicates, rarer, level)


def percentile_interval(value: float, replicates: Tensor, rarer: int, level: float = 0.95) -> Interval:
    """Expanded percentile interval: the middle of the replicates, widened by the ratio of Student's t to the normal distribution.

    Args:
        value: the metric of the answers, which the interval is extended to contain.
        replicates: float [B]; NaN replicates are left out.
        rarer: the number of sampling units (answers or images) with a correct answer or with a wrong one, whichever is
            smaller. It is the effective sample size of accuracy and rank, and sets the degrees of freedom.
        level: nominal coverage, in (0, 1).
    """
    tail = 0.0
    if rarer > 1:
        tail = float(ndtr(math.sqrt(rarer / (rarer - 1)) * stdtrit(rarer - 1, (1 - level) / 2)))
    low, high = replicates.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return _containing(value, low, high)


def _containing(value: float, low: float, high: float) -> Interval:
    return Interval(value, min(low, value), max(high, value))


def _compatible_errors(
    gap_norm: GapNorm, groups: ConfidenceGroups, draws: ConfidenceGroups, level: float
) -> tuple[float, float]:
    """The smallest and the largest true error compatible with the measured one, as multiples of the measured one."""
    gaps, noise, standard_error = _gaps_and_noise(gap_norm, groups, draws)
    norm, miss = gap_norm.norm, 1 - level
    measured = float(norm(gaps))
    if measured == 0:
        return 0.0, 1.0

    def population(shift: float) -> Tensor:
        """True gaps that exceed the measured ones by `shift` standard errors, with the same sign or 0."""
        return gaps.sign() * (gaps.abs() + shift * standard_error).clamp_min(0)

    def is_compatible_below(shift: float) -> bool:
        true = population(shift)
        errors = norm(true + noise)
        # If a measured error is never below the true one, the upper bound never misses, and all misses are at this bound.
        above = min(miss / 2, float((errors < norm(true)).double().mean()))
        return float((errors >= measured).double().mean()) >= miss - above

    def is_compatible_above(shift: float) -> bool:
        return float((norm(population(shift) + noise) <= measured).double().mean()) >= miss / 2

    no_gaps = -float((gaps.abs() / standard_error.clamp_min(1e-300)).max()) - 1
    low = no_gaps if is_compatible_below(no_gaps) else _boundary(is_compatible_below, 0.0, no_gaps)
    high = _boundary(is_compatible_above, 0.0, _MAX_SHIFT)
    return float(norm(population(low))) / measured, float(norm(population(high))) / measured


def _boundary(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Bisect for the last number from `inside` towards `outside` at which `holds`; `inside` if it holds nowhere."""
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


def _gaps_and_noise(
    gap_norm: GapNorm, groups: ConfidenceGroups, draws: ConfidenceGroups
) -> tuple[Tensor, Tensor, Tensor]:
    """The measured gaps [K], their sampling noise in B draws [B, K], and its standard error [K], all float64."""
    weights = gap_norm.weights(groups)

    # Contribution of a wrong and of a correct answer at each confidence to the gaps' numerators and denominators: [2 L, K].
    value = torch.stack([groups.value, groups.value - 1], dim=-1)
    numerators = (value[..., None] * weights[:, None]).flatten(0, 1)
    denominators = (
        weights.repeat_interleave(2, 0) if gap_norm.of_bin else numerators.new_ones(len(numerators), 1)
    )

    def sums(groups: ConfidenceGroups) -> tuple[Tensor, Tensor]:
        counts = groups.counts.flatten(-2).double()
        return counts @ numerators, counts @ denominators

    (total, n), (total_drawn, n_drawn) = sums(groups), sums(draws)
    gaps = total / n
    noise = (total_drawn - gaps * n_drawn) / n
    variance = noise.square().mean(0)
    # A bin whose answers are all correct or all wrong shows no variance. Half of what it falls short of the variance of a calibrated
    # model, which follows from the confidences, is added.
    calibrated = (groups.answers * groups.value * (1 - groups.value)) @ weights.square() / n.square()
    missing = (calibrated - variance).clamp_min(0) / 2
    generator = torch.Generator().manual_seed(0)
    extra = torch.randn(noise.shape, generator=generator, dtype=torch.float64)
    return gaps, noise + extra * missing.sqrt(), (variance + missing).sqrt()
