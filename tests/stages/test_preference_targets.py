"""Which candidates a module compares on the demo model, and its distribution over the levels.

Likelihoods are checked against plain forwards over whole conversations, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlm_calibration.data.candidates import (
    Candidate,
    CandidateSettings,
)
from vlm_calibration.losses.preference import SimPO
from vlm_calibration.stages.preference_targets import (
    LevelDistribution,
    PairPolicy,
)

from .preference import LEVELS, Data, MakeModule, Observed


def _nearest_level(confidence: float) -> float:
    return min(LEVELS, key=lambda c: abs(c - confidence))


@pytest.mark.slow
def test_the_level_of_the_noise_is_chosen(
    make_module: MakeModule, candidates: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = Observed(make_module(pairs=PairPolicy(target="level")), candidates(), monkeypatch, 9)
    for row, sample in zip(observed.compared(), observed.samples, strict=True):
        assert row[0].confidence == sample.confidence
        assert {c.confidence for c in row[1:]} == set(LEVELS) - {sample.confidence}
    assert len({s.confidence for s in observed.samples}) > 2


@pytest.mark.parametrize("reference", ["adapter", "base"])
def test_the_expected_level_is_that_of_plain_forwards(
    make_module: MakeModule, candidates: Data, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    observed = Observed(make_module(reference=reference), candidates(), monkeypatch)
    expected = [observed.expected(row) for row in range(4)]
    assert [row[0].confidence for row in observed.compared()] == [_nearest_level(e) for e in expected]
    scores = observed.module.score_reference(observed.batch, observed.batch.candidates)
    distribution = LevelDistribution(scores.total, observed.batch.candidates)
    assert [distribution.expected(row) for row in range(4)] == pytest.approx(expected, abs=1e-4)
    policy = [observed.expected(row, reference=False) for row in range(4)]
    assert max(abs(a - b) for a, b in zip(policy, expected, strict=True)) > 0.01, "the reference decides"


def test_a_grid_refines_the_expected_confidence(
    make_module: MakeModule, candidates: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = Observed(make_module(), candidates(CandidateSettings(grid=5)), monkeypatch, 6)
    finer = [percent / 100 for percent in range(0, 101, 5)]
    expected = [observed.expected(row) for row in range(6)]
    chosen = observed.compared()
    assert [row[0].confidence for row in chosen] == [min(finer, key=lambda c: abs(c - e)) for e in expected]
    assert {row[0].confidence for row in chosen} - set(LEVELS)
    assert all(sorted(c.confidence for c in row) == finer for row in chosen)


@pytest.mark.parametrize("target", ["level", "expected"])
def test_reference_likelihoods_match_their_candidates(
    make_module: MakeModule, candidates: Data, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    policy = PairPolicy(target=target, rejected="uniform", n_rejected=2)  # type: ignore[arg-type]
    observed = Observed(
        make_module(pairs=policy), candidates(CandidateSettings(wrong_answer=True)), monkeypatch, 9
    )
    with torch.no_grad():
        comparison = observed.module.choose(observed.batch)
    compared, reference = comparison.compared, comparison.reference
    assert reference is not None
    assert {len(row) for row in compared} == {3, 4}, (
        "a response that is wrong itself has no wrong answer beside it"
    )
    assert [len(row) == 4 for row in compared] == list(observed.batch.is_correct)
    for row, responses in enumerate(compared):
        plain = [observed.plain(row, c, reference=True)[0] for c in responses]
        assert reference.total[row, : len(responses)].tolist() == pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize("settings", [{"loss": SimPO(), "reference": "none"}, {"loss": SimPO()}])
def test_a_reference_that_is_not_needed_does_not_score(
    make_module: MakeModule, candidates: Data, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    observed = Observed(make_module(**settings, pairs=PairPolicy(target="level")), candidates(), monkeypatch)

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("the reference scores")

    monkeypatch.setattr(observed.module, "score_reference", refuse)
    assert observed.module.choose(observed.batch).reference is None
    assert observed.step().isfinite()
    adapters = set(observed.module.model.peft_config)
    assert adapters == ({"default"} if "reference" in settings else {"default", "reference"})


@pytest.mark.parametrize("reference", ["adapter", "base"])
def test_the_reference_is_the_same_while_the_policy_is_trained(
    make_module: MakeModule,
    demo_adapter: Callable[..., str],
    candidates: Data,
    monkeypatch: pytest.MonkeyPatch,
    reference: str,
) -> None:
    observed = Observed(
        make_module(demo_adapter(dropout=0.3), reference=reference), candidates(), monkeypatch
    )
    scores = observed.module.score_reference
    assert observed.module.model.training
    first, again = (scores(observed.batch, observed.batch.candidates).total for _ in range(2))
    assert observed.module.model.training
    assert torch.equal(first, again), "no dropout in the frozen reference"
    observed.module.eval()
    assert torch.allclose(first, scores(observed.batch, observed.batch.candidates).total, atol=1e-4)


def _distribution(*rows: Sequence[float]) -> LevelDistribution:
    """A distribution over three levels; the same levels with a wrong answer do not count."""
    levels = [Candidate((1,), 1, 0, c, False) for c in (1.0, 0.5, 0.0)]
    candidates = (*levels, *(c._replace(wrong=True) for c in levels))
    return LevelDistribution(torch.tensor([[*row, 5.0, 6.0, 7.0] for row in rows]), (candidates,) * len(rows))


def test_the_mean_by_hand() -> None:
    distribution = _distribution([math.log(0.1), math.log(0.1), math.log(0.2)], [-900.0, -901.0, -900.0])
    assert distribution.expected(0) == pytest.approx(0.25 * 1 + 0.25 * 0.5)
    weight = 1 / (2 + math.exp(-1))
    assert distribution.expected(1) == pytest.approx(weight + 0.5 * weight * math.exp(-1))


def test_divergence_by_hand() -> None:
    now, before = (
        _distribution([0.0, 1.0, 2.0], [0.0, 0.0, 0.0]),
        _distribution([2.0, 1.0, 0.0], [-7.0, -7.0, -7.0]),
    )
    p = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    assert float(now.kl_divergence(before)) == pytest.approx((p @ np.log(p / p[::-1]) + 0) / 2)
    assert float(now.kl_divergence(now)) == 0
