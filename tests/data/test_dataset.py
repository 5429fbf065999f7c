"""Queries of several splits as one dataset: names, steps, queries left out, and errors that name the record."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.data.dataset import (
    EvalSplit,
    NoEvidenceError,
    PerturbedQueries,
    level_id,
    query_id_of_level,
)
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.perturbation.by_kind import KIND_NAMES
from vlm_calibration.perturbation.levels import CLEAN, AnchoredLevels, LinearLevels, Perturbation
from vlm_calibration.records import DataError, LoadedImage, Query, Region

from ..level_tables import OnlyAt, noise_counts
from .conftest import Listed

POLICY = NoisePolicy(resolution="native", distractor_probability=0.0)


REGIONS = (Region("dog", (2, 2, 8, 8)),)
SQUARE = (
    Query("dog", "x", "A dog?", "Yes", "yes_no", ("dog",), REGIONS, "existence"),
    Query("cat", "x", "A cat?", "No", "yes_no", ("cat",), REGIONS),
)
"""Two queries about one grey image: about a dog in it, and about an absent cat."""


def _dataset(policy: NoisePolicy = POLICY, **parts: EvalSplit) -> PerturbedQueries:
    return PerturbedQueries(parts or {"": EvalSplit(Listed(*SQUARE), "drawn")}, policy, None)


def test_parts_get_names_and_one_part_none() -> None:
    dataset = _dataset(clean=EvalSplit(Listed(*SQUARE)), noised=EvalSplit(Listed(*SQUARE), "drawn"))
    assert [q.id for q in dataset.queries] == ["clean:dog", "clean:cat", "noised:dog", "noised:cat"]
    assert [q.category for q in dataset.queries] == ["clean/existence", "clean", "noised/existence", "noised"]
    assert [(q.id, q.category) for q in _dataset().queries] == [("dog", "existence"), ("cat", None)]


@pytest.mark.parametrize("kinds", [{"noise": 1.0}, {"noise": 1.0, "darkness": 0.0, "blur": 2.0}])
def test_every_level_asks_each_query_at_each_level_of_each_kind(kinds: dict[str, float]) -> None:
    policy = replace(POLICY, kinds=kinds, levels=LinearLevels(3))
    dataset = _dataset(policy, sweep=EvalSplit(Listed(*SQUARE), "every_level"))
    levels = [(kind, s) for kind, weight in kinds.items() if weight for s in (0.5, 1.0)]
    assert len(dataset) == 2 * (1 + len(levels))
    samples = [dataset[0, i] for i in range(len(dataset))]
    assert [s.perturbation for s in samples] == [p for p in (CLEAN, *levels) for _ in ("dog", "cat")]
    assert [q.id for q in dataset.queries] == [
        f"sweep:{q}@{level}" for level in ("0", *(f"{k}-{s:g}" for k, s in levels)) for q in ("dog", "cat")
    ]
    assert len({q.id for q in dataset.queries}) == len(dataset)


@given(
    st.text(),
    st.sampled_from([CLEAN, *(Perturbation(k, s) for k in KIND_NAMES for s in (0.0, 0.001, 1 / 3, 1.0))]),
)
def test_the_id_of_a_level_contains_that_of_the_query(query_id: str, perturbation: Perturbation) -> None:
    assert query_id_of_level(level_id(query_id, perturbation)) == query_id


def test_a_part_may_have_kinds_of_its_own() -> None:
    policy = replace(POLICY, levels=LinearLevels(3))
    parts = {
        "own": EvalSplit(Listed(*SQUARE), "every_level", {"blur": 1.0}),
        "shared": EvalSplit(Listed(*SQUARE), "every_level"),
        "clean": EvalSplit(Listed(*SQUARE)),
    }
    dataset = _dataset(policy, **parts)
    kinds: dict[str, set[str]] = {}
    for index, query in enumerate(dataset.queries):
        kinds.setdefault(query.id.split(":")[0], set()).add(dataset[0, index].perturbation.kind)
    assert kinds == {"own": {"", "blur"}, "shared": {"", "noise"}, "clean": {""}}
    with pytest.raises(
        DataError, match=r"^data\.bad: noise.kinds: there is no kind 'rain': expected noise, blur"
    ):
        _dataset(policy, bad=EvalSplit(Listed(*SQUARE), "drawn", {"rain": 1.0}))


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(DataError, match="no query is left"):
        _dataset(NoisePolicy(resolution="native", absent="skip"), some=EvalSplit(Listed(SQUARE[1]), "drawn"))


def test_an_error_names_the_record() -> None:
    class Wrong(Listed):
        def load(self, query: Query) -> LoadedImage:
            return super().load(query)._replace(evidence=(np.zeros((10, 10), dtype=bool),))

    with pytest.raises(DataError, match=r"record 'bad:dog': region mask is empty"):
        _dataset(bad=EvalSplit(Wrong(*SQUARE), "drawn"))[0, 0]


Write = Callable[..., Path]
Record = Callable[..., dict[str, Any]]
DOG = [{"label": "dog", "box": [2, 2, 8, 8]}]


def _jsonl(path: Path, policy: NoisePolicy = POLICY, noise: Any = "drawn", **source: Any) -> PerturbedQueries:
    part = EvalSplit(JsonlSource(str(path), **source), noise)
    return PerturbedQueries({"": part}, policy, None, where="data.train")


@pytest.fixture
def mixed(write_jsonl: Write, record: Record) -> Path:
    """Queries of each kind: with a region, about an absent object, and five that lack a region."""
    no_dog = {"answer": "No", "objects": ["dog"]}
    return write_jsonl(
        record("shown", objects=["the Dogs"], regions=DOG),
        record("absent", **no_dog),
        record("absent, with another region", **no_dog, regions=[{"label": "cat", "box": [1, 1, 5, 5]}]),
        record("no, about a dog that is there", **no_dog, regions=DOG),
        record("yes without regions"),
        record("yes with another region", objects=["cup"], regions=DOG),
        record("short", answer="red", answer_type="short"),
        record("a short no", answer="No", answer_type="short"),
        record("open", answer="No dog.", answer_type="open"),
    )


ASKED = ["shown", "absent", "absent, with another region", "no, about a dog that is there"]
UNLOCATED = ["yes without regions", "yes with another region", "short", "a short no", "open"]


@pytest.mark.parametrize(("question", "answer"), [("A dog?", "Yes"), ("Is the car red?", "No")])
@pytest.mark.parametrize("noise", ["drawn", "every_level"])
def test_a_missing_region_is_never_an_absent_object(
    write_jsonl: Write, record: Record, question: str, answer: str, noise: str
) -> None:
    """Such a query gets no noise elsewhere, with the confidence of that noise: it is asked once an epoch, untouched."""
    unlocated = [record(f"q {i}", question=question, answer=answer) for i in range(200)]
    path = write_jsonl(*unlocated, record("shown", regions=DOG))
    with pytest.warns(UserWarning, match="need a region") as warned:
        dataset = _jsonl(path, replace(POLICY, levels=OnlyAt()), noise)
    own = [i for i, query in enumerate(dataset.queries) if not query.id.startswith("shown")]
    assert len(own) == 200
    assert len(dataset) == 201 + (noise == "every_level") * (len(dataset.policy.perturbations) - 1)
    for index in own[::40]:
        sample = dataset[0, index]
        assert (sample.perturbation, sample.confidence) == (CLEAN, 1.0)
        assert (sample.image == (255, 0, 0)).all()
    [message] = [str(w.message) for w in warned]
    assert message.endswith(": 'q 0', 'q 1', 'q 2', 'q 3', 'q 4' and 195 more")


@pytest.mark.parametrize("noise", ["drawn", "every_level"])
def test_only_the_answer_says_that_an_object_is_absent(mixed: Path, noise: str) -> None:
    with pytest.warns(UserWarning, match="need a region") as warned:
        dataset = _jsonl(mixed, noise=noise)
    asked = Counter(q.id.split("@")[0] for q in dataset.queries)
    levels = len(POLICY.perturbations) if noise == "every_level" else 1
    assert asked == {**dict.fromkeys(ASKED, levels), **dict.fromkeys(UNLOCATED, 1)}
    [message] = [str(w.message) for w in warned]
    missing, absent = message.split("; ")
    assert "5 of 9 queries (2 yes, 2 short, 1 open)" in missing
    assert missing.endswith(f": {str(UNLOCATED)[1:-1]}")
    assert absent.endswith(": 'absent', 'absent, with another region'")


def test_all_key_objects_must_have_a_region(write_jsonl: Write, record: Record) -> None:
    both = [*DOG, {"label": "cups", "box": [1, 1, 5, 5]}]
    rows = {
        "both": {"objects": ["dog", "a cup"], "regions": both},
        "one": {"objects": ["dog", "a cup"], "regions": DOG},
        "one, the other is absent": {"objects": ["dog", "a cup"], "regions": DOG, "absent": ["a cup"]},
    }
    path = write_jsonl(*(record(name, question="Is it near?", **row) for name, row in rows.items()))
    with pytest.warns(UserWarning, match=re.escape("1 of 3 queries (1 yes) need") + r".*: 'one'$"):
        dataset = _jsonl(path, replace(POLICY, levels=OnlyAt()))
    perturbed = {s.query.id for s in (dataset[0, i] for i in range(3)) if s.perturbation.strength}
    assert perturbed == {"both", "one, the other is absent"}


def test_a_no_about_an_object_that_is_there_is_noised_there(mixed: Path) -> None:
    policy = NoisePolicy(resolution="native", distractor_probability=0.0, levels=OnlyAt())
    with pytest.warns(UserWarning, match="need a region"):
        dataset = _jsonl(mixed, policy)
    changed = {q.id: (dataset[0, i].image != (255, 0, 0)).any(axis=-1) for i, q in enumerate(dataset.queries)}
    dog = np.zeros((10, 20), dtype=bool)
    dog[2:8, 2:8] = True
    for name in ("shown", "no, about a dog that is there"):
        assert not changed[name][~dog].any()
        assert changed[name][dog].mean() > 0.9
    assert changed["absent"].any()


def test_absent_objects_may_be_left_out_too(mixed: Path) -> None:
    policy = NoisePolicy(resolution="native", absent="skip")
    with pytest.warns(UserWarning, match=re.escape("2 ask about an object that is absent (`absent: skip`)")):
        assert [q.id for q in _jsonl(mixed, policy).queries] == [ASKED[0], ASKED[3], *UNLOCATED]


def test_a_missing_region_may_stop_the_run(mixed: Path) -> None:
    says = r"^data\.train: 5 of 9 queries .* 'yes without regions', .*`data\.noise\.no_region: clean`"
    with pytest.raises(DataError, match=says):
        _jsonl(mixed, NoisePolicy(resolution="native", no_region="raise"))


@pytest.mark.parametrize(
    ("located", "unlocated", "says"),
    [
        ((), ("Yes",), "1 of 1 queries"),
        (("Yes", "red"), ("Yes", "Yes", "red"), "3 of 5 queries"),
        (("Yes", "Yes", "no."), ("Yes", "Yes", "red"), None),
        (("No.", "no", "no"), ("Yes",), "1 of 4 queries.* the answer 'No'"),
        (("Yes", "No", "red", "red"), ("blue",), "1 of 5 queries.* the answer 'red'"),
        (("Yes", "No", "red", "blue"), ("blue",), None),
        (("Yes", "Yes"), ("Yes",), None),
    ],
    ids=["none located", "most lost", "half lost", "No alone", "one colour", "two colours", "had no other"],
)
@pytest.mark.parametrize("noise", ["drawn", "every_level"])
def test_what_is_taught_is_not_decided_by_what_lacks_a_region(
    write_jsonl: Write,
    record: Record,
    located: Sequence[str],
    unlocated: Sequence[str],
    says: str | None,
    noise: Any,
) -> None:
    def written(answer: str, **changes: Any) -> dict[str, Any]:
        kind = "yes_no" if answer.strip(".").lower() in ("yes", "no") else "short"
        name = f"{answer} {len(records)}"
        return record(name, answer=answer, answer_type=kind, **changes)

    records: list[dict[str, Any]] = []
    for answer in located:
        records.append(written(answer, objects=["dog"], regions=DOG))
    for answer in unlocated:
        records.append(written(answer))
    splits = {"": EvalSplit(JsonlSource(str(write_jsonl(*records))), noise)}
    if says is None:
        with pytest.warns(UserWarning, match="need a region"):
            assert len(PerturbedQueries(splits, POLICY, None, where="data.levels", taught=True))
    else:
        with pytest.raises(DataError, match=f"^data.levels: {says}.*predict --config regions"):
            PerturbedQueries(splits, POLICY, None, where="data.levels", taught=True)


def test_clean_images_need_no_regions(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        dataset = _jsonl(mixed, NoisePolicy(resolution="native", no_region="raise", absent="skip"), "none")
    assert [q.id for q in dataset.queries] == [*ASKED, *UNLOCATED]
    samples = [dataset[0, i] for i in range(9)]
    assert {(s.perturbation, s.noise_step, s.confidence) for s in samples} == {(CLEAN, 0, 1.0)}
    assert caplog.text == ""


def test_the_demo_loses_no_question(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        dataset = PerturbedQueries(
            {"": EvalSplit(DemoSource(scenes=50), "drawn")}, POLICY, None, where="data.train"
        )
    assert len(dataset) == 150
    assert "data.train: absent object in 50 of 150 queries (`absent: distractor`)" in caplog.text


@pytest.fixture
def levels() -> AnchoredLevels:
    return AnchoredLevels.fit({"yes_no": noise_counts((0, 10, 9), (1, 10, 5))})


def test_an_answer_type_without_levels_is_told_before_anything_is_loaded(
    write_jsonl: Write, record: Record, levels: AnchoredLevels
) -> None:
    path = write_jsonl(
        record("yes", regions=DOG), record("open", regions=DOG, answer="Dogs.", answer_type="open")
    )
    policy = NoisePolicy(resolution="native", levels=levels)
    with pytest.raises(DataError, match=r"^data\.train: record 'open': .*levels fit.*`on_bad_record: skip`"):
        _jsonl(path, policy)
    with pytest.warns(UserWarning, match="left out 1 of 2 records: data.train: record 'open'"):
        dataset = _jsonl(path, policy, on_bad_record="skip")
    assert [q.id for q in dataset.queries] == ["yes"]
    clean = _jsonl(path, policy, "none")
    assert [clean[0, i].perturbation for i in range(2)] == [CLEAN, CLEAN], "clean images need no levels"


def test_what_the_model_cannot_be_asked_is_told_before_anything_is_loaded(
    write_jsonl: Write, record: Record
) -> None:
    def check(query: Query, wrong: Sequence[str]) -> None:
        if "<image>" in query.question:
            raise DataError(f"record {query.id!r}: '<image>'")

    path = write_jsonl(record("one", regions=DOG), record("two", regions=DOG, question="<image>?"))
    with pytest.raises(DataError, match="data: record 'two': '<image>'; `on_bad_record: skip`"):
        PerturbedQueries({"": EvalSplit(JsonlSource(str(path)))}, POLICY, None, check)
    skipping = EvalSplit(JsonlSource(str(path), on_bad_record="skip"))
    with pytest.warns(UserWarning, match="left out 1 of 2 records"):
        assert len(PerturbedQueries({"": skipping}, POLICY, None, check)) == 1


@pytest.fixture
def damaged(write_jsonl: Write, record: Record) -> Path:
    """Seven records; the odd ones cannot be loaded: a damaged image, a region outside it, a mask of another size."""
    mask = {"label": "dog", "box": [0, 0, 1, 1], "mask": {"size": [5, 5], "counts": [0, 25]}}
    path = write_jsonl(
        *(record(str(i), regions=DOG, **c) for i, c in enumerate(({}, {"image": "b.png"}, {}))),
        record("3", regions=[{"label": "dog", "box": [50, 50, 60, 60]}]),
        record("4", regions=[{"label": "dog", "box": [-3, 0, 5, 5]}]),
        record("5", regions=[mask]),
        record("6", regions=DOG),
    )
    (path.parent / "b.png").write_bytes((path.parent / "a.png").read_bytes()[:40])
    return path


@pytest.mark.parametrize("noise", ["drawn", "none"])
def test_records_that_cannot_be_loaded_are_left_out_of_a_batch(damaged: Path, noise: str) -> None:
    """The samples of the other records do not change."""
    dataset = _jsonl(damaged, noise=noise, on_bad_record="skip")
    assert len(dataset) == 7, "which is not known before"
    drawn = dataset.__getitems__([(3, i) for i in range(7)])
    assert [s.query.id for s in drawn.samples] == ["0", "2", "4", "6"]
    assert sorted(drawn.left_out) == [1, 3, 5]
    assert drawn.clipped == [4]
    for index, says in ((1, "b.png"), (3, "covers no pixel"), (5, "has size [5, 5]")):
        assert drawn.left_out[index].startswith(f"{damaged}: record '{index}': ")
        assert says in drawn.left_out[index]
    for sample in drawn.samples:
        alone = dataset[3, int(sample.query.id)]
        assert np.array_equal(alone.image, sample.image)
        assert (alone.confidence, alone.perturbation) == (sample.confidence, sample.perturbation)


def test_a_record_that_cannot_be_loaded_stops_the_run_where_it_is_to(damaged: Path) -> None:
    with pytest.raises(DataError, match="record '1': .*b.png.*`on_bad_record: skip` leaves such records out"):
        _jsonl(damaged).__getitems__([(0, 0), (0, 1)])


@pytest.mark.parametrize("noise", ["drawn", "every_level"])
@pytest.mark.parametrize("rule", ["clean", "raise"])
@pytest.mark.parametrize("answer", ["Yes", "No"])
def test_a_region_that_only_the_image_shows_to_be_empty(rule: Any, noise: Any, answer: str) -> None:
    """A region has the object's label, but no pixel, as some in COCO. On clean images it does not matter."""

    class Empty(Listed):
        def load(self, query: Query) -> LoadedImage:
            loaded = super().load(query)
            return loaded._replace(evidence=()) if query.objects == ("dog",) else loaded

    policy = NoisePolicy(resolution="native", no_region=rule, levels=OnlyAt())
    source = Empty(replace(SQUARE[0], answer=answer), SQUARE[1])
    dataset = _dataset(policy, some=EvalSplit(source, noise))
    keys = [(0, i) for i in range(len(dataset))]
    if rule == "raise":
        with pytest.raises(NoEvidenceError, match="record 'some:dog.*no pixel of its image shows"):
            dataset.__getitems__(keys)
    else:
        drawn = dataset.__getitems__(keys)
        [dog] = [s for s in drawn.samples if s.query.objects == ("dog",)]
        assert (dog.perturbation, dog.confidence, drawn.empty) == (CLEAN, 1.0, [0])
        assert list(drawn.left_out) == [i for i, q in enumerate(dataset.queries) if "dog@" in q.id and i]
    assert len(_dataset(policy, some=EvalSplit(source)).__getitems__([(0, 0)]).samples) == 1


def test_the_same_query_in_two_parts_gets_different_noise() -> None:
    policy = NoisePolicy(resolution="native", levels=OnlyAt())
    dataset = _dataset(
        policy, one=EvalSplit(Listed(*SQUARE), "drawn"), two=EvalSplit(Listed(*SQUARE), "drawn")
    )
    assert not np.array_equal(dataset[0, 0].image, dataset[0, 2].image)
