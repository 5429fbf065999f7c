"""Scenes of one to four everyday objects, drawn with OpenMoji's pictures, with an exact mask per object.

Objects co-occur as in photographs, by the theme of a scene and by their frequencies, so that "popular" and "adversarial" absent objects
(POPE, arXiv 2305.10355) are harder than random ones.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlm_calibration.demo.pictures import GLYPHS, LOOK_ALIKES, UNUSUAL, Hand, LookAlike, sized_picture

SCENE_SIZE = 96  # height and width of a scene in pixels: the demo model's input resolution

HARD_KINDS = ("small", "overlapping", "look_alike", "unusual")
"""Kinds of naturally hard scene: small objects; objects partly covered by a neighbour; an object of no class that resembles one, about
which the question with the answer "No" asks; other pictures of the classes. The base model was trained on easy scenes alone; these were
chosen on development scenes so that it is right 65 to 85% of the time on each kind."""

CORNERS = ("top left", "top right", "bottom left", "bottom right")

CLASSES: tuple[str, ...] = tuple(GLYPHS)
CLASS_WEIGHTS = 1.0 / np.sqrt(1.0 + np.arange(len(CLASSES)))
CLASS_WEIGHTS /= CLASS_WEIGHTS.sum()
"""Relative frequency of each class, float64 with sum 1: a mild Zipf law."""

THEMES: dict[str, tuple[str, ...]] = {
    "farm": ("horse", "cow", "pig", "dog", "tree", "house"),
    "street": ("car", "bus", "bicycle", "house", "umbrella", "clock"),
    "kitchen": ("apple", "banana", "pizza", "cake", "carrot", "cup"),
    "room": ("chair", "bed", "clock", "book", "cat", "guitar"),
    "nature": ("elephant", "bird", "fish", "tree", "boat", "airplane"),
    "park": ("ball", "dog", "tree", "bird", "bicycle", "umbrella"),
}

SIZES = (24, 42)  # smallest and largest longer side of an object in pixels
SMALL_SIZES = (14, 22)
LEAST_VISIBLE, MOST_VISIBLE = 0.25, 0.7
"""Of the objects of an overlapping scene, the one that is covered most has a visible share between these."""
_TRIES = 1000  # placements tried for an overlapping scene; two or three suffice as a rule

Seed = int | tuple[int, ...]


class Layout(NamedTuple):
    """The classes of a scene's objects, the corner (index into `CORNERS`) and picture of each, the look-alike's last, and this itself."""

    names: tuple[str, ...]
    corners: tuple[int, ...]
    characters: tuple[str, ...]
    look_alike: LookAlike | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of all objects, the look-alike's included."""
        return (*self.names, self.look_alike.name) if self.look_alike else self.names


class SceneObject(NamedTuple):
    """An object's class or the look-alike's name, the index of its corner in `CORNERS`, and its visible pixels, bool [S, S]."""

    name: str
    corner: int
    mask: np.ndarray


class Scene(NamedTuple):
    """An image, uint8 [S, S, 3], and its objects, each with another name and in another corner."""

    image: np.ndarray
    objects: tuple[SceneObject, ...]


def _background(rng: np.random.Generator) -> Image.Image:
    """A gradient between two pale colours in one of four directions, with noise."""
    first, second = rng.integers(120, 256, size=(2, 3)).astype(np.float32)
    ramp = np.linspace(0.0, 1.0, SCENE_SIZE, dtype=np.float32)
    share = np.rot90(np.broadcast_to(ramp, (SCENE_SIZE, SCENE_SIZE)), k=int(rng.integers(4)))[..., None]
    colours = first * (1 - share) + second * share
    colours = colours + rng.normal(0.0, rng.uniform(0, 8), size=(SCENE_SIZE, SCENE_SIZE, 1))
    return Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8)).convert("RGBA")


def hard_kind(seed: tuple[int, int], share: float) -> str:
    """The kind of a scene where a share of all is hard, "" for an easy one; it stays the same at every larger share."""
    rng = np.random.default_rng((*seed, 4))
    return HARD_KINDS[int(rng.integers(len(HARD_KINDS)))] if rng.random() < share else ""


@lru_cache(maxsize=1 << 14)
def scene_layout(seed: Seed, kind: str = "") -> Layout:
    """The objects of the scene that `render_scene` draws."""
    return _draw_layout(seed, kind)[0]


def _draw_layout(seed: Seed, kind: str) -> tuple[Layout, np.random.Generator]:
    """The objects of a scene, and the generator to draw it with."""
    entropy: Seed = (*np.atleast_1d(seed), 100 + HARD_KINDS.index(kind)) if kind else seed
    rng = np.random.default_rng(entropy)
    names = _draw_names(rng, kind)
    corners = tuple(int(c) for c in rng.permutation(4)[: len(names) + (kind == "look_alike")])
    characters = tuple(
        UNUSUAL[name][int(rng.integers(len(UNUSUAL[name])))] if kind == "unusual" else GLYPHS[name]
        for name in names
    )
    if kind != "look_alike":
        return Layout(names, corners, characters), rng
    others = [look for look in LOOK_ALIKES if look.resembles not in names]
    look = others[int(rng.integers(len(others)))]
    return Layout(names, corners, (*characters, look.character), look), rng


def _draw_names(rng: np.random.Generator, kind: str) -> tuple[str, ...]:
    fewest, most = {"overlapping": (3, 4), "look_alike": (1, 3)}.get(kind, (1, 4))
    count = int(rng.integers(fewest, most + 1))
    allowed = np.isin(CLASSES, tuple(UNUSUAL) if kind == "unusual" else CLASSES)
    in_theme = np.isin(CLASSES, THEMES[sorted(THEMES)[int(rng.integers(len(THEMES)))]])
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        weights = CLASS_WEIGHTS * allowed
        if rng.random() < 0.7 and (allowed & in_theme).any():  # otherwise of all classes
            weights = weights * in_theme
        chosen[CLASSES[int(rng.choice(len(CLASSES), p=weights / weights.sum()))]] = None
    return tuple(chosen)


def render_scene(seed: Seed, kind: str = "", hand: Hand = "colour") -> Scene:
    """Draw the scene of this seed; `kind` is one of `HARD_KINDS`, or "" for an easy scene.

    A mask contains the pixels that the object colours and no later object covers.
    """
    layout, rng = _draw_layout(seed, kind)
    canvas = _background(rng)
    for _ in range(_TRIES):
        layers = _place(rng, layout, kind, hand)
        drawn = [np.asarray(layer)[..., 3] > 0 for layer in layers]
        masks = [mask & ~np.any(drawn[i:], axis=0) for i, mask in enumerate(drawn, start=1)]
        if kind != "overlapping" or _overlap_well(layout, drawn, masks):
            break
    else:
        raise RuntimeError(f"no overlap of {layout.names} in {_TRIES} tries")
    for layer in layers:
        canvas.alpha_composite(layer)
    objects = map(SceneObject, layout.labels, layout.corners, masks)
    return Scene(np.array(canvas.convert("RGB")), tuple(objects))


def _place(rng: np.random.Generator, layout: Layout, kind: str, hand: Hand) -> list[Image.Image]:
    """A layer for each object, at a random size and position inside its quarter; near the middle of an overlapping scene."""
    smallest, largest = {"small": SMALL_SIZES, "overlapping": (36, 54)}.get(kind, SIZES)
    half = SCENE_SIZE // 2
    layers = []
    for character, corner in zip(layout.characters, layout.corners, strict=True):
        size, mirrored = int(rng.integers(smallest, largest + 1)), bool(rng.integers(2))
        drawn = sized_picture(character, hand, size, mirrored)
        begins = []
        for side, length in ((corner % 2, drawn.width), (corner // 2, drawn.height)):
            if kind == "overlapping":
                middle = half + (2 * side - 1) * int(rng.integers(6, 15))
                begins.append(min(max(0, middle - length // 2), SCENE_SIZE - length))
            else:
                begins.append(side * half + int(rng.integers(0, max(1, half - length) + 1)))
        layers.append(Image.new("RGBA", (SCENE_SIZE, SCENE_SIZE)))
        layers[-1].paste(drawn, (begins[0], begins[1]))
    return layers


def _overlap_well(layout: Layout, drawn: list[np.ndarray], masks: list[np.ndarray]) -> bool:
    """Whether one object is covered well, all can be seen, and the middle of what is seen of each is in its own quarter."""
    half = SCENE_SIZE / 2
    for corner, mask in zip(layout.corners, masks, strict=True):
        rows, columns = np.nonzero(mask)
        if len(rows) and 2 * (rows.mean() >= half) + (columns.mean() >= half) != corner:
            return False
    least = min(mask.sum() / whole.sum() for mask, whole in zip(masks, drawn, strict=True))
    return bool(LEAST_VISIBLE <= least <= MOST_VISIBLE)
