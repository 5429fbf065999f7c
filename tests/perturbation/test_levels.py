import json
import pickle
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentError, ArgumentParser
from scipy.stats import norm

from vlm_calibration import demo
from vlm_calibration.perturbation.level_table import trend_p_value
from vlm_calibration.perturbation.levels import (
    AnchoredLevels,
    ConfidenceLevels,
    LevelTable,
    LinearLevels,
    StepCount,
    _group_means,
)
from vlm_calibration.perturbation.schedules import CosineSchedule, Schedule

COUNTS = {
    "yes_no": [StepCount(0, 200, 190), StepCount(500, 200, 150), StepCount(1000, 200, 104)],
    # At 1000 the model happened to be right more often than at 500, which noise cannot do.
    "short": [StepCount(0, 100, 97), StepCount(500, 100, 20), StepCount(1000, 300, 90)],
}


@pytest.fixture
def levels():
    return AnchoredLevels.fit(COUNTS, provenance={"model": "tiny", "schedule": "linear", "seed": 0})


def test_linear_levels_are_the_papers():
    levels = LinearLevels()
    assert levels.steps == (0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
    stated = [levels.confidence(step, "yes_no") for step in levels.steps]
    assert stated == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    assert [levels.step(confidence) for confidence in stated] == list(levels.steps)
    assert levels.confidence(250, "short") == 0.75
    assert levels.step(0.7504) == 250


@given(st.integers(2, 101), st.integers(100, 4000))
def test_linear_levels_invert_themselves(n_levels, total_steps):
    levels = LinearLevels(n_levels, total_steps)
    assert len(set(levels.steps)) == n_levels
    assert levels.steps[0] == 0
    assert levels.steps[-1] == total_steps
    stated = [levels.confidence(step, "any") for step in levels.steps]
    assert stated == sorted(stated, reverse=True)
    assert [levels.step(confidence) for confidence in stated] == list(levels.steps)


@pytest.mark.parametrize(
    "make", [lambda: LinearLevels(1), lambda: LinearLevels(0), lambda: LinearLevels(11, 9)]
)
def test_impossible_linear_levels_are_refused(make):
    with pytest.raises(ValueError, match="n_levels"):
        make()


@pytest.mark.parametrize("confidence", [-0.1, 1.1, float("nan"), float("inf"), 80])
def test_a_confidence_outside_the_unit_interval_is_refused(confidence, levels):
    for each in (LinearLevels(), levels):
        with pytest.raises(ValueError, match=r"confidence must be in \[0, 1\]"):
            each.step(confidence, "yes_no")


@pytest.mark.parametrize("step", [-1, 1001])
def test_a_step_outside_the_range_is_refused(step, levels):
    for each in (LinearLevels(), levels):
        with pytest.raises(ValueError, match=r"noise step must be in \[0, 1000\]"):
            each.confidence(step, "yes_no")


def test_anchored_levels_state_the_measured_accuracy_per_answer_type(levels):
    assert levels.steps == (0, 500, 1000)
    assert levels.answer_types == ("yes_no", "short")
    assert levels.accuracy(0, "yes_no") == 0.95
    assert levels.accuracy(1000, "yes_no") == 0.52
    assert levels.confidence(1000, "yes_no") == 0.5
    assert levels.confidence(0, "short") == 0.95


def test_accuracies_that_rise_with_the_noise_are_pooled_by_their_counts(levels):
    pooled = (20 + 90) / (100 + 300)
    assert levels.accuracy(500, "short") == pytest.approx(pooled)
    assert levels.accuracy(1000, "short") == pytest.approx(pooled)
    assert levels.accuracy(700, "short") == pytest.approx(pooled)


def pool_adjacent_violators(accuracies, weights):
    """The textbook algorithm for a fit that never rises."""
    blocks = []
    for accuracy, weight in zip(accuracies, weights, strict=True):
        blocks.append([accuracy, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            a, b = blocks[-2:]
            weight = a[1] + b[1]
            blocks[-2:] = [[(a[0] * a[1] + b[0] * b[1]) / weight, weight, a[2] + b[2]]]
    return [value for value, _, size in blocks for _ in range(size)]


@given(
    st.lists(
        st.integers(1, 500).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
        min_size=1,
        max_size=12,
    )
)
def test_the_fit_is_isotonic_regression(pairs):
    rows = [StepCount(100 * i, n, right) for i, (n, right) in enumerate(pairs)]
    levels = AnchoredLevels.fit({"open": rows})
    fitted = [levels.accuracy(row.step, "open") for row in rows]
    expected = pool_adjacent_violators([right / n for n, right in pairs], [n for n, _ in pairs])
    np.testing.assert_allclose(fitted, expected, atol=1e-9)
    assert all(0 <= value <= 1 for value in fitted)


def test_between_measured_steps_accuracy_is_linear(levels):
    assert levels.accuracy(250, "yes_no") == pytest.approx((0.95 + 0.75) / 2)
    assert levels.accuracy(600, "yes_no") == pytest.approx(0.75 + (0.52 - 0.75) / 5)


@pytest.mark.parametrize(
    ("right", "grid", "stated"),
    [
        (974, 5, 0.95),
        (975, 5, 1.0),
        (523, 5, 0.5),
        (525, 5, 0.55),
        (523, 1, 0.52),
        (525, 1, 0.53),
        (549, 10, 0.5),
        (30, 100, 0),
    ],
)
def test_confidences_are_rounded_to_the_grid_with_ties_up(right, grid, stated):
    levels = AnchoredLevels.fit({"open": [(0, 1000, right)]}, grid=grid)
    assert levels.confidence(0, "open") == stated
    assert levels.accuracy(0, "open") == right / 1000


@given(st.integers(0, 1000), st.sampled_from([1, 2, 5, 10, 20, 25]))
def test_a_stated_confidence_is_a_whole_percent_and_close(step, grid):
    levels = AnchoredLevels.fit(COUNTS, grid=grid)
    stated = levels.confidence(step, "yes_no")
    assert round(stated * 100) / 100 == stated
    assert round(stated * 100) % grid == 0
    assert abs(stated - levels.accuracy(step, "yes_no")) <= grid / 200 + 1e-9


def test_the_step_of_a_confidence_is_the_first_that_brings_accuracy_down_to_it(levels):
    assert levels.step(1.0, "yes_no") == 0
    assert levels.step(0.95, "yes_no") == 0
    assert levels.step(0.75, "yes_no") == 500
    step = levels.step(0.85, "yes_no")
    assert levels.accuracy(step, "yes_no") <= 0.85 < levels.accuracy(step - 1, "yes_no")
    with pytest.raises(
        ValueError, match=r"no noise step brings 'yes_no' answers down to 0.1: the lowest accuracy is 0.52"
    ):
        levels.step(0.1, "yes_no")
    with pytest.raises(ValueError, match="name one of yes_no, short"):
        levels.step(0.9)


def test_an_answer_type_that_was_not_measured_is_answered_with_the_known_ones(levels):
    for method in (levels.confidence, levels.accuracy):
        with pytest.raises(
            ValueError, match="no levels were measured for answer type 'open'; known: yes_no, short"
        ):
            method(0, "open")


def test_a_saved_table_loads_equal(levels, tmp_path):
    path = tmp_path / "new" / "levels.json"
    levels.save(path)
    loaded = AnchoredLevels.load(path, grid=1)
    assert loaded.table == levels.table
    assert loaded.table.provenance == {"model": "tiny", "schedule": "linear", "seed": 0}
    for kind in COUNTS:
        for step in range(0, 1001, 50):
            assert loaded.accuracy(step, kind) == levels.accuracy(step, kind)
    content = json.loads(path.read_text())
    assert content["answer_types"]["short"][1] == {"step": 500, "n": 100, "n_correct": 20, "accuracy": 0.275}
    assert [entry.name for entry in path.parent.iterdir()] == ["levels.json"]


def test_a_failed_save_leaves_the_old_file_and_no_other(levels, tmp_path, monkeypatch):
    path = tmp_path / "levels.json"
    path.write_text("old")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        levels.save(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "Expecting value"),
        ("[]", "expected a JSON object"),
        ("{}", "expected a JSON object"),
        ('{"format": "vlm_calibration.levels/1"}', "missing key 'answer_types'"),
        ('{"format": "vlm_calibration.levels/1", "answer_types": [], "provenance": {}}', "items"),
        (
            '{"format": "vlm_calibration.levels/1", "provenance": {"grading": "exact"},'
            ' "answer_types": {"open": [{"step": 0, "n": 10, "n_correct": 9, "accuracy": 0.9}]}}',
            "'grading' must be an object",
        ),
        (
            '{"format": "vlm_calibration.levels/1", "answer_types": {}, "provenance": {}}',
            "at least one answer type",
        ),
        (
            '{"format": "vlm_calibration.levels/1", "provenance": {},'
            ' "answer_types": {"open": [{"step": 0, "n": 10, "n_correct": 9, "accuracy": 0.8}]}}',
            "was the file edited",
        ),
    ],
)
def test_a_file_that_is_no_level_table_is_named(content, message, tmp_path):
    path = tmp_path / "levels.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a level table") as error:
        AnchoredLevels.load(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no level table at .*missing\.json"):
        AnchoredLevels(tmp_path / "missing.json")


STEPS = range(0, 1001, 100)


def saved(folder, right, n=100, kind="open", **provenance):
    """A file with these numbers of right answers of `n` at each step."""
    rows = [StepCount(step, n, k) for step, k in zip(STEPS, right, strict=True)]
    path = folder / "levels.json"
    AnchoredLevels.fit({kind: rows}, provenance=provenance).save(path)
    return path


FALLING = [80, 79, 75, 70, 60, 50, 40, 30, 20, 10, 0]
RANKING = {"grading": {"open": "ranking"}}


@pytest.mark.parametrize(
    ("right", "settings", "message"),
    [
        ([0] * 11, {}, "right on 0 of 100 clean images, not significantly more than the 5% of a blind guess"),
        ([8, *[4] * 10], {}, "right on 8 of 100 clean images"),
        ([80] * 11, {}, "noise does not significantly lower how often the base model is right"),
        ([100] * 11, {}, "noise does not significantly lower"),
        (FALLING[::-1], {"kind": "short"}, "right on 0 of 100 clean images"),
        ([60, *range(60, 90, 3)], {}, "noise does not significantly lower"),
        ([55, *[45] * 10], {"kind": "yes_no"}, "55 of 100 clean images, not significantly more than the 50%"),
        ([55, *[45] * 10], RANKING, "55 of 100 clean images, not significantly more than the 50%"),
        (
            [4] * 5 + [2] * 6,
            {"kind": "yes_no", "n": 4},
            "4 clean queries are not enough answers to tell, which takes 5",
        ),
    ],
)
def test_a_table_that_teaches_nothing_is_refused(right, settings, message, tmp_path):
    path = saved(tmp_path, right, **settings)
    with pytest.raises(ValueError, match="teach no confidence") as error:
        AnchoredLevels(path)
    n = settings.get("n", 100)
    for part in (
        str(path),
        settings.get("kind", "open"),
        message,
        f"{right[0]}/{n} at 0, {right[1]}/{n} at 100",
    ):
        assert part in str(error.value)
    ranked_or_yes_no = settings in ({"kind": "yes_no"}, RANKING) or n == 4
    assert ("data.grading" in str(error.value)) is not ranked_or_yes_no
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("right", "settings"),
    [
        (FALLING, {}),
        ([12, 12, 11, 10, 8, 6, 4, 2, 0, 0, 0], {}),
        ([65, *[64] * 5, *[50] * 5], {"kind": "yes_no"}),
        ([65, *[64] * 5, *[50] * 5], RANKING),
        ([5] * 6 + [2] * 5, {"kind": "yes_no", "n": 5}),
        ([1] * 6 + [0] * 5, {"kind": "short", "n": 1}),
    ],
)
def test_a_table_that_teaches_something_is_read(right, settings, tmp_path):
    assert AnchoredLevels(saved(tmp_path, right, **settings)).steps == tuple(STEPS)


def test_each_answer_type_must_teach_something(tmp_path):
    rows = {"yes_no": [(0, 50, 48), (1000, 50, 25)], "short": [(0, 50, 40), (1000, 50, 40)]}
    AnchoredLevels.fit(rows).save(tmp_path / "levels.json")
    with pytest.raises(ValueError, match="short answers teach no confidence"):
        AnchoredLevels(tmp_path / "levels.json")


def test_the_trend_is_that_of_a_contingency_table():
    """The square of the statistic is N times the squared correlation of step and being right."""
    rows = [StepCount(0, 30, 25), StepCount(200, 20, 14), StepCount(700, 40, 22)]
    steps = np.repeat([r.step for r in rows], [r.n for r in rows])
    right = np.concatenate([np.arange(r.n) < r.n_correct for r in rows])
    z = np.sqrt(len(right)) * np.corrcoef(steps, right)[0, 1]
    assert trend_p_value(rows) == pytest.approx(norm.cdf(z))
    rng, least = np.random.default_rng(0), []
    for _ in range(2000):
        least.append(trend_p_value([StepCount(s, 50, rng.binomial(50, 0.6)) for s in STEPS]))
    assert np.mean(np.array(least) <= 0.05) == pytest.approx(0.05, abs=0.015), (
        "refuses what noise does not change"
    )


def test_the_shipped_table_teaches_something():
    AnchoredLevels(Path(demo.__file__).parent / "levels.json").table.check_usable()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "at least one answer type"),
        ({"open": []}, "must begin at step 0"),
        ({"open": [(100, 10, 5)]}, "must begin at step 0"),
        ({"open": [(0, 10, 5), (0, 10, 6)]}, "repeat a step"),
        ({"open": [(0, 0, 0)]}, "impossible count"),
        ({"open": [(0, 10, 11)]}, "impossible count"),
        ({"open": [(0, 10, -1)]}, "impossible count"),
        ({"open": [(0, 10, 5)], "short": [(0, 10, 5), (9, 10, 5)]}, "measured at different steps"),
    ],
)
def test_impossible_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        AnchoredLevels.fit(counts)


@pytest.mark.parametrize("grid", [0, -5, 3, 200, 2.5, True])
def test_a_grid_must_divide_a_hundred(grid):
    with pytest.raises(ValueError, match="grid must be a whole number of percent"):
        AnchoredLevels.fit(COUNTS, grid=grid)


def segmentations(n, most):
    """All ways to cut `range(n)` into at most `most` runs, as lists of (start, end)."""
    for cuts in range(min(most, n)):
        for where in combinations(range(1, n), cuts):
            yield list(pairwise((0, *where, n)))


def error_and_means(values, weights, runs):
    """The weighted sum of squared errors of a segmentation, and the mean of the run that each value is in."""
    means = []
    for start, end in runs:
        weight = sum(weights[start:end])
        mean = sum(v * w for v, w in zip(values[start:end], weights[start:end], strict=True)) / weight
        means += [mean] * (end - start)
    return sum(w * (v - m) ** 2 for v, m, w in zip(values, means, weights, strict=True)), means


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 500)), min_size=1, max_size=8), st.integers(1, 9)
)
def test_groups_are_the_best_of_all_segmentations(pairs, groups):
    values = sorted((v / 1000 for v, _ in pairs), reverse=True)
    weights = [w for _, w in pairs]
    found = _group_means(np.array(values), weights, groups)
    all_of_them = [error_and_means(values, weights, runs) for runs in segmentations(len(values), groups)]
    least = min(error for error, _ in all_of_them)
    error = sum(w * (v - m) ** 2 for v, m, w in zip(values, found, weights, strict=True))
    assert error == pytest.approx(least, abs=1e-9)
    assert any(np.allclose(found, means, atol=1e-9) for e, means in all_of_them if e <= least + 1e-9), (
        "the means of such a segmentation"
    )
    assert (np.diff(found) <= 1e-12).all(), "never rising with the noise"
    assert len(set(np.round(found, 9))) <= groups
    assert np.average(found, weights=weights) == pytest.approx(np.average(values, weights=weights))


def grouped(rights, groups, ns=None, grid=1, **more):
    ns = ns or [100] * len(rights)
    rows = tuple(StepCount(100 * i, n, right) for i, (n, right) in enumerate(zip(ns, rights, strict=True)))
    return AnchoredLevels(table=LevelTable({"open": rows, **more}), grid=grid, groups=groups)


def stated_at_steps(levels, kind="open"):
    return [levels.confidence(step, kind) for step in levels.steps]


def test_neighbours_are_merged_to_the_mean_of_their_answers():
    levels = grouped([98, 96, 60, 58, 10], 3)
    assert stated_at_steps(levels) == [0.97, 0.97, 0.59, 0.59, 0.10]
    assert [levels.accuracy(step, "open") for step in levels.steps] == [0.98, 0.96, 0.60, 0.58, 0.10], (
        "as it was"
    )
    assert levels.step(0.60, "open") == 200
    # 900 of 1000 and 60 of 100 answers, and then the other way around.
    assert stated_at_steps(grouped([900, 60, 1], 2, [1000, 100, 100])) == [0.87, 0.87, 0.01]
    assert stated_at_steps(grouped([90, 600, 1], 2, [100, 1000, 100])) == [0.63, 0.63, 0.01]


def test_groups_are_of_the_monotone_fit_and_of_each_answer_type():
    rows = tuple(StepCount(100 * i, 100, right) for i, right in enumerate([50, 50, 40, 44]))
    levels = grouped([98, 96, 60, 58], 2, short=rows)
    assert stated_at_steps(levels) == [0.97, 0.97, 0.59, 0.59]
    assert stated_at_steps(levels, "short") == [0.5, 0.5, 0.42, 0.42]
    with pytest.raises(ValueError, match="no levels were measured for answer type 'yes_no'"):
        levels.confidence(0, "yes_no")


@pytest.mark.parametrize("groups", [5, 6, 100])
@pytest.mark.parametrize("grid", [1, 5, 25])
def test_as_many_groups_as_steps_are_the_fit_itself(groups, grid):
    rights = [975, 925, 925, 600, 125]
    plain, merged = (grouped(rights, g, [1000] * 5, grid) for g in (None, groups))
    assert stated_at_steps(merged) == stated_at_steps(plain)


def test_one_group_is_the_mean():
    assert stated_at_steps(grouped([90, 60, 0], 1)) == [0.5, 0.5, 0.5]


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=10),
    st.integers(1, 6),
    st.sampled_from([1, 5, 10, 25, 100]),
)
def test_the_means_of_groups_are_rounded_to_the_grid(rights, groups, grid):
    levels = grouped(rights, groups, [400] * len(rights), grid)
    fit = np.array([levels.accuracy(step, "open") for step in levels.steps])
    stated = np.array(stated_at_steps(levels))
    means = _group_means(fit, [400] * len(rights), groups)
    assert (np.abs(stated - means) <= grid / 200 + 1e-8).all()
    assert all(round(value * 100) % grid == 0 and round(value * 100) / 100 == value for value in stated)
    assert len(set(stated)) <= groups
    assert (np.diff(stated) <= 0).all()


def test_a_tie_of_a_group_goes_up():
    assert stated_at_steps(grouped([90, 85, 0], 2)) == [0.88, 0.88, 0.0]
    assert stated_at_steps(grouped([90, 85, 0], 2, grid=25)) == [1.0, 1.0, 0.0]


def test_between_measured_steps_a_group_is_that_of_the_nearest():
    levels = grouped([98, 96, 60, 58, 10], 3)
    for step in range(401):
        nearest = min(abs(step - s) for s in levels.steps)
        could_be = {levels.confidence(s, "open") for s in levels.steps if abs(step - s) == nearest}
        assert levels.confidence(step, "open") in could_be
    assert levels.confidence(149, "open") == 0.97
    assert levels.confidence(151, "open") == 0.59
    for step in (-1, 401):
        with pytest.raises(ValueError, match=r"noise step must be in \[0, 400\]"):
            levels.confidence(step, "open")


def test_groups_can_be_saved_and_sent(tmp_path):
    levels = grouped([98, 96, 60, 58, 10], 3)
    levels.save(tmp_path / "levels.json")
    again = AnchoredLevels(tmp_path / "levels.json", grid=1, groups=3)
    for copy in (again, pickle.loads(pickle.dumps(levels))):
        assert stated_at_steps(copy) == stated_at_steps(levels)
    assert stated_at_steps(AnchoredLevels(tmp_path / "levels.json", grid=1)) == [0.98, 0.96, 0.60, 0.58, 0.10]


@pytest.mark.parametrize("groups", [0, -1])
def test_there_is_at_least_one_group(groups):
    with pytest.raises(ValueError, match=f"groups must be at least 1, got {groups}"):
        grouped([90, 50], groups)


def test_either_a_path_or_a_table():
    table = LevelTable({kind: tuple(rows) for kind, rows in COUNTS.items()})
    assert AnchoredLevels(table=table).steps == (0, 500, 1000)
    for arguments in ({}, {"path": "levels.json", "table": table}):
        with pytest.raises(ValueError, match="either a path or a table"):
            AnchoredLevels(**arguments)


def test_levels_survive_pickling(levels):
    copy = pickle.loads(pickle.dumps(levels))
    assert copy.confidence(300, "short") == levels.confidence(300, "short")
    assert pickle.loads(pickle.dumps(LinearLevels(6))) == LinearLevels(6)


def test_levels_can_be_named_in_a_configuration(levels, tmp_path):
    levels.save(tmp_path / "levels.json")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--levels", type=ConfidenceLevels)
    parser.add_argument("--schedule", type=Schedule)

    def build(key, class_name, **arguments):
        package = "vlm_calibration.perturbation"
        config = parser.parse_object({key: {"class_path": f"{package}.{class_name}", "init_args": arguments}})
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # before 4.49
        return instantiate(config)[key]

    assert build("levels", "LinearLevels", n_levels=6) == LinearLevels(6)
    assert build("levels", "AnchoredLevels", path=str(tmp_path / "levels.json")).answer_types == (
        "yes_no",
        "short",
    )
    assert build("schedule", "CosineSchedule", offset=0.01) == CosineSchedule(offset=0.01)
    with pytest.raises(ArgumentError, match="foo"):
        build("levels", "LinearLevels", foo=6)
