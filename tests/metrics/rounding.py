"""Bounds of the change of each metric when confidences are rounded to a table's grid, computed from the table.

Confidences on the grid, such as stated percentages, do not move. Any other moves by at most
`d = 1 / (2 * grid_steps)`, and different levels keep their order.
"""

import math

import torch

from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.groups import ConfidenceGroups
from vlm_calibration.metrics.smooth import MIN_BANDWIDTH, smooth_calibration_error
from vlm_calibration.metrics.table import ConfidenceTable

SMOOTH_ECE_NUMERICS = 1e-4
"""Allowance for the numerical error of two smooth ECE values that are compared."""


def rounding_bounds(table: ConfidenceTable, *, n_bins: int = 10) -> dict[str, float]:
    r"""Upper bounds of `|metric(table) - metric(the confidences that were rounded)|`, by flat name.

    With `d = 1 / (2 * grid_steps)`:

    - `n, parse_failure_rate, brier_uncertainty, parsed_accuracy`: 0.
    - `mean_confidence, overconfidence`: `d`.
    - `brier`: `2 d`, as `|c'^2 - c^2| <= 2 d`.
    - `log_loss`: a wrong (correct) answer at level `c` costs at most `d / (1 - c - d)` (`d / (c - d)`) more or
      less; infinite once an answer is within `d` of certainty that could be wrong.
    - `auroc`: rounding only makes ties, each worth half a pair: half the share of (correct, wrong) pairs
      that share a level.
    - `aurc`: within a level of `n` answers, `e` of them wrong, the errors counted so far differ by
      at most `e (n - e) / n` from their expectation over the order.
    - `ece` (uniform bins): `d + 2 m`, where `m` is the share of
      answers on levels whose rounding cell contains a bin edge, which may change bins.
    - `mce`: `d` if `m = 0`, else 1: a binned maximum is not continuous.
    - `ace` (quantile bins): `d` if no level's answers could belong to two bins, else 1.
    - `smooth_ece`: `d (1 + sqrt(2 / pi) / s)` with `s` the value on the table (or `MIN_BANDWIDTH` if smaller):
      two Gaussians of deviation `s` whose centres are `d` apart differ by `sqrt(2 / pi) d / s`.
    - No bound below the range: `brier_reliability` and `brier_resolution`, which depend on the levels themselves
      (reliability minus resolution moves by at most `2 d`).

    Args:
        table: the rounded confidences, at least one.
        n_bins: bins of the binned errors.

    Raises:
        ValueError: if the table has no answer with a readable confidence.
    """
    if table.parsed == 0:
        raise ValueError("a table without readable confidences has no bounds")
    groups = table.groups()
    half = 1 / (2 * table.grid_steps)
    bounds = dict.fromkeys(("n", "parse_failure_rate", "brier_uncertainty", "parsed_accuracy"), 0.0)
    bounds |= dict.fromkeys(("mean_confidence", "overconfidence"), half)
    bounds |= {"brier": 2 * half, "log_loss": _log_loss_bound(groups, half)}
    for name in ("brier_reliability", "brier_resolution"):
        bounds[name] = METRICS[name].upper - METRICS[name].lower
    bounds |= _binned_bounds(groups, table.grid_steps, half, n_bins)
    bounds |= _ranking_bounds(groups)
    bounds["smooth_ece"] = _smooth_bound(groups, half)
    return bounds


def _log_loss_bound(groups: ConfidenceGroups, half: float) -> float:
    """Mean over the answers of the largest change of their own cost."""
    correct_room, wrong_room = groups.value - half, 1 - groups.value - half
    cost = torch.where(groups.correct > 0, groups.correct * half / correct_room.clamp_min(0), 0.0)
    cost = cost + torch.where(groups.wrong > 0, groups.wrong * half / wrong_room.clamp_min(0), 0.0)
    return float(cost.sum() / groups.total)


def _binned_bounds(groups: ConfidenceGroups, grid_steps: int, half: float, n_bins: int) -> dict[str, float]:
    answers, total = groups.answers, float(groups.total)
    # An inner edge b / n_bins is in the cell ((2 i - 1), (2 i + 1)) / (2 grid_steps] of level i.
    edge = torch.arange(1, n_bins, dtype=torch.int64)
    cell = (2 * edge * grid_steps + n_bins) // (2 * n_bins)
    half_edge = (2 * edge * grid_steps + n_bins) % (2 * n_bins) == 0
    touched = torch.cat([cell, cell[half_edge] - 1])
    moved = float(answers[torch.isin(groups.cell, touched)].sum()) / total
    l1 = min(1.0, half + 2 * moved)
    rank = groups.counts.sum(-1).cumsum(-1)
    last = (rank[-1:] - 1).clamp_min(1)
    first_bin = (
        ((rank - groups.counts.sum(-1)) * n_bins).div(last, rounding_mode="floor").clamp_max(n_bins - 1)
    )
    last_bin = ((rank - 1) * n_bins).div(last, rounding_mode="floor").clamp_max(n_bins - 1)
    split = bool((first_bin != last_bin).any())
    return {
        "ece": l1,
        "mce": half if moved == 0 else 1.0,
        "ace": 1.0 if split else half,
    }


def _ranking_bounds(groups: ConfidenceGroups) -> dict[str, float]:
    """Bounds of the ranking metrics, from the ties within levels."""
    correct, wrong = groups.correct.flip(-1), groups.wrong.flip(-1)
    answers, total = correct + wrong, float(groups.total)
    before = answers.cumsum(-1) - answers
    pairs = float(correct.sum() * wrong.sum())
    tied = float((correct * wrong).sum())
    spread = wrong * correct / answers.clamp_min(1)
    aurc = float((spread * (torch.digamma(before + answers + 1) - torch.digamma(before + 1))).sum()) / total
    return {"auroc": tied / pairs / 2 if pairs else math.nan, "aurc": aurc}


def _smooth_bound(groups: ConfidenceGroups, half: float) -> float:
    bandwidth = max(float(smooth_calibration_error(groups)), MIN_BANDWIDTH)
    return min(1.0, half * (1 + math.sqrt(2 / math.pi) / bandwidth) + SMOOTH_ECE_NUMERICS)
