"""Which candidates are chosen and which are rejected, given a target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from vlm_calibration.data.candidates import Candidate
from vlm_calibration.records import DataError, Query
from vlm_calibration.stages.preference_targets import PairPolicy, choose, nearest

QUERY = Query("q", "x.png", "A dog?", "Yes", "yes_no")
TENTHS = tuple(i / 10 for i in range(10, -1, -1))


def _candidates(levels: Sequence[float] = TENTHS, wrong: bool = False) -> tuple[Candidate, ...]:
    """One response per level, then the same with a wrong answer."""
    correct = [Candidate((i,), 1, 0, c, False) for i, c in enumerate(levels)]
    return (*correct, *(c._replace(wrong=True) for c in correct if wrong))


@st.composite
def _choices(draw: st.DrawFn) -> tuple[PairPolicy, tuple[Candidate, ...], int, int]:
    """A policy, candidates, the target's index, and an epoch."""
    levels = sorted(draw(st.sets(st.integers(0, 100), min_size=1, max_size=12)), reverse=True)
    rejected = draw(st.sampled_from(["all", "uniform"]))
    policy = PairPolicy(
        rejected=rejected,  # type: ignore[arg-type]
        n_rejected=None if rejected == "all" else draw(st.none() | st.integers(1, 15)),
        seed=draw(st.integers(0, 5)),
    )
    index = st.integers(0, len(levels) - 1)
    candidates = _candidates([level / 100 for level in levels], draw(st.booleans()))
    return policy, candidates, draw(index), draw(st.integers(0, 3))


@given(_choices())
def test_the_chosen_one_comes_first_and_is_never_rejected(
    case: tuple[PairPolicy, tuple[Candidate, ...], int, int],
) -> None:
    policy, candidates, target, epoch = case
    picks = choose(policy, candidates, target, QUERY, epoch)
    assert picks == choose(policy, candidates, target, QUERY, epoch)
    assert picks[0] == target
    assert len(set(picks)) == len(picks)
    n_levels = sum(not c.wrong for c in candidates)
    n_rejected = n_levels - 1 if policy.rejected == "all" else min(policy.n_rejected or 1, n_levels - 1)
    levels, wrong = picks[1 : n_rejected + 1], picks[n_rejected + 1 :]
    assert len(levels) == n_rejected
    assert not any(candidates[i].wrong for i in levels)
    assert wrong == ([target + n_levels] if len(candidates) > n_levels else []), "last, and at the same level"


def test_uniform_is_uniform() -> None:
    candidates = _candidates((1.0, 0.8, 0.4, 0.1, 0.0))
    for n, sets in ((1, [(0,), (1,), (3,), (4,)]), (2, list(combinations([0, 1, 3, 4], 2)))):
        policy = PairPolicy(rejected="uniform", n_rejected=n)
        drawn = Counter(tuple(sorted(choose(policy, candidates, 2, QUERY, e)[1:])) for e in range(2000))
        assert sorted(drawn) == sets
        assert chisquare(list(drawn.values())).pvalue > 1e-3


def test_what_is_drawn_is_a_pure_function_of_seed_epoch_and_id() -> None:
    def drawn(seed: int = 0, epoch: int = 0, name: str = "q") -> tuple[int, ...]:
        policy = PairPolicy(rejected="uniform", n_rejected=6, seed=seed)
        return tuple(choose(policy, _candidates(), 5, replace(QUERY, id=name), epoch))

    expected = drawn()
    np.random.default_rng(0).random(10)
    np.random.seed(3)  # noqa: NPY002  (the legacy stream must not matter)
    torch.manual_seed(3)
    assert drawn() == expected
    assert len({expected, drawn(seed=1), drawn(epoch=1), drawn(name="r")}) == 4


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"n_rejected": 1}, "n_rejected .* not allowed with `rejected: all`, found 1"),
        ({"rejected": "uniform", "n_rejected": 0}, "n_rejected .* found 0"),
        ({"seed": -1}, "seed must be at least 0, found -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], culprit: str) -> None:
    with pytest.raises(DataError, match=f"model.pairs.{culprit}"):
        PairPolicy(**settings)


def test_the_nearest_level_is_the_higher_of_two() -> None:
    assert nearest((1.0, 0.5, 0.0), 0.75) == 0
    assert nearest((0.0, 0.5, 1.0), 0.75) == 2
    assert nearest((0.9, 0.8, 0.7), 0.75) == 1
    assert nearest((0.9, 0.2), 0.99) == 0
