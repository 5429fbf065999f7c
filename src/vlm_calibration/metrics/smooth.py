"""Smooth calibration error (Błasiok & Nakkiran, arXiv 2309.12236), without bins.

The residuals (confidence - correctness), placed on [0, 1] at their confidences, are smoothed with a Gaussian reflected at 0 and 1. This
is the heat kernel of the interval, so smoothing is a product in the cosine basis.
"""

import math

import torch
from torch import Tensor

from vlm_calibration.metrics.table import ConfidenceTable, GapNorm

MIN_BANDWIDTH = 1 / 1024
"""Narrowest kernel, close to that of the authors' code (0.001): a smaller error is computed at this bandwidth."""

_KERNEL_TAIL = 6.5
"""Cosines beyond `_KERNEL_TAIL / (pi * bandwidth)` are damped by less than exp(-_KERNEL_TAIL**2 / 2) = 7e-10."""
_NODES_PER_BANDWIDTH, _DIRECT_LEVELS, _FINE_GRID, _TOLERANCE = 8, 4096, 1 << 16, 1e-6
_GAP_NODES, _NARROWEST_GAP = 64, 1 / 48


def smooth_calibration_error(table: ConfidenceTable) -> Tensor:
    r"""Smooth ECE: :math:`\int_0^1 |\frac{1}{N} \sum_i K_\sigma(t, c_i) (c_i - y_i)| dt` at :math:`\sigma = smECE_\sigma`.

    `K` is the Gaussian of standard deviation :math:`\sigma` reflected at 0 and 1. It has no edges, and lies between `|overconfidence|` and
    the l1 ECE over distinct confidences. The fixed point is searched down to a bandwidth of `MIN_BANDWIDTH`, and the integral is accurate
    to about 1e-5 (also above 4,096 distinct confidences, where residuals are first split linearly over a grid of 65,536 cells).

    >>> from vlm_calibration.metrics.functional import smooth_calibration_error
    >>> smooth_calibration_error(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([False, False, False]))
    tensor(0.7000, dtype=torch.float64)
    """
    total = table.total
    if table.value.numel() == 0:
        return torch.full_like(total, torch.nan)
    residual = (table.answers * table.value - table.correct) / total.clamp_min(1).unsqueeze(-1)
    error = _fixed_point(residual.reshape(-1, residual.shape[-1]), table.value)
    return torch.where(total > 0, error.reshape(total.shape), torch.nan)


def _terms(bandwidth: float) -> int:
    """Number of cosines that a kernel of this bandwidth does not damp away."""
    return math.ceil(_KERNEL_TAIL / (math.pi * bandwidth)) + 1


def _cosines(residual: Tensor, value: Tensor, terms: int) -> Tensor:
    """Cosine coefficients `sum_i residual_i cos(m pi value_i)` for m = 0 .. terms - 1, from [B, L] to [B, terms]."""
    if len(value) <= _DIRECT_LEVELS:
        return residual @ torch.outer(value, torch.arange(terms, dtype=torch.float64) * torch.pi).cos_()
    position = value * _FINE_GRID
    low = position.floor().clamp_max(_FINE_GRID - 1)
    upper_share = position - low
    grid = residual.new_zeros(len(residual), 2 * _FINE_GRID)
    index = low.long()
    grid.index_add_(1, index, residual * (1 - upper_share))
    grid.index_add_(1, index + 1, residual * upper_share)
    return torch.fft.rfft(grid).real[:, :terms]


def _smoothed_error(waves: Tensor, sigma: Tensor) -> Tensor:
    """`integral |h|` of the smoothed residual, for each row at its own bandwidth, from [B, M] and [B] to [B]."""
    # A wide kernel needs few nodes, so rows are batched by octave of their bandwidth.
    octave = sigma.clamp_min(MIN_BANDWIDTH).log2().floor()
    error = torch.empty_like(sigma)
    for value in octave.unique():
        rows = octave == value
        narrowest = max(float(sigma[rows].min()), MIN_BANDWIDTH)
        terms = min(_terms(narrowest), waves.shape[1])
        nodes = 128 * math.ceil(_NODES_PER_BANDWIDTH / narrowest / 128)
        frequency = torch.arange(terms, dtype=torch.float64) * torch.pi
        damped = waves[rows, :terms] * (-0.5 * (frequency * sigma[rows, None]).square()).exp()
        # irfft of length 2 * nodes is (c_0 + 2 sum_m c_m cos(m pi t)) / (2 nodes) at t = j / nodes.
        height = torch.fft.irfft(damped, n=2 * nodes)[:, : nodes + 1] * (2 * nodes)
        error[rows] = _integral_of_absolute(height)
    return error


def _integral_of_absolute(height: Tensor) -> Tensor:
    """Trapezoid rule for |h| on [0, 1] from nodes [B, G + 1], exact to third order at sign changes."""
    nodes = height.shape[1] - 1
    size = height.abs()
    area = size.sum(1) - (size[:, 0] + size[:, -1]) / 2
    start, end = height[:, :-1], height[:, 1:]
    # In a cell where h changes sign the absolute value of the straight line has area (a^2 + b^2) / (2 (|a| + |b|)) instead of
    # (|a| + |b|) / 2, and the jump of the slope of |h| adds the Euler-Maclaurin term |b - a| / 6.
    row, cell = ((start < 0) != (end < 0)).nonzero(as_tuple=True)
    a, b = start[row, cell].abs(), end[row, cell].abs()
    span = a + b
    correction = (a * a + b * b) / (2 * span) - span / 2 + span / 6
    return area.index_add(0, row, correction) / nodes


def _fixed_point(residual: Tensor, value: Tensor) -> Tensor:
    """Solve `error(sigma) = sigma` for each row of [B, L]; the error does not rise with sigma."""
    # |sum of residuals| <= error <= sum of |residuals|, and the error at the upper end is a tighter lower end.
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
    # Where the error at `low` is not above `low`, `low` is the solution or the narrowest kernel.
    result[rows] = torch.where(low > MIN_BANDWIDTH, low, at_low)
    rising = at_low - low > _TOLERANCE
    columns = (waves, low, high, at_low - low, at_high - high)
    result[rows[rising]] = _search(*(values[rising] for values in columns))
    return result


def _search(waves: Tensor, low: Tensor, high: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """Solve `error(sigma) - sigma = 0` by Illinois regula falsi; the value is `above` > 0 at `low`, `below` < 0 at `high`."""
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
        open_ = (excess.abs() > _TOLERANCE) & (high - low > _TOLERANCE)
        rows, low, high, above, below = rows[open_], low[open_], high[open_], above[open_], below[open_]
        last_side = side[open_]
    return solution


def _kernels(table: ConfidenceTable) -> Tensor:
    """The reflected Gaussian around each confidence at `_GAP_NODES` nodes, float64 [L, K]; its width is the smooth ECE."""
    width = max(float(smooth_calibration_error(table)), _NARROWEST_GAP)
    order = torch.arange(_terms(width), dtype=torch.float64) * torch.pi
    nodes = (torch.arange(_GAP_NODES, dtype=torch.float64) + 0.5) / _GAP_NODES
    damped = (-0.5 * (order * width).square()).exp() * torch.where(order > 0, 2.0, 1.0)
    waves = torch.outer(table.value, order).cos() * damped
    return waves @ torch.outer(order, nodes).cos() / _GAP_NODES


SMOOTH_GAPS = GapNorm(_kernels, lambda gaps: gaps.abs().sum(-1))
"""`smooth_calibration_error` at its bandwidth on these answers, up to the spacing of the nodes."""
