"""Figures of answers by kind and strength of perturbation, tables of samples, and the contact sheet of perturbed images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_calibration.callbacks import contact_sheet as sheets
from vlm_calibration.callbacks.contact_sheet import ContactSheet, contact_sheet
from vlm_calibration.callbacks.figures import CalibrationFigures, media_of, sample_table
from vlm_calibration.callbacks.official import OfficialScores
from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.data.dataset import EvalSplit, PerturbedQueries
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.predictions import graded_prediction
from vlm_calibration.perturbation import LinearLevels, region_perturbation
from vlm_calibration.records import DataError, Prediction
from vlm_calibration.text.grading import Grading

from ..trainers import fake_trainer

ANSWER = Prediction("q", "A dog?", "Yes", "Yes. Confidence: 80%", "yes", 0.8, True, None, None, "yes_no")


class Dataset:
    """Perturbs queries whose id begins with "p"."""

    def is_noised(self, query_id: str) -> bool:
        return query_id.startswith("p")


ANSWERS = [
    replace(ANSWER, id=i, perturbation=kind, strength=strength, confidence=confidence, correct=correct)
    for i, kind, strength, confidence, correct in (
        ("p1", "blur", 0.5, 0.6, True),
        ("p2", "blur", 0.5, 0.2, False),
        ("p3", "noise", 0.5, None, True),
        ("p4", "", 0.0, 0.9, True),
        ("c1", "", 0.0, 1.0, False),
        ("c2", None, None, 1.0, True),
    )
]


def test_the_response_has_a_row_for_each_kind_and_strength_with_confidences() -> None:
    media = media_of(ANSWERS, Dataset())  # type: ignore[arg-type]
    for name in ("response_curve", "reliability", "risk_coverage"):
        assert media[name].image.size == (800, 600)
        assert len(media[name].image.convert("RGB").getcolors(1 << 20)) > 50, "something is on it"
    assert media["response_table"].columns == ["kind", "strength", "answers", "accuracy", "mean_confidence"]
    rows = [("untouched", 0.0, 1, 1.0, 0.9), ("blur", 0.5, 2, 0.5, 0.4)]
    assert [row[0] for row in media["response_table"].data] == [row[0] for row in rows]
    for row, expected in zip(media["response_table"].data, rows, strict=True):
        assert row[1:] == pytest.approx(expected[1:])
    assert [row[0] for row in media["confidence_table"].data] == [0.2, 0.6, 0.9, 1.0]
    assert media["confidence_table"].data[-1][1:] == [1, 1]
    unperturbed = media_of(ANSWERS[4:], Dataset())  # type: ignore[arg-type]
    assert set(unperturbed) == {"reliability", "risk_coverage", "confidence_table"}


@pytest.mark.parametrize("callback", [CalibrationFigures(), OfficialScores()])
def test_they_need_written_predictions(tmp_path: Path, callback: Any) -> None:
    trainer = fake_trainer(tmp_path, callbacks=[callback, PredictionWriter()])
    with pytest.raises(DataError, match=f"{type(callback).__name__} needs a PredictionWriter before it"):
        callback.setup(trainer, None, "fit")


def test_samples_are_evenly_spaced_queries_with_the_answers_of_each_system(processor: Any) -> None:
    splits = {"noised": EvalSplit(DemoSource("test", 3), "drawn")}
    dataset = PerturbedQueries(splits, NoisePolicy(), processor.image_processor)
    samples = [dataset[0, i] for i in range(len(dataset))]
    answers = {
        system: [graded_prediction(s.query, text, s.perturbation, s.noise_step, Grading()) for s in samples]
        for system, text in (("base", "Yes. Confidence: 90%"), ("sft", "No. Confidence: 20%"))
    }
    logged = sample_table(dataset, answers, 2, taught=True)
    first, last = (dict(zip(logged.columns, row, strict=True)) for row in logged.data)
    assert (first["id"], last["id"]) == (samples[0].query.id, samples[-1].query.id)
    assert (first["perturbation"], first["strength"]) == samples[0].perturbation
    assert first["earned_confidence"] == samples[0].confidence
    assert (first["base_confidence"], first["sft_confidence"]) == (0.9, 0.2)
    assert first["base_correct"] != first["sft_correct"]
    untaught = sample_table(dataset, {"": answers["base"][1:]}, 16, taught=False)
    assert "earned_confidence" not in untaught.columns
    assert [row[0] for row in untaught.data] == [s.query.id for s in samples[1:]]


# --- The contact sheet ---

KINDS = NoisePolicy(LinearLevels(6), kinds={"noise": 1.0, "blur": 0.0, "motion_blur": 1.0, "fade": 0.5})


def _pictures(sheet: np.ndarray, row: int, columns: int) -> list[np.ndarray]:
    top = row * sheets.CELL_HEIGHT + sheets.LABEL
    lefts = (sheets.TEXT_WIDTH + column * sheets.CELL_WIDTH for column in range(columns))
    return [sheet[top : top + sheets.THUMB, left : left + sheets.THUMB].astype(int) for left in lefts]


def test_queries_and_strengths_of_one_kind() -> None:
    source = DemoSource("test", scenes=4)
    sheet = np.asarray(contact_sheet([source], 3, NoisePolicy()))
    assert sheet.shape == (3 * sheets.CELL_HEIGHT, sheets.TEXT_WIDTH + 12 * sheets.CELL_WIDTH, 3)
    assert np.array_equal(sheet, np.asarray(contact_sheet([source], 3, NoisePolicy())))
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
    assert contact_sheet(sources, 100, NoisePolicy()).size[1] == 6 * sheets.CELL_HEIGHT, "all that there are"
    with pytest.raises(DataError, match="queries must be at least 1"):
        ContactSheet(queries=0)
