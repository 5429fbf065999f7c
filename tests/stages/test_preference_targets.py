"""Which candidates a module compares on the demo model, and its distribution over the levels.

Likelihoods are checked against plain forwards over whole conversations, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlm_calibration.data.candidates import Candidate, CandidateSettings
from vlm_calibration.estimators.verbal import expected_confidence
from vlm_calibration.losses.preference import SimPO
from vlm_calibration.stages.dpo_terms import kl_divergence
from vlm_calibration.stages.preference_targets import PairPolicy, level_log_p

from .own import MakeStep
from .preference import LEVELS, NewAdapter


def test_the_level_of_the_noise_is_chosen(make_step: MakeStep) -> None:
    step = make_step(n=9, pairs=PairPolicy(target="level"))
    with torch.no_grad():
        compared = step.compare()[1].compared
    for row, sample in zip(compared, step.samples, strict=True):
        assert row[0].confidence == sample.confidence
        assert {c.confidence for c in row[1:]} == set(LEVELS) - {sample.confidence}
    assert len({s.confidence for s in step.samples}) > 2


@pytest.mark.parametrize(("reference", "grid"), [("adapter", 5), ("base", None)])
def test_the_expected_level_is_that_of_plain_forwards(
    make_step: MakeStep, reference: str, grid: int | None
) -> None:
    step = make_step(CandidateSettings(grid=grid), 4, reference=reference)
    levels = LEVELS if grid is None else tuple(percent / 100 for percent in range(100, -1, -grid))
    expected, policy = (
        [
            step.ask(row, lambda alone, row=row: alone.expected(step.answer(row), levels), of)
            for row in range(4)
        ]
        for of in (True, False)
    )
    with torch.no_grad():
        comparison = step.compare()[1]
    assert comparison.targets == pytest.approx(expected, abs=1e-4)
    chosen = [row[0].confidence for row in comparison.compared]
    assert chosen == [min(levels, key=lambda c: abs(c - e)) for e in expected]
    assert all(sorted(c.confidence for c in row) == sorted(levels) for row in comparison.compared)
    assert grid is None or set(chosen) - set(LEVELS)
    assert max(abs(a - b) for a, b in zip(policy, expected, strict=True)) > 0.01, "the reference decides"


@pytest.mark.parametrize("target", ["level", "expected"])
def test_reference_likelihoods_match_their_candidates(make_step: MakeStep, target: Any) -> None:
    step = make_step(CandidateSettings(wrong_answer=True), 9, pairs=PairPolicy(target, "uniform", 2))
    with torch.no_grad():
        comparison = step.compare()[1]
    assert comparison.reference is not None
    # A response that is wrong itself has no wrong answer beside it.
    assert [len(row) for row in comparison.compared] == [
        3 + is_correct for is_correct in comparison.is_correct
    ]
    assert set(comparison.is_correct) == {True, False}
    for row, responses in enumerate(comparison.compared):
        plain = [sum(step.log_p(row, c, reference=True)) for c in responses]
        assert comparison.reference.total[row, : len(responses)].tolist() == pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize("settings", [{"reference": "none"}, {}])
def test_a_reference_that_is_not_needed_does_not_score(
    make_step: MakeStep, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    step = make_step(n=4, **settings, loss=SimPO(), pairs=PairPolicy(target="level"))
    monkeypatch.setattr(step.module, "score_reference", None)
    assert step.compare()[1].reference is None
    assert step.step().isfinite()
    adapters = set(step.module.model.peft_config)
    assert adapters == ({"default"} if settings else {"default", "reference"})


def test_the_reference_is_the_same_while_the_policy_is_trained(
    make_step: MakeStep, demo_adapter: NewAdapter
) -> None:
    step = make_step(n=4, folder=demo_adapter(dropout=0.3))
    batch, module = step.batch, step.module
    assert module.model.training
    first, again = (module.score_reference(batch, batch.candidates).total for _ in range(2))
    assert module.model.training
    assert torch.equal(first, again), "no dropout in the frozen reference"
    module.eval()
    assert torch.allclose(first, module.score_reference(batch, batch.candidates).total, atol=1e-4)


LEVEL = [Candidate((1,), 1, 0, c, False) for c in (1.0, 0.5, 0.0)]
# The same levels with a wrong answer do not count.
CANDIDATES = (*LEVEL, *(c._replace(wrong=True) for c in LEVEL))


def _totals(*rows: Sequence[float]) -> Tensor:
    return torch.tensor([[*row, 5.0, 6.0, 7.0] for row in rows])


def test_mean_and_divergence_by_hand() -> None:
    totals = _totals([math.log(0.1), math.log(0.1), math.log(0.2)], [-900.0, -901.0, -900.0])
    first, second = (expected_confidence(*levels) for levels in level_log_p(totals, (CANDIDATES,) * 2))
    assert first == pytest.approx(0.25 * 1 + 0.25 * 0.5)
    weight = 1 / (2 + math.exp(-1))
    assert second == pytest.approx(weight + 0.5 * weight * math.exp(-1))

    now, before = _totals([0, 1, 2], [0, 0, 0]), _totals([2, 1, 0], [-7, -7, -7])
    p = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    divergence = kl_divergence(now, before, (CANDIDATES,) * 2)
    assert float(divergence) == pytest.approx((p @ np.log(p / p[::-1]) + 0) / 2)
    assert float(kl_divergence(now, now, (CANDIDATES,) * 2)) == 0
