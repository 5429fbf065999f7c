"""The perturbation of a query and its confidence: purity, frequencies, regions, and resolution."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from vlm_calibration.data.noise import NoisePolicy, Sample, perturb_query, query_rng
from vlm_calibration.perturbation.by_kind import KIND_NAMES
from vlm_calibration.perturbation.level_table import AnswerTypeCounts, LevelTable, write_likelihoods
from vlm_calibration.perturbation.levels import (
    CLEAN,
    AnchoredLevels,
    LinearLevels,
    Perturbation,
)
from vlm_calibration.perturbation.noise import add_region_noise
from vlm_calibration.perturbation.schedules import CosineSchedule, LinearSchedule, SigmoidSchedule
from vlm_calibration.records import DataError, LoadedImage, Query

from ..level_tables import OnlyAt, measured_likelihoods, noise_counts

DOG = np.zeros((96, 96), dtype=bool)
DOG[10:40, 10:50] = True
CAT = np.zeros((96, 96), dtype=bool)
CAT[60:90, 55:90] = True
IMAGE = np.random.default_rng(0).integers(60, 200, (96, 96, 3), dtype=np.uint8)
SCENE = LoadedImage(IMAGE, (DOG,), (CAT,))
NO_DOG = LoadedImage(IMAGE, (), (CAT,))


def _query(identifier: str = "q", answer_type: str = "yes_no") -> Query:
    return Query(identifier, "x.png", "A dog?", "Yes", answer_type, objects=("dog",))  # type: ignore[arg-type]


def _perturbed(
    loaded: LoadedImage,
    epoch: int = 0,
    query: str = "q",
    strength: float | None = None,
    processor: Any = None,
    kind: str = "noise",
    **policy: Any,
) -> Sample:
    perturbation = None if strength is None else Perturbation(kind, strength)
    resolution = {} if processor is not None else {"resolution": "native"}
    settings = {"distractor_probability": 0.0, **resolution, **policy}
    return perturb_query(_query(query), loaded, NoisePolicy(**settings), processor, epoch, perturbation)


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
    sample = _perturbed(
        SCENE,
        strength=0.7,
        kind=kind,
        kinds={kind: 1.0},
        resolution=resolution,
        processor=processor.image_processor,
    )
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
    expected = {
        Perturbation(k, s): n * w / sum(drawn.values()) / 5
        for k, w in drawn.items()
        for s in (0.25, 0.5, 0.75, 1.0)
    } | {CLEAN: n / 5}
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
    policy = NoisePolicy(levels=levels, resolution="native")
    strongest = Perturbation("noise", 0.9)
    for answer_type, expected in (("yes_no", 0.5), ("short", 0.05)):
        sample = perturb_query(_query("q", answer_type), SCENE, policy, None, 0, strongest)
        assert sample.confidence == expected
    distracted = replace(policy, distractor_probability=1.0)
    samples = [perturb_query(_query(f"q{i}", "short"), SCENE, distracted, None, 0) for i in range(9)]
    assert {s.confidence for s in samples} == {0.8}
    assert any(_changed(s)[CAT].any() for s in samples)
    with pytest.raises(ValueError, match="no levels for answer type 'open'"):
        perturb_query(_query("q", "open"), SCENE, policy, None, 0, strongest)


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
        distracted = [
            _perturbed(SCENE, epoch, query, levels=levels, distractor_probability=1.0) for epoch in range(5)
        ]
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


@pytest.mark.parametrize("steps", [50, 500, 2000])
def test_strengths_are_shares_of_any_schedule(steps: int) -> None:
    sample = _perturbed(SCENE, strength=0.5, schedule=CosineSchedule(steps=steps))
    assert sample.noise_step == steps // 2
    expected = add_region_noise(IMAGE, DOG, steps // 2, CosineSchedule(steps=steps), 1)[DOG].std()
    assert sample.image[DOG].std() == pytest.approx(expected, rel=0.1)


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
    seen, seen_of_native = (
        float(image_processor(images=[sample.image], return_tensors="pt")["pixel_values"].std())
        for sample in (model, native)
    )
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
