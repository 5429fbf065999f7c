"""How the images of a family become patches of its vision tower and tokens of its language model, from the configuration alone.

Memory depends on an image's number of tokens. Families of which a larger image has more tokens are of two kinds: one token for an area of
pixels (Qwen), or so many for each tile of a fixed size (SmolVLM, InternVL). The others give all images the same number, or choose
among grids of tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

TILES = {"scale_factor": 16, "downsample_ratio": 12}
"""Field of a configuration of images in tiles -> the most tiles that the processors of such models cut an image into by default."""


@dataclass(frozen=True)
class ImageTokens:
    """The images of a model.

    Attributes:
        kind: "area", "tiles", "fixed", or "unknown" (grids of tiles, and families that are not known here).
        tokens: tokens of one unit: an area, a tile, or the whole image; 0 for "unknown".
        pixels: pixels of one unit; 0 for "fixed" and "unknown".
        patches: patches of the tower per token.
        patch_values: values of one patch's pixels.
        tiles: the most tiles of an image without a limit; 0 if images are not cut into tiles.
    """

    kind: Literal["area", "tiles", "fixed", "unknown"]
    tokens: int
    pixels: int
    patches: float
    patch_values: int
    tiles: int = 0

    def at_most(self, max_pixels: int | None) -> int | None:
        """Tokens of the largest image of at most `max_pixels`; None if that cannot be told.

        An image of several tiles has one more, the overview.
        """
        if self.kind == "fixed":
            return self.tokens
        if self.kind == "unknown" or (max_pixels is None and not self.tiles):
            return None
        units = self.tiles if max_pixels is None else max(1, max_pixels // self.pixels)
        units = min(units, self.tiles or units)
        return self.tokens * (units + (self.kind == "tiles" and units > 1))

    def limit(self, tokens: int) -> int | None:
        """The largest `max_pixels` at which no image has more than so many tokens; None if no limit has an effect."""
        if self.kind not in ("area", "tiles"):
            return None
        units = tokens // self.tokens
        return self.pixels * max(1, units - (self.kind == "tiles" and units > 1))


def image_tokens(config: Any) -> ImageTokens:
    """The images of a model.

    Args:
        config: its configuration, of transformers.
    """
    vision = config.vision_config
    patch = _side(getattr(vision, "patch_size", 1))
    values = 3 * patch**2 * int(getattr(vision, "temporal_patch_size", None) or 1)
    patches = patches_per_token(config)
    side = _side(getattr(vision, "image_size", 0) or 0)
    per_image = round((side // patch) ** 2 / patches)
    if hasattr(vision, "spatial_merge_size"):
        return ImageTokens("area", 1, round(patch**2 * patches), patches, values)
    if hasattr(config, "image_grid_pinpoints") or vision.model_type == "pixtral" or not side:
        return ImageTokens("unknown", 0, 0, patches, values)
    for field, tiles in TILES.items():
        if hasattr(config, field):
            return ImageTokens("tiles", per_image, side**2, patches, values, tiles)
    return ImageTokens("fixed", per_image, 0, patches, values)


def patches_per_token(config: Any) -> float:
    """Patches of an image in the vision tower per token of the image in the language model."""
    vision = config.vision_config
    for owner, name, power in (
        (vision, "spatial_merge_size", 2),
        (config, "scale_factor", 2),
        (config, "downsample_ratio", -2),
    ):
        if factor := getattr(owner, name, None):
            return float(factor**power)
    if tokens := getattr(config, "mm_tokens_per_image", None):
        return (vision.image_size // vision.patch_size) ** 2 / tokens
    return 1.0


def _side(size: Any) -> int:
    """The side of a square that may be set as one number or as two."""
    return int(size) if isinstance(size, int) else math.isqrt(math.prod(size))
