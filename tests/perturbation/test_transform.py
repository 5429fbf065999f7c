import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from vlm_calibration.perturbation.by_kind import perturb
from vlm_calibration.perturbation.noise import add_region_noise
from vlm_calibration.perturbation.regions import region_mask
from vlm_calibration.perturbation.schedules import CosineSchedule, LinearSchedule, schedule_by_name
from vlm_calibration.perturbation.transform import RegionNoise

# isort: split
import albumentations as A


@pytest.fixture
def image():
    return np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.fixture
def mask():
    mask = np.zeros((48, 64), dtype=bool)
    mask[10:30, 20:45] = True
    mask[12:15, 22:25] = False
    return mask


def test_it_is_perturb_with_the_mask_and_keys_of_the_call(image, mask):
    for schedule in ("linear", "cosine", "sigmoid"):
        result = RegionNoise(schedule)(image=image, mask=mask, confidence=0.3, seed=(1, 2, 3))
        np.testing.assert_array_equal(
            result["image"], perturb(image, mask, 0.3, schedule=schedule, seed=(1, 2, 3))
        )
        np.testing.assert_array_equal(result["mask"], mask)


def test_a_call_may_pass_the_step_and_any_schedule(image, mask):
    for schedule in (CosineSchedule(steps=5), LinearSchedule(beta_end=0.01)):
        transform = RegionNoise(schedule)
        result = transform(image=image, mask=mask, step=4, seed=7)["image"]
        np.testing.assert_array_equal(result, add_region_noise(image, mask, 4, schedule, 7))
        used = transform.get_applied_params()
        assert (used["strength"], used["step"], used["seed"]) == (4 / schedule.steps, 4, 7)
        again = A.from_dict(json.loads(json.dumps(A.to_dict(transform))))
        assert again.schedule == schedule


def test_at_full_confidence_the_image_is_bit_identical(image, mask):
    np.testing.assert_array_equal(
        A.Compose([RegionNoise()])(image=image, mask=mask, confidence=1.0)["image"], image
    )


def test_it_follows_geometry_that_comes_before_it(image, mask):
    transform = A.Compose([A.HorizontalFlip(p=1), RegionNoise()], strict=True)
    result = transform(image=image, mask=mask, confidence=0.2, seed=4)
    expected = perturb(image[:, ::-1], mask[:, ::-1], 0.2, schedule="linear", seed=4)
    np.testing.assert_array_equal(result["image"], expected)
    np.testing.assert_array_equal(result["mask"], mask[:, ::-1])


def test_shape_and_dilation(image, mask):
    result = RegionNoise(shape="box", dilate=0.2)(image=image, mask=mask, confidence=0.0, seed=0)
    region = region_mask(mask, shape="box", dilate=0.2)
    assert region.sum() > mask.sum()
    np.testing.assert_array_equal(np.any(result["image"] != image, axis=-1) & ~region, False)
    expected = add_region_noise(image, region, 1000, schedule_by_name("linear"), 0)
    np.testing.assert_array_equal(result["image"], expected)


def test_an_explicit_seed_makes_every_call_the_same(image, mask):
    first, second = (RegionNoise(seed=seed)(image=image, mask=mask)["image"] for seed in (5, 5))
    np.testing.assert_array_equal(first, second)
    transform = RegionNoise(seed=5)
    np.testing.assert_array_equal(transform(image=image, mask=mask)["image"], first)
    np.testing.assert_array_equal(transform(image=image, mask=mask)["image"], first)
    seen = {
        RegionNoise(seed=seed, strengths=[0.5])(image=image, mask=mask)["image"].tobytes()
        for seed in range(5)
    }
    assert len(seen) == 5


def test_a_seeded_compose_draws_a_reproducible_sequence(image, mask):
    def sequence(seed):
        transform = A.Compose([RegionNoise()], seed=seed)
        return [transform(image=image, mask=mask)["image"].tobytes() for _ in range(6)]

    assert sequence(3) == sequence(3) != sequence(4)
    assert len(set(sequence(3))) > 3


def test_levels_are_drawn_evenly_and_reported(image, mask):
    transform = RegionNoise(strengths=[1.0, 0.5, 0.0])
    transform.set_random_seed(0)
    drawn = []
    for _ in range(300):
        result = transform(image=image, mask=mask)["image"]
        used = transform.get_applied_params()
        assert used["step"] == round(used["strength"] * 1000)
        drawn.append(used["strength"])
    np.testing.assert_array_equal(
        result, perturb(image, mask, 1 - used["strength"], schedule="linear", seed=used["seed"])
    )
    for level in (1.0, 0.5, 0.0):
        assert 70 < drawn.count(level) < 130


def test_it_can_be_left_to_chance(image, mask):
    transform = RegionNoise(p=0.0)
    np.testing.assert_array_equal(transform(image=image, mask=mask, confidence=0.0)["image"], image)


def test_a_compose_survives_serialisation(image, mask):
    schedule = {"name": "cosine", "steps": 500}
    noise = RegionNoise(schedule, strengths=[0.2, 0.4], shape="box", dilate=0.1, seed=11, p=1.0)
    transform = A.Compose([A.HorizontalFlip(p=1), noise])
    written = json.dumps(A.to_dict(transform))
    again = A.from_dict(json.loads(written))
    assert A.to_dict(again) == json.loads(written)
    expected = transform(image=image, mask=mask)["image"]
    assert np.any(expected != image[:, ::-1])
    np.testing.assert_array_equal(again(image=image, mask=mask)["image"], expected)
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(transform))(image=image, mask=mask)["image"], expected
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "quadratic"}, "unknown noise schedule 'quadratic'"),
        ({"strengths": [0.5, 1.5]}, r"strength must be in \[0, 1\]"),
        ({"strengths": []}, "must not be empty"),
        ({"shape": "circle"}, "shape"),
        ({"schedule": {"name": "linear", "steps": 5}}, "use more steps"),
        ({"dilate": -1.0}, "dilate"),
        ({"seed": -1}, "seed"),
        ({"p": 2.0}, "p"),
    ],
)
def test_wrong_parameters_are_refused_when_it_is_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        RegionNoise(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": None}, TypeError, "mask must be a numpy array"),
        ({"mask": np.zeros((48, 64), bool)}, ValueError, "mask is empty"),
        ({"mask": np.ones((64, 48), bool)}, ValueError, "mask has shape"),
        ({"confidence": 1.5}, ValueError, "confidence must be in"),
        ({"confidence": float("nan")}, ValueError, "confidence must be in"),
        ({"strength": 0.5}, ValueError, "strength or confidence, not both"),
        ({"step": 5}, ValueError, "not two of them, got step 5"),
        ({"confidence": None, "step": 1001}, ValueError, "step must be in"),
        ({"seed": -3}, ValueError, "seed must not be negative"),
    ],
)
def test_wrong_calls_are_refused(image, mask, change, error, message):
    with pytest.raises(error, match=message):
        RegionNoise()(**({"image": image, "mask": mask, "confidence": 0.5} | change))


def test_it_needs_a_mask(image):
    with pytest.raises(ValueError, match=r"missing keys: \{'mask'\}"):
        A.Compose([RegionNoise()])(image=image)


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.slow
def test_only_this_module_imports_albumentations_and_it_stays_off_the_network():
    heavy = run_python(
        "import sys, vlm_calibration.perturbation, vlm_calibration.text\n"
        "print([name for name in ('albumentations', 'torch', 'lightning', 'transformers') if name in sys.modules])"
    )
    assert heavy == "[]"
    offline = run_python(
        "import os, socket\n"
        "os.environ.pop('NO_ALBUMENTATIONS_UPDATE', None)\n"
        "def refuse(*args, **kwargs): raise SystemExit('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import vlm_calibration.perturbation.transform\n"
        "print(os.environ['NO_ALBUMENTATIONS_UPDATE'])"
    )
    assert offline == "1"
