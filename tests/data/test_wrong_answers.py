"""Wrong answers in training responses: their rate, their choice, and the wrong answers that sources offer."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, chisquare

from vlm_calibration.data.dataset import EvalSplit, PerturbedQueries
from vlm_calibration.data.noise import NoisePolicy, Sample, perturb_query
from vlm_calibration.data.sources.base import opposite
from vlm_calibration.demo.questions import scene_seed
from vlm_calibration.demo.scenes import CLASSES, scene_layout
from vlm_calibration.demo.source import DemoSource, scene_index
from vlm_calibration.perturbation.levels import NOISE, AnchoredLevels, Perturbation
from vlm_calibration.records import LoadedImage, Query, Region
from vlm_calibration.text.grading import grade

from ..level_tables import OnlyAt, noise_counts
from .conftest import Listed

IMAGE = np.random.default_rng(0).integers(60, 200, (6, 6, 3), dtype=np.uint8)
DOG = np.zeros((6, 6), dtype=bool)
DOG[1:4, 1:4] = True
SCENE = LoadedImage(IMAGE, (DOG,), ())
QUERY = Query("q", "x.png", "A dog?", "Yes", "yes_no", objects=("dog",))


def _sample(
    number: int,
    wrong_answer_rate: float = 1.0,
    epoch: int = 0,
    strength: float | None = None,
    **settings: Any,
) -> Sample:
    wrong = settings.pop("wrong", ("No",))
    query = replace(QUERY, id=f"q{number}", answer_type=settings.pop("kind", "yes_no"))
    policy = NoisePolicy(**{"resolution": "native", "wrong_answer_rate": wrong_answer_rate, **settings})
    perturbation = None if strength is None else Perturbation(NOISE, strength)
    return perturb_query(query, SCENE, policy, None, epoch, perturbation, wrong)


def _fits(wrong: int, n: int, share: float) -> bool:
    if share in (0.0, 1.0):
        return wrong == n * share
    return binomtest(wrong, n, share).pvalue > 1e-4


@pytest.mark.parametrize("wrong_answer_rate", [1.0, 0.4])
def test_a_response_is_as_often_wrong_as_its_confidence_says(wrong_answer_rate: float) -> None:
    samples = [_sample(i, wrong_answer_rate, distractor_probability=0.2) for i in range(1200)]
    for confidence in sorted({s.confidence for s in samples}):
        of_level = [s for s in samples if s.confidence == confidence]
        assert len(of_level) > 50
        wrong = sum(s.wrong_answer is not None for s in of_level)
        assert _fits(wrong, len(of_level), wrong_answer_rate * (1 - confidence)), confidence
    assert {s.confidence for s in samples} == {i / 10 for i in range(11)}


def test_the_confidence_counts_and_not_the_noise() -> None:
    # Half of all yes/no questions are answered correctly without any evidence.
    counts = {
        "yes_no": noise_counts((0, 100, 100), (1, 100, 50)),
        "short": noise_counts((0, 100, 100), (1, 100, 0)),
    }
    levels = AnchoredLevels.fit(counts)
    for kind, share in (("yes_no", 0.5), ("short", 1.0)):
        for strength, wrong in ((0, 0.0), (1, share)):
            samples = [_sample(i, strength=strength, levels=levels, kind=kind) for i in range(150)]
            assert _fits(sum(s.wrong_answer is not None for s in samples), 150, wrong)


def test_without_mistakes_or_without_a_wrong_answer_none_is_given() -> None:
    for i in range(20):
        for sample in (_sample(i, 0.0, strength=1), _sample(i, 1.0, strength=1, wrong=())):
            assert (sample.wrong_answer, sample.answer, sample.confidence) == (None, "Yes", 0.0)


def test_wrong_answers_are_drawn_alike_often_as_a_pure_function_of_seed_epoch_and_id() -> None:
    wrong = ("cat", "car", "tree")

    def drawn(**settings: Any) -> list[str]:
        samples = [_sample(i, strength=1, wrong=wrong, **settings) for i in range(300)]
        assert {(s.query.answer, s.wrong, s.epoch) for s in samples} == {
            ("Yes", wrong, settings.get("epoch", 0))
        }
        assert all(s.answer == s.wrong_answer for s in samples)
        return [s.answer for s in samples]

    answers = drawn()
    counts = Counter(answers)
    assert set(counts) == set(wrong)
    assert chisquare(list(counts.values())).pvalue > 1e-3
    np.random.seed(3)  # noqa: NPY002  (the legacy stream must not matter)
    assert drawn() == answers
    assert answers != drawn(epoch=1) != drawn(seed=1) != answers


def test_mistakes_change_neither_level_nor_noise() -> None:
    changed = 0
    for i in range(100):
        plain, mistaken = (
            _sample(i, wrong_answer_rate, epoch=2, distractor_probability=0.3, clean_fraction=0.1)
            for wrong_answer_rate in (0.0, 1.0)
        )
        assert np.array_equal(plain.image, mistaken.image)
        changed += mistaken.wrong_answer is not None
        assert plain._replace(image=IMAGE) == mistaken._replace(image=IMAGE, wrong_answer=None)
    assert 20 < changed < 60


def test_mistakes_have_a_stream_of_their_own() -> None:
    # The first draw of the noise generator decides which samples stay clean; for the other samples it is above 0.5.
    levels = OnlyAt(drawn=(0.4, 0.5, 0.6))
    rows = [_sample(i, clean_fraction=0.5, levels=levels) for i in range(900)]
    wrong = Counter(s.confidence for s in rows if s.wrong_answer is not None)
    total = Counter(s.confidence for s in rows)
    assert set(total) == {1.0, 0.6, 0.5, 0.4}
    assert all(_fits(wrong[c], total[c], 1 - c) for c in total)


# --- Wrong answers of sources -------------------------------------------------------------------------------------------


def _regions(*labels: str) -> tuple[Region, ...]:
    return tuple(Region(label, (0, 0, 1, 1)) for label in labels)


@pytest.mark.parametrize(
    ("gold", "expected"),
    [("Yes", "No"), ("no", "Yes"), ("No.", "Yes"), ("yes, there is", "No"), ("There is no dog", "Yes")],
)
def test_the_opposite_of_yes_or_no(gold: str, expected: str) -> None:
    query = replace(QUERY, answer=gold, regions=_regions("dog", "cat"))
    assert opposite(query) == (expected,)
    assert tuple(Listed(QUERY).wrong_answers(query)) == (expected,)
    assert not grade(expected, gold, "yes_no").correct


@pytest.mark.parametrize(
    ("labels", "objects", "expected"),
    [
        (("cat", "dog", "cat", "car", "cat"), ("dog",), ["cat", "car"]),
        (("dog", "puppy", "Dogs", "a dog", "cat"), ("dog",), ["cat"]),
        (("dog", "cat"), ("dog", "cat"), []),
        (("cat", "car"), (), []),
        (("dog", "", " ", "cat"), ("dog",), ["cat"]),
    ],
    ids=["each once", "not what is right too", "all is evidence", "no object", "no word"],
)
def test_a_short_answer_may_be_taken_for_what_else_is_there(
    labels: tuple[str, ...], objects: tuple[str, ...], expected: list[str]
) -> None:
    regions = _regions(*labels)
    query = Query("q", "x", "What is it?", "dog", "short", objects, regions, synonyms=("puppy", "hound"))
    assert opposite(query) == ()
    assert list(Listed(QUERY).wrong_answers(query)) == expected
    assert list(Listed(QUERY).wrong_answers(replace(query, answer_type="open"))) == []


@pytest.mark.parametrize("shifted", [False, True])
def test_the_dataset_asks_the_demo_which_knows_what_else_is_in_the_scene(shifted: bool) -> None:
    source = DemoSource("train", scenes=60, shifted=shifted)
    policy = NoisePolicy(wrong_answer_rate=1.0, resolution="native")
    dataset = PerturbedQueries({"": EvalSplit(source, "drawn")}, policy, None)
    alone = 0
    for index, query in enumerate(source.queries()):
        wrong = list(source.wrong_answers(query))
        assert not any(grade(w, query.answer, query.answer_type, query.synonyms).correct for w in wrong)
        names = set(scene_layout(scene_seed("train", scene_index(query)))[0])
        if query.answer_type == "yes_no":
            assert wrong == [{"Yes": "No", "No": "Yes"}[query.answer]]
        elif names == {query.answer}:
            alone += 1
            assert set(wrong) == set(CLASSES) - names
        else:
            assert set(wrong) == names - {query.answer}
        assert list(dataset[3, index].wrong) == wrong
    assert alone, "scenes of a single object are among them"


FORMS = {
    "What colour is the {}?": ("red", "Blue", "blue", "green"),
    "How many {}s are there?": ("1", "two", "3", "1"),
    "Who painted this?": ("nobody", "Nobody.", "nobody", "nobody"),
}
"""Form of a question about an object -> the gold answers to it about four objects."""
SHORT = Listed(
    *(
        Query(f"{form}|{name}", "x", form.format(name), gold, "short", (name,), _regions(name))
        for form, golds in FORMS.items()
        for name, gold in zip(("dog", "red car", "cup", "tree"), golds, strict=True)
    )
)
"""Short questions of these forms, each object with its region and no other."""


def test_a_wrong_answer_that_the_source_lacks_is_right_to_a_question_of_the_same_form() -> None:
    policy = NoisePolicy(
        levels=OnlyAt(), wrong_answer_rate=1.0, resolution="native", distractor_probability=0
    )
    with pytest.warns(UserWarning, match="data: 4 of 12 queries have no wrong answer .*`wrong_answer_rate`"):
        dataset = PerturbedQueries({"": EvalSplit(SHORT, "drawn")}, policy, None)
    given: dict[str, set[str]] = {}
    for epoch in range(12):
        for index, query in enumerate(dataset.queries):
            sample = dataset[epoch, index]
            assert sample.confidence == 0
            assert (sample.wrong_answer is None) == query.question.startswith("Who")
            if sample.wrong_answer is not None:
                assert not grade(sample.answer, query.answer, "short").correct
                given.setdefault(query.id.partition("|")[0], set()).add(sample.answer)
    assert given == {form: set(golds) for form, golds in FORMS.items() if "{}" in form}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = replace(policy, wrong_answer_rate=0.0)
        plain = PerturbedQueries({"": EvalSplit(SHORT, "drawn")}, policy, None)
    assert {plain[0, i].wrong for i in range(12)} == {()}
