"""The demo's scenes as a query source; scenes are drawn when they are loaded."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from PIL import Image

from vlm_calibration.data.sources.base import QuerySource, opposite, with_masks
from vlm_calibration.demo.pictures import Hand, check_installed
from vlm_calibration.demo.questions import scene_queries, scene_seed
from vlm_calibration.demo.scenes import CLASSES, hard_kind, render_scene, scene_layout
from vlm_calibration.records import DataError, LoadedImage, Query


def low_contrast(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Move every pixel towards the image's mean colour; `strength` 0 is the identity, 1 gives a uniform image."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    return np.rint(mean + (image - mean) * (1.0 - strength)).astype(np.uint8)


def jpeg(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """JPEG at quality 100 - `strength`."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=round(100 - strength))
    return np.array(Image.open(buffer).convert("RGB"))


def shrink(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Shrink by the factor `strength` and enlarge to the original size."""
    picture = Image.fromarray(image)
    width, height = (max(1, round(side / strength)) for side in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BOX)
    return np.array(resized.resize(picture.size, Image.Resampling.BILINEAR))


def glare(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """White light that falls off from a random point; `strength` is its share of the pixel's colour where it is brightest."""
    height, width = image.shape[:2]
    y, x = rng.uniform(0, height), rng.uniform(0, width)
    rows, columns = np.mgrid[:height, :width]
    distance = ((rows - y) / height) ** 2 + ((columns - x) / width) ** 2
    light = strength * np.exp(-distance / 0.5)[..., None]
    return np.rint(image * (1 - light) + 255.0 * light).astype(np.uint8)


def coloured_light(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The image under light of a random hue; at `strength` 1 the light is of one pure colour."""
    hue = rng.uniform(0, 6)
    light = np.clip(np.abs((hue + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return np.rint(image * (1 - strength * (1 - light))).astype(np.uint8)


Change = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
"""uint8 [H, W, 3], strength and generator to uint8 [H, W, 3]."""
SHIFTS: dict[str, tuple[Change, tuple[float, ...]]] = {
    "low_contrast": (low_contrast, (0.7, 0.8, 0.9)),
    "jpeg": (jpeg, (96, 98, 99)),
    "shrink": (shrink, (5, 7, 10)),
    "glare": (glare, (0.6, 0.75, 0.9)),
    "coloured_light": (coloured_light, (0.25, 0.35, 0.4)),
}
"""Name -> the change and its strengths in the test."""


def draw_shift(rng: np.random.Generator) -> tuple[str, float]:
    """Sample one of the shifts and one of its strengths."""
    name = list(SHIFTS)[int(rng.integers(len(SHIFTS)))]
    return name, float(rng.choice(SHIFTS[name][1]))


# The three questions about a scene often follow each other. Nothing changes what is drawn.
_drawn = lru_cache(maxsize=4)(render_scene)


def scene_index(query: Query) -> int:
    return int(query.image.rsplit("-", 1)[1])


class DemoSource(QuerySource):
    """Existence and corner questions about rendered scenes: three per scene, with exact masks.

    Args:
        split: "train", "calibration", "development" or "test"; splits share no scene. Choose settings on "development".
        scenes: number of scenes.
        first: index of the first scene, for sources of one split without overlap.
        shifted: apply one of the demo's shifts to each image (low contrast, JPEG, shrinking, glare, coloured light).
        hard: share of naturally hard scenes (`HARD_KINDS`), in [0, 1]. Which are hard depends on the split and the index alone.
        hand: "colour", or "line" for line drawings with a pale wash, which need resvg-py.
    """

    annotates_all = True

    def __init__(
        self,
        split: str = "train",
        scenes: int = 1000,
        first: int = 0,
        shifted: bool = False,
        hard: float = 0.0,
        hand: Hand = "colour",
    ) -> None:
        if scenes < 1 or first < 0:
            raise DataError(f"DemoSource: needs scenes >= 1 and first >= 0, found {scenes} and {first}")
        if not 0 <= hard <= 1:
            raise DataError(f"DemoSource: hard is a share of scenes from 0 to 1, found {hard}")
        scene_seed(split, first)  # raises for an unknown split here instead of in a worker
        self.split, self.scenes, self.first, self.shifted, self.hard = split, scenes, first, shifted, hard
        self.hand: Hand = hand

    def _scene(self, index: int) -> tuple[tuple[int, int], str]:
        """The seed of a scene, and its kind."""
        seed = scene_seed(self.split, index)
        return seed, hard_kind(seed, self.hard)

    def queries(self) -> Sequence[Query]:
        check_installed(self.hand)  # raises for a missing package here instead of in a worker
        queries: list[Query] = []
        for index in range(self.first, self.first + self.scenes):
            seed, kind = self._scene(index)
            of_scene = scene_queries(self.split, index, kind)
            if self.shifted:
                shift, _ = draw_shift(np.random.default_rng((*seed, 3)))
                of_scene = [replace(query, category=f"{shift}/{query.category}") for query in of_scene]
            queries += of_scene
        return queries

    def load(self, query: Query) -> LoadedImage:
        seed, kind = self._scene(scene_index(query))
        image, objects = _drawn(seed, kind, self.hand)
        if self.shifted:
            rng = np.random.default_rng((*seed, 3))
            name, strength = draw_shift(rng)
            image = SHIFTS[name][0](image, strength, rng)
        return with_masks(query, image, ((o.name, o.mask) for o in objects))

    def image_digest(self, query: Query) -> str:
        """What the scene is drawn from; its pixels differ between versions of the libraries that draw it."""
        return f"{query.image} {self.hand} {self.shifted}"

    def wrong_answers(self, query: Query) -> Sequence[str]:
        names = scene_layout(*self._scene(scene_index(query))).names
        in_scene = [name for name in names if name != query.answer]
        return opposite(query) or in_scene or [name for name in CLASSES if name != query.answer]

    def labels(self, query: Query) -> Sequence[str]:
        return scene_layout(*self._scene(scene_index(query))).labels
