"""Photographs after the noise policy and the processor, compared with the processor alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from matplotlib import cbook
from PIL import Image

from vlm_calibration.data.noise import NoisePolicy, perturb_query
from vlm_calibration.data.resolution import check_resolution, resize_to_model
from vlm_calibration.demo.questions import scene_seed
from vlm_calibration.demo.scenes import render_scene
from vlm_calibration.perturbation.levels import CLEAN, Perturbation
from vlm_calibration.records import LoadedImage, Query

from ..models.processors import published_family


def photographs() -> dict[str, np.ndarray]:
    """A portrait in large, small, wide and tall form, and a rendered scene with sensor noise."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        portrait = Image.open(file).convert("RGB")
        portrait.load()
    width, height = portrait.size
    shapes = {
        "portrait": portrait,
        "large": portrait.resize((3 * width, 3 * height), Image.Resampling.LANCZOS),
        "small": portrait.crop((150, 60, 211, 143)),
        "wide": portrait.crop((0, 100, width, 220)),
        "tall": portrait.crop((200, 0, 330, height)),
    }
    grain = np.random.default_rng(0).normal(0, 12, (480, 640, 3))
    scene = Image.fromarray(render_scene(scene_seed("test", 0)).image).resize((640, 480))
    drawn = np.clip(np.asarray(scene) + grain, 0, 255).astype(np.uint8)
    return {**{name: np.array(image) for name, image in shapes.items()}, "drawn": drawn}


PHOTOGRAPHS = photographs()


@pytest.fixture(
    scope="module", params=["llava_1_5_7b", "qwen3_vl_8b", "internvl3_8b", "gemma3_4b", "smolvlm2_500m"]
)
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """Name and image processor; SmolVLM's resizes twice."""
    processor = published_family(request.param).processor
    check_resolution(processor)
    return request.param, processor.image_processor


def _levels(image_processor: Any, image: np.ndarray) -> torch.Tensor:
    """The processor's pixel values in 0..255, by view or row of patches."""
    pixels = image_processor(images=[image], do_normalize=False, return_tensors="pt")["pixel_values"]
    return (pixels[0] if pixels.ndim == 5 else pixels) * 255


@pytest.mark.slow
@pytest.mark.parametrize("photograph", ["large", "small", "tall", "drawn"])
def test_pixels_are_those_of_the_processor_alone(family: tuple[str, Any], photograph: str) -> None:
    name, image_processor = family
    image = PHOTOGRAPHS[photograph]
    alone = _levels(image_processor, image)
    ours = _levels(image_processor, resize_to_model(image_processor, image))
    assert ours.shape == alone.shape
    away = (ours - alone).abs().flatten(1).amax(1)
    differing = int((away > 0.01).sum())
    assert differing <= (name == "internvl3_8b"), (
        "its overview image is made from the file, not from the tiles"
    )
    assert (ours - alone).abs().flatten(1).mean(1).max() < 4


def _perturbed(
    image_processor: Any, image: np.ndarray, mask: np.ndarray, perturbation: Perturbation
) -> np.ndarray:
    query = Query("q", "x.png", "A hat?", "Yes", "yes_no", objects=("hat",))
    loaded = LoadedImage(image, (mask,), ())
    return perturb_query(
        query, loaded, NoisePolicy(), image_processor, epoch=0, perturbation=perturbation
    ).image


def test_a_sample_without_noise_is_what_the_processor_makes_of_the_file(family: tuple[str, Any]) -> None:
    _, image_processor = family
    image = PHOTOGRAPHS["portrait"]
    sample = _perturbed(image_processor, image, np.ones(image.shape[:2], dtype=bool), CLEAN)
    assert torch.equal(_levels(image_processor, sample), _levels(image_processor, image))


def test_noise_leaves_all_other_pixels_to_the_processor(family: tuple[str, Any]) -> None:
    _, image_processor = family
    image = PHOTOGRAPHS["portrait"]
    mask = np.zeros(image.shape[:2], dtype=bool)
    mask[: len(mask) // 2] = True
    sample, alone = (
        _perturbed(image_processor, image, mask, Perturbation("noise", 0.5)),
        resize_to_model(image_processor, image),
    )
    assert sample.shape == alone.shape
    changed = (sample != alone).any(-1).mean(1)
    assert changed[: len(changed) // 2 - 1].min() > 0.5
    assert changed[len(changed) // 2 + 1 :].max() == 0


@pytest.mark.parametrize("kind", ["Gemma3", "SmolVLM", "Qwen2VL"])
def test_processors_that_resize_with_pillow_are_followed_too(kind: str) -> None:
    image_processor = getattr(transformers, f"{kind}ImageProcessorPil")()
    check_resolution(SimpleNamespace(image_processor=image_processor))
    image = PHOTOGRAPHS["portrait"]
    alone, ours = (_levels(image_processor, i) for i in (image, resize_to_model(image_processor, image)))
    assert (alone - ours).abs().max() < 0.01


def test_images_other_than_8_bit_rgb_are_refused() -> None:
    with pytest.raises(TypeError, match="uint8"):
        resize_to_model(transformers.SiglipImageProcessor(), np.zeros((8, 8, 3)))
