"""The model's image size, compared with the output of the image processors of transformers, and `data.max_pixels`, which limits it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from matplotlib import cbook
from PIL import Image

from vlm_calibration.data.module import PerturbedQueryDataModule, load_processor
from vlm_calibration.data.noise import NoisePolicy, perturb_query
from vlm_calibration.data.resolution import check_resolution, limit_pixels, resize_to_model
from vlm_calibration.perturbation.levels import CLEAN, Perturbation
from vlm_calibration.presets import read_config
from vlm_calibration.records import DataError, LoadedImage, Query

from ..models.processors import PUBLISHED, cached_family, published_family


def _built(name: str, **settings: Any) -> Any:
    return getattr(transformers, f"{name}ImageProcessor")(**settings)


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


SMOLVLM = {"size": {"longest_edge": 160}, "max_image_size": {"longest_edge": 40}}
INTERNVL = {"size": _square(48), "crop_to_patches": True}
GRIDS = [[48 * rows, 48 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
KNOWN = {
    "CLIP": _built("CLIP", size={"shortest_edge": 48}, crop_size=_square(48)),
    "CLIP_WHOLE": _built("CLIP", size={"shortest_edge": 48}, do_center_crop=False),
    "FIXED": _built("Siglip", do_resize=False),
    "SIGLIP": _built("Siglip", size={"height": 40, "width": 56}),
    "QWEN2": _built("Qwen2VL", patch_size=4, size={"shortest_edge": 16 * 16, "longest_edge": 80 * 80}),
    "SMOLVLM": _built("SmolVLM", **SMOLVLM),
    "PIXTRAL": _built("Pixtral", size={"longest_edge": 64}, patch_size=_square(8)),
    "INTERNVL": _built("GotOcr2", **INTERNVL),
    "INTERNVL_MORE": _built("GotOcr2", size=_square(30), crop_to_patches=True, min_patches=2, max_patches=15),
    "ONEVISION": _built("LlavaOnevision", size=_square(48), image_grid_pinpoints=GRIDS),
}
TILED = ("SMOLVLM", "INTERNVL", "INTERNVL_MORE", "ONEVISION")
STOCK = (
    *("CLIP", "Siglip", "Qwen2VL", "Idefics3", "SmolVLM", "Pixtral", "Llava", "LlavaOnevision", "Blip"),
    *("LlavaNext", "Llama4", "Cohere2Vision", "Idefics2", "Aria", "Siglip2", "Janus", "DeepseekVL"),
)


def _size(image_processor: Any, height: int, width: int) -> tuple[int, ...]:
    """The size (height, width) of an image after `resize_to_model`."""
    return resize_to_model(image_processor, np.zeros((height, width, 3), np.uint8)).shape[:2]


def _seen(image_processor: Any, image: np.ndarray, **settings: Any) -> torch.Tensor:
    return image_processor(images=[image], return_tensors="pt", **settings)["pixel_values"]


def _noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(st.integers(10, 260), st.integers(10, 260))
@settings(max_examples=8)
@pytest.mark.parametrize("name", sorted(KNOWN))
def test_at_that_size_the_processor_resizes_nothing(name: str, height: int, width: int) -> None:
    processor = KNOWN[name]
    image = _noise(*_size(processor, height, width))
    assert np.array_equal(resize_to_model(processor, image), image)
    if name not in TILED:
        assert torch.equal(_seen(processor, image), _seen(processor, image, do_resize=False))


def _levels(image_processor: Any, image: np.ndarray) -> torch.Tensor:
    """The processor's pixel values in 0..255, by view or row of patches."""
    pixels = _seen(image_processor, image, do_normalize=False)
    return (pixels[0] if pixels.ndim == 5 else pixels) * 255


def test_center_crop_comes_after() -> None:
    clip = KNOWN["CLIP"]
    assert _size(clip, 100, 150) == (48, 72)
    image = _noise(48, 72)
    crop = torch.from_numpy(image[:, 12:60].copy()).permute(2, 0, 1)
    assert torch.allclose(_levels(clip, image)[0], crop.float(), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SmolVLM", {**SMOLVLM, "size": {"longest_edge": 150}}),
        ("GotOcr2", {**INTERNVL, "size": {"height": 40, "width": 48}}),
        ("GotOcr2", {**INTERNVL, "max_patches": 16}),
        *((name, {}) for name in ("Mllama", "Lfm2Vl", "DeepseekVLHybrid")),
    ],
)
def test_processors_that_cannot_be_followed_are_refused(name: str, settings: dict[str, Any]) -> None:
    """The tiles of the first three would not keep their number; the last one shows an image at two resolutions."""
    processor = SimpleNamespace(image_processor=_built(name, **settings))
    with pytest.raises(DataError, match=f"behind {name}ImageProcessor: set data.noise.resolution to native"):
        check_resolution(processor)


def test_settings_of_the_processor_around_count() -> None:
    image_processor = _built("GotOcr2", size=_square(48))
    assert _size(image_processor, 100, 300) == (48, 48)
    tiles = {"crop_to_patches": True, "max_patches": 4}
    check_resolution(SimpleNamespace(image_processor=image_processor, images_kwargs=tiles))
    assert _size(image_processor, 100, 300) == (48, 3 * 48)


WHOLE = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}, "do_image_splitting": False}
"""Of a SmolVLM that enlarges an image to the longest edge, and then shrinks it to one tile."""


@pytest.mark.parametrize(
    "image_processor",
    [*KNOWN.values(), _built("SmolVLM", **WHOLE), *map(_built, STOCK)],
    ids=[*KNOWN, "SMOLVLM_WHOLE", *STOCK],
)
def test_known_and_stock_processors_pass_the_check(image_processor: Any) -> None:
    check_resolution(SimpleNamespace(image_processor=image_processor))


@pytest.mark.parametrize("name", sorted({PUBLISHED[name][0]: name for name in PUBLISHED}.values()))
def test_published_settings_pass_the_check(name: str) -> None:
    processor = published_family(name).processor
    check_resolution(processor)
    for height, width in ((480, 640), (1333, 800), (90, 100), (2160, 480)):
        size = _size(processor.image_processor, height, width)
        assert _size(processor.image_processor, *size) == size


# --- data.max_pixels -------------------------------------------------------------------------------------------------


SIDES = st.integers(8, 400)
TEXT_TOKENS = 256
"""Tokens of a prompt and its response beside the image: question, request for a confidence, chat template, answer."""


def _limited(name: str, max_pixels: int) -> Any:
    """A copy of a known image processor with the limit."""
    image_processor = copy.deepcopy(KNOWN[name])
    limit_pixels(SimpleNamespace(image_processor=image_processor), max_pixels)
    return image_processor


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(["QWEN2", "SMOLVLM", "INTERNVL", "PIXTRAL"]),
    height=SIDES,
    width=SIDES,
    max_pixels=st.integers(2304, 30000),
)
@example(name="QWEN2", height=50, width=400, max_pixels=2304)
def test_no_image_has_more_pixels(name: str, height: int, width: int, max_pixels: int) -> None:
    # Of an image that is one patch wide, Qwen's processors keep that patch.
    assume(max(height, width) <= 8 * min(height, width))
    assert math.prod(_size(_limited(name, max_pixels), height, width)) <= max_pixels


@pytest.mark.parametrize(
    ("name", "smallest"), [("QWEN2", 64), ("INTERNVL", 48**2), ("SMOLVLM", 40**2), ("PIXTRAL", 64)]
)
def test_limits_above_the_processor_s_own_and_below_its_smallest_image(name: str, smallest: int) -> None:
    limited = _limited(name, 300_000)
    for size in ((300, 200), (50, 399)):
        assert _size(limited, *size) == _size(KNOWN[name], *size)
    _limited(name, smallest)
    with pytest.raises(DataError, match=rf"data\.max_pixels: .* at least {smallest}"):
        _limited(name, smallest - 1)


def test_most_of_the_limit_is_used() -> None:
    assert math.prod(_size(_limited("QWEN2", 5000), 300, 200)) > 0.8 * 5000
    assert math.prod(_size(_limited("INTERNVL", 7 * 48**2), 300, 200)) == 6 * 48**2
    assert _size(_limited("SMOLVLM", 3 * 80**2), 300, 300) == (120, 120)


@pytest.mark.parametrize(("name", "pixels"), [("CLIP", 48 * 48), ("SIGLIP", 40 * 56)])
def test_images_of_one_size_cannot_be_limited_below_it(name: str, pixels: int) -> None:
    assert _size(_limited(name, pixels), 300, 200) == _size(KNOWN[name], 300, 200)
    with pytest.raises(DataError, match=rf"data\.max_pixels: .*{pixels} pixels"):
        _limited(name, pixels - 1)


@pytest.mark.parametrize("image_processor", [KNOWN["ONEVISION"], KNOWN["CLIP_WHOLE"], _built("Mllama")])
def test_processors_without_a_bound_are_refused(image_processor: Any) -> None:
    """The grids of the first one are listed in its model as well."""
    with pytest.raises(DataError, match=rf"{type(image_processor).__name__}.*no setting"):
        limit_pixels(SimpleNamespace(image_processor=image_processor), 48**2)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "internvl"])
def test_a_saved_processor_keeps_the_limit(name: str, tmp_path: Path) -> None:
    """What the model is given of a photograph, by a saved and reloaded processor as by the one in memory."""
    cached_family(name).processor.save_pretrained(tmp_path / "base")
    data = PerturbedQueryDataModule(str(tmp_path / "base"), max_pixels=16 * 32)
    check_resolution(data.processor)
    data.processor.save_pretrained(tmp_path / "adapter")
    text, photograph = data.chat.render("A dog?"), _noise(90, 120)
    base, saved = (load_processor(str(tmp_path / folder)) for folder in ("base", "adapter"))
    before, limited, reloaded = (
        processor(images=[[photograph]], text=[text], return_tensors="pt")
        for processor in (base, data.processor, saved)
    )
    assert reloaded["pixel_values"].shape == limited["pixel_values"].shape
    assert reloaded["input_ids"].tolist() == limited["input_ids"].tolist()
    assert limited["input_ids"].shape[1] < before["input_ids"].shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_room_for_a_photograph_and_its_text(name: str) -> None:
    """Of 12 megapixels, upright or a panorama; `test_every_file_is_of_a_published_model` has all presets among these."""
    data, processor = read_config(f"model/{name}")["data"], published_family(name).processor
    if "max_pixels" in data:
        limit_pixels(processor, data["max_pixels"])
    for height, width in ((4000, 3000), (2000, 6000)):
        photograph = np.zeros((height, width, 3), np.uint8)
        inputs = processor(images=[[photograph]], text=[processor.image_token], return_tensors="pt")
        assert inputs["input_ids"].shape[1] + TEXT_TOKENS <= data["max_length"]


# --- A photograph after the noise policy and the processor -----------------------------------------------------------


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    """uint8 [600, 512, 3]."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return np.array(Image.open(file).convert("RGB"))


@pytest.fixture(
    scope="module", params=["llava_1_5_7b", "qwen3_vl_8b", "internvl3_8b", "gemma3_4b", "smolvlm2_500m"]
)
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """Name and image processor; SmolVLM's resizes twice."""
    processor = published_family(request.param).processor
    check_resolution(processor)
    return request.param, processor.image_processor


def test_pixels_are_those_of_the_processor_alone(family: tuple[str, Any], portrait: np.ndarray) -> None:
    """For a large and a small photograph; InternVL's overview image is made from the file, not from the tiles."""
    name, image_processor = family
    for image in (np.kron(portrait, np.ones((2, 2, 1), np.uint8)), portrait[60:143, 150:211]):
        alone = _levels(image_processor, image)
        ours = _levels(image_processor, resize_to_model(image_processor, image))
        assert ours.shape == alone.shape
        away = (ours - alone).abs().flatten(1)
        assert int((away.amax(1) > 0.01).sum()) <= (name == "internvl3_8b")
        assert away.mean(1).max() < 4


def test_noise_leaves_all_other_pixels_to_the_processor(
    family: tuple[str, Any], portrait: np.ndarray
) -> None:
    """And a sample without noise is the file."""
    _, image_processor = family
    query = Query("q", "x.png", "A hat?", "Yes", "yes_no", objects=("hat",))
    mask = np.zeros(portrait.shape[:2], dtype=bool)
    mask[: len(mask) // 2] = True
    clean, noised = (
        perturb_query(
            query, LoadedImage(portrait, (mask,), ()), NoisePolicy(), image_processor, 0, perturbation
        ).image
        for perturbation in (CLEAN, Perturbation("noise", 0.5))
    )
    assert np.array_equal(clean, portrait)
    changed = (noised != resize_to_model(image_processor, portrait)).any(-1).mean(1)
    assert changed[: len(changed) // 2 - 1].min() > 0.5
    assert changed[len(changed) // 2 + 1 :].max() == 0


@pytest.mark.parametrize("kind", ["Gemma3", "SmolVLM", "Qwen2VL"])
def test_processors_that_resize_with_pillow_are_followed_too(kind: str, portrait: np.ndarray) -> None:
    image_processor = getattr(transformers, f"{kind}ImageProcessorPil")()
    check_resolution(SimpleNamespace(image_processor=image_processor))
    images = portrait, resize_to_model(image_processor, portrait)
    alone, ours = (_levels(image_processor, image) for image in images)
    assert (alone - ours).abs().max() < 0.01


def test_images_other_than_8_bit_rgb_are_refused() -> None:
    with pytest.raises(TypeError, match="uint8"):
        resize_to_model(KNOWN["SIGLIP"], np.zeros((8, 8, 3)))
