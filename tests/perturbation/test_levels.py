"""Levels: linear as in the paper; anchored at the measured accuracy, rounded to a grid; and by the likelihood of a query's answer."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_calibration.perturbation.level_table import (
    LIKELIHOODS_FORMAT,
    AnswerTypeCounts,
    LevelTable,
    Measured,
    read_likelihoods,
    write_likelihoods,
)
from vlm_calibration.perturbation.levels import (
    CLEAN,
    AnchoredLevels,
    LinearLevels,
    Perturbation,
    fit_bins,
    spread_strengths,
)

from ..level_tables import measured_likelihoods, noise_counts
from .conftest import COUNTS, KINDS, PROVENANCE, instance_table


def noise(strength):
    return Perturbation("noise", strength)


def test_linear_levels_are_the_papers_for_every_kind_answer_type_and_query():
    levels = LinearLevels()
    assert levels.strengths("noise") == (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
    stated = [levels.confidence(noise(s), "yes_no") for s in levels.strengths("noise")]
    assert stated == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    assert levels.confidences("yes_no") == tuple(stated)
    assert levels.confidence(noise(0.25), "short") == 0.75
    assert LinearLevels(5).strengths("blur") == (0, 0.25, 0.5, 0.75, 1)
    assert levels.confidence(Perturbation("blur", 0.5), "short", "q") == 0.5
    assert levels.confidence(CLEAN, "short") == 1
    assert levels.averaged is levels


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_strength_outside_the_measured_range_is_refused(strength, levels):
    for each in (LinearLevels(), levels):
        with pytest.raises(ValueError, match=r"strength must be in \[0, 1\]"):
            each.confidence(noise(strength), "yes_no")
    short = AnchoredLevels.fit({"open": noise_counts((0, 100, 90), (0.4, 100, 20))})
    with pytest.raises(ValueError, match=r"strength must be in \[0, 0\.4\], got 0\.5"):
        short.confidence(noise(0.5), "open")


def test_anchored_levels_state_the_measured_accuracy_per_answer_type(levels):
    assert levels.answer_types == ("yes_no", "short")
    assert levels.accuracy(CLEAN, "yes_no") == levels.accuracy(noise(0), "yes_no") == 0.95
    assert levels.accuracy(noise(1), "yes_no") == 0.52
    assert levels.confidence(noise(1), "yes_no") == 0.5
    assert levels.confidence(CLEAN, "short") == 0.95
    # Linear between measured strengths.
    assert levels.accuracy(noise(0.25), "yes_no") == pytest.approx((0.95 + 0.75) / 2)
    assert levels.accuracy(noise(0.6), "yes_no") == pytest.approx(0.75 + (0.52 - 0.75) / 5)


@pytest.mark.parametrize(
    ("right", "grid", "stated"),
    [(974, 5, 0.95), (975, 5, 1.0), (523, 5, 0.5), (525, 1, 0.53), (549, 10, 0.5), (30, 100, 0)],
)
def test_confidences_are_rounded_to_the_grid_with_ties_up(right, grid, stated):
    levels = AnchoredLevels(table=LevelTable({"open": noise_counts((0, 1000, right))}), grid=grid)
    assert levels.confidence(CLEAN, "open") == stated
    assert levels.accuracy(CLEAN, "open") == right / 1000


def test_what_was_not_measured_is_answered_with_what_was(levels):
    calls = (levels.confidences, *(lambda t, m=m: m(CLEAN, t) for m in (levels.confidence, levels.accuracy)))
    for call in calls:
        with pytest.raises(ValueError, match="no levels for answer type 'open'; measured: yes_no, short"):
            call("open")
    for call in (levels.strengths, lambda kind: levels.confidence(Perturbation(kind, 0.5), "short")):
        with pytest.raises(ValueError, match="no levels for 'blur'; measured: noise"):
            call("blur")


def test_each_kind_has_its_own_accuracies_and_all_share_the_untouched_image():
    noisy = [(0, 100, 90), (0.5, 100, 60), (1, 100, 20)]
    counts = AnswerTypeCounts({"noise": noisy, "blur": [(0, 100, 90), (0.8, 100, 70)]})
    levels = AnchoredLevels(table=LevelTable({"open": counts}), grid=1)
    assert levels.confidence(noise(0.5), "open") == 0.6
    assert levels.confidence(Perturbation("blur", 0.8), "open") == 0.7
    assert levels.confidence(Perturbation("blur", 0), "open") == levels.confidence(CLEAN, "open") == 0.9
    assert levels.strengths("blur") == (0, 0.8)
    with pytest.raises(ValueError, match=r"strength must be in \[0, 0\.8\]"):
        levels.confidence(Perturbation("blur", 0.9), "open")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"grid": grid}, "grid must be a whole number of percent") for grid in (0, -5, 3, 200, 2.5, True)),
        *(({"groups": groups}, f"groups must be at least 1, got {groups}") for groups in (0, -1)),
        ({"table": None}, "either a path or a table"),
        ({"path": "levels.json"}, "either a path or a table"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AnchoredLevels(**{"table": LevelTable(COUNTS), **settings})
    with pytest.raises(ValueError, match=r"n_levels.* 1"):
        LinearLevels(1)


def test_an_untouched_image_has_the_accuracy_of_all_queries_and_a_perturbed_one_that_of_the_perturbed():
    """40 queries that are perturbed, correct on 26 untouched images, and as many that never are, all correct."""
    rows = [(0, 40, 26), (0.5, 40, 20), (1, 40, 12)]
    alone, both = (
        AnchoredLevels(table=LevelTable({"short": AnswerTypeCounts({"noise": rows}, (), others)}), grid=1)
        for others in (None, (0, 40, 40))
    )
    assert alone.accuracy(CLEAN, "short") == pytest.approx(26 / 40)
    assert both.accuracy(CLEAN, "short") == pytest.approx(66 / 80)
    assert both.strengths("noise") == alone.strengths("noise")
    for strength in (0.01, 0.3, 0.5, 1):
        assert both.accuracy(noise(strength), "short") == alone.accuracy(noise(strength), "short")
    assert both.confidences("short") == (0.83, *alone.confidences("short")[1:])


def test_queries_that_are_never_perturbed_do_not_make_a_perturbation_lower_the_accuracy():
    """A model that says no too often, whatever happened to the image: each no is correct, and few yes are."""
    counts = AnswerTypeCounts({"noise": [(0, 100, 40), (1, 100, 40)]}, (), (0, 100, 100))
    with pytest.raises(ValueError, match="noise does not significantly lower"):
        LevelTable({"yes_no": counts}).check_usable()


def test_accuracies_on_untouched_images_rise_with_the_likelihood_whoever_is_perturbed(tmp_path):
    kinds = {"noise": [(0, (50, 50), (20, 45)), (1, (50, 50), (10, 12))]}
    counts = AnswerTypeCounts(kinds, (0.5,), (0, (50, 50), (50, 0)))
    table = LevelTable({"short": counts}, PROVENANCE)
    write_likelihoods(tmp_path / "l.parquet", measured_likelihoods({"low": 0.1, "high": 0.9}), PROVENANCE)
    levels = AnchoredLevels(table=table, likelihoods=tmp_path / "l.parquet")
    stated = [levels.accuracy(CLEAN, "short", query) for query in ("low", "high", None)]
    assert stated == pytest.approx([115 / 200] * 3)


def test_a_perturbation_in_words():
    assert str(CLEAN) == str(Perturbation("blur", 0.0)) == "untouched"
    assert str(Perturbation("motion_blur", 0.5)) == "motion blur, strength 0.5"


# --- by the likelihood of the answer to the untouched image


LIKELIHOODS = {"hard": 0.3, "edge": 0.625, "middle": 0.75, "easy": 0.99, "none": 0.0, "sure": 1.0}


@pytest.fixture
def file(tmp_path):
    write_likelihoods(tmp_path / "likelihoods.parquet", measured_likelihoods(LIKELIHOODS), PROVENANCE)
    return tmp_path / "likelihoods.parquet"


@pytest.fixture
def by_query(file):
    def make(**settings):
        return AnchoredLevels(table=instance_table(), likelihoods=file, **settings)

    return make


def perturbations(levels):
    return [Perturbation(kind, s) for kind in KINDS for s in levels.strengths(kind)]


def test_a_hard_untouched_image_is_low_and_an_easy_one_high(by_query):
    levels = by_query(grid=1)
    stated = {name: levels.confidence(CLEAN, "yes_no", name) for name in LIKELIHOODS}
    assert stated["hard"] == stated["none"] == 0.55
    assert stated["edge"] == stated["middle"] == 0.8, "an edge belongs to the bin above it"
    assert stated["easy"] == stated["sure"] == 0.98
    assert levels.confidence(CLEAN, "short", "hard") == 0.4
    assert levels.confidence(CLEAN, "short", "easy") == 0.95
    # Blur and noise fall by their own counts.
    for kind, strength, accuracy in (("noise", 1, 0.5), ("blur", 1, 0.74), ("blur", 0.25, 0.92)):
        assert levels.accuracy(Perturbation(kind, strength), "yes_no", "easy") == pytest.approx(accuracy)


def test_a_query_without_a_likelihood_or_of_another_image_is_refused_and_the_file_named(by_query, file):
    levels = by_query()
    levels.check_content("hard", lambda: 0)
    levels.averaged.check_content("unknown", lambda: 1)
    for call, message in (
        (lambda: levels.confidence(CLEAN, "yes_no", "unknown"), "`vlm-calibration levels fit`"),
        (lambda: levels.check_content("hard", lambda: 1), "question or image.*levels fit --overwrite`"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert str(file) in str(error.value)


def test_without_a_query_the_levels_are_the_average(by_query):
    levels, table = by_query(), instance_table()
    plain = AnchoredLevels(table=table)
    for perturbation in perturbations(levels):
        for answer_type in levels.answer_types:
            expected = plain.accuracy(perturbation, answer_type)
            assert levels.accuracy(perturbation, answer_type) == expected
            assert levels.averaged.accuracy(perturbation, answer_type, "unknown") == expected
    assert plain.averaged.table is table
    fits = [fit_bins(counts.merged)[0] for counts in table.counts.values()]
    for kind, strengths in KINDS.items():
        assert levels.strengths(kind) == spread_strengths(strengths, [fit[kind] for fit in fits])
        measured = [levels.accuracy(Perturbation(kind, s), "short") for s in strengths]
        assert measured == pytest.approx(fits[1][kind].tolist())


@pytest.mark.parametrize("grid", [1, 5, 20])
@pytest.mark.parametrize("groups", [None, 1, 2, 3, 5, 50])
def test_everything_that_is_stated_is_among_the_confidences(by_query, grid, groups):
    levels = by_query(grid=grid, groups=groups)
    for answer_type in levels.answer_types:
        known = levels.confidences(answer_type)
        assert known == tuple(sorted(set(known), reverse=True))
        stated = {
            levels.confidence(p, answer_type, q) for p in perturbations(levels) for q in (*LIKELIHOODS, None)
        }
        averaged = {levels.averaged.confidence(p, answer_type) for p in perturbations(levels)}
        assert stated == set(known)
        assert averaged == set(levels.averaged.confidences(answer_type)) <= stated
        assert groups is None or len(known) <= groups


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.builds(Measured, st.floats(0, 1, width=32), st.integers(0, 2**64 - 1)),
    )
)
def test_likelihoods_are_read_as_they_were_written(tmp_path, likelihoods):
    path = tmp_path / "likelihoods.parquet"
    write_likelihoods(path, likelihoods, PROVENANCE)
    assert read_likelihoods(path, PROVENANCE, "levels.json") == likelihoods
    # As when the edges of the bins are computed, a likelihood has single precision.
    write_likelihoods(path, {"q": Measured(0.1, 0)}, PROVENANCE)
    assert read_likelihoods(path, PROVENANCE, "")["q"].likelihood == float(np.float32(0.1))


@pytest.mark.parametrize("keys", [["weights"], ["max_pixels"], ["weights", "prompt"]])
def test_likelihoods_of_another_model_or_prompt_are_refused_and_both_files_named(file, keys, tmp_path):
    path = tmp_path / "levels.json"
    instance_table(PROVENANCE | dict.fromkeys(keys, "other")).save(path)
    with pytest.raises(ValueError, match=f"another {', '.join(keys)}: ") as error:
        AnchoredLevels(path, likelihoods=file)
    assert str(file) in str(error.value)
    assert str(path) in str(error.value)
    AnchoredLevels(table=instance_table({**PROVENANCE, "seed": 7, "schedule": "cosine"}), likelihoods=file)
    with pytest.raises(FileNotFoundError, match=r"no likelihoods at .*none\.parquet"):
        AnchoredLevels(table=instance_table(), likelihoods=tmp_path / "none.parquet")


METADATA = {"format": LIKELIHOODS_FORMAT, "provenance": json.dumps(PROVENANCE)}
COLUMNS = {"id": ["a"], "likelihood": [0.5], "content": [1]}


@pytest.mark.parametrize(
    ("columns", "metadata", "message"),
    [
        ({}, {}, "expected the format"),
        ({}, {"format": "other"}, "b'other'"),
        ({}, {"format": LIKELIHOODS_FORMAT}, "provenance"),
        ({}, {**METADATA, "provenance": "no json"}, "Expecting value"),
        ({}, {**METADATA, "provenance": "[1]"}, "is not a file of likelihoods"),
        ({"id": None}, METADATA, "id"),
        ({"likelihood": ["high"]}, METADATA, "high"),
        ({"likelihood": [1.5]}, METADATA, "found 1.5 to 1.5"),
        ({"likelihood": pa.array([None], pa.float32())}, METADATA, "found nan"),
    ],
)
def test_a_file_that_has_no_likelihoods_or_is_damaged_is_named(tmp_path, columns, metadata, message):
    path = tmp_path / "likelihoods.parquet"
    given = {name: values for name, values in {**COLUMNS, **columns}.items() if values is not None}
    pq.write_table(pa.table(given, metadata=metadata), path)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="likelihoods") as error:
        read_likelihoods(path, PROVENANCE, "levels.json")
    assert str(path) in str(error.value)
    assert message in str(error.value)
    for content in (b"", b"not parquet", whole[:-20], whole[:8] + bytes(40) + whole[48:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} is not a file of likelihoods"):
            read_likelihoods(path, PROVENANCE, "levels.json")
