"""Noise with linear levels is bit for bit what it was when noise was the only kind of perturbation.

The digests are of that version, over images, confidences, noise steps and wrong answers; so a run of the paper's preset can be repeated.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from vlm_calibration.data.noise import NoisePolicy, perturb_query
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.perturbation.schedules import LinearSchedule, SigmoidSchedule
from vlm_calibration.records import LoadedImage, Query

Y, X = np.mgrid[:120, :160]
IMAGE = np.stack([(3 * X + 2 * Y) % 256, (X * Y) % 256, (5 * X + 200 - Y) % 256], axis=-1).astype(np.uint8)
DOG = np.hypot(X - 50, Y - 40) < 30
CAT = (Y > 70) & (X > 90) & (X < 150) & (Y < 110)
SCENE = LoadedImage(IMAGE, (DOG,), (CAT,))
NATIVE = {"resolution": "native", "distractor_probability": 0.0}

CASES: dict[str, tuple[LoadedImage, dict[str, Any], str]] = {
    "the paper's preset": (SCENE, NATIVE, "e6563cbd1b52d010c4faba4773b504d3"),
    "the model's resolution": (SCENE, {}, "608825d40983e3c1546330ff1497f54c"),
    "distractors": (
        SCENE,
        {"resolution": "native", "distractor_probability": 0.5},
        "3fe6d096e88946997c5f605b49a99ff7",
    ),
    "clean images": (SCENE, {"clean_fraction": 0.4, "seed": 3}, "8b500c4ac6f43fe555036c16cd9b916e"),
    "wrong answers": (SCENE, {"wrong_answer_rate": 1.0}, "addb1542c107b0ea118eca12006c7c3b"),
    "an absent object": (LoadedImage(IMAGE, (), (CAT,)), {}, "0af19cb7914a4096b584377267e30a1a"),
    "no regions": (LoadedImage(IMAGE, (), ()), {}, "230add7a224f7685b50ffc4210c30396"),
    "boxes, linear schedule": (
        SCENE,
        {"shape": "box", "dilate": 0.1, "schedule": LinearSchedule()},
        "c2d13cdf71cf1f2d7b228d1eefcdb996",
    ),
    "sigmoid schedule": (SCENE, {"schedule": SigmoidSchedule()}, "d808361ab5746981d38ddfce27034495"),
    "six levels": (SCENE, {"levels": LinearLevels(6)}, "bebf8943949129904fa1f9add76d9766"),
}


def digest(loaded: LoadedImage, policy: NoisePolicy, image_processor: Any) -> str:
    """The digest of four queries in three epochs."""
    result = hashlib.sha256()
    for i in range(12):
        query = Query(f"q{i}", "x.png", "What is it?", "a dog", "short")
        sample = perturb_query(query, loaded, policy, image_processor, i // 4, wrong=("a cat", "a cow"))
        result.update(sample.image.tobytes())
        facts = (sample.image.shape, sample.confidence, sample.noise_step, sample.wrong_answer)
        result.update(repr(facts).encode())
    return result.hexdigest()[:32]


@pytest.mark.parametrize("case", CASES)
def test_samples_are_what_they_were(processor: Any, case: str) -> None:
    loaded, settings, expected = CASES[case]
    assert digest(loaded, NoisePolicy(**settings), processor.image_processor) == expected


def test_naming_noise_as_the_only_kind_changes_nothing(processor: Any) -> None:
    for kinds in ({"noise": 1.0}, {"noise": 7.0, "blur": 0.0}):
        policy = NoisePolicy(**NATIVE, kinds=kinds)  # type: ignore[arg-type]
        assert digest(SCENE, policy, None) == CASES["the paper's preset"][2]
