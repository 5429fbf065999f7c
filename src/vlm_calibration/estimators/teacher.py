"""The teacher of stage 2: maps from several estimates of the confidence in an answer to its accuracy, fitted on labelled answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from vlm_calibration.estimators.recalibration import SMALLEST, logit
from vlm_calibration.metrics.functional import auroc, brier_score, expected_calibration_error
from vlm_calibration.records import DataError, Prediction

TEACHER = "teacher"
"""Name of what the teacher makes of the estimates in an answer, beside those of estimators."""
Feature = Literal["expected", "likelihood", "p_true", "self_consistency"]
Map = tuple[Any, Any]
"""Logistic: the weights of the features' log-odds, and the intercept. Isotonic: rising confidences, and the accuracy at each."""


@dataclass(frozen=True)
class TeacherSettings:
    """The teacher that `pairs.target: fitted` fits on the reference's answers to `data.teacher`.

    Args:
        features: estimates of the reference's confidence that the map combines, as in an evaluation's `model.estimators`.
        map: "logistic": logistic regression of correctness on the log-odds of the features. "isotonic": isotonic regression
            on a single feature.
    """

    features: tuple[Feature, ...] = ("likelihood", "expected")
    map: Literal["logistic", "isotonic"] = "logistic"

    def __post_init__(self) -> None:
        if not self.features or len(set(self.features)) < len(self.features):
            raise DataError(f"model.teacher.features: at least one, each once, found {list(self.features)}")
        if self.map == "isotonic" and len(self.features) > 1:
            raise DataError(
                f"model.teacher: `map: isotonic` takes one feature, found {list(self.features)}: use one, or `map: logistic`"
            )


class TaughtAnswer(NamedTuple):
    """One answer that a teacher is fitted on, with its confidences in [0, 1] in the order of the settings."""

    features: tuple[float, ...]
    correct: bool
    answer_type: str
    image: str


@dataclass(frozen=True, repr=False)
class FittedTeacher:
    """Maps from estimates of confidence to accuracy, one for each answer type.

    The `scores` of the answers, each by maps that were fitted on other images, are `n`, `accuracy`, `brier`, `ece` and `auroc`, without
    those that are undefined, such as `auroc` if all answers are correct.
    """

    settings: TeacherSettings
    maps: Mapping[str, Map]
    scores: Mapping[str, float]

    def __call__(self, features: Sequence[float], answer_type: str) -> float:
        """The accuracy in [0, 1] of answers with such features; raises a DataError if no answer of this type was fitted."""
        if answer_type not in self.maps:
            raise DataError(
                f"`target: fitted`: no {answer_type} answer to data.teacher, or data.validation, only {', '.join(sorted(self.maps))}: add such queries"
            )
        first, second = self.maps[answer_type]
        if self.settings.map == "isotonic":
            return float(np.interp(features[0], first, second))
        z = float(np.dot(first, _log_odds(np.array(features))) + second)
        return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))

    @staticmethod
    def fit(settings: TeacherSettings, answers: Sequence[TaughtAnswer]) -> FittedTeacher:
        """Fit the maps on at least one answer. The order of the answers does not matter."""
        rows = sorted(answers)
        return FittedTeacher(settings, _fit_maps(settings, rows), _cross_validated(settings, rows))

    @staticmethod
    def from_state(settings: TeacherSettings, state: Mapping[str, Any]) -> FittedTeacher:
        """The teacher of a checkpoint; raises a DataError if it was fitted with other settings."""
        if state["settings"] != asdict(settings):
            raise DataError(
                f"--ckpt_path: its teacher was fitted with {state['settings']}, but model.teacher is {asdict(settings)}: use the former"
            )
        return FittedTeacher(settings, state["maps"], state["scores"])

    def __repr__(self) -> str:
        scores = ", ".join(f"{k} {v:g}" if k == "n" else f"{k} {v:.3f}" for k, v in self.scores.items())
        return f"{self.settings.map} map of {' and '.join(self.settings.features)}, cross-validated: {scores}"


def _fit_maps(settings: TeacherSettings, rows: Sequence[TaughtAnswer]) -> dict[str, Map]:
    maps: dict[str, Map] = {}
    for kind in sorted({row.answer_type for row in rows}):
        of_kind = [row for row in rows if row.answer_type == kind]
        features = np.array([row.features for row in of_kind])  # float64 [N, F]
        correct = np.array([row.correct for row in of_kind])
        n, n_correct = len(correct), int(correct.sum())
        if settings.map == "isotonic":
            isotonic = IsotonicRegression(y_min=0.0, y_max=1.0).fit(features[:, 0], correct.astype(float))
            maps[kind] = tuple(isotonic.X_thresholds_.tolist()), tuple(isotonic.y_thresholds_.tolist())
        elif n_correct in (0, n):
            # One outcome has no finite fit: the rule of succession, whatever the features are.
            maps[kind] = (0.0,) * features.shape[1], math.log((n_correct + 1) / (n - n_correct + 1))
        else:
            logistic = LogisticRegression(max_iter=1000).fit(_log_odds(features), correct)
            maps[kind] = tuple(logistic.coef_[0].tolist()), float(logistic.intercept_[0])
    return maps


def _log_odds(confidence: np.ndarray) -> np.ndarray:
    return logit(np.clip(confidence, SMALLEST, 1 - SMALLEST))


def _cross_validated(settings: TeacherSettings, rows: Sequence[TaughtAnswer]) -> dict[str, float]:
    """Scores of teachers on answers about images that they were not fitted on, in at most five folds."""
    images = [row.image for row in rows]
    folds = min(5, len(set(images)))
    correct = torch.tensor([row.correct for row in rows])
    scores = {"n": float(len(rows)), "accuracy": float(correct.double().mean())}
    if folds < 2:
        return scores
    confidence = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    for fitted_on, held_out in GroupKFold(folds).split(images, groups=images):
        teacher = FittedTeacher(settings, _fit_maps(settings, [rows[i] for i in fitted_on]), {})
        for i in held_out:
            if rows[i].answer_type in teacher.maps:
                confidence[i] = teacher(rows[i].features, rows[i].answer_type)
    rated = ~confidence.isnan()  # all but those of an answer type of a single fold
    confidence, correct = confidence[rated], correct[rated]
    if len(correct):
        scores["brier"] = float(brier_score(confidence, correct))
        scores["ece"] = float(expected_calibration_error(confidence, correct))
    if len(correct.unique()) == 2:
        scores["auroc"] = float(auroc(confidence, correct))
    return scores


def taught_confidences(
    predictions: Sequence[Prediction], calibration: Sequence[Prediction]
) -> list[float | None]:
    """For each answer the accuracy in [0, 1] by a teacher of the default settings that is fitted on the calibration answers.

    None for an answer that lacks an estimate, or is of a type without calibration answers; empty if that holds for every answer.
    """
    settings = TeacherSettings()

    def rated(p: Prediction) -> TaughtAnswer | None:
        features = tuple(c for name in settings.features if (c := p.estimates.get(name)) is not None)
        is_complete = len(features) == len(settings.features)
        return TaughtAnswer(features, p.correct, p.answer_type, p.image or "") if is_complete else None

    teacher = FittedTeacher(settings, _fit_maps(settings, sorted(filter(None, map(rated, calibration)))), {})
    asked = (row if row and row.answer_type in teacher.maps else None for row in map(rated, predictions))
    values = [row and teacher(row.features, row.answer_type) for row in asked]
    return values if any(value is not None for value in values) else []
