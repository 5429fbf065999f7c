"""Bootstrap confidence intervals straight from a table.

Resampling N answers with replacement is one multinomial draw of the table's cells, so a replicate costs the
same for a thousand answers as for a billion, and all replicates go through a metric as one batch.

An interval always holds the value that it is about. For most metrics it is the expanded percentile interval (Hesterberg, 2015).
Calibration errors need another: they are sums of absolute gaps, to which chance adds, so the error of the answers is too large
and that of a resample larger still. Theirs inverts a test instead (Carpenter, 1999): it holds the errors that are compatible
with the one found, among populations whose gaps are those found, all of them smaller or larger by as many standard errors.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtr, stdtrit
from torch import Tensor

from vlm_calibration.metrics.groups import ConfidenceGroups, GapNorm
from vlm_calibration.metrics.summary import check_names, warn_undefined_values
from vlm_calibration.metrics.table import ConfidenceTable
from vlm_calibration.metrics.table_metrics import METRICS, REPORTED, MetricSpec

_BATCH_CELLS = 1 << 19
"""Replicates are computed in batches of about this many levels, which bounds memory for fine grids."""

_HALVINGS = 10
_WIDEST = 8.0
"""How many standard errors above those found the gaps of a population may be."""


class Interval(NamedTuple):
    """A value with its confidence bounds, `low <= value <= high`; all NaN where the metric is undefined."""

    value: float
    low: float
    high: float


def resample(table: ConfidenceTable, replicates: int, seed: int) -> ConfidenceGroups:
    """Draw tables of as many answers with replacement, unparsed ones included.

    Args:
        table: at least one answer.
        replicates: number of draws B.
        seed: of `numpy.random.default_rng`; the draws are a function of the table, B and the seed.

    Returns:
        levels whose counts are `(B, L, 2)` and whose `unparsed` is `(B,)`.

    Raises:
        ValueError: without an answer, or without a replicate.
    """
    if table.n == 0:
        raise ValueError("cannot resample a table without answers")
    if replicates < 1:
        raise ValueError(f"replicates must be positive, got {replicates}")
    levels = table.levels()
    cells = np.append(levels.counts.numpy().reshape(-1), table.unparsed)
    drawn = torch.from_numpy(
        np.random.default_rng(seed).multinomial(table.n, cells / table.n, size=replicates)
    )
    count = drawn[:, :-1].reshape(replicates, -1, 2)
    return levels._replace(counts=count, unparsed=drawn[:, -1])


def bootstrap_replicates(levels: ConfidenceGroups, function: Callable[[ConfidenceGroups], Tensor]) -> Tensor:
    """A function of levels on every replicate, `(B,)` float64, in batches of bounded memory."""
    step = max(1, _BATCH_CELLS // max(len(levels.value), 512))
    parts = [
        function(levels._replace(counts=levels.counts[i : i + step], unparsed=levels.unparsed[i : i + step]))
        for i in range(0, len(levels.counts), step)
    ]
    return torch.cat(parts)


def bootstrap_intervals(
    table: ConfidenceTable,
    metrics: Iterable[str] | Mapping[str, Callable[[ConfidenceGroups], Tensor]] = REPORTED,
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Bootstrap confidence intervals for metrics of a table.

    `python -m tests.performance.intervals` measures how often they hold the truth.

    Args:
        table: the answers.
        metrics: names from `METRICS`, or functions of `ConfidenceGroups` by name (for other arguments than the defaults), which get
            percentile intervals.
        replicates: number of resampled tables.
        level: nominal coverage, in (0, 1).
        seed: see `resample`.

    Returns:
        name to `Interval`. Replicates on which a metric is undefined are left out. A metric that is undefined
        on the table has NaN bounds; there is one warning for all of them.

    Raises:
        ValueError: on an unknown metric, a level outside (0, 1), or an empty table.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if isinstance(metrics, Mapping):
        functions = dict(metrics)
    else:
        functions = {name: METRICS[name] for name in check_names(metrics)}
    drawn, own = resample(table, replicates, seed), table.levels()
    intervals = {name: interval_of(function, own, drawn, level=level) for name, function in functions.items()}
    warn_undefined_values({name: interval.value for name, interval in intervals.items()})
    return intervals


def interval_of(
    function: Callable[[ConfidenceGroups], Tensor],
    own: ConfidenceGroups,
    drawn: ConfidenceGroups,
    replicates: Tensor | None = None,
    rarer: int | None = None,
    level: float = 0.95,
) -> Interval:
    """The interval of one metric.

    Args:
        function: a function of levels, or a `MetricSpec`.
        own: the answers.
        drawn: as many answers drawn from them B times, whatever was drawn together: counts `(B, L, 2)` over the same levels.
        replicates: the metric of the draws, `(B,)`, if known.
        rarer: see `percentile_interval`; by default that of answers that were drawn one by one.
        level: nominal coverage, in (0, 1).
    """
    value = float(function(own))
    if value != value:
        return Interval(value, value, value)
    if isinstance(function, MetricSpec) and function.gaps is not None:
        low, high = _compatible_errors(function.gaps, own, drawn, level)
        return _around(value, low * value, min(high * value, function.upper))
    if replicates is None:
        replicates = bootstrap_replicates(drawn, function)
    if rarer is None:
        rarer = int(own.counts.sum(0).amin())
    return percentile_interval(value, replicates, rarer, level)


def percentile_interval(value: float, replicates: Tensor, rarer: int, level: float = 0.95) -> Interval:
    """The middle of the replicates, as much wider as Student's t is than the normal distribution, and the value.

    Args:
        replicates: `(B,)`; those that are NaN are left out.
        rarer: how many of what is drawn hold a right answer, or a wrong one if those are fewer: no more is known of
            accuracy and rank than of these.
    """
    tail = 0.0
    if rarer > 1:
        tail = float(ndtr(math.sqrt(rarer / (rarer - 1)) * stdtrit(rarer - 1, (1 - level) / 2)))
    low, high = replicates.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return _around(value, low, high)


def _around(value: float, low: float, high: float) -> Interval:
    return Interval(value, min(low, value), max(high, value))


def _compatible_errors(
    gap_norm: GapNorm, own: ConfidenceGroups, drawn: ConfidenceGroups, level: float
) -> tuple[float, float]:
    """The least and the largest error compatible with the one found, as multiples of that."""
    gaps, noise, spread = _gaps_and_noise(gap_norm, own, drawn)
    norm, miss = gap_norm.norm, 1 - level
    found = float(norm(gaps))
    if found == 0:
        return 0.0, 1.0

    def population(shift: float) -> Tensor:
        """Gaps that are larger, or smaller but of the same sign, by this many standard errors."""
        return gaps.sign() * (gaps.abs() + shift * spread).clamp_min(0)

    def may_be_less(shift: float) -> bool:
        true = population(shift)
        errors = norm(true + noise)
        # Where the error found is never below the true one, no upper bound can be missed: all of the misses are here.
        above = min(miss / 2, float((errors < norm(true)).double().mean()))
        return float((errors >= found).double().mean()) >= miss - above

    def may_be_more(shift: float) -> bool:
        return float((norm(population(shift) + noise) <= found).double().mean()) >= miss / 2

    nothing = -float((gaps.abs() / spread.clamp_min(1e-300)).max()) - 1
    least = nothing if may_be_less(nothing) else _boundary(may_be_less, 0.0, nothing)
    most = _boundary(may_be_more, 0.0, _WIDEST)
    return float(norm(population(least))) / found, float(norm(population(most))) / found


def _boundary(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """The last number from `inside` towards `outside` for which this holds; `inside` if it holds nowhere."""
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


def _gaps_and_noise(
    gap_norm: GapNorm, own: ConfidenceGroups, drawn: ConfidenceGroups
) -> tuple[Tensor, Tensor, Tensor]:
    """The gaps `(K,)`, what chance adds to them in B draws `(B, K)`, and its standard error `(K,)`."""
    weights = gap_norm.weights(own)

    # What a wrong and a right answer of each level add to the gaps, and to what they are divided by: (2 L, K).
    value = torch.stack([own.value, own.value - 1], dim=-1)
    added = (value[..., None] * weights[:, None]).flatten(0, 1)
    counted = weights.repeat_interleave(2, 0) if gap_norm.of_bin else added.new_ones(len(added), 1)

    def sums(levels: ConfidenceGroups) -> tuple[Tensor, Tensor]:
        counts = levels.counts.flatten(-2).double()
        return counts @ added, counts @ counted

    (total, per), (total_drawn, per_drawn) = sums(own), sums(drawn)
    gaps = total / per
    noise = (total_drawn - gaps * per_drawn) / per
    measured = noise.square().mean(0)
    # Answers in a bin that happen to be all right or all wrong show no chance at all. What they state says how much there
    # would be if it were honest: of what is missing to that, half is added.
    stated = (own.answers * own.value * (1 - own.value)) @ weights.square() / per.square()
    missing = (stated - measured).clamp_min(0) / 2
    generator = torch.Generator().manual_seed(0)
    more = torch.randn(noise.shape, generator=generator, dtype=torch.float64)
    return gaps, noise + more * missing.sqrt(), (measured + missing).sqrt()
