"""Counts of probed confidences, against a loop in exact fractions, in any batches."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from vlm_calibration.metrics.counting import ProbeMetrics
from vlm_calibration.records import ORIGINAL

PROBES = ("image", "answer")
GROUPS = ("a", "b", "empty")


def draw(n: int) -> tuple[list[dict[str, float | None]], list[list[str]]]:
    """Confidences of whole percents and of millionths, some missing, and the groups of each answer."""
    rng = np.random.default_rng(0)

    def one() -> float | None:
        if rng.random() < 0.2:
            return None
        return float(rng.integers(0, 11) / 10) if rng.random() < 0.7 else round(float(rng.random()), 6)

    probed = [{name: one() for name in (ORIGINAL, *PROBES)} for _ in range(n)]
    return probed, [[g for g in ("a", "b") if rng.random() < 0.5] for _ in range(n)]


def by_hand(probed: list[dict[str, float | None]], probe: str) -> dict[str, float]:
    pairs = [
        (Fraction(str(p[ORIGINAL])), Fraction(str(p[probe])))
        for p in probed
        if p[ORIGINAL] is not None and p[probe] is not None
    ]
    n = len(pairs)
    if not n:
        return {"n": 0.0, **dict.fromkeys(("change", "fell", "stayed", "rose", "sum"), math.nan)}
    return {
        "n": float(n),
        "change": float(sum(after - before for before, after in pairs) / n),
        "fell": sum(after < before for before, after in pairs) / n,
        "stayed": sum(after == before for before, after in pairs) / n,
        "rose": sum(after > before for before, after in pairs) / n,
        "sum": float(sum(after + before for before, after in pairs) / n),
    }


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_every_number_is_that_of_a_loop(batch: int) -> None:
    probed, groups = draw(200)
    metrics = ProbeMetrics(PROBES, GROUPS)
    for start in range(0, 200, batch):
        metrics.update(probed[start : start + batch], groups[start : start + batch])
    values = {name: float(value) for name, value in metrics.compute().items()}
    expected: dict[str, float] = {}
    for group in ("", *GROUPS):
        members = [p for p, of in zip(probed, groups, strict=True) if not group or group in of]
        for probe in PROBES:
            named = by_hand(members, probe)
            if probe != "answer":
                del named["sum"]
            suffix = f"/{group}" if group else ""
            expected |= {f"probe_{probe}_{name}{suffix}": value for name, value in named.items()}
    assert values == pytest.approx(expected, abs=1e-15, nan_ok=True)
    assert 0 < values["probe_image_fell"] < 1
    assert ProbeMetrics((), GROUPS).compute() == {}
