"""What confidences listen to, from probed confidences: the counts that all numbers about them are made of.

A probe reads the confidence in an answer again after something has changed (`estimators.probes`). Confidences are whole millionths,
as in prediction files, so all sums are exact and do not depend on the order of the answers.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from vlm_calibration.records import ORIGINAL

SWAPPED = "answer"
"""The probe that swaps the answer; its confidence and the original one should add up to 1."""
FELL, STAYED, ROSE, CHANGE, SUM = range(5)
"""Counts of one probe: answers whose confidence fell, stayed and rose; in millionths the sum of all changes, probed minus original,
and of all sums of both."""
MILLION = 1_000_000

Probed = Mapping[str, float | None]
"""The probed confidences of one answer by name, in [0, 1], `ORIGINAL` among them; None where a probe does not apply."""


def count_probes(
    probed: Iterable[Probed], probes: Sequence[str], rows: Iterable[Sequence[int]], n_rows: int
) -> Tensor:
    """Count N answers at P probes, each answer in some of R rows: int64 [R, P, 5], see `FELL` and the others."""
    counts = [[[0] * 5 for _ in probes] for _ in range(n_rows)]
    for confidences, of_answer in zip(probed, rows, strict=True):
        for number, probe in enumerate(probes):
            original, changed = confidences[ORIGINAL], confidences[probe]
            if original is None or changed is None:
                continue
            before, after = round(original * MILLION), round(changed * MILLION)
            way = FELL if after < before else ROSE if after > before else STAYED
            for row in of_answer:
                cell = counts[row][number]
                cell[way] += 1
                cell[CHANGE] += after - before
                cell[SUM] += after + before
    return torch.tensor(counts, dtype=torch.int64).reshape(n_rows, len(probes), 5)


def probe_values(counts: Tensor, probes: Sequence[str], suffix: str = "") -> dict[str, float]:
    """The metrics of one row of `count_probes`, int64 [P, 5].

    For each probe `probe_NAME_n`, the number of answers that it applies to; `probe_NAME_change`, the mean change of the
    confidence in [-1, 1]; `probe_NAME_fell`, `_stayed` and `_rose`, shares of answers; and for the swapped answer
    `probe_answer_sum`, the mean sum of both confidences in [0, 2]. NaN without answers. `suffix` is behind every name.
    """
    values: dict[str, float] = {}
    for probe, cell in zip(probes, counts.tolist(), strict=True):
        n = sum(cell[:CHANGE])
        named = {"n": float(n), "change": _ratio(cell[CHANGE], n * MILLION)}
        named |= {
            "fell": _ratio(cell[FELL], n),
            "stayed": _ratio(cell[STAYED], n),
            "rose": _ratio(cell[ROSE], n),
        }
        if probe == SWAPPED:
            named["sum"] = _ratio(cell[SUM], n * MILLION)
        values |= {f"probe_{probe}_{name}{suffix}": value for name, value in named.items()}
    return values


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else float("nan")
