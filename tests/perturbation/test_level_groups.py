"""Groups of levels: similar accuracies are merged, and state their mean."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.perturbation.level_accuracy import group_means
from vlm_calibration.perturbation.level_table import AnswerTypeCounts, LevelTable
from vlm_calibration.perturbation.levels import CLEAN, AnchoredLevels, Perturbation

from .conftest import noise_counts


def partitions(values, groups):
    """All partitions of falling numbers into at most `groups` runs."""
    for cuts in range(min(groups, len(values))):
        for where in combinations(range(1, len(values)), cuts):
            yield [values[a:b] for a, b in pairwise((0, *where, len(values)))]


def error(runs):
    return sum(float(((np.array(run) - np.mean(run)) ** 2).sum()) for run in runs)


def runs_of(values, smallest):
    """The falling numbers split behind each of `smallest`."""
    bounds = [0, *(max(i for i, v in enumerate(values) if v == s) + 1 for s in smallest)]
    return [values[a:b] for a, b in pairwise(bounds)]


@given(st.lists(st.integers(0, 12).map(lambda i: i / 12), min_size=1, max_size=9), st.integers(1, 10))
def test_groups_are_the_best_of_all_partitions(values, groups):
    falling = sorted(values, reverse=True)
    result = group_means(values, groups)
    runs = runs_of(falling, [smallest for smallest, _ in result])
    assert len(result) <= groups
    assert error(runs) == pytest.approx(min(error(p) for p in partitions(falling, groups)), abs=1e-9)
    assert [mean for _, mean in result] == pytest.approx([np.mean(run) for run in runs])
    assert sum(map(len, runs)) == len(values)


def grouped(rights, groups, ns=None, grid=1, **more):
    ns = ns or [100] * len(rights)
    rows = [(i / 10, n, right) for i, (n, right) in enumerate(zip(ns, rights, strict=True))]
    return AnchoredLevels(table=LevelTable({"open": noise_counts(rows), **more}), grid=grid, groups=groups)


def stated(levels, answer_type="open"):
    """The confidences at the measured strengths."""
    rows = levels.table.counts[answer_type].bins[0]["noise"]
    return [levels.confidence(Perturbation("noise", row.strength), answer_type) for row in rows]


def test_neighbours_are_merged_to_their_mean():
    levels = grouped([90, 70, 50, 30, 10], 5)
    assert stated(levels) == [0.9, 0.7, 0.5, 0.3, 0.1]
    assert levels.strengths("noise") == (0, 0.1, 0.2, 0.3, 0.4)
    assert levels.confidences("open") == (0.9, 0.7, 0.5, 0.3, 0.1)
    # At evenly spread accuracies 0.9, 0.7, ..., 0.1; the untouched image counts as often as the four others.
    assert stated(grouped([90, 70, 50, 30, 10], 1)) == [0.65] * 5
    assert stated(grouped([98, 96, 94, 92], 2)) == [0.98, 0.98, 0.93, 0.93]


def test_groups_are_of_the_fit_and_of_each_answer_type():
    rows = [(i / 10, 100, right) for i, right in enumerate([50, 44, 36, 40])]
    levels = grouped([98, 96, 94, 92], 2, short=noise_counts(rows))
    assert len(levels.confidences("open")) == len(levels.confidences("short")) == 2
    assert max(levels.confidences("short")) <= 0.5 < min(levels.confidences("open"))
    assert [levels.accuracy(Perturbation("noise", i / 10), "open") for i in range(4)] == [
        0.98,
        0.96,
        0.94,
        0.92,
    ], "not merged"


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=10),
    st.integers(1, 6),
    st.sampled_from([1, 5, 10, 25, 100]),
)
def test_the_means_of_groups_are_rounded_to_the_grid(rights, groups, grid):
    levels = grouped(rights, groups, [400] * len(rights), grid)
    strengths = levels.strengths("noise")
    accuracies = [round(levels.accuracy(Perturbation("noise", s), "open"), 9) for s in strengths]
    result = group_means(accuracies + accuracies[:1] * (len(accuracies) - 2), groups)
    of_strengths = [levels.confidence(Perturbation("noise", s), "open") for s in strengths]
    expected = [next(mean for smallest, mean in result if a >= smallest) for a in accuracies]
    assert np.abs(np.array(of_strengths) - expected).max() <= grid / 200 + 1e-8
    assert all(round(value * 100) % grid == 0 and round(value * 100) / 100 == value for value in of_strengths)
    assert len(set(of_strengths)) <= groups
    assert levels.confidences("open") == tuple(sorted(set(of_strengths), reverse=True))
    assert (np.diff(stated(levels)) <= 0).all(), "never rising with the strength"
    assert set(stated(levels)) <= set(of_strengths)


@given(
    st.lists(
        st.lists(st.integers(0, 30), min_size=1, max_size=5).map(lambda v: [30, *v]), min_size=1, max_size=3
    ),
    st.integers(1, 8),
)
def test_groups_of_several_kinds_state_what_they_say(rights, groups):
    kinds = ("noise", "blur", "fade")[: len(rights)]
    counts = {
        kind: [(i / 7, 30, right) for i, right in enumerate(row)]
        for kind, row in zip(kinds, rights, strict=True)
    }
    levels = AnchoredLevels(
        table=LevelTable({"open": AnswerTypeCounts.of_kinds(counts)}), grid=1, groups=groups
    )
    drawn = {levels.confidence(Perturbation(k, s), "open") for k in kinds for s in levels.strengths(k)}
    assert drawn == set(levels.confidences("open"))
    assert len(drawn) <= groups


def test_a_tie_of_a_group_goes_up():
    assert levels_of([90, 85, 0], 2).confidence(CLEAN, "open") == 0.88
    assert levels_of([90, 85, 0], 2, grid=25).confidence(CLEAN, "open") == 1.0


def levels_of(percent, groups, grid=1):
    """Levels whose own strengths have these accuracies, since every kind has two strengths."""
    kinds = ("blur", "fade", "darkness")
    top, *rest = percent
    counts = {kind: [(0, 100, top), (1, 100, value)] for kind, value in zip(kinds, rest, strict=False)}
    table = LevelTable({"open": AnswerTypeCounts.of_kinds(counts)})
    return AnchoredLevels(table=table, grid=grid, groups=groups)


def test_between_groups_the_nearest_accuracy_counts():
    levels = levels_of([98, 60, 10], 3)
    for strength in np.linspace(0, 1, 41):
        accuracy = levels.accuracy(Perturbation("fade", strength), "open")
        distances = [abs(accuracy - c) for c in (0.98, 0.6, 0.1)]
        could_be = {c for c, d in zip((0.98, 0.6, 0.1), distances, strict=True) if d <= min(distances) + 1e-9}
        assert levels.confidence(Perturbation("fade", strength), "open") in could_be


@pytest.mark.parametrize("groups", [0, -1])
def test_there_is_at_least_one_group(groups):
    with pytest.raises(ValueError, match=f"groups must be at least 1, got {groups}"):
        grouped([90, 50], groups)
