"""Smooth calibration error of a table (Błasiok & Nakkiran, arXiv 2309.12236), without bins.

The residuals (confidence - correctness), placed on [0, 1] at their confidences, are smoothed with a Gaussian
reflected at 0 and 1. That is the heat kernel of the interval, so in the cosine basis smoothing is a product:
the whole computation is one cosine transform and a search for the bandwidth that equals its own error.
"""

import math

import torch
from torch import Tensor

from vlm_calibration.metrics.binned import NO_ANSWERS
from vlm_calibration.metrics.groups import ConfidenceGroups, GapNorm, quiet, table_metric

MIN_BANDWIDTH = 1 / 1024
"""Narrowest kernel tried, as in the authors' code (0.001): a smaller error is reported at this bandwidth."""

_KERNEL_TAIL = 6.5
"""Cosines beyond `_KERNEL_TAIL / (pi * bandwidth)` are damped by less than exp(-_KERNEL_TAIL**2 / 2) = 7e-10."""

_NODES_PER_BANDWIDTH = 8
_DIRECT_LEVELS = 4096
_FINE_GRID = 1 << 16
_TOLERANCE = 1e-6


_GAP_NODES = 64
_NARROWEST_GAP = 1 / 48


@table_metric(NO_ANSWERS)
def smooth_calibration_error(levels: ConfidenceGroups, *, bandwidth: float | None = None) -> Tensor:
    r"""Smooth ECE: :math:`\int_0^1 |\frac{1}{N} \sum_i K_\sigma(t, c_i) (c_i - y_i)| dt` at :math:`\sigma = smECE_\sigma`.

    `K` is the Gaussian of standard deviation :math:`\sigma` reflected at 0 and 1. Unlike a binned error it
    has no edges: moving a confidence a little changes it a little. It lies between `|overconfidence|` and the
    l1 ECE of `levels` binning.

    The fixed point is searched down to a bandwidth of `MIN_BANDWIDTH`, and the integral is accurate to about
    1e-5 (also above 4,096 levels, where residuals are first split linearly over a grid of 65,536 cells).

    Args:
        levels: a table.
        bandwidth: a fixed :math:`\sigma`, at least `MIN_BANDWIDTH`, instead of the fixed point.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.

    Raises:
        ValueError: if `bandwidth` is below `MIN_BANDWIDTH`.
    """
    total = levels.total
    if levels.value.numel() == 0:
        return torch.full_like(total, torch.nan)
    residual = (levels.answers * levels.value - levels.right) / total.clamp_min(1).unsqueeze(-1)
    flat = residual.reshape(-1, residual.shape[-1])
    if bandwidth is not None:
        if not bandwidth >= MIN_BANDWIDTH:
            raise ValueError(f"bandwidth must be at least {MIN_BANDWIDTH}, got {bandwidth}")
        sigma = flat.new_full(flat.shape[:1], bandwidth)
        waves = _cosines(flat, levels.value, _terms(bandwidth))
        return torch.where(total > 0, _smoothed_error(waves, sigma).reshape(total.shape), torch.nan)
    error = _fixed_point(flat, levels.value).reshape(total.shape)
    return torch.where(total > 0, error, torch.nan)


def _terms(bandwidth: float) -> int:
    """How many cosines a kernel of this bandwidth lets through."""
    return math.ceil(_KERNEL_TAIL / (math.pi * bandwidth)) + 1


def _cosines(residual: Tensor, value: Tensor, terms: int) -> Tensor:
    """Cosine coefficients `sum_i residual_i cos(m pi value_i)` for m = 0 .. terms - 1: `(B, L)` to `(B, terms)`."""
    if len(value) <= _DIRECT_LEVELS:
        order = torch.arange(terms, dtype=torch.float64) * torch.pi
        return residual @ torch.outer(value, order).cos_()
    position = value * _FINE_GRID
    low = position.floor().clamp_max(_FINE_GRID - 1)
    upper_share = position - low
    grid = residual.new_zeros(len(residual), 2 * _FINE_GRID)
    index = low.long()
    grid.index_add_(1, index, residual * (1 - upper_share))
    grid.index_add_(1, index + 1, residual * upper_share)
    return torch.fft.rfft(grid).real[:, :terms]


def _smoothed_error(waves: Tensor, sigma: Tensor) -> Tensor:
    """`integral |h|` of the smoothed residual, for each row at its own bandwidth: `(B, M), (B,)` to `(B,)`.

    A wide kernel needs few nodes, so rows are taken together whose bandwidths are within a factor of two.
    """
    octave = sigma.clamp_min(MIN_BANDWIDTH).log2().floor()
    error = torch.empty_like(sigma)
    for each in octave.unique():
        rows = octave == each
        error[rows] = _smoothed_at_once(waves[rows], sigma[rows])
    return error


def _smoothed_at_once(waves: Tensor, sigma: Tensor) -> Tensor:
    """`_smoothed_error` with nodes for the narrowest bandwidth in all rows."""
    narrowest = max(float(sigma.min()), MIN_BANDWIDTH)
    terms = min(_terms(narrowest), waves.shape[1])
    nodes = 128 * math.ceil(_NODES_PER_BANDWIDTH / narrowest / 128)
    frequency = torch.arange(terms, dtype=torch.float64) * torch.pi
    damped = waves[:, :terms] * (-0.5 * (frequency * sigma[:, None]).square()).exp()
    # irfft of length 2 * nodes is (c_0 + 2 sum_m c_m cos(m pi t)) / (2 nodes) at t = j / nodes.
    height = torch.fft.irfft(damped, n=2 * nodes)[:, : nodes + 1] * (2 * nodes)
    return _integral_of_absolute(height)


def _integral_of_absolute(height: Tensor) -> Tensor:
    """Trapezoid rule for |h| on [0, 1] from nodes `(B, G + 1)`, exact to third order at sign changes.

    In a cell where h changes sign the straight line has area `(a^2 + b^2) / (2 (|a| + |b|))` instead of
    `(|a| + |b|) / 2`, and the jump of the slope of |h| adds the Euler-Maclaurin term `|b - a| / 6`.
    """
    nodes = height.shape[1] - 1
    size = height.abs()
    area = size.sum(1) - (size[:, 0] + size[:, -1]) / 2
    left, right = height[:, :-1], height[:, 1:]
    row, cell = ((left < 0) != (right < 0)).nonzero(as_tuple=True)
    a, b = left[row, cell].abs(), right[row, cell].abs()
    span = a + b
    correction = torch.where(
        span > 0, (a * a + b * b) / (2 * span.clamp_min(1e-300)) - span / 2 + span / 6, 0.0
    )
    return area.index_add(0, row, correction) / nodes


def _fixed_point(residual: Tensor, value: Tensor) -> Tensor:
    """Solve `error(sigma) = sigma` for each row of `(B, L)`; the error does not rise with sigma.

    `|sum of residuals| <= error <= sum of |residuals|` brackets the solution, and the error at the upper end is a
    better lower end. Where the bracket stays open, `_search` closes it.
    """
    high = residual.abs().sum(1).clamp_min(MIN_BANDWIDTH)
    at_high = _smoothed_error(_cosines(residual, value, _terms(float(high.min()))), high)
    low = torch.maximum(residual.sum(1).abs(), at_high).clamp_min(MIN_BANDWIDTH)
    result = torch.where(high > MIN_BANDWIDTH, low, at_high)
    rows = (high - low > _TOLERANCE).nonzero()[:, 0]
    if not len(rows):
        return result
    low, high, at_high = low[rows], high[rows], at_high[rows]
    waves = _cosines(residual[rows], value, _terms(float(low.min())))
    at_low = _smoothed_error(waves, low)
    # Where the error at `low` is not above it, that is the answer: `low` is the narrowest kernel, or the solution.
    result[rows] = torch.where(low > MIN_BANDWIDTH, low, at_low)
    rising = at_low - low > _TOLERANCE
    found = _search(
        waves[rising], low[rising], high[rising], (at_low - low)[rising], (at_high - high)[rising]
    )
    result[rows[rising]] = found
    return result


def _search(waves: Tensor, low: Tensor, high: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """Illinois regula falsi for `error(sigma) - sigma = 0`, of value `above` > 0 at `low` and `below` < 0 at `high`."""
    solution = high.clone()
    rows = torch.arange(len(low))
    last_side = torch.zeros_like(low)
    for _ in range(100):
        if not len(rows):
            break
        guess = low + (high - low) * above / (above - below)
        excess = _smoothed_error(waves[rows], guess) - guess
        side = excess.sign()
        stuck = side == last_side
        low, high = torch.where(side > 0, guess, low), torch.where(side > 0, high, guess)
        above = torch.where(side > 0, excess, torch.where(stuck, above / 2, above))
        below = torch.where(side > 0, torch.where(stuck, below / 2, below), excess)
        solution[rows] = guess
        going = (excess.abs() > _TOLERANCE) & (high - low > _TOLERANCE)
        rows, low, high, above, below = rows[going], low[going], high[going], above[going], below[going]
        last_side = side[going]
    return solution


def _kernels(levels: ConfidenceGroups) -> Tensor:
    """The reflected Gaussian at `_GAP_NODES` nodes around each level, `(L, K)`, as wide as the smooth ECE is large."""
    error = quiet(smooth_calibration_error)(levels)
    width = max(float(error), _NARROWEST_GAP)
    order = torch.arange(_terms(width), dtype=torch.float64) * torch.pi
    nodes = (torch.arange(_GAP_NODES, dtype=torch.float64) + 0.5) / _GAP_NODES
    damped = (-0.5 * (order * width).square()).exp() * torch.where(order > 0, 2.0, 1.0)
    waves = torch.outer(levels.value, order).cos() * damped
    return waves @ torch.outer(order, nodes).cos() / _GAP_NODES


SMOOTH_GAPS = GapNorm(_kernels, lambda gaps: gaps.abs().sum(-1))
"""`smooth_calibration_error` at the bandwidth of these answers, to within its nodes."""
