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
from vlm_calibration.data.resolution import check_resolution, limit_pixels, model_resolution, resize_to_model
from vlm_calibration.demo.questions import scene_seed
from vlm_calibration.demo.scenes import render_scene
from vlm_calibration.perturbation.levels import CLEAN, Perturbation
from vlm_calibration.presets import read_config
from vlm_calibration.records import DataError, LoadedImage, Query

from ..models.processors import PUBLISHED, cached_family, published_family

CLIP = transformers.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
CLIP_WHOLE = transformers.CLIPImageProcessor(size={"shortest_edge": 48}, do_center_crop=False)
FIXED = transformers.SiglipImageProcessor(do_resize=False)
SIGLIP = transformers.SiglipImageProcessor(size={"height": 40, "width": 56})
QWEN2 = transformers.Qwen2VLImageProcessor(
    patch_size=4, size={"shortest_edge": 16 * 16, "longest_edge": 80 * 80}
)
SMOLVLM = transformers.SmolVLMImageProcessor(size={"longest_edge": 160}, max_image_size={"longest_edge": 40})
SMOLVLM_WHOLE = transformers.SmolVLMImageProcessor(
    size={"longest_edge": 112}, max_image_size={"longest_edge": 28}, do_image_splitting=False
)
PIXTRAL = transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
INTERNVL = transformers.GotOcr2ImageProcessor(size={"height": 48, "width": 48}, crop_to_patches=True)
INTERNVL_MORE = transformers.GotOcr2ImageProcessor(
    size={"height": 30, "width": 30}, crop_to_patches=True, min_patches=2, max_patches=15
)
GRIDS = [[48 * rows, 48 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
ONEVISION = transformers.LlavaOnevisionImageProcessor(
    size={"height": 48, "width": 48}, image_grid_pinpoints=GRIDS
)

KNOWN = {
    name: p
    for name, p in list(globals().items())
    if isinstance(p, transformers.image_processing_base.ImageProcessingMixin)
}
TILED = ("SMOLVLM", "INTERNVL", "INTERNVL_MORE", "ONEVISION")
STOCK = [
    *("CLIP", "Siglip", "Qwen2VL", "Idefics3", "SmolVLM", "Pixtral", "Llava", "LlavaOnevision", "Blip"),
    *("LlavaNext", "Llama4", "Cohere2Vision", "Idefics2", "Aria", "Siglip2", "Janus", "DeepseekVL"),
]


def _stock(name: str) -> Any:
    return getattr(transformers, f"{name}ImageProcessor")()


def _check(image_processor: Any, **settings: Any) -> None:
    check_resolution(SimpleNamespace(image_processor=image_processor, **settings))


def _seen(image_processor: Any, image: np.ndarray, **settings: Any) -> torch.Tensor:
    return image_processor(images=[image], return_tensors="pt", **settings)["pixel_values"]


def _levels(image_processor: Any, image: np.ndarray) -> torch.Tensor:
    """The processor's pixel values in 0..255, by view or row of patches."""
    pixels = _seen(image_processor, image, do_normalize=False)
    return (pixels[0] if pixels.ndim == 5 else pixels) * 255


def _noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(st.integers(10, 260), st.integers(10, 260))
@settings(max_examples=8)
@pytest.mark.parametrize("name", sorted(KNOWN))
def test_at_that_size_the_processor_resizes_nothing(name: str, height: int, width: int) -> None:
    processor = KNOWN[name]
    size = model_resolution(processor, height, width)
    assert model_resolution(processor, *size) == size
    image = _noise(*size)
    resized = _seen(processor, image)
    if name in TILED:
        assert _holds(_tiles(processor, image), image)
    elif name == "SMOLVLM_WHOLE":
        # The image is enlarged to the longest edge, then shrunk to one tile; before torchvision 0.27 not with Lanczos, but bicubic.
        assert resized.std() > 0.65 * (image / 127.5 - 1).std()
    else:
        assert torch.equal(resized, _seen(processor, image, do_resize=False))


def _tiles(image_processor: Any, image: np.ndarray) -> torch.Tensor:
    """The tiles as pixels in 0..255 [N, 3, H, W], without the overview image."""
    pixels = _levels(image_processor, image)
    if len(pixels) == 1:
        return pixels
    return pixels[1:] if hasattr(image_processor, "image_grid_pinpoints") else pixels[:-1]


def _holds(tiles: torch.Tensor, image: np.ndarray) -> bool:
    """Whether the tiles contain every pixel of the image, and only black around it."""
    weights = torch.tensor([1, 256, 256**2])
    seen, expected = (
        (pixels.reshape(-1, 3).round().long() @ weights).sort().values
        for pixels in (tiles.permute(0, 2, 3, 1), torch.from_numpy(image).float())
    )
    black = len(seen) - len(expected)
    return not seen[:black].any() and torch.equal(seen[black:], expected)


def test_center_crop_comes_after() -> None:
    size = model_resolution(CLIP, 100, 150)
    assert size == (48, 72)
    image = _noise(*size)
    expected = torch.from_numpy(image[:, 12:60].copy()).permute(2, 0, 1)
    assert torch.allclose(_levels(CLIP, image)[0], expected.float(), atol=1e-3)


def test_tiles_whose_size_would_not_stay_are_refused() -> None:
    odd = transformers.SmolVLMImageProcessor(size={"longest_edge": 150}, max_image_size={"longest_edge": 40})
    with pytest.raises(DataError, match="behind SmolVLMImageProcessor: set data.noise.resolution to native"):
        _check(odd)
    for change in ({"size": {"height": 40, "width": 48}}, {"max_patches": 16}):
        odd = transformers.GotOcr2ImageProcessor(**{**INTERNVL.to_dict(), **change})
        with pytest.raises(DataError, match="behind GotOcr2ImageProcessor"):
            _check(odd)


def test_settings_of_the_processor_around_count() -> None:
    image_processor = transformers.GotOcr2ImageProcessor(size={"height": 48, "width": 48})
    assert model_resolution(image_processor, 100, 300) == (48, 48)
    _check(image_processor, images_kwargs={"crop_to_patches": True, "max_patches": 4})
    assert model_resolution(image_processor, 100, 300) == (48, 3 * 48)


def test_an_image_that_qwen_refuses_is_refused() -> None:
    for height, width in ((10, 2001), (2001, 10)):
        with pytest.raises(DataError, match=f"an image of {width} x {height} pixels: .*smaller than 200"):
            model_resolution(QWEN2, height, width)
    assert model_resolution(QWEN2, 10, 2000) == (8, 1128)


@pytest.mark.parametrize("name", sorted({PUBLISHED[name][0]: name for name in PUBLISHED}.values()))
def test_published_settings_pass_the_check(name: str) -> None:
    processor = published_family(name).processor
    check_resolution(processor)
    for height, width in ((480, 640), (1333, 800), (90, 100), (2160, 480)):
        size = model_resolution(processor.image_processor, height, width)
        assert model_resolution(processor.image_processor, *size) == size


@pytest.mark.parametrize("name", [*KNOWN, *STOCK])
def test_small_and_stock_settings_pass_the_check(name: str) -> None:
    _check(KNOWN[name] if name in KNOWN else _stock(name))


@pytest.mark.parametrize("name", ["Mllama", "Lfm2Vl"])
def test_processors_that_cannot_be_followed_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"behind {name}ImageProcessor"):
        _check(_stock(name))
    with pytest.raises(DataError, match=rf"data\.max_pixels: {name}ImageProcessor"):
        _limited(_stock(name), 100)


# --- data.max_pixels -------------------------------------------------------------------------------------------------

LIMITED = {"QWEN2": QWEN2, "SMOLVLM": SMOLVLM, "INTERNVL": INTERNVL, "PIXTRAL": PIXTRAL}
SIDES = st.integers(8, 400)
TEXT_TOKENS = 256
"""Tokens of a prompt and its response beside the image: question, request for a confidence, chat template, answer."""


def _limited(image_processor: Any, max_pixels: int) -> Any:
    """A copy of the image processor with the limit."""
    image_processor = copy.deepcopy(image_processor)
    limit_pixels(SimpleNamespace(image_processor=image_processor), max_pixels)
    return image_processor


@settings(max_examples=50, deadline=None)
@given(name=st.sampled_from(sorted(LIMITED)), height=SIDES, width=SIDES, max_pixels=st.integers(2304, 30000))
@example(name="QWEN2", height=50, width=400, max_pixels=2304)
def test_no_image_has_more_pixels(name: str, height: int, width: int, max_pixels: int) -> None:
    # Of an image that is one patch wide, Qwen's processors keep that patch.
    assume(max(height, width) <= 8 * min(height, width))
    limited = _limited(LIMITED[name], max_pixels)
    assert math.prod(model_resolution(limited, height, width)) <= max_pixels


@pytest.mark.parametrize("name", [*LIMITED, "CLIP"])
def test_a_limit_above_the_processor_s_own_changes_nothing(name: str) -> None:
    limited = _limited(KNOWN[name], 300_000)
    for size in ((300, 200), (50, 399)):
        assert model_resolution(limited, *size) == model_resolution(KNOWN[name], *size)


def test_most_of_the_limit_is_used() -> None:
    assert math.prod(model_resolution(_limited(QWEN2, 5000), 300, 200)) > 0.8 * 5000
    assert math.prod(model_resolution(_limited(INTERNVL, 7 * 48**2), 300, 200)) == 6 * 48**2
    assert model_resolution(_limited(SMOLVLM, 3 * 80**2), 300, 300) == (120, 120)


@pytest.mark.parametrize("image_processor", [CLIP, SIGLIP], ids=["crop", "fixed"])
def test_images_of_one_size_cannot_be_limited_below_it(image_processor: Any) -> None:
    pixels = 48 * 48 if image_processor is CLIP else 40 * 56
    _limited(image_processor, pixels)
    with pytest.raises(DataError, match=rf"data\.max_pixels: .*{pixels} pixels"):
        _limited(image_processor, pixels - 1)


@pytest.mark.parametrize(
    ("image_processor", "smallest"), [(QWEN2, 64), (INTERNVL, 48**2), (SMOLVLM, 40**2), (PIXTRAL, 64)]
)
def test_a_limit_below_the_smallest_image_names_it(image_processor: Any, smallest: int) -> None:
    _limited(image_processor, smallest)
    with pytest.raises(DataError, match=rf"data\.max_pixels: .* at least {smallest}"):
        _limited(image_processor, smallest - 1)


def test_grids_that_the_model_lists_as_well_are_refused() -> None:
    with pytest.raises(DataError, match="LlavaOnevisionImageProcessor.*no setting"):
        _limited(ONEVISION, 48**2)
    with pytest.raises(DataError, match="at least 1, found 0"):
        _limited(QWEN2, 0)
    with pytest.raises(DataError, match="CLIPImageProcessor.*no setting"):
        _limited(CLIP_WHOLE, 48**2)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "internvl"])
def test_a_saved_processor_keeps_the_limit(name: str, tmp_path: Path) -> None:
    """What the model is given of a photograph, by a saved and reloaded processor as by the one in memory."""
    cached_family(name).processor.save_pretrained(tmp_path / "base")
    data = PerturbedQueryDataModule(str(tmp_path / "base"), max_pixels=16 * 32)
    check_resolution(data.processor)
    data.processor.save_pretrained(tmp_path / "adapter")
    photograph = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    text = data.chat.render("A dog?")
    whole, saved, limited = (
        processor(images=[[photograph]], text=[text], return_tensors="pt")
        for processor in (*(load_processor(str(tmp_path / n)) for n in ("base", "adapter")), data.processor)
    )
    assert saved["pixel_values"].shape == limited["pixel_values"].shape
    assert saved["input_ids"].tolist() == limited["input_ids"].tolist()
    assert limited["input_ids"].shape[1] < whole["input_ids"].shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_room_for_a_photograph_and_its_text(name: str) -> None:
    """Of 12 megapixels, upright or a panorama; `test_every_file_is_of_a_published_model` has all presets among these."""
    data, family = read_config(f"model/{name}")["data"], published_family(name)
    processor = family.processor
    if "max_pixels" in data:
        limit_pixels(processor, data["max_pixels"])
    for height, width in ((4000, 3000), (2000, 6000)):
        photograph = np.zeros((height, width, 3), np.uint8)
        inputs = processor(images=[[photograph]], text=[processor.image_token], return_tensors="pt")
        assert inputs["input_ids"].shape[1] + TEXT_TOKENS <= data["max_length"]


# --- Photographs after the noise policy and the processor ------------------------------------------------------------


def photographs() -> dict[str, np.ndarray]:
    """A portrait, also large, small and tall, and a rendered scene with sensor noise."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        portrait = Image.open(file).convert("RGB")
    width, height = portrait.size
    shapes = {
        "portrait": portrait,
        "large": portrait.resize((3 * width, 3 * height), Image.Resampling.LANCZOS),
        "small": portrait.crop((150, 60, 211, 143)),
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


@pytest.mark.slow
@pytest.mark.parametrize("photograph", ["large", "small", "tall", "drawn"])
def test_pixels_are_those_of_the_processor_alone(family: tuple[str, Any], photograph: str) -> None:
    name, image_processor = family
    image = PHOTOGRAPHS[photograph]
    alone = _levels(image_processor, image)
    ours = _levels(image_processor, resize_to_model(image_processor, image))
    assert ours.shape == alone.shape
    away = (ours - alone).abs().flatten(1)
    # InternVL's overview image is made from the file, not from the tiles.
    assert int((away.amax(1) > 0.01).sum()) <= (name == "internvl3_8b")
    assert away.mean(1).max() < 4


def test_what_noise_does_not_reach_is_what_the_processor_makes_of_the_file(family: tuple[str, Any]) -> None:
    _, image_processor = family
    image = PHOTOGRAPHS["portrait"]
    mask = np.zeros(image.shape[:2], dtype=bool)
    mask[: len(mask) // 2] = True
    query = Query("q", "x.png", "A hat?", "Yes", "yes_no", objects=("hat",))
    clean, noised = (
        perturb_query(query, LoadedImage(image, (mask,), ()), NoisePolicy(), image_processor, 0, p).image
        for p in (CLEAN, Perturbation("noise", 0.5))
    )
    assert torch.equal(_levels(image_processor, clean), _levels(image_processor, image))
    alone = resize_to_model(image_processor, image)
    assert noised.shape == alone.shape
    changed = (noised != alone).any(-1).mean(1)
    assert changed[: len(changed) // 2 - 1].min() > 0.5
    assert changed[len(changed) // 2 + 1 :].max() == 0


@pytest.mark.parametrize("kind", ["Gemma3", "SmolVLM", "Qwen2VL"])
def test_processors_that_resize_with_pillow_are_followed_too(kind: str) -> None:
    small = {name: getattr(SMOLVLM, name) for name in ("size", "max_image_size")} if kind == "SmolVLM" else {}
    image_processor = getattr(transformers, f"{kind}ImageProcessorPil")(**small)
    _check(image_processor)
    image = PHOTOGRAPHS["portrait"]
    alone, ours = (_levels(image_processor, i) for i in (image, resize_to_model(image_processor, image)))
    assert (alone - ours).abs().max() < 0.01


def test_images_other_than_8_bit_rgb_are_refused() -> None:
    with pytest.raises(TypeError, match="uint8"):
        resize_to_model(transformers.SiglipImageProcessor(), np.zeros((8, 8, 3)))
