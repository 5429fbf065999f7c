"""Queries of several splits as one dataset: names, steps, queries left out, errors that name the record, and shapes of regions."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from vlm_calibration.data import dataset as datasets
from vlm_calibration.data.dataset import EvalSplit, NoEvidenceError, PerturbedQueries
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.perturbation.levels import CLEAN, AnchoredLevels, LinearLevels, Perturbation
from vlm_calibration.perturbation.masks import bounding_box, mask_to_rle
from vlm_calibration.records import DataError, LoadedImage, Query, Region

from ..level_tables import OnlyAt, noise_counts
from .conftest import Listed, Write, record

POLICY = NoisePolicy(resolution="native", distractor_probability=0.0)
ALL_NOISE = replace(POLICY, levels=OnlyAt())
DOG, CAT = (Region("dog", (2, 2, 8, 8)),), (Region("cat", (1, 1, 5, 5)),)


def _query(name: str, answer: str = "Yes", kind: Any = "yes_no", **settings: Any) -> Query:
    return Query(name, "x", "A dog?", answer, kind, **settings)


SQUARE = (
    _query("dog", objects=("dog",), regions=DOG, category="existence"),
    replace(_query("cat", "No", objects=("cat",), regions=DOG), question="A cat?"),
)
"""Two queries about one grey image: about a dog in it, and about an absent cat."""


def _dataset(policy: NoisePolicy = POLICY, **parts: EvalSplit) -> PerturbedQueries:
    return PerturbedQueries(parts or {"": EvalSplit(Listed(*SQUARE), "drawn")}, policy, None)


def _train(
    queries: Sequence[Query], policy: NoisePolicy = POLICY, noise: Any = "drawn", **settings: Any
) -> PerturbedQueries:
    source = Listed(*queries)
    source.on_bad_record = settings.pop("on_bad_record", "raise")
    return PerturbedQueries({"": EvalSplit(source, noise)}, policy, None, where="data.train", **settings)


def test_parts_get_names_and_noise_of_their_own() -> None:
    parts = {name: EvalSplit(Listed(*SQUARE), "drawn") for name in ("one", "two")}
    dataset = _dataset(ALL_NOISE, **parts)
    assert [q.id for q in dataset.queries] == ["one:dog", "one:cat", "two:dog", "two:cat"]
    assert [q.category for q in dataset.queries] == ["one/existence", "one", "two/existence", "two"]
    assert not np.array_equal(dataset[0, 0].image, dataset[0, 2].image)
    assert [(q.id, q.category) for q in _dataset().queries] == [("dog", "existence"), ("cat", None)]


def test_every_level_asks_each_query_at_each_level_of_each_kind() -> None:
    policy = replace(POLICY, kinds={"noise": 1.0, "darkness": 0.0, "blur": 2.0}, levels=LinearLevels(3))
    dataset = _dataset(policy, sweep=EvalSplit(Listed(*SQUARE), "every_level"))
    levels = [(kind, s) for kind in ("noise", "blur") for s in (0.5, 1.0)]
    samples = [dataset[0, i] for i in range(len(dataset))]
    assert [s.perturbation for s in samples] == [p for p in (CLEAN, *levels) for _ in ("dog", "cat")]
    assert [q.id for q in dataset.queries] == [
        f"sweep:{q}@{level}" for level in ("0", *(f"{k}-{s:g}" for k, s in levels)) for q in ("dog", "cat")
    ]


@pytest.mark.parametrize("query_id", ["", "q", "a@0", "clean:q@noise-0.3"])
def test_the_id_of_a_level_contains_that_of_the_query(query_id: str) -> None:
    for perturbation in (CLEAN, Perturbation("blur", 0.001), Perturbation("noise", 1 / 3)):
        assert datasets.query_id_of_level(datasets.level_id(query_id, perturbation)) == query_id


def test_a_part_may_have_kinds_of_its_own() -> None:
    parts = {
        "own": EvalSplit(Listed(*SQUARE), "every_level", {"blur": 1.0}),
        "shared": EvalSplit(Listed(*SQUARE), "every_level"),
        "clean": EvalSplit(Listed(*SQUARE)),
    }
    dataset = _dataset(replace(POLICY, levels=LinearLevels(3)), **parts)
    ids = [query.id.split(":")[0] for query in dataset.queries]
    kinds = {(name, dataset[0, i].perturbation.kind) for i, name in enumerate(ids)}
    assert kinds == {("own", ""), ("own", "blur"), ("shared", ""), ("shared", "noise"), ("clean", "")}
    with pytest.raises(DataError, match=r"^data\.bad: noise.kinds: there is no kind 'rain': expected noise"):
        _dataset(bad=EvalSplit(Listed(*SQUARE), "drawn", {"rain": 1.0}))


def test_an_error_names_the_record_and_nothing_left_is_one() -> None:
    class Wrong(Listed):
        def load(self, query: Query) -> LoadedImage:
            return super().load(query)._replace(evidence=(np.zeros((10, 10), dtype=bool),))

    with pytest.raises(DataError, match=r"record 'bad:dog': mask is empty"):
        _dataset(bad=EvalSplit(Wrong(*SQUARE), "drawn"))[0, 0]
    with pytest.raises(DataError, match="no query is left"):
        _train(SQUARE[1:], replace(POLICY, absent="skip"))


# --- Queries without a region ----------------------------------------------------------------------------------------

ASKED = (
    _query("shown", objects=("the Dogs",), regions=DOG),
    _query("absent", "No", objects=("dog",)),
    _query("absent, with another region", "No", objects=("dog",), regions=CAT),
    _query("no, about a dog that is there", "No", objects=("dog",), regions=DOG),
)
UNLOCATED = (
    _query("yes without regions"),
    _query("yes with another region", objects=("cup",), regions=DOG),
    _query("short", "red", "short"),
    _query("a short no", "No", "short"),
    _query("open", "No dog.", "open"),
)
MIXED = (*ASKED, *UNLOCATED)


@pytest.mark.parametrize(("question", "answer"), [("A dog?", "Yes"), ("Is the car red?", "No")])
@pytest.mark.parametrize("noise", ["drawn", "every_level"])
def test_a_missing_region_is_never_an_absent_object(question: str, answer: str, noise: str) -> None:
    """Such a query gets no noise elsewhere, with the confidence of that noise: it is asked once an epoch, untouched."""
    unlocated = [replace(_query(f"q {i}", answer), question=question) for i in range(40)]
    with pytest.warns(UserWarning, match="need a region.*: 'q 0', 'q 1', 'q 2', 'q 3', 'q 4' and 35 more$"):
        dataset = _train([*unlocated, ASKED[0]], ALL_NOISE, noise)
    own = [i for i, query in enumerate(dataset.queries) if not query.id.startswith("shown")]
    assert len(own) == 40
    assert len(dataset) == 41 + (noise == "every_level") * (len(dataset.policy.perturbations) - 1)
    for index in own[::8]:
        sample = dataset[0, index]
        assert (sample.perturbation, sample.confidence) == (CLEAN, 1.0)
        assert (sample.image == 128).all()


@pytest.mark.parametrize("noise", ["drawn", "every_level"])
def test_only_the_answer_says_that_an_object_is_absent(noise: str) -> None:
    with pytest.warns(UserWarning, match="need a region") as warned:
        dataset = _train(MIXED, noise=noise)
    asked = Counter(q.id.split("@")[0] for q in dataset.queries)
    levels = len(POLICY.perturbations) if noise == "every_level" else 1
    assert asked == {**{q.id: levels for q in ASKED}, **{q.id: 1 for q in UNLOCATED}}
    [message] = [str(w.message) for w in warned]
    missing, absent = message.split("; ")
    assert "5 of 9 queries (2 yes, 2 short, 1 open)" in missing
    assert missing.endswith(f": {', '.join(repr(q.id) for q in UNLOCATED)}")
    assert absent.endswith(": 'absent', 'absent, with another region'")


def test_all_key_objects_must_have_a_region() -> None:
    two = {"objects": ("dog", "a cat")}
    queries = [
        _query("both", regions=DOG + CAT, **two),
        _query("one", regions=DOG, **two),
        _query("one, the other is absent", regions=DOG, absent=("a cat",), **two),
    ]
    with pytest.warns(UserWarning, match=re.escape("1 of 3 queries (1 yes) need") + r".*: 'one'$"):
        dataset = _train(queries, ALL_NOISE)
    perturbed = {s.query.id for s in (dataset[0, i] for i in range(3)) if s.perturbation.strength}
    assert perturbed == {"both", "one, the other is absent"}


def test_a_no_about_an_object_that_is_there_is_noised_there() -> None:
    dataset = _train(ASKED, ALL_NOISE)
    changed = {q.id: (dataset[0, i].image != 128).any(axis=-1) for i, q in enumerate(dataset.queries)}
    dog = np.zeros((10, 10), dtype=bool)
    dog[2:8, 2:8] = True
    for name in ("shown", "no, about a dog that is there"):
        assert not changed[name][~dog].any()
        assert changed[name][dog].mean() > 0.9
    assert changed["absent"].any()


def test_absent_objects_may_be_left_out_and_a_missing_region_may_stop_the_run() -> None:
    with pytest.warns(UserWarning, match=re.escape("2 ask about an object that is absent (`absent: skip`)")):
        dataset = _train(MIXED, replace(POLICY, absent="skip"))
    assert list(dataset.queries) == [ASKED[0], ASKED[3], *UNLOCATED]
    says = r"^data\.train: 5 of 9 queries .* 'yes without regions', .*`data\.noise\.no_region: clean`"
    with pytest.raises(DataError, match=says):
        _train(MIXED, replace(POLICY, no_region="raise"))


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
def test_what_is_taught_is_not_decided_by_what_lacks_a_region(
    located: Sequence[str], unlocated: Sequence[str], says: str | None
) -> None:
    queries = []
    for number, answer in enumerate((*located, *unlocated)):
        kind = "yes_no" if answer.strip(".").lower() in ("yes", "no") else "short"
        region = {"objects": ("dog",), "regions": DOG} if number < len(located) else {}
        queries.append(_query(str(number), answer, kind, **region))
    if says is None:
        with pytest.warns(UserWarning, match="need a region"):
            assert len(_train(queries, taught=True)) == len(queries)
    else:
        with pytest.raises(DataError, match=f"^data.train: {says}.*predict --config regions"):
            _train(queries, taught=True)


def test_clean_images_need_no_regions_and_the_demo_loses_none(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        dataset = _train(MIXED, replace(POLICY, no_region="raise", absent="skip"), "none")
        assert caplog.text == ""
        demo = PerturbedQueries({"": EvalSplit(DemoSource(scenes=50), "drawn")}, POLICY, None)
    assert list(dataset.queries) == list(MIXED)
    samples = [dataset[0, i] for i in range(9)]
    assert {(s.perturbation, s.noise_step, s.confidence) for s in samples} == {(CLEAN, 0, 1.0)}
    assert len(demo) == 150
    assert "data: absent object in 50 of 150 queries (`absent: distractor`)" in caplog.text


# --- Records that cannot be asked or loaded --------------------------------------------------------------------------


def test_what_cannot_be_asked_is_told_before_anything_is_loaded() -> None:
    """An answer type without levels, and what the model cannot read; wrong answers are checked when a sample draws them."""

    def check(query: Query, wrong: Sequence[str]) -> None:
        if query.answer_type == "open" or "No" in wrong:
            raise DataError(f"record {query.id!r}: '<image>'")

    queries = [SQUARE[0], _query("open", "Dogs.", "open", regions=DOG)]
    levels = AnchoredLevels.fit({"yes_no": noise_counts((0, 10, 9), (1, 10, 5))})
    without_levels: Any = {"policy": replace(POLICY, levels=levels)}
    for settings, says in ((without_levels, ".*levels fit.*"), ({"check": check}, "'<image>'")):
        with pytest.raises(DataError, match=f"^data.train: record 'open': {says}; `on_bad_record: skip`"):
            _train(queries, **settings)
        with pytest.warns(UserWarning, match="left out 1 of 2 records: data.train: record 'open'"):
            assert len(_train(queries, **settings, on_bad_record="skip")) == 1
    assert len(_train(queries, **without_levels, noise="none")) == 2, "clean images need no levels"
    with pytest.raises(DataError, match="^record 'dog': '<image>'$"):
        _train(SQUARE[:1], check=check)[0, 0]


@pytest.mark.parametrize("noise", ["drawn", "none"])
def test_records_that_cannot_be_loaded_are_left_out_or_stop_the_run(write_jsonl: Write, noise: Any) -> None:
    """A damaged image, a region outside the image, a mask of another size; the samples of the other records do not change."""

    def region(box: Sequence[int], **more: Any) -> dict[str, Any]:
        return {"regions": [{"label": "dog", "box": box, **more}]}

    inside, mask = region([2, 2, 8, 8]), {"size": [5, 5], "counts": [0, 25]}
    rows = [inside, {**inside, "image": "b.png"}, inside, region([50, 50, 60, 60]), region([-3, 0, 5, 5])]
    rows.append(region([0, 0, 1, 1], mask=mask))
    path = write_jsonl(*(record(str(i), **row) for i, row in enumerate(rows)))
    (path.parent / "b.png").write_bytes((path.parent / "a.png").read_bytes()[:40])
    dataset, strict = (
        PerturbedQueries({"": EvalSplit(JsonlSource(str(path), on_bad_record=rule), noise)}, POLICY, None)
        for rule in ("skip", "raise")
    )
    assert len(dataset) == 6, "which is not known before"
    drawn = dataset.__getitems__([(3, i) for i in range(6)])
    assert [s.query.id for s in drawn.samples] == ["0", "2", "4"]
    assert (sorted(drawn.left_out), drawn.clipped) == ([1, 3, 5], [4])
    for index, says in ((1, "b.png"), (3, "covers no pixel"), (5, "has size [5, 5]")):
        assert drawn.left_out[index].startswith(f"{path}: record '{index}': ")
        assert says in drawn.left_out[index]
    for sample in drawn.samples:
        alone = dataset[3, int(sample.query.id)]
        assert np.array_equal(alone.image, sample.image)
        assert (alone.confidence, alone.perturbation) == (sample.confidence, sample.perturbation)
    with pytest.raises(DataError, match="record '1': .*b.png.*`on_bad_record: skip` leaves such records out"):
        strict.__getitems__([(0, 0), (0, 1)])


@pytest.mark.parametrize("noise", ["drawn", "every_level"])
@pytest.mark.parametrize("rule", ["clean", "raise"])
@pytest.mark.parametrize("answer", ["Yes", "No"])
def test_a_region_that_only_the_image_shows_to_be_empty(rule: Any, noise: Any, answer: str) -> None:
    """A region has the object's label, but no pixel, as some in COCO. On clean images it does not matter."""

    class Empty(Listed):
        def load(self, query: Query) -> LoadedImage:
            loaded = super().load(query)
            return loaded._replace(evidence=()) if query.objects == ("dog",) else loaded

    policy = replace(ALL_NOISE, no_region=rule)
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


# --- The shape of a perturbed region does not tell the answer: objects that are there and that are not get the same shapes

SIZE = 48


def _region(label: str, height: int, width: int, *, outlined: bool) -> Region:
    """A triangle, or without an outline its box."""
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[5 : 5 + height, 8 : 8 + width] = np.tri(height, width, dtype=bool)
    return Region(label, (8, 5, 8 + width, 5 + height), mask_to_rle(mask) if outlined else None)


def located(outlined: Sequence[bool], others: bool) -> list[Query]:
    """As many yes as no about existence; only what is there has a region of its own, triangles of five sizes.

    For each size, `outlined` says whether its regions have masks; with `others`, every image has a box of another object.
    """
    cats = (_region("cat", 21, 3, outlined=False),) if others else ()
    queries = []
    for i, has_mask in enumerate(outlined):
        dog = _region("dog", 4 + 3 * i, 12 - i, outlined=has_mask)
        sky = _region("sky", 2, 30 + i, outlined=False)  # no question about existence asks for it
        queries += [
            Query(f"yes {i}", "x", "Is there a dog?", "Yes", "yes_no", ("dog",), (dog, *cats)),
            Query(f"no {i}", "x", "Is there a dog?", "No", "yes_no", ("dog",), cats),
            Query(f"red {i}", "x", "What colour is it?", "red", "short", ("sky",), (sky,)),
        ]
    return queries


def _shaped(
    queries: Sequence[Query],
    noise: Any = "drawn",
    damaged: Sequence[str] = (),
    rule: Any = "raise",
    **policy: Any,
) -> PerturbedQueries:
    source = Listed(*queries, size=(SIZE, SIZE), damaged=damaged)
    source.on_bad_record = rule
    noise_policy = NoisePolicy(levels=OnlyAt(), resolution="native", **policy)
    return _dataset(noise_policy, **{"": EvalSplit(source, noise)})


@pytest.mark.parametrize(
    "outlined", [[True] * 5, [False] * 5, [True, False] * 2 + [True]], ids=["masks", "boxes", "both"]
)
@pytest.mark.parametrize(
    ("others", "noise"), [(False, "drawn"), (True, "every_level")], ids=["alone", "with other objects"]
)
def test_both_answers_get_regions_of_one_distribution(outlined: list[bool], others: bool, noise: Any) -> None:
    dataset = _shaped(located(outlined, others), noise, distractor_probability=0.4)
    shapes: dict[str, Counter[tuple[tuple[int, ...], bytes]]] = {"Yes": Counter(), "No": Counter()}
    for epoch in range(60):
        for index, query in enumerate(dataset.queries):
            if query.answer_type == "yes_no" and not query.id.endswith("@0"):
                changed = (dataset[epoch, index].image != 128).any(axis=-1)
                shape = changed[bounding_box(changed).slices]
                shapes[query.answer][shape.shape, shape.tobytes()] += 1
    assert set(shapes["Yes"]) == set(shapes["No"])
    assert len(shapes["No"]) == 5
    table = [[shapes[answer][shape] for shape in shapes["Yes"]] for answer in ("Yes", "No")]
    assert chi2_contingency(table).pvalue > 1e-3


def test_without_a_shape_to_give_boxes_are_perturbed_and_the_run_says_so() -> None:
    absent = [query for query in located([True] * 5, True) if query.answer == "No"]
    with pytest.warns(UserWarning, match=r"data: .*shape those of 5 absent objects could have.*random boxes"):
        dataset = _shaped(absent)
    changed = (dataset[0, 0].image != 128).any(axis=-1)
    assert changed[bounding_box(changed).slices].all()


@pytest.mark.parametrize("rule", ["raise", "skip"])
def test_a_shape_comes_from_an_image_that_can_be_loaded(rule: Any) -> None:
    dataset = _shaped(located([True] * 5, False), damaged=[f"yes {i}" for i in range(4)], rule=rule)
    absent = [i for i, query in enumerate(dataset.queries) if query.answer == "No"]
    keys = [(epoch, i) for epoch in range(5) for i in absent]
    if rule == "raise":
        with pytest.raises(DataError, match="damaged"):
            dataset.__getitems__(keys)
    else:
        for sample in dataset.__getitems__(keys).samples:
            assert (sample.image != 128).any(axis=-1).sum() == np.tri(16, 8).sum()
