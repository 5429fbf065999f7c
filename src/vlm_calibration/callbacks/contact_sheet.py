"""Draws some queries with their regions and the perturbed images, to inspect extracted regions and strengths by eye."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from vlm_calibration.data.noise import NoisePolicy, query_rng
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.data.sources.parquet import ParquetSource
from vlm_calibration.files import replacing
from vlm_calibration.perturbation.by_kind import region_perturbation
from vlm_calibration.perturbation.images import resize_image
from vlm_calibration.perturbation.masks import resize_mask
from vlm_calibration.records import DataError

THUMB = 168
MARGIN, LINE, LABEL, TEXT_WIDTH = 6, 15, 20, 260
CELL_WIDTH, CELL_HEIGHT = THUMB + MARGIN, LABEL + THUMB + MARGIN
EVIDENCE, OTHER, LINE_COLOUR = (230, 30, 90), (40, 110, 230), (200, 200, 200)


class ContactSheet(L.Callback):
    """Writes `contact_sheet.png` of some `queries` in the run directory of `vlm-calibration predict`; place it after `RegionWriter`.

    It shows the kinds of perturbation and the strengths of `data.noise`.
    """

    def __init__(self, queries: int = 12) -> None:
        if queries < 1:
            raise DataError(f"ContactSheet: queries must be at least 1, found {queries}")
        self.queries = queries

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder, data = Path(trainer.default_root_dir), trainer.datamodule  # type: ignore[attr-defined]
        files = {folder / extraction.file: extraction.source for extraction in data.region_plan.extractions}
        # A part that ends before others has no merged files yet.
        if not trainer.is_global_zero or not files or not all(path.exists() for path in files):
            return
        sources = [ParquetSource(str(path), images=source) for path, source in files.items()]
        with replacing(folder / "contact_sheet.png") as temporary:
            contact_sheet(sources, self.queries, data.noise).save(temporary, "PNG")


def contact_sheet(sources: Sequence[QuerySource], count: int, policy: NoisePolicy) -> Image.Image:
    """Draw `count` random queries: question and answer, regions, and a row of strengths for each kind of perturbation of `policy`.

    The evidence is outlined in red, other regions in blue. The evidence is perturbed, or the other regions if there is none.
    Raises a DataError if an image cannot be read.
    """
    queries = [(source, index) for source in sources for index in range(len(source.queries()))]
    chosen = np.sort(np.random.default_rng(0).permutation(len(queries))[:count])
    strengths = {kind: [s for s in policy.levels.strengths(kind) if s] for kind in policy.used_kinds}
    columns, rows = 2 + max(map(len, strengths.values())), len(strengths) * len(chosen)
    font = ImageFont.load_default(12)
    sheet = Image.new("RGB", (TEXT_WIDTH + CELL_WIDTH * columns, CELL_HEIGHT * rows), "white")
    draw = ImageDraw.Draw(sheet)

    def paste(row: int, column: int, label: str, picture: np.ndarray) -> None:
        left, top = TEXT_WIDTH + column * CELL_WIDTH, row * CELL_HEIGHT
        draw.text((left + THUMB // 2, top + LABEL // 2), label, "black", font, anchor="mm")
        sheet.paste(Image.fromarray(picture), (left, top + LABEL))

    for first, index in zip(range(0, rows, len(strengths)), chosen.tolist(), strict=True):
        source, position = queries[index]
        query = source.queries()[position]
        draw.line((0, first * CELL_HEIGHT, sheet.width, first * CELL_HEIGHT), LINE_COLOUR)
        caption: list[str] = []
        for text in (query.question, f"-> {query.answer}", f"[{', '.join(query.objects)}]", query.id):
            caption += textwrap.wrap(text, 40)[:4]
        for line, text in enumerate(caption[: THUMB // LINE]):
            draw.text((MARGIN, first * CELL_HEIGHT + LABEL + line * LINE), text, "black", font)
        loaded = source.load(query)
        scale = THUMB / max(loaded.image.shape[:2])
        height, width = (max(1, round(side * scale)) for side in loaded.image.shape[:2])
        image = resize_image(loaded.image, (height, width))
        tinted = image.astype(np.float32)
        evidence = [resize_mask(mask, (height, width)) for mask in loaded.evidence]
        distractors = [resize_mask(mask, (height, width)) for mask in loaded.distractors]
        for masks, colour in ((distractors, OTHER), (evidence, EVIDENCE)):
            for mask in masks:
                tinted[mask] = 0.6 * tinted[mask] + 0.4 * np.array(colour, dtype=np.float32)
                tinted[mask & ~binary_erosion(mask)] = colour
        paste(first, 0, "regions", tinted.round().astype(np.uint8))
        paste(first, 1, "untouched", image)
        mask = np.logical_or.reduce([*(evidence or distractors), np.zeros(image.shape[:2], dtype=bool)])
        own_seed = int(query_rng(0, 0, query.id).integers(2**63))
        for row, (kind, values) in enumerate(strengths.items(), start=first):
            transform = region_perturbation(kind, policy.schedule)
            for column, strength in enumerate(values, start=2):
                shown = image
                if mask.any():
                    shown = transform(image=image, mask=mask, strength=strength, seed=own_seed)["image"]
                paste(row, column, f"{kind.replace('_', ' ')} {strength:g}", shown)
    return sheet
