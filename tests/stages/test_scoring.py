"""The scorer: predictions in any pieces score as all of them at once, over all and over every group of a category."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vlm_calibration.metrics.functional import brier_score, expected_calibration_error, overconfidence
from vlm_calibration.records import Prediction, category_groups
from vlm_calibration.stages.scoring import Scorer

CATEGORIES = ("clean/existence", "clean/position", "shifted/blur/existence", "shifted/jpeg/position", None)


def _predictions(n: int = 200, seed: int = 0) -> list[Prediction]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        category = CATEGORIES[int(rng.integers(len(CATEGORIES)))]
        short = category is not None and category.endswith("position")
        gold = "dog" if short else ("Yes", "No")[int(rng.integers(2))]
        predicted = [gold.lower(), "cat" if short else "no", None][int(rng.choice(3, p=[0.6, 0.3, 0.1]))]
        confidence = None if rng.random() < 0.1 else int(rng.integers(101)) / 100
        made.append(
            Prediction(
                *(f"q{i}", "?", gold, "", predicted, confidence, predicted == gold.lower(), category, 0),
                answer_type="short" if short else "yes_no",
            )
        )
    return made


PREDICTIONS = _predictions()
GROUPS = sorted({g for c in CATEGORIES for g in category_groups(c)})


def _scored(predictions: list[Prediction], size: int, groups: list[str]) -> dict[str, float]:
    scorer = Scorer(groups)
    for start in range(0, len(predictions), size):
        scorer.update(predictions[start : start + size])
    return scorer.compute()


@pytest.mark.parametrize("group", [None, "existence"])
def test_values_are_those_of_the_pure_functions(group: str | None) -> None:
    chosen = [p for p in PREDICTIONS if group is None or group in category_groups(p.category)]
    assert len(chosen) > 10
    suffix = f"/{group}" if group else ""
    found = _scored(PREDICTIONS, 16, GROUPS)
    read = [p for p in chosen if p.confidence is not None]
    confidence = torch.tensor([p.confidence for p in read], dtype=torch.float64)
    correct = torch.tensor([p.correct for p in read])
    expected = {
        "n": len(chosen),
        "accuracy": np.mean([p.correct for p in chosen]),
        "parse_failure_rate": 1 - len(read) / len(chosen),
        "ece": expected_calibration_error(confidence, correct),
        "brier": brier_score(confidence, correct),
        "overconfidence": overconfidence(confidence, correct),
        "mean_confidence": confidence.mean(),
    }
    for name, value in expected.items():
        assert found[f"{name}{suffix}"] == pytest.approx(float(value)), name


def test_the_file_format_has_its_names() -> None:
    names = (
        *("n", "accuracy", "precision", "recall", "f1", "yes_ratio", "ece", "ace", "mce", "brier"),
        *("brier_reliability", "brier_resolution", "brier_uncertainty", "log_loss", "auroc", "aurc"),
        *("smooth_ece", "mean_confidence", "overconfidence", "parse_failure_rate"),
    )
    found = _scored(PREDICTIONS, 50, GROUPS)
    assert {k for k in found if "/" not in k} == set(names)
    assert set(found) == {n + s for n in names for s in ("", *(f"/{g}" for g in GROUPS))}
    assert set(_scored(PREDICTIONS, 50, [])) == set(names)


def test_new_groups_forget_and_nothing_adds_nothing() -> None:
    scorer = Scorer(GROUPS)
    scorer.update(PREDICTIONS)
    scorer.set_groups(["clean"])
    scorer.update([])
    scorer.update(PREDICTIONS[:20])
    expected = _scored(PREDICTIONS[:20], 20, ["clean"])
    assert scorer.compute() == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


@pytest.mark.filterwarnings("error")
def test_what_is_undefined_is_nan_without_a_warning() -> None:
    always = [p for p in PREDICTIONS if p.correct and p.confidence is not None]
    found = _scored(always, 50, [])
    assert math.isnan(found["auroc"])
    assert found["accuracy"] == 1.0
