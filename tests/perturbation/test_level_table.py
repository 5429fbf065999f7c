"""Level tables: saving and loading, and refusal of damaged, impossible or useless tables."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from vlm_calibration import demo
from vlm_calibration.perturbation.level_table import trend_p_value
from vlm_calibration.perturbation.levels import AnchoredLevels, LevelTable, StepCount

from .conftest import COUNTS

STEPS = range(0, 1001, 100)


def saved(folder, right, n=100, kind="open", **provenance):
    """Write a table with these numbers of correct answers of `n` at each step."""
    rows = [StepCount(step, n, k) for step, k in zip(STEPS, right, strict=True)]
    path = folder / "levels.json"
    AnchoredLevels.fit({kind: rows}, provenance=provenance).save(path)
    return path


FALLING = [80, 79, 75, 70, 60, 50, 40, 30, 20, 10, 0]


RANKING = {"grading": {"open": "ranking"}}


def test_a_saved_table_loads_equal(levels, tmp_path):
    path = tmp_path / "new" / "levels.json"
    levels.save(path)
    loaded = AnchoredLevels(path, grid=1)
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
        AnchoredLevels(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no level table at .*missing\.json"):
        AnchoredLevels(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("right", "settings", "message"),
    [
        ([0] * 11, {}, "correct on 0 of 100 clean images, not significantly more than the 5%"),
        ([8, *[4] * 10], {}, "correct on 8 of 100 clean images"),
        ([80] * 11, {}, "noise does not significantly lower"),
        ([100] * 11, {}, "noise does not significantly lower"),
        (FALLING[::-1], {"kind": "short"}, "correct on 0 of 100 clean images"),
        ([60, *range(60, 90, 3)], {}, "noise does not significantly lower"),
        ([55, *[45] * 10], {"kind": "yes_no"}, "55 of 100 clean images, not significantly more than the 50%"),
        ([55, *[45] * 10], RANKING, "55 of 100 clean images, not significantly more than the 50%"),
        (
            [4] * 5 + [2] * 6,
            {"kind": "yes_no", "n": 4},
            "4 clean queries are too few, at least 5",
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
    """The square of the statistic is N times the squared correlation of step and being correct."""
    rows = [StepCount(0, 30, 25), StepCount(200, 20, 14), StepCount(700, 40, 22)]
    steps = np.repeat([r.step for r in rows], [r.n for r in rows])
    right = np.concatenate([np.arange(r.n) < r.n_correct for r in rows])
    z = np.sqrt(len(right)) * np.corrcoef(steps, right)[0, 1]
    assert trend_p_value(rows) == pytest.approx(norm.cdf(z))
    rng, p_values = np.random.default_rng(0), []
    for _ in range(2000):
        p_values.append(trend_p_value([StepCount(s, 50, rng.binomial(50, 0.6)) for s in STEPS]))
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.015), (
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


def test_either_a_path_or_a_table():
    table = LevelTable({kind: tuple(rows) for kind, rows in COUNTS.items()})
    assert AnchoredLevels(table=table).steps == (0, 500, 1000)
    for arguments in ({}, {"path": "levels.json", "table": table}):
        with pytest.raises(ValueError, match="either a path or a table"):
            AnchoredLevels(**arguments)
