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

from vlm_calibration.data.candidates import (
    Candidate,
)
from vlm_calibration.records import DataError, Query
from vlm_calibration.stages.preference_targets import (
    PairPolicy,
    choose,
    nearest,
)

QUERY = Query("q", "x.png", "A dog?", "Yes", "yes_no")
TENTHS = tuple(i / 10 for i in range(10, -1, -1))


def _candidates(levels: Sequence[float] = TENTHS, wrong: bool = False) -> tuple[Candidate, ...]:
    """One response per level, then the same with a wrong answer."""
    correct = [Candidate((i,), 1, 0, c, False) for i, c in enumerate(levels)]
    return (*correct, *(c._replace(wrong=True) for c in correct if wrong))


def _rejected(target: int, epoch: int = 0, levels: Sequence[float] = TENTHS, **settings: Any) -> list[int]:
    chosen, *rejected = choose(PairPolicy(**settings), _candidates(levels), target, QUERY, epoch)
    assert chosen == target
    return rejected


@st.composite
def _choices(draw: st.DrawFn) -> tuple[PairPolicy, tuple[Candidate, ...], int, int]:
    """A policy, candidates, the target's index, and an epoch."""
    levels = sorted(draw(st.sets(st.integers(0, 100), min_size=1, max_size=12)), reverse=True)
    rejected = draw(st.sampled_from(["all", "uniform", "far", "adjacent"]))
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


def test_all_others_are_rejected() -> None:
    assert _rejected(3, rejected="all") == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert _rejected(0, rejected="all", levels=(1.0,)) == []
    assert _rejected(0, rejected="far", levels=(1.0,)) == []


def test_uniform_is_uniform() -> None:
    levels = (1.0, 0.8, 0.4, 0.1, 0.0)
    single = Counter(_rejected(2, e, levels, rejected="uniform")[0] for e in range(2000))
    assert sorted(single) == [0, 1, 3, 4]
    assert chisquare(list(single.values())).pvalue > 1e-3
    in_pairs = Counter(
        tuple(sorted(_rejected(2, e, levels, rejected="uniform", n_rejected=2))) for e in range(2000)
    )
    assert sorted(in_pairs) == list(combinations([0, 1, 3, 4], 2))
    assert chisquare(list(in_pairs.values())).pvalue > 1e-3


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


@pytest.mark.parametrize("rejected", ["far", "adjacent"])
@pytest.mark.parametrize("target", range(11))
@pytest.mark.parametrize("n", [1, 2, 5])
def test_far_and_adjacent_are_those_of_a_naive_sort(rejected: str, target: int, n: int) -> None:
    # In tenths, so that equal distances are equal: in floats 0.3 - 0.2 is not 0.2 - 0.1.
    away = {i: abs(i - target) for i in range(11) if i != target}
    nearest_or_furthest = sorted(away.values(), reverse=rejected == "far")[:n]
    choices = [_rejected(target, epoch, rejected=rejected, n_rejected=n) for epoch in range(40)]
    assert all([away[i] for i in picks] == nearest_or_furthest for picks in choices)
    # Ties are broken at random.
    could_be = {i for i in away if away[i] in nearest_or_furthest}
    assert {i for picks in choices for i in picks} == could_be


def test_a_wrong_answer_comes_last_and_states_the_target() -> None:
    candidates = _candidates((0.9, 0.5, 0.1), wrong=True)
    assert choose(PairPolicy(), candidates, 1, QUERY, 0) == [1, 0, 2, 4]
    assert choose(PairPolicy(rejected="far"), candidates, 0, QUERY, 0) == [0, 2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"n_rejected": 1},
            "model.pairs.n_rejected must be at least 1, and is not allowed with `rejected: all`",
        ),
        ({"rejected": "far", "n_rejected": 0}, "model.pairs.n_rejected must be at least 1"),
        ({"rejected": "uniform", "n_rejected": -2}, "found -2"),
        ({"seed": -1}, "model.pairs.seed must be at least 0, found -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        PairPolicy(**settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("levels", "confidence", "expected"),
    [
        ((1.0, 0.5, 0.0), 0.75, 0),
        ((1.0, 0.5, 0.0), 0.25, 1),
        ((0.0, 0.5, 1.0), 0.75, 2),
        ((0.9, 0.8, 0.7), 0.85, 0),
        ((0.9, 0.8, 0.7), 0.75, 1),
        ((0.9, 0.2), 0.99, 0),
        ((0.4,), 0.99, 0),
    ],
)
def test_the_nearest_level_is_the_higher_of_two(
    levels: tuple[float, ...], confidence: float, expected: int
) -> None:
    assert nearest(levels, confidence) == expected
