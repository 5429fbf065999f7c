"""Draws some queries with their regions and the noised images, to inspect extracted regions by eye."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from vlm_calibration.data.noise import query_rng
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.data.sources.parquet import ParquetSource
from vlm_calibration.files import replacing
from vlm_calibration.perturbation.images import resize_image, resize_mask
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.perturbation.noise import add_region_noise
from vlm_calibration.perturbation.schedules import CosineSchedule, Schedule
from vlm_calibration.records import DataError, LoadedImage, Query

THUMB = 168
MARGIN, LINE, TEXT_WIDTH = 6, 15, 260
EVIDENCE, OTHER = (230, 30, 90), (40, 110, 230)


class ContactSheet(L.Callback):
    """Writes `contact_sheet.png` in the run directory of `vlm-calibration predict`; place it after `RegionWriter`.

    Args:
        queries: number of rows.
        schedule: noise schedule of the drawn images.
        seed: of the choice of queries, and of the noise.
    """

    def __init__(self, queries: int = 12, schedule: Schedule = CosineSchedule(), seed: int = 0) -> None:  # noqa: B008
        if queries < 1:
            raise DataError(f"ContactSheet: queries must be at least 1, found {queries}")
        self.queries = queries
        self.schedule = schedule
        self.seed = seed

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder, data = Path(trainer.default_root_dir), trainer.datamodule  # type: ignore[attr-defined]
        files = {folder / extraction.file: extraction.source for extraction in data.region_plan.extractions}
        # A part that ends before others has no merged files yet.
        if not trainer.is_global_zero or not files or not all(path.exists() for path in files):
            return
        sources = [ParquetSource(str(path), images=source) for path, source in files.items()]
        with replacing(folder / "contact_sheet.png") as temporary:
            contact_sheet(sources, self.queries, self.schedule, self.seed).save(temporary, "PNG")


def contact_sheet(
    sources: Sequence[QuerySource], count: int, schedule: Schedule, seed: int = 0
) -> Image.Image:
    """Draw random queries of some sources, one a row: question and answer, regions, and the noised images of levels 100% to 0%.

    The evidence is outlined in red, other regions in blue. The evidence is noised, or the other regions if there is none.

    Raises:
        DataError: an image cannot be read.
    """
    queries = [(source, index) for source in sources for index in range(len(source.queries()))]
    chosen = np.sort(np.random.default_rng(seed).permutation(len(queries))[:count])
    levels = LinearLevels()
    header = ["", "regions", *(f"{confidence:.0%}" for confidence in levels.confidences())]
    rows = []
    for index in chosen:
        source, position = queries[int(index)]
        query = source.queries()[position]
        loaded = _thumbnail(source.load(query))
        union = _union(loaded.evidence or loaded.distractors, loaded.image)
        noised = [
            _add_noise(loaded.image, union, round(s * schedule.steps), schedule, query, seed)
            if union.any()
            else loaded.image
            for s in levels.strengths()
        ]
        rows.append((query, [_draw_regions(loaded), *noised]))
    return _sheet(header, rows)


def _thumbnail(loaded: LoadedImage) -> LoadedImage:
    """The image and its masks at the size of a thumbnail."""
    height, width = loaded.image.shape[:2]
    scale = THUMB / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return LoadedImage(
        resize_image(loaded.image, size),
        tuple(resize_mask(m, size) for m in loaded.evidence),
        tuple(resize_mask(m, size) for m in loaded.distractors),
    )


def _union(masks: Sequence[np.ndarray], image: np.ndarray) -> np.ndarray:
    return np.logical_or.reduce([*masks, np.zeros(image.shape[:2], dtype=bool)])


def _add_noise(
    image: np.ndarray, mask: np.ndarray, step: int, schedule: Schedule, query: Query, seed: int
) -> np.ndarray:
    noise = int(query_rng(seed, 0, query.id).integers(2**63))
    return add_region_noise(image, mask, step, schedule=schedule, seed=noise) if step else image


def _draw_regions(loaded: LoadedImage) -> np.ndarray:
    """The image with its regions tinted and outlined."""
    pixels = loaded.image.astype(np.float32)
    for masks, colour in ((loaded.distractors, OTHER), (loaded.evidence, EVIDENCE)):
        for mask in masks:
            pixels[mask] = 0.6 * pixels[mask] + 0.4 * np.array(colour, dtype=np.float32)
            pixels[mask & ~binary_erosion(mask)] = colour
    return pixels.round().astype(np.uint8)


def _sheet(header: Sequence[str], rows: Sequence[tuple[Query, list[np.ndarray]]]) -> Image.Image:
    """The sheet: captions at the left, thumbnails at their right."""
    font = ImageFont.load_default(12)
    cell = THUMB + MARGIN
    sheet = Image.new("RGB", (TEXT_WIDTH + cell * (len(header) - 1), 24 + cell * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(header[1:]):
        draw.text((TEXT_WIDTH + column * cell + THUMB // 2, 12), text, "black", font, anchor="mm")
    for number, (query, pictures) in enumerate(rows):
        top = 24 + number * cell
        for line, text in enumerate(_caption(query)[: THUMB // LINE]):
            draw.text((MARGIN, top + line * LINE), text, "black", font)
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (TEXT_WIDTH + column * cell, top))
    return sheet


def _caption(query: Query) -> list[str]:
    wrapped: list[str] = []
    for text in (query.question, f"-> {query.answer}", f"[{', '.join(query.objects)}]", query.id):
        wrapped += textwrap.wrap(text, 40)[:4]
    return wrapped
