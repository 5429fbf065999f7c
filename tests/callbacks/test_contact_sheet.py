"""The contact sheet: number of rows, clean images at 100%, and noise on the object alone."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_calibration.callbacks import contact_sheet as sheets
from vlm_calibration.callbacks.contact_sheet import ContactSheet, contact_sheet
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.perturbation.schedules import CosineSchedule
from vlm_calibration.records import DataError


def test_rows_and_levels() -> None:
    source = DemoSource("test", scenes=4)
    sheet = np.asarray(contact_sheet([source], 3, CosineSchedule()))
    cell = sheets.THUMB + sheets.MARGIN
    assert sheet.shape == (24 + 3 * cell, sheets.TEXT_WIDTH + 12 * cell, 3)
    again = np.asarray(contact_sheet([source], 3, CosineSchedule()))
    assert np.array_equal(sheet, again)
    assert not np.array_equal(sheet, np.asarray(contact_sheet([source], 3, CosineSchedule(), seed=1)))
    for row in range(3):
        top = 24 + row * cell
        pictures = [
            sheet[top : top + sheets.THUMB, left : left + sheets.THUMB].astype(int)
            for left in range(sheets.TEXT_WIDTH, sheet.shape[1], cell)
        ]
        overlay, clean, *noised = pictures
        assert not np.array_equal(overlay, clean)
        changed = [(picture != clean).any(axis=2) for picture in noised]
        assert 0 < changed[-1].mean() < 0.5, "the object, not the image"
        apart = [np.abs(picture - clean).mean() for picture in noised]
        assert apart == sorted(apart), "more noise at lower levels"


def test_more_rows_than_queries_and_none() -> None:
    sources = [DemoSource("test", scenes=1), DemoSource("train", scenes=1)]
    assert contact_sheet(sources, 100, CosineSchedule()).size[1] == 24 + 6 * (sheets.THUMB + sheets.MARGIN)
    with pytest.raises(DataError, match="queries must be at least 1"):
        ContactSheet(queries=0)
