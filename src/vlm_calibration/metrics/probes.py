"""What confidences listen to, from probed confidences: the counts that all numbers about them are made of.

A probe reads the confidence in an answer again after something has changed (`estimators.probes`). Confidences are whole millionths,
as in prediction files, so all sums are exact and do not depend on the order of the answers.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vlm_calibration.records import ORIGINAL

SWAPPED = "answer"
"""The probe that swaps the answer; its confidence and the original one should add up to at most 1."""
MILLION = 1_000_000

Probed = Mapping[str, float | None]
"""The probed confidences of one answer by name, in [0, 1], `ORIGINAL` among them; None where a probe does not apply."""


def count_probes(probed: Iterable[Probed], probes: Sequence[str]) -> Tensor:
    """For each of P probes the answers whose confidence fell, stayed and rose; in millionths the sum of all changes and of all sums of both.

    int64 [P, 5]; a change is the probed confidence minus the original one.
    """
    probed = list(probed)
    counts = torch.zeros(len(probes), 5, dtype=torch.int64)
    for row, probe in zip(counts, probes, strict=True):
        pairs = [pair for p in probed if None not in (pair := (p[ORIGINAL], p[probe]))]
        before, after = np.rint(np.array(pairs, dtype=np.float64).reshape(-1, 2) * MILLION).astype(np.int64).T
        change = after - before
        row[:3] = torch.tensor([(change < 0).sum(), (change == 0).sum(), (change > 0).sum()])
        row[3:] = torch.tensor([change.sum(), (after + before).sum()])
    return counts


def probe_values(counts: Tensor, probes: Sequence[str], suffix: str = "") -> dict[str, float]:
    """The metrics of `count_probes`.

    For each probe `probe_NAME_n`, the number of answers that it applies to; `_change`, the mean change of the confidence in [-1, 1];
    `_fell`, `_stayed` and `_rose`, shares of answers; and for the swapped answer `_sum`, the mean sum of both confidences in [0, 2].
    NaN without answers.
    """
    values: dict[str, float] = {}
    for probe, (fell, stayed, rose, change, total) in zip(probes, counts.double(), strict=True):
        n = fell + stayed + rose
        named = {"n": n, "change": change / (n * MILLION)}
        named |= {"fell": fell / n, "stayed": stayed / n, "rose": rose / n}
        if probe == SWAPPED:
            named["sum"] = total / (n * MILLION)
        values |= {f"probe_{probe}_{name}{suffix}": float(value) for name, value in named.items()}
    return values
