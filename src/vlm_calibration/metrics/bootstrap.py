"""Bootstrap confidence intervals straight from a table.

Resampling N answers with replacement is one multinomial draw of the table's cells, so a replicate costs the
same for a thousand answers as for a billion, and all replicates go through a metric as one batch.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlm_calibration.metrics.levels import Levels
from vlm_calibration.metrics.summary import check_names, warn_undefined_values
from vlm_calibration.metrics.table import ConfidenceTable
from vlm_calibration.metrics.table_metrics import METRICS, REPORTED

_BATCH_CELLS = 1 << 17
"""Replicates are computed in batches of about this many levels, which bounds memory for fine grids."""


class Interval(NamedTuple):
    """A value on the table itself with its confidence bounds; all NaN where the metric is undefined."""

    value: float
    low: float
    high: float


def resample(table: ConfidenceTable, replicates: int, seed: int) -> Levels:
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


def bootstrap_replicates(levels: Levels, function: Callable[[Levels], Tensor]) -> Tensor:
    """A function of levels on every replicate, `(B,)` float64, in batches of bounded memory."""
    step = max(1, _BATCH_CELLS // max(len(levels.value), 512))
    parts = [
        function(levels._replace(counts=levels.counts[i : i + step], unparsed=levels.unparsed[i : i + step]))
        for i in range(0, len(levels.counts), step)
    ]
    return torch.cat(parts)


def bootstrap_intervals(
    table: ConfidenceTable,
    metrics: Iterable[str] | Mapping[str, Callable[[Levels], Tensor]] = REPORTED,
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    method: Literal["basic", "percentile"] = "basic",
) -> dict[str, Interval]:
    """Bootstrap confidence intervals (Efron & Tibshirani, 1993) for metrics of a table.

    Args:
        table: the answers.
        metrics: names from `METRICS`, or functions of `Levels` by name (for other arguments than the defaults).
        replicates: number of resampled tables.
        level: nominal coverage, in (0, 1).
        seed: see `resample`.
        method: `basic` reflects the replicates around the value. Errors such as ECE are larger on a resample
            than on the answers themselves, just as they are larger there than in truth, and reflection undoes
            that bias; bounds are kept within the metric's range. `percentile` takes the replicates' quantiles.
            Neither covers the error of a model that is calibrated almost perfectly, which is at the edge of its range.

    Returns:
        name to `Interval`. Replicates on which a metric is undefined are left out. A metric that is undefined
        on the table has NaN bounds; there is one warning for all of them.

    Raises:
        ValueError: on an unknown metric or method, a level outside (0, 1), or an empty table.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if method not in ("basic", "percentile"):
        raise ValueError(f"method must be basic or percentile, got {method!r}")
    if isinstance(metrics, Mapping):
        functions = dict(metrics)
    else:
        functions = {name: METRICS[name] for name in check_names(metrics)}
    drawn, own = resample(table, replicates, seed), table.levels()
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    intervals = {}
    for name, function in functions.items():
        value = float(function(own))
        low, high = bootstrap_replicates(drawn, function).nanquantile(tails).tolist()
        if method == "basic":
            low, high = 2 * value - high, 2 * value - low
            if name in METRICS:
                low, high = (
                    min(max(bound, METRICS[name].lower), METRICS[name].upper) for bound in (low, high)
                )
        if value != value:
            low = high = value
        intervals[name] = Interval(value, low, high)
    warn_undefined_values({name: interval.value for name, interval in intervals.items()})
    return intervals
