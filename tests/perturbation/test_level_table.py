"""Level tables: saving and loading, and refusal of damaged, impossible or useless tables."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from vlm_calibration.perturbation.level_table import (
    FORMAT,
    AnswerTypeCounts,
    LevelCount,
    LevelTable,
    trend_p_value,
)
from vlm_calibration.perturbation.levels import AnchoredLevels

from ..level_tables import noise_counts
from .conftest import COUNTS, PROVENANCE

STRENGTHS = [i / 10 for i in range(11)]


def saved(folder, right, n=100, kind="open", **provenance):
    """Write a table with these numbers of correct answers of `n` at each strength."""
    counts = noise_counts(*((strength, n, k) for strength, k in zip(STRENGTHS, right, strict=True)))
    LevelTable({kind: counts}, provenance).save(folder / "levels.json")
    return folder / "levels.json"


FALLING = [80, 79, 75, 70, 60, 50, 40, 30, 20, 10, 0]
RANKING = {"grading": {"open": "ranking"}}


def test_a_saved_table_loads_equal(levels, tmp_path):
    path = tmp_path / "new" / "levels.json"
    levels.save(path)
    loaded = AnchoredLevels(path, grid=1)
    assert loaded.table == levels.table == LevelTable(COUNTS, PROVENANCE)
    content = json.loads(path.read_text())
    counted = ((0.0, 100, 97), (0.5, 100, 20), (1.0, 300, 90))
    assert content["answer_types"]["short"] == {
        "likelihood_edges": [],
        "kinds": {"noise": [{"strength": s, "n": [n], "n_correct": [k]} for s, n, k in counted]},
        "never_perturbed": {"n": [0], "n_correct": [0]},
    }
    assert [entry.name for entry in path.parent.iterdir()] == ["levels.json"]


SHARES = st.floats(0, 1)


@st.composite
def falling_tables(draw):
    """Usable tables: accuracies fall from all correct to none, in any bins, kinds and strengths."""
    edges = tuple(sorted(draw(st.sets(SHARES, max_size=3))))
    kinds = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3, unique=True))
    n = draw(st.integers(20, 10**6))
    bins = range(len(edges) + 1)

    def row(strength, correct):
        return strength, (n,) * len(bins), (correct,) * len(bins)

    between = st.sets(st.floats(0.01, 0.99), max_size=3)
    rows = {kind: [row(0, n), *(row(s, n // 3) for s in draw(between)), row(1, 0)] for kind in kinds}
    others = (0, (9,) * len(bins), [draw(st.integers(0, 9)) for _ in bins])
    counts = AnswerTypeCounts(rows, edges, others)
    return LevelTable({"yes_no": counts, "short": counts}, {"prompt": draw(st.text(max_size=20))})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(falling_tables())
def test_any_table_loads_as_it_was_saved(tmp_path, table):
    table.save(tmp_path / "levels.json")
    loaded = AnchoredLevels(tmp_path / "levels.json").table
    assert (loaded, loaded.kinds) == (table, table.kinds)


def content(answer_types):
    return json.dumps({"format": FORMAT, "provenance": {}, "answer_types": answer_types})


ROW = {"strength": 0, "n": [10], "n_correct": [9]}


def one(*rows, others=(0, 0)):
    """The content of a table of open answers with these rows."""
    never = dict(zip(("n", "n_correct"), others, strict=True))
    kinds = {"noise": list(rows)} if rows else {}
    return content({"open": {"likelihood_edges": [], "kinds": kinds, "never_perturbed": never}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "Expecting value"),
        ("[]", "expected a JSON object"),
        ('{"format": "vlm_calibration.levels/2"}', "'vlm_calibration.levels/2': measure it again"),
        (f'{{"format": "{FORMAT}"}}', "missing key 'answer_types'"),
        (f'{{"format": "{FORMAT}", "answer_types": {{}}}}', "missing key 'provenance'"),
        (content([]), "items"),
        (content({}), "at least one answer type"),
        (content({"open": {"likelihood_edges": []}}), "missing key 'kinds'"),
        (one(), "no counts"),
        (one(ROW).replace('"provenance": {}', '"provenance": {"grading": 1}'), "'grading' must be an object"),
        (one(ROW, others=([3, 4], [1, 2])), "must have 1 bins"),
        (one(ROW, others=([3], [4])), "impossible count of 'no kind'"),
        (one({"n": [10], "n_correct": [9]}), "'strength'"),
        (one({**ROW, "n": [10.5]}), "correct of [10.5]"),
        (one(ROW, {**ROW, "strength": "strong"}), "strong"),
        (one(ROW, {**ROW, "strength": float("nan")}), "nan"),
    ],
)
def test_a_file_that_is_no_level_table_is_named(text, message, tmp_path):
    path = tmp_path / "levels.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a level table") as error:
        AnchoredLevels(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"no level table at .*missing\.json"):
        AnchoredLevels(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("right", "options", "message"),
    [
        ([8, *[4] * 10], {}, "correct on 8 of 100 clean images, not significantly more than the 5%"),
        ([60, *range(60, 90, 3)], {}, "noise does not significantly lower"),
        ([55, *[45] * 10], {"kind": "yes_no"}, "55 of 100 clean images, not significantly more than the 50%"),
        ([55, *[45] * 10], RANKING, "55 of 100 clean images, not significantly more than the 50%"),
        ([4] * 5 + [2] * 6, {"kind": "yes_no", "n": 4}, "4 clean queries are too few, at least 5"),
    ],
)
def test_a_table_that_teaches_nothing_is_refused(right, options, message, tmp_path):
    path = saved(tmp_path, right, **options)
    with pytest.raises(ValueError, match="teach no confidence") as error:
        AnchoredLevels(path)
    n = options.get("n", 100)
    counts = f"by strength of noise: {right[0]}/{n} at 0, {right[1]}/{n} at 0.1"
    for part in (str(path), options.get("kind", "open"), message, counts):
        assert part in str(error.value)
    ranked_or_yes_no = options in ({"kind": "yes_no"}, RANKING) or n == 4
    assert ("data.grading" in str(error.value)) is not ranked_or_yes_no
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("right", "options"),
    [
        (FALLING, {}),
        ([65, *[64] * 5, *[50] * 5], {"kind": "yes_no"}),
        ([65, *[64] * 5, *[50] * 5], RANKING),
        ([5] * 6 + [2] * 5, {"kind": "yes_no", "n": 5}),
        ([1] * 6 + [0] * 5, {"kind": "short", "n": 1}),
    ],
)
def test_a_table_that_teaches_something_is_read(right, options, tmp_path):
    levels = AnchoredLevels(saved(tmp_path, right, **options))
    (counts,) = levels.table.counts.values()
    assert [row.n_correct for row in counts.kinds["noise"]] == [(n,) for n in right]


STEEP, FLAT = [(0, 50, 48), (1, 50, 2)], [(0, 50, 40), (1, 50, 40)]
EASY_FALLS = [(0, (900, 50), (20, 48)), (1, (900, 50), (60, 2))]


@pytest.mark.parametrize(
    ("counts", "messages"),
    [
        ({"yes_no": noise_counts(*STEEP), "short": noise_counts(*FLAT)}, ["40/50 at 0, 40/50 at 1"]),
        (
            {"short": AnswerTypeCounts({"noise": STEEP, "jpeg": [(0, 50, 48), (1, 50, 48)]})},
            ["jpeg does not significantly lower", "data.noise.kinds", "48/50 at 0, 48/50 at 1"],
        ),
        # The easy bin alone would, the pooled counts do not.
        ({"short": AnswerTypeCounts({"noise": EASY_FALLS}, (0.5,))}, ["68/950 at 0, 62/950 at 1"]),
    ],
    ids=["answer type", "kind", "all bins together"],
)
def test_each_answer_type_and_kind_must_teach_something(counts, messages):
    with pytest.raises(ValueError, match="short answers teach no confidence") as error:
        LevelTable(counts).check_usable()
    assert all(message in str(error.value) for message in messages)


@pytest.mark.parametrize(
    ("highest", "lowest", "n"), [(0.9, 0.5, 20), (0.7, 0.5, 100), (0.9, 0.7, 100), (0.8, 0.7, 250)]
)
def test_the_queries_that_levels_need_as_the_page_of_data_says(highest, lowest, n):
    rng = np.random.default_rng(0)
    accepted = []
    for _ in range(100):
        clean = (0, n, rng.binomial(n, highest))
        rates = [(s, highest - (highest - lowest) * s) for s in STRENGTHS[1:]]
        kinds = ("noise", "blur", "occlusion")
        rows = {kind: [clean, *((s, n, rng.binomial(n, rate)) for s, rate in rates)] for kind in kinds}
        counts = AnswerTypeCounts(rows)
        try:
            LevelTable({"yes_no": counts}).check_usable()
            accepted.append(True)
        except ValueError:
            accepted.append(False)
    assert np.mean(accepted) >= 0.95


def test_the_trend_is_that_of_a_contingency_table():
    """The square of the statistic is N times the squared correlation of strength and being correct."""
    rows = [LevelCount(0, (30,), (25,)), LevelCount(0.2, (9, 11), (8, 6)), LevelCount(0.7, (40,), (22,))]
    strengths = np.repeat([r.strength for r in rows], [sum(r.n) for r in rows])
    right = np.concatenate([np.arange(sum(r.n)) < sum(r.n_correct) for r in rows])
    z = np.sqrt(len(right)) * np.corrcoef(strengths, right)[0, 1]
    assert trend_p_value(rows) == pytest.approx(norm.cdf(z))


CLEAN = (0, 10, 5)
BINNED = (0, (10, 10), (5, 6))


@pytest.mark.parametrize(
    ("kinds", "edges", "message"),
    [
        ({}, (), "no counts"),
        ({"noise": []}, (), "'noise' must begin at strength 0"),
        ({"noise": [CLEAN, (1.1, 10, 5)]}, (), "1.1"),
        ({"noise": [CLEAN, (-0.1, 10, 5)]}, (), "-0.1"),
        ({"noise": [CLEAN, (0, 10, 6)]}, (), "repeat none"),
        ({"noise": [(0, 0, 0)]}, (), "impossible count"),
        ({"noise": [(0, 10, 11)]}, (), "impossible count"),
        ({"noise": [(0, 10, 0.5)]}, (), "impossible count"),
        ({"noise": [CLEAN], "blur": [(0, 10, 6)]}, (), "different counts of untouched images"),
        ({"noise": [BINNED]}, (), "must have 1 bins"),
        ({"noise": [BINNED, (1, 10, 5)]}, (0.5,), "must have 2 bins"),
        ({"noise": [(0, (9,) * 3, (5,) * 3)]}, (0.5, 0.5), "rise"),
        ({"noise": [BINNED]}, (1.5,), "1.5"),
        ({"noise": [BINNED]}, (float("nan"),), "nan"),
    ],
)
def test_impossible_counts_and_bins_are_refused(kinds, edges, message):
    with pytest.raises(ValueError, match=message):
        AnswerTypeCounts(kinds, edges)


@pytest.mark.parametrize("other", [{"blur": [CLEAN]}, {"noise": [CLEAN, (0.9, 10, 5)]}])
def test_answer_types_of_a_table_share_kinds_and_strengths(other):
    with pytest.raises(ValueError, match="'open' and 'short' were measured with different kinds"):
        LevelTable({"open": noise_counts(CLEAN), "short": AnswerTypeCounts(other)})


def test_counts_are_sorted_and_merged():
    clean = (0, (20, 30), (15, 29))
    counts = AnswerTypeCounts(
        {"noise": [(1, (10, 5), (1, 2)), clean], "blur": [clean, (0.5, (7, 3), (3, 3))]},
        (0.5,),
        (0, (1, 2), (0, 2)),
    )
    assert counts.kinds["noise"] == (LevelCount(*clean), LevelCount(1, (10, 5), (1, 2)))
    assert counts.untouched.tolist() == [[21, 32], [15, 31]]
    assert counts.merged == AnswerTypeCounts(
        {"noise": [(0, 50, 44), (1, 15, 3)], "blur": [(0, 50, 44), (0.5, 10, 6)]}, (), (0, 3, 2)
    )
