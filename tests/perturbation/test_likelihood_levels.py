"""Levels that depend on how likely the base model holds its answer to the untouched image, and the file of these likelihoods."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_calibration.perturbation.level_table import (
    LIKELIHOODS_FORMAT,
    Measured,
    read_likelihoods,
    write_likelihoods,
)
from vlm_calibration.perturbation.levels import (
    CLEAN,
    AnchoredLevels,
    Perturbation,
    fit_bins,
    spread_strengths,
)

from ..level_tables import measured_likelihoods
from .conftest import KINDS, PROVENANCE, instance_table

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
