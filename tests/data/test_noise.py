"""The perturbation of a query and its confidence: purity, frequencies, regions, and resolution."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from vlm_calibration.data.noise import NoisePolicy, Sample, perturb_query, query_rng
from vlm_calibration.perturbation.levels import AnchoredLevels, LinearLevels, StepCount
from vlm_calibration.perturbation.schedules import CosineSchedule
from vlm_calibration.perturbation.transform import RegionNoise
from vlm_calibration.records import DataError, LoadedImage, Query

DOG = np.zeros((96, 96), dtype=bool)
DOG[10:40, 10:50] = True
CAT = np.zeros((96, 96), dtype=bool)
CAT[60:90, 55:90] = True
IMAGE = np.random.default_rng(0).integers(60, 200, (96, 96, 3), dtype=np.uint8)
SCENE = LoadedImage(IMAGE, (DOG,), (CAT,))
NO_DOG = LoadedImage(IMAGE, (), (CAT,))
EMPTY = LoadedImage(IMAGE, (), ())


def _query(identifier: str = "q", answer_type: str = "yes_no") -> Query:
    return Query(identifier, "x.png", "A dog?", "Yes", answer_type, objects=("dog",))  # type: ignore[arg-type]


def _perturbed(
    loaded: LoadedImage,
    epoch: int = 0,
    query: str = "q",
    step: int | None = None,
    processor: Any = None,
    **policy: Any,
) -> Sample:
    resolution = {} if processor is not None else {"resolution": "native"}
    settings = {"distractor_probability": 0.0, **resolution, **policy}
    return perturb_query(_query(query), loaded, NoisePolicy(**settings), processor, epoch, step)


def _changed(sample: Sample, before: np.ndarray = IMAGE) -> np.ndarray:
    return (sample.image != before).any(axis=-1)


def test_a_sample_is_a_pure_function_of_seed_epoch_and_id() -> None:
    def key(sample: Sample) -> tuple[bytes, float, int]:
        return sample.image.tobytes(), sample.confidence, sample.step

    expected = key(_perturbed(SCENE, epoch=3, seed=5))
    np.random.default_rng(0).random(100)
    np.random.seed(1)  # noqa: NPY002  (the legacy stream must not matter)
    for identifier in ("a", "b"):
        _perturbed(SCENE, epoch=3, seed=5, query=identifier)
    assert key(_perturbed(SCENE, epoch=3, seed=5)) == expected
    changed = [
        key(_perturbed(SCENE, epoch=4, seed=5)),
        key(_perturbed(SCENE, epoch=3, seed=6)),
        key(_perturbed(SCENE, epoch=3, seed=5, query="r")),
    ]
    assert len({expected, *changed}) == 4


def test_epochs_and_queries_have_unrelated_streams() -> None:
    draws = [
        query_rng(s, e, q).random() for s in range(5) for e in range(5) for q in ("a", "b", "ab", "é", "")
    ]
    assert len(set(draws)) == len(draws)
    assert query_rng(0, 1, "x").random() == query_rng(0, 1, "x").random()


def test_the_image_given_is_left_alone() -> None:
    before = IMAGE.copy()
    _perturbed(SCENE, step=1000)
    assert np.array_equal(IMAGE, before)


@pytest.mark.parametrize("resolution", ["native", "model"])
@pytest.mark.parametrize("step", [100, 500, 1000])
def test_only_the_evidence_changes(processor: Any, resolution: str, step: int) -> None:
    sample = _perturbed(SCENE, step=step, resolution=resolution, processor=processor.image_processor)
    changed = _changed(sample)
    assert not changed[~DOG].any()
    assert changed[DOG].mean() > 0.9
    assert (sample.step, sample.confidence) == (step, 1 - step / 1000)


def test_at_full_confidence_nothing_changes() -> None:
    sample = _perturbed(SCENE, step=0)
    assert np.array_equal(sample.image, IMAGE)
    assert (sample.step, sample.confidence) == (0, 1.0)


def test_a_box_and_a_grown_region_cover_more() -> None:
    round_dog = np.hypot(*(np.mgrid[:96, :96] - 30)) < 15
    loaded = LoadedImage(IMAGE, (round_dog,), ())
    areas = [
        _changed(_perturbed(loaded, step=1000, **how)).sum()
        for how in ({}, {"dilate": 0.1}, {"shape": "box"}, {"shape": "box", "dilate": 0.1})
    ]
    assert areas[0] < areas[1] < areas[3]
    assert areas[0] < areas[2] < areas[3]


def test_all_evidence_is_noised_together() -> None:
    changed = _changed(_perturbed(LoadedImage(IMAGE, (DOG, CAT), ()), step=1000))
    assert changed[DOG].mean() > 0.9
    assert changed[CAT].mean() > 0.9


def test_a_distractor_keeps_the_clean_confidence_and_the_evidence() -> None:
    samples = [
        _perturbed(SCENE, query=f"q{i}", distractor_probability=1.0, level_weights=[0] * 10 + [1])
        for i in range(50)
    ]
    for sample in samples:
        assert np.array_equal(sample.image[DOG], IMAGE[DOG])
        assert _changed(sample)[CAT].mean() > 0.9
        assert (sample.step, sample.confidence) == (0, 1.0)


def test_distractors_come_as_often_as_asked() -> None:
    noised = [
        _perturbed(SCENE, query=f"q{i}", distractor_probability=0.3, level_weights=[0] * 10 + [1])
        for i in range(600)
    ]
    share = np.mean([s.step == 0 for s in noised])
    assert abs(share - 0.3) < 0.06


def test_a_given_step_never_goes_to_a_distractor() -> None:
    for i in range(30):
        sample = _perturbed(SCENE, query=f"q{i}", step=1000, distractor_probability=1.0)
        assert sample.step == 1000
        assert not _changed(sample)[CAT].any()


@pytest.mark.parametrize(("loaded", "where"), [(NO_DOG, CAT), (EMPTY, None)])
def test_absent_objects_another_region_is_noised(loaded: LoadedImage, where: np.ndarray | None) -> None:
    sample = _perturbed(loaded, step=1000)
    assert (sample.step, sample.confidence) == (1000, 0.0)
    changed = _changed(sample)
    if where is None:
        assert 0.01 < changed.mean() < 0.3
    else:
        assert changed[where].mean() > 0.9
        assert not changed[~where].any()


def test_absent_objects_clean() -> None:
    sample = _perturbed(NO_DOG, step=1000, absent="clean")
    assert np.array_equal(sample.image, IMAGE)
    assert (sample.step, sample.confidence) == (0, 1.0)


def _draws(n: int = 4000, **policy: Any) -> Counter[int]:
    noise_policy = NoisePolicy(**policy)
    return Counter(noise_policy.draw_step(query_rng(0, 0, f"q{i}")) for i in range(n))


def test_levels_come_alike_often() -> None:
    counts = _draws()
    assert sorted(counts) == list(LinearLevels().steps)
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_level_weights_and_clean_fraction() -> None:
    weights = [0.0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    counts = _draws(level_weights=weights, clean_fraction=0.25)
    assert abs(counts[0] / 4000 - 0.25) < 0.025
    drawn = np.array([counts[s] for s in LinearLevels().steps])[1:]
    relative = np.array(weights[1:])
    assert (drawn[relative == 0] == 0).all()
    expected = relative / relative.sum() * drawn.sum()
    assert chisquare(drawn[relative > 0], expected[relative > 0]).pvalue > 1e-3


def test_own_levels_decide_the_steps_and_the_confidence() -> None:
    counts = {
        "yes_no": [StepCount(0, 100, 90), StepCount(400, 100, 70), StepCount(900, 100, 50)],
        "short": [StepCount(0, 100, 80), StepCount(400, 100, 40), StepCount(900, 100, 5)],
    }
    levels = AnchoredLevels.fit(counts)
    assert sorted(_draws(300, levels=levels)) == [0, 400, 900]
    policy = NoisePolicy(levels=levels, resolution="native")
    for kind, expected in (("yes_no", 0.5), ("short", 0.05)):
        assert perturb_query(_query("q", kind), SCENE, policy, None, 0, 900).confidence == expected
    distracted = NoisePolicy(
        levels=levels, resolution="native", distractor_probability=1.0, level_weights=[0, 0, 1]
    )
    assert perturb_query(_query("q", "short"), SCENE, distracted, None, 0).confidence == 0.8
    with pytest.raises(ValueError, match="no levels were measured for answer type 'open'"):
        perturb_query(_query("q", "open"), SCENE, policy, None, 0, 900)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"clean_fraction": 1.5}, "noise.clean_fraction must be in [0, 1], found 1.5"),
        ({"clean_fraction": float("nan")}, "noise.clean_fraction"),
        ({"distractor_probability": -0.1}, "noise.distractor_probability must be in [0, 1], found -0.1"),
        ({"wrong_answer_rate": 1.1}, "noise.wrong_answer_rate must be in [0, 1], found 1.1"),
        ({"wrong_answer_rate": float("nan")}, "noise.wrong_answer_rate"),
        ({"level_weights": [1.0, 2.0]}, "noise.level_weights must be 11 numbers"),
        ({"level_weights": [-1.0] + [1.0] * 10}, "noise.level_weights"),
        ({"level_weights": [0.0] * 11}, "noise.level_weights"),
        ({"level_weights": [float("nan")] + [1.0] * 10}, "noise.level_weights"),
        ({"level_weights": [float("inf")] + [1.0] * 10}, "noise.level_weights"),
        ({"schedule": CosineSchedule(steps=500)}, "goes up to step 1000 but noise.schedule has 500"),
        ({"schedule": CosineSchedule(steps=2000)}, "goes up to step 1000 but noise.schedule has 2000"),
        ({"seed": -1}, "noise.seed must be at least 0, found -1"),
        ({"dilate": -0.1}, "noise.dilate must be a finite number of at least 0, found -0.1"),
        ({"dilate": float("inf")}, "noise.dilate"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        NoisePolicy(**settings)
    assert says in str(caught.value)


def _seen_std(processor: Any, sample: Sample) -> float:
    """Standard deviation of the model's pixel values, on the scale [-1, 1]."""
    pixels = processor.image_processor(images=[sample.image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 96, 96)
    return float(pixels.std())


def test_noise_means_the_same_on_a_large_photograph(processor: Any) -> None:
    photo = np.full((1500, 2000, 3), 128, dtype=np.uint8)
    everything = LoadedImage(photo, (np.ones((1500, 2000), dtype=bool),), ())
    step = 300
    expected = np.sqrt(1 - NoisePolicy().schedule.alpha_bar(step))
    assert 0.3 < expected < 0.6, "strong enough to see, weak enough not to be clipped much"

    sample = _perturbed(everything, step=step, processor=processor.image_processor, resolution="model")
    assert sample.image.shape == (96, 96, 3)
    assert abs(_seen_std(processor, sample) / expected - 1) < 0.05

    native = _perturbed(everything, step=step, processor=processor.image_processor, resolution="native")
    assert native.image.shape == photo.shape
    assert native.image.std() / 127.5 == pytest.approx(expected, rel=0.05)
    assert _seen_std(processor, native) < 0.15 * expected


def test_masks_follow_the_image_to_the_models_resolution(processor: Any) -> None:
    photo = np.full((480, 640, 3), 128, dtype=np.uint8)
    mask = np.zeros((480, 640), dtype=bool)
    mask[120:240, 320:480] = True
    sample = _perturbed(LoadedImage(photo, (mask,), ()), step=1000, processor=processor.image_processor)
    expected = np.zeros((96, 96), dtype=bool)
    expected[24:48, 48:72] = True
    changed = (sample.image != 128).any(axis=-1)
    assert not changed[~expected].any()
    assert changed[expected].mean() > 0.9


def test_the_noise_is_that_of_the_albumentations_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def record(self: Any, **call: Any) -> dict[str, Any]:
        calls.append(call)
        return {"image": np.zeros_like(call["image"])}

    monkeypatch.setattr(RegionNoise, "__call__", record)
    assert not _perturbed(SCENE, step=300).image.any()
    assert calls[0]["image"] is IMAGE
    assert (calls[0]["mask"] == DOG).all()
    assert calls[0]["step"] == 300


@pytest.mark.slow
def test_albumentations_is_imported_where_images_are_noised_and_nowhere_else() -> None:
    code = (
        "import sys\n"
        "from vlm_calibration.data.dataset import EvalSplit, PerturbedQueries\n"
        "from vlm_calibration.data.noise import NoisePolicy\n"
        "from vlm_calibration.demo.source import DemoSource\n"
        "for noise in ('none', 'drawn'):\n"
        "    data = PerturbedQueries({'': EvalSplit(DemoSource(scenes=1), noise)}, NoisePolicy(resolution='native'), None)\n"
        "    data[0, 0] if noise == 'none' else None\n"
        "    print('albumentations' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.split() == ["False", "True"]
