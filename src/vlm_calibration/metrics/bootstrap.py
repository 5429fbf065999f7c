"""Bootstrap confidence intervals of metrics, from resampled counts: a metric takes all replicates as one batch.

An interval always contains its value. Most metrics have the expanded percentile interval (Hesterberg, 2015). Calibration
errors are sums of absolute gaps, which sampling noise inflates: the measured error is too large, and that of a resample is larger
still. Their interval inverts a test instead (Carpenter, 1999). It holds the errors that are compatible with the measured
one, among populations whose gaps are the measured ones, all shrunk or grown by the same number of standard errors.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.special import ndtr, stdtrit
from torch import Tensor

from vlm_calibration.metrics.functional import CalibrationMetric
from vlm_calibration.metrics.table import ConfidenceTable, GapNorm

LEVEL = 0.95  # nominal coverage
_BATCH_CELLS = 1 << 19
"""Number of confidences in a batch of replicates, approximately; bounds memory for fine grids."""
_HALVINGS = 10
_MAX_SHIFT = 8.0
"""Largest number of standard errors by which a population's gaps may exceed the measured ones."""


class Interval(NamedTuple):
    """A value with its confidence bounds, which contain it; all NaN where the metric is undefined."""

    value: float
    low: float
    high: float


def bootstrap_replicates(table: ConfidenceTable, function: Callable[[ConfidenceTable], Tensor]) -> Tensor:
    """A function of a table on every replicate, float64 [B], in batches of bounded memory."""
    step = max(1, _BATCH_CELLS // max(len(table.value), 512))
    batches = zip(table.counts.split(step), table.unparsed.split(step), strict=True)
    return torch.cat([function(table._replace(counts=c, unparsed=unparsed)) for c, unparsed in batches])


def interval_of(
    metric: CalibrationMetric, table: ConfidenceTable, draws: ConfidenceTable, replicates: Tensor, rarer: int
) -> Interval:
    """95% confidence interval of one metric of the answers in `table`.

    Args:
        draws: B resamples of the answers, drawn one by one or in clusters: counts [B, L, 2] over the same confidences.
        replicates: the metric of the draws, float [B].
        rarer: see `percentile_interval`.
    """
    value = float(metric(table))
    if math.isnan(value):
        return Interval(value, value, value)
    if metric.gaps is None:
        return percentile_interval(value, replicates, rarer)
    low, high = _compatible_errors(metric.gaps, table, draws)
    return Interval(value, min(low * value, value), max(min(high * value, metric.upper), value))


def percentile_interval(value: float, replicates: Tensor, rarer: int) -> Interval:
    """Expanded 95% percentile interval: the middle of the replicates, widened by the ratio of Student's t to the normal distribution.

    Args:
        value: the metric of the answers, which the interval is extended to contain.
        replicates: float [B]; NaN replicates are left out.
        rarer: the number of images with a correct answer or with a wrong one, whichever is smaller; sets the degrees of freedom.
    """
    tail = 0.0
    if rarer > 1:
        tail = float(ndtr(math.sqrt(rarer / (rarer - 1)) * stdtrit(rarer - 1, (1 - LEVEL) / 2)))
    low, high = replicates.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(value, min(low, value), max(high, value))


def _compatible_errors(
    gap_norm: GapNorm, table: ConfidenceTable, draws: ConfidenceTable
) -> tuple[float, float]:
    """The smallest and the largest true error compatible with the measured one, as multiples of the measured one."""
    gaps, noise, standard_error = _gaps_and_noise(gap_norm, table, draws)
    norm, miss = gap_norm.norm, 1 - LEVEL
    if (measured := float(norm(gaps))) == 0:
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

    def boundary(is_compatible: Callable[[float], bool], outside: float) -> float:
        """Bisect for the last shift from 0 towards `outside` that is compatible; 0 if none is."""
        inside = 0.0
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if is_compatible(middle) else (inside, middle)
        return inside

    no_gaps = -float((gaps.abs() / standard_error.clamp_min(1e-300)).max()) - 1
    low = no_gaps if is_compatible_below(no_gaps) else boundary(is_compatible_below, no_gaps)
    high = boundary(is_compatible_above, _MAX_SHIFT)
    return float(norm(population(low))) / measured, float(norm(population(high))) / measured


def _gaps_and_noise(
    gap_norm: GapNorm, table: ConfidenceTable, draws: ConfidenceTable
) -> tuple[Tensor, Tensor, Tensor]:
    """The measured gaps [K], their sampling noise in B draws [B, K], and its standard error [K], all float64."""
    weights = gap_norm.weights(table)

    # Contribution of a wrong and of a correct answer at each confidence to the gaps' numerators and denominators: [2 L, K].
    value = torch.stack([table.value, table.value - 1], dim=-1)
    numerators = (value[..., None] * weights[:, None]).flatten(0, 1)
    ones = numerators.new_ones(len(numerators), 1)
    denominators = weights.repeat_interleave(2, 0) if gap_norm.of_bin else ones

    def sums(table: ConfidenceTable) -> tuple[Tensor, Tensor]:
        counts = table.counts.flatten(-2).double()
        return counts @ numerators, counts @ denominators

    (total, n), (total_drawn, n_drawn) = sums(table), sums(draws)
    gaps = total / n
    noise = (total_drawn - gaps * n_drawn) / n
    variance = noise.square().mean(0)
    # A bin whose answers are all correct or all wrong shows no variance: half of what it lacks to that of a calibrated model is added.
    calibrated = (table.answers * table.value * (1 - table.value)) @ weights.square() / n.square()
    missing = (calibrated - variance).clamp_min(0) / 2
    extra = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return gaps, noise + extra * missing.sqrt(), (variance + missing).sqrt()
