"""The contact sheet: a row for each kind of a query, the untouched image first, and perturbations on the object alone."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_calibration.callbacks import contact_sheet as sheets
from vlm_calibration.callbacks.contact_sheet import ContactSheet, contact_sheet
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.perturbation import LinearLevels, region_perturbation
from vlm_calibration.records import DataError

NOISE = NoisePolicy()
KINDS = NoisePolicy(LinearLevels(6), kinds={"noise": 1.0, "blur": 0.0, "motion_blur": 1.0, "fade": 0.5})


def _pictures(sheet: np.ndarray, row: int, columns: int) -> list[np.ndarray]:
    top = row * sheets.CELL_HEIGHT + sheets.LABEL
    lefts = (sheets.TEXT_WIDTH + column * sheets.CELL_WIDTH for column in range(columns))
    return [sheet[top : top + sheets.THUMB, left : left + sheets.THUMB].astype(int) for left in lefts]


def test_queries_and_strengths_of_one_kind() -> None:
    source = DemoSource("test", scenes=4)
    sheet = np.asarray(contact_sheet([source], 3, NOISE))
    assert sheet.shape == (3 * sheets.CELL_HEIGHT, sheets.TEXT_WIDTH + 12 * sheets.CELL_WIDTH, 3)
    assert np.array_equal(sheet, np.asarray(contact_sheet([source], 3, NOISE)))
    for row in range(3):
        overlay, untouched, *perturbed = _pictures(sheet, row, 12)
        assert not np.array_equal(overlay, untouched)
        changed = [(picture != untouched).any(axis=2) for picture in perturbed]
        assert 0 < changed[-1].mean() < 0.5, "the object, not the image"
        apart = [np.abs(picture - untouched).mean() for picture in perturbed]
        assert apart == sorted(apart), "more noise at higher strengths"


def test_each_kind_that_is_drawn_has_a_row_below_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[str, list[float]] = {}
    transformed: list[np.ndarray] = []

    def recorded(kind: str, schedule: object) -> object:
        def transform(**arguments: object) -> dict[str, np.ndarray]:
            used.setdefault(kind, []).append(arguments["strength"])  # type: ignore[arg-type]
            result = region_perturbation(kind, schedule)(**arguments)  # type: ignore[arg-type]
            transformed.append(result["image"])
            return result

        return transform

    monkeypatch.setattr(sheets, "region_perturbation", recorded)
    sheet = np.asarray(contact_sheet([DemoSource("test", scenes=1)], 1, KINDS))
    strengths = [0.2, 0.4, 0.6, 0.8, 1.0]
    assert used == {"noise": strengths, "motion_blur": strengths, "fade": strengths}
    assert sheet.shape == (3 * sheets.CELL_HEIGHT, sheets.TEXT_WIDTH + 7 * sheets.CELL_WIDTH, 3)
    shown = [picture for row in range(3) for picture in _pictures(sheet, row, 7)[2:]]
    assert all(np.array_equal(a, b) for a, b in zip(shown, transformed, strict=True)), "as training has it"
    for row in (1, 2):
        assert (np.stack(_pictures(sheet, row, 2)) == 255).all(), "regions are shown once"
    for row in range(3):
        top, left = row * sheets.CELL_HEIGHT, sheets.TEXT_WIDTH + 2 * sheets.CELL_WIDTH
        label = sheet[top + 1 : top + sheets.LABEL, left : left + sheets.THUMB]
        assert (label < 100).any(), "each picture has its label"
    sources = [DemoSource("test", scenes=1), DemoSource("train", scenes=1)]
    assert contact_sheet(sources, 100, NOISE).size[1] == 6 * sheets.CELL_HEIGHT, "all that there are"
    with pytest.raises(DataError, match="queries must be at least 1"):
        ContactSheet(queries=0)
