"""The perturbation of a query, its confidence and its wrong answer: purity, frequencies, regions, resolution, and choice."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, chisquare

from vlm_calibration.data.dataset import EvalSplit, PerturbedQueries
from vlm_calibration.data.noise import NoisePolicy, Sample, perturb_query, query_rng
from vlm_calibration.data.sources.base import opposite
from vlm_calibration.demo.questions import scene_seed
from vlm_calibration.demo.scenes import CLASSES, scene_layout
from vlm_calibration.demo.source import DemoSource, scene_index
from vlm_calibration.perturbation.by_kind import KIND_NAMES
from vlm_calibration.perturbation.level_table import AnswerTypeCounts, LevelTable, write_likelihoods
from vlm_calibration.perturbation.levels import CLEAN, AnchoredLevels, LinearLevels, Perturbation
from vlm_calibration.perturbation.noise import CosineSchedule, LinearSchedule, SigmoidSchedule
from vlm_calibration.records import DataError, LoadedImage, Query, Region
from vlm_calibration.text.grading import grade

from ..level_tables import OnlyAt, measured_likelihoods, noise_counts
from .conftest import Listed

DOG = np.zeros((96, 96), dtype=bool)
DOG[10:40, 10:50] = True
CAT = np.zeros((96, 96), dtype=bool)
CAT[60:90, 55:90] = True
IMAGE = np.random.default_rng(0).integers(60, 200, (96, 96, 3), dtype=np.uint8)
SCENE = LoadedImage(IMAGE, (DOG,), (CAT,))
NO_DOG = LoadedImage(IMAGE, (), (CAT,))
SMALL = LoadedImage(IMAGE[:6, :6], (np.eye(6, dtype=bool),), ())


def _query(identifier: str = "q", answer_type: str = "yes_no") -> Query:
    return Query(identifier, "x.png", "A dog?", "Yes", answer_type, objects=("dog",))  # type: ignore[arg-type]


def _perturbed(
    loaded: LoadedImage,
    epoch: int = 0,
    query: str = "q",
    strength: float | None = None,
    processor: Any = None,
    kind: str = "noise",
    answer_type: str = "yes_no",
    wrong: tuple[str, ...] = (),
    **policy: Any,
) -> Sample:
    perturbation = None if strength is None else Perturbation(kind, strength)
    resolution = {} if processor is not None else {"resolution": "native"}
    noise = NoisePolicy(**{"distractor_probability": 0.0, **resolution, **policy})
    return perturb_query(_query(query, answer_type), loaded, noise, processor, epoch, perturbation, wrong)


def _changed(sample: Sample, before: np.ndarray = IMAGE) -> np.ndarray:
    return (sample.image != before).any(axis=-1)


@pytest.mark.parametrize("kinds", [{"noise": 1.0}, {"noise": 1.0, "occlusion": 1.0, "darkness": 1.0}])
def test_a_sample_is_a_pure_function_of_seed_epoch_and_id(kinds: dict[str, float]) -> None:
    def key(epoch: int = 3, seed: int = 5, query: str = "q") -> tuple[bytes, float, Perturbation]:
        sample = _perturbed(SCENE, epoch, query, seed=seed, kinds=kinds)
        return sample.image.tobytes(), sample.confidence, sample.perturbation

    expected = key()
    np.random.default_rng(0).random(100)
    np.random.seed(1)  # noqa: NPY002  (the legacy stream must not matter)
    changed = [key(epoch=4), key(seed=6), key(query="r")]
    assert key() == expected
    assert len({expected, *changed}) == 4


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("resolution", ["native", "model"])
def test_every_kind_changes_the_evidence_alone(processor: Any, resolution: str, kind: str) -> None:
    settings: dict[str, Any] = {"resolution": resolution, "processor": processor.image_processor}
    sample = _perturbed(SCENE, strength=0.7, kind=kind, kinds={kind: 1.0}, **settings)
    changed = _changed(sample)
    assert not changed[~DOG].any()
    assert changed[DOG].mean() > 0.5
    assert (sample.perturbation, sample.confidence) == ((kind, 0.7), pytest.approx(0.3))
    clean = _perturbed(SCENE, strength=0, kind=kind)
    assert np.array_equal(clean.image, IMAGE)
    assert clean.confidence == 1.0
    assert sample.noise_step == (700 if kind == "noise" else None)


def test_a_distractor_keeps_the_clean_confidence_and_the_evidence() -> None:
    """A perturbation that is given, and not drawn, never goes to a distractor."""
    for query in map(str, range(10)):
        sample = _perturbed(SCENE, query=query, distractor_probability=1.0, levels=OnlyAt())
        assert np.array_equal(sample.image[DOG], IMAGE[DOG])
        assert _changed(sample)[CAT].mean() > 0.9
        assert (sample.perturbation, sample.noise_step, sample.confidence) == (CLEAN, 0, 1.0)
        given = _perturbed(SCENE, query=query, strength=1, distractor_probability=1.0)
        assert given.perturbation == ("noise", 1)
        assert not _changed(given)[CAT].any()


def test_for_absent_objects_another_region_is_noised_or_none() -> None:
    others, nothing = (_perturbed(loaded, strength=1) for loaded in (NO_DOG, LoadedImage(IMAGE, (), ())))
    for sample in (others, nothing):
        assert (sample.perturbation, sample.confidence) == (("noise", 1), 0.0)
    assert _changed(others)[CAT].mean() > 0.9
    assert not _changed(others)[~CAT].any()
    assert 0.01 < _changed(nothing).mean() < 0.3
    clean = _perturbed(NO_DOG, strength=1, absent="clean")
    assert np.array_equal(clean.image, IMAGE)
    assert (clean.perturbation, clean.noise_step, clean.confidence) == (CLEAN, 0, 1.0)


def _draws(n: int = 2000, **policy: Any) -> Counter[Perturbation]:
    noise = NoisePolicy(**policy)
    return Counter(noise.draw(0, f"q{i}", query_rng(noise.seed, 0, f"q{i}")) for i in range(n))


def test_a_share_stays_clean() -> None:
    counts = _draws(clean_fraction=0.25)
    assert abs(counts[CLEAN] / 2000 - (0.25 + 0.75 / 11)) < 0.04
    assert chisquare([n for p, n in counts.items() if p != CLEAN]).pvalue > 1e-3
    assert set(_draws(50, clean_fraction=1.0)) == {CLEAN}


def test_kinds_and_their_strengths_come_as_often_as_asked() -> None:
    kinds = {"noise": 2.0, "blur": 1.0, "jpeg": 0.0, "occlusion": 0.5}
    n = 3000
    counts = _draws(n, kinds=kinds, levels=LinearLevels(5), seed=7)
    drawn = {k: w for k, w in kinds.items() if w}
    strengths = (0.25, 0.5, 0.75, 1.0)
    expected = {Perturbation(k, s): n * w / 3.5 / 5 for k, w in drawn.items() for s in strengths}
    expected |= {CLEAN: n / 5}
    assert set(counts) == set(expected)
    assert chisquare([counts[p] for p in expected], list(expected.values())).pvalue > 1e-3
    policy = NoisePolicy(kinds=kinds, levels=LinearLevels(5))
    assert policy.used_kinds == ("noise", "blur", "occlusion")
    assert policy.perturbations[0] == CLEAN
    assert sorted(policy.perturbations) == sorted(expected), "each once"


def test_another_kind_with_the_same_strengths_changes_no_strength() -> None:
    """The kind has a generator of its own, so runs with more kinds compare image by image with noise alone."""
    alone, mixed = (
        [policy.draw(2, f"q{i}", query_rng(0, 2, f"q{i}")).strength for i in range(200)]
        for policy in (NoisePolicy(), NoisePolicy(kinds={"noise": 1.0, "blur": 1.0}))
    )
    assert alone == mixed


def test_own_levels_decide_the_strengths_and_the_confidence() -> None:
    counts = {
        "yes_no": noise_counts((0, 100, 90), (0.4, 100, 70), (0.9, 100, 50)),
        "short": noise_counts((0, 100, 80), (0.4, 100, 40), (0.9, 100, 5)),
    }
    levels = AnchoredLevels.fit(counts)
    assert sorted(s for _, s in _draws(300, levels=levels)) == list(levels.strengths("noise"))
    for answer_type, expected in (("yes_no", 0.5), ("short", 0.05)):
        sample = _perturbed(SCENE, strength=0.9, levels=levels, answer_type=answer_type)
        assert sample.confidence == expected
    with pytest.raises(ValueError, match="no levels for answer type 'open'"):
        _perturbed(SCENE, strength=0.9, levels=levels, answer_type="open")


def test_kinds_without_levels_are_refused_at_once() -> None:
    levels = AnchoredLevels.fit({"short": noise_counts((0, 100, 80), (1, 100, 5))})
    NoisePolicy(levels=levels, kinds={"noise": 1.0, "blur": 0.0})
    with pytest.raises(DataError, match=r"^noise\.kinds: .* 'blur'; measured: noise: .*levels fit"):
        NoisePolicy(levels=levels, kinds={"noise": 1.0, "blur": 1.0})


def test_levels_of_a_query_are_stated_for_it(tmp_path: Path) -> None:
    """Untouched, perturbed, and with a perturbed distractor."""
    provenance = {"weights": "w", "prompt": "p", "max_pixels": None}
    kinds = {"noise": [(0, (100, 100), (60, 100)), (1, (100, 100), (20, 30))]}
    table = LevelTable({"yes_no": AnswerTypeCounts(kinds, (0.5,))}, provenance)
    write_likelihoods(tmp_path / "l.parquet", measured_likelihoods({"hard": 0.1, "easy": 0.9}), provenance)
    levels = AnchoredLevels(table=table, grid=1, likelihoods=tmp_path / "l.parquet")
    for query, untouched, perturbed in (("hard", 0.6, 0.2), ("easy", 1.0, 0.3)):
        stated = [_perturbed(SCENE, query=query, strength=s, levels=levels).confidence for s in (0, 1)]
        assert stated == [untouched, perturbed]
        settings: dict[str, Any] = {"levels": levels, "distractor_probability": 1.0}
        distracted = [_perturbed(SCENE, epoch, query, **settings) for epoch in range(5)]
        assert {sample.confidence for sample in distracted} == {untouched}
        assert any(_changed(sample)[CAT].any() for sample in distracted)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "l.parquet"))):
        _perturbed(SCENE, query="unknown", levels=levels)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"clean_fraction": 1.5}, "noise.clean_fraction must be in [0, 1], found 1.5"),
        ({"distractor_probability": -0.1}, "noise.distractor_probability must be in [0, 1], found -0.1"),
        ({"wrong_answer_rate": 1.1}, "noise.wrong_answer_rate must be in [0, 1], found 1.1"),
        ({"kinds": {"rain": 1.0}}, "'rain': expected noise, blur, motion_blur, pixelation, occlusion"),
        ({"kinds": {}}, "noise.kinds must be frequencies of at least 0, one of them above 0, found {}"),
        ({"kinds": {"noise": 2.0, "blur": -1.0}}, "noise.kinds"),
        ({"kinds": {"noise": float("inf")}}, "noise.kinds"),
        ({"seed": -1}, "noise.seed must be at least 0, found -1"),
        ({"dilate": -0.1}, "noise.dilate must be a finite number of at least 0, found -0.1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=re.escape(says)):
        NoisePolicy(**settings)


def test_the_step_of_the_noise_is_a_share_of_any_schedule() -> None:
    assert _perturbed(SCENE, strength=0.5, schedule=CosineSchedule(steps=50)).noise_step == 25


def test_noise_means_the_same_on_a_large_photograph(processor: Any) -> None:
    """Standard deviations of the model's pixel values, on the scale [-1, 1]."""
    photo = np.full((1200, 1600, 3), 128, dtype=np.uint8)
    everything = LoadedImage(photo, (np.ones((1200, 1600), dtype=bool),), ())
    expected = np.sqrt(1 - NoisePolicy().schedule.alpha_bar(300))
    assert 0.3 < expected < 0.6, "strong enough to see, weak enough not to be clipped much"
    image_processor = processor.image_processor
    model, native = (
        _perturbed(everything, strength=0.3, processor=image_processor, resolution=resolution)
        for resolution in ("model", "native")
    )
    given = image_processor(images=[model.image, native.image], return_tensors="pt")["pixel_values"]
    seen, seen_of_native = (float(values.std()) for values in given)
    assert (model.image.shape, native.image.shape) == ((96, 96, 3), photo.shape)
    assert seen == pytest.approx(expected, rel=0.05)
    assert native.image.std() / 127.5 == pytest.approx(expected, rel=0.05)
    assert seen_of_native < 0.15 * expected
    assert (photo == 128).all(), "the image given is left alone"


# --- Noise with linear levels is bit for bit what it was when noise was the only kind: runs of the paper's preset repeat

Y, X = np.mgrid[:120, :160]
PATTERN = np.stack([(3 * X + 2 * Y) % 256, (X * Y) % 256, (5 * X + 200 - Y) % 256], axis=-1).astype(np.uint8)
ROUND = np.hypot(X - 50, Y - 40) < 30
CORNER = (Y > 70) & (X > 90) & (X < 150) & (Y < 110)
PATTERNED = LoadedImage(PATTERN, (ROUND,), (CORNER,))
NATIVE = {"resolution": "native", "distractor_probability": 0.0}

CASES: dict[str, tuple[LoadedImage, dict[str, Any], str]] = {
    "the paper's preset": (PATTERNED, NATIVE, "e6563cbd1b52d010"),
    "noise named": (PATTERNED, {**NATIVE, "kinds": {"noise": 7.0, "blur": 0.0}}, "e6563cbd1b52d010"),
    "the model's resolution": (PATTERNED, {}, "608825d40983e3c1"),
    "distractors": (PATTERNED, {**NATIVE, "distractor_probability": 0.5}, "3fe6d096e8894699"),
    "clean images": (PATTERNED, {"clean_fraction": 0.4, "seed": 3}, "8b500c4ac6f43fe5"),
    "wrong answers": (PATTERNED, {"wrong_answer_rate": 1.0}, "addb1542c107b0ea"),
    "an absent object": (LoadedImage(PATTERN, (), (CORNER,)), {}, "0af19cb7914a4096"),
    "no regions": (LoadedImage(PATTERN, (), ()), {}, "230add7a224f7685"),
    "boxes": (PATTERNED, {"shape": "box", "dilate": 0.1, "schedule": LinearSchedule()}, "c2d13cdf71cf1f2d"),
    "sigmoid schedule": (PATTERNED, {"schedule": SigmoidSchedule()}, "d808361ab5746981"),
    "six levels": (PATTERNED, {"levels": LinearLevels(6)}, "bebf894394912990"),
}


@pytest.mark.parametrize("case", CASES)
def test_samples_are_what_they_were(processor: Any, case: str) -> None:
    """The digest of four queries in three epochs."""
    loaded, settings, expected = CASES[case]
    result = hashlib.sha256()
    for i in range(12):
        query = Query(f"q{i}", "x.png", "What is it?", "a dog", "short")
        policy, wrong = NoisePolicy(**settings), ("a cat", "a cow")
        sample = perturb_query(query, loaded, policy, processor.image_processor, i // 4, wrong=wrong)
        result.update(sample.image.tobytes())
        facts = (sample.image.shape, sample.confidence, sample.noise_step, sample.wrong_answer)
        result.update(repr(facts).encode())
    assert result.hexdigest()[:16] == expected


# --- Wrong answers in training responses: their rate and their choice ----------------------------------------------------


def _mistaken(number: int, rate: float = 1.0, **settings: Any) -> Sample:
    settings = {"wrong": ("No",), "wrong_answer_rate": rate, **settings}
    return _perturbed(SMALL, query=f"q{number}", **settings)


def _fits(wrong: int, n: int, share: float) -> bool:
    if share in (0.0, 1.0):
        return wrong == n * share
    return binomtest(wrong, n, share).pvalue > 1e-4


@pytest.mark.parametrize("wrong_answer_rate", [1.0, 0.4])
def test_a_response_is_as_often_wrong_as_its_confidence_says(wrong_answer_rate: float) -> None:
    samples = [_mistaken(i, wrong_answer_rate, distractor_probability=0.2) for i in range(800)]
    for confidence in sorted({s.confidence for s in samples}):
        of_level = [s for s in samples if s.confidence == confidence]
        assert len(of_level) > 40
        wrong = sum(s.wrong_answer is not None for s in of_level)
        assert _fits(wrong, len(of_level), wrong_answer_rate * (1 - confidence)), confidence
    assert {s.confidence for s in samples} == {i / 10 for i in range(11)}


def test_the_confidence_counts_and_not_the_noise() -> None:
    # Half of all yes/no questions are answered correctly without any evidence.
    lowest = {"yes_no": 50, "short": 0}
    counts = {kind: noise_counts((0, 100, 100), (1, 100, n)) for kind, n in lowest.items()}
    levels = AnchoredLevels.fit(counts)
    for kind, share in (("yes_no", 0.5), ("short", 1.0)):
        for strength, wrong in ((0, 0.0), (1, share)):
            samples = [_mistaken(i, strength=strength, levels=levels, answer_type=kind) for i in range(150)]
            assert _fits(sum(s.wrong_answer is not None for s in samples), 150, wrong)


def test_wrong_answers_are_drawn_alike_often_as_a_pure_function_of_seed_epoch_and_id() -> None:
    wrong = ("cat", "car", "tree")

    def drawn(**settings: Any) -> list[str]:
        samples = [_mistaken(i, strength=1, wrong=wrong, **settings) for i in range(300)]
        epoch = settings.get("epoch", 0)
        assert {(s.query.answer, s.wrong, s.epoch) for s in samples} == {("Yes", wrong, epoch)}
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
    settings = {"epoch": 2, "distractor_probability": 0.3, "clean_fraction": 0.1}
    for i in range(100):
        plain, mistaken = (_mistaken(i, rate, **settings) for rate in (0.0, 1.0))
        assert np.array_equal(plain.image, mistaken.image)
        changed += mistaken.wrong_answer is not None
        assert plain._replace(image=IMAGE) == mistaken._replace(image=IMAGE, wrong_answer=None)
    assert 20 < changed < 60


def test_mistakes_have_a_stream_of_their_own() -> None:
    # The first draw of the noise generator decides which samples stay clean; for the other samples it is above 0.5.
    levels = OnlyAt(drawn=(0.4, 0.5, 0.6))
    rows = [_mistaken(i, clean_fraction=0.5, levels=levels) for i in range(900)]
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
    query = replace(_query(), answer=gold, regions=_regions("dog", "cat"))
    assert opposite(query) == (expected,)
    assert tuple(Listed(_query()).wrong_answers(query)) == (expected,)
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
    assert list(Listed(_query()).wrong_answers(query)) == expected
    assert list(Listed(_query()).wrong_answers(replace(query, answer_type="open"))) == []


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
    settings: dict[str, Any] = {"levels": OnlyAt(), "resolution": "native", "distractor_probability": 0}
    policy = NoisePolicy(wrong_answer_rate=1.0, **settings)
    with pytest.warns(
        UserWarning, match="data: 4 of 12 queries have no wrong answer .*`wrong_answer_rate`.*: 'Who"
    ):
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
