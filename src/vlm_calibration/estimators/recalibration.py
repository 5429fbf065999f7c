"""Post-hoc recalibration, the baseline that training for calibration must beat.

A map from confidence to accuracy is fitted on the answers of a calibration set and applied to those of a test set. The sets
share no image, because the correctness of answers about one image is correlated. One map applies to all answers: with maps
fitted on folds of the test set, the ranking would not be the model's alone. The maps are those of scikit-learn. All but histogram
binning are monotone, so they fix calibration, not ranking: AUROC and AURC need a better model.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, KBinsDiscretizer

from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.records import DataError

EPSILON = 0.005
"""Distance from 0 and 1 within which the logit is replaced by its tangent: half of the step between stated percentages."""
MIN_SLOPE = 1e-6
"""Slope of a logistic map, at least: confidences keep their order."""
UNREGULARISED = 1e6
"""Inverse strength of the penalty on logistic weights: negligible, but keeps them finite for separable answers."""


class Recalibration(ABC):
    """A map from confidence to accuracy.

    Attributes:
        name: its name in tables.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.map = self._map()

    @abstractmethod
    def _map(self) -> object:
        """A scikit-learn model with `fit` and `predict` on float64 [N, 1]."""

    def fit(self, confidence: np.ndarray, correct: np.ndarray) -> Recalibration:
        """Fit on float64 [N] in [0, 1] and bool [N], N at least 1; returns itself."""
        self.map.fit(confidence[:, None], correct.astype(np.float64))  # type: ignore[attr-defined]
        return self

    def __call__(self, confidence: np.ndarray) -> np.ndarray:
        """The recalibrated confidences, float64 [N] in [0, 1]."""
        accuracy = self.map.predict(confidence[:, None])  # type: ignore[attr-defined]
        return np.clip(accuracy, 0.0, 1.0)  # rounding can move a least-squares fit outside


class _Logistic(Recalibration):
    """Logistic regression on the logit of the confidence."""

    intercept: ClassVar[bool]

    def _map(self) -> object:
        logistic = LogisticRegression(C=UNREGULARISED, fit_intercept=self.intercept, max_iter=1000)
        return make_pipeline(FunctionTransformer(logit), logistic)

    def fit(self, confidence: np.ndarray, correct: np.ndarray) -> Recalibration:
        self.constant = float(correct[0]) if len(set(correct.tolist())) == 1 else None
        return self if self.constant is not None else super().fit(confidence, correct)

    def __call__(self, confidence: np.ndarray) -> np.ndarray:
        if self.constant is not None:  # all answers are correct, or all are wrong
            return np.full(len(confidence), self.constant)
        return self.map.predict_proba(confidence[:, None])[:, 1]  # type: ignore[attr-defined]


class Platt(_Logistic):
    """Platt scaling (1999), of the logit of the confidence: sigmoid(a logit(c) + b), a > 0.

    It is strictly increasing, so AUROC does not change. If accuracy falls with confidence, a is `MIN_SLOPE`, and all
    confidences map to about the overall accuracy.
    """

    name = "platt"
    intercept = True

    def fit(self, confidence: np.ndarray, correct: np.ndarray) -> Recalibration:
        super().fit(confidence, correct)
        if self.constant is None and (logistic := self.map[-1]).coef_[0, 0] < MIN_SLOPE:  # type: ignore[index]
            logistic.coef_ = np.array([[MIN_SLOPE]])
            logistic.intercept_ = logit(np.array([correct.mean()]))
        return self


class Temperature(_Logistic):
    """Temperature scaling (Guo et al., arXiv 1706.04599): sigmoid(logit(c) / T)."""

    name = "temperature"
    intercept = False

    def fit(self, confidence: np.ndarray, correct: np.ndarray) -> Recalibration:
        super().fit(confidence, correct)
        if self.constant is None:
            logistic = self.map[-1]  # type: ignore[index]
            # If accuracy falls with confidence, the best temperature is infinite.
            logistic.coef_ = np.maximum(logistic.coef_, 0.0)
        return self


class Isotonic(Recalibration):
    """Isotonic regression (Zadrozny & Elkan, 2002): the best monotone map, linear between its knots."""

    name = "isotonic"

    def _map(self) -> object:
        return IsotonicRegression(y_min=0.0, y_max=1.0, increasing=True, out_of_bounds="clip")


class Histogram(Recalibration):
    """Histogram binning (Zadrozny & Elkan, 2001): the accuracy of each of ten bins with equally many answers.

    Fewer distinct confidences give fewer bins.
    """

    name = "histogram"
    bins = 10

    def _map(self) -> object:
        # Least squares on bin indicators gives the mean of each bin.
        return make_pipeline(
            KBinsDiscretizer(self.bins, encode="onehot-dense", strategy="quantile", subsample=None),
            LinearRegression(),
        )

    def fit(self, confidence: np.ndarray, correct: np.ndarray) -> Recalibration:
        if len(np.unique(confidence)) == 1:  # no quantiles
            self.map = LinearRegression()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Bins whose width are too small")  # fewer bins are expected
            return super().fit(confidence, correct)


METHODS: dict[str, type[Recalibration]] = {m.name: m for m in (Platt, Temperature, Isotonic, Histogram)}

Confidences = Sequence[float | None]


def logit(confidence: np.ndarray) -> np.ndarray:
    """log(c / (1 - c)), and its tangent within `EPSILON` of 0 or 1: finite and strictly increasing everywhere."""
    inside = np.clip(confidence, EPSILON, 1 - EPSILON)
    return np.log(inside) - np.log1p(-inside) + (confidence - inside) / (inside * (1 - inside))


def recalibrated(
    method: str,
    predictions: Sequence[EstimatedPrediction],
    estimator: str,
    calibration: Sequence[EstimatedPrediction],
) -> list[float | None]:
    """Recalibrate the confidences of an estimator with a map fitted on answers about other images.

    Args:
        method: one of `METHODS`.
        predictions: answers to recalibrate.
        estimator: name of the estimator.
        calibration: answers to fit the map on.

    Returns:
        For each prediction its recalibrated confidence, None without a confidence.

    Raises:
        DataError: an image is in both sets or unknown, or no calibration answer has a confidence.
    """
    check_disjoint_images(calibration, predictions)
    fit = _fit(method, calibration, [p.confidence_of(estimator) for p in calibration])
    return _apply(fit, [p.confidence_of(estimator) for p in predictions])


def check_disjoint_images(
    calibration: Sequence[EstimatedPrediction], test: Sequence[EstimatedPrediction]
) -> None:
    """Check that the calibration split shares no image with the answers to recalibrate.

    Raises:
        DataError: they share an image, or an image is unknown.
    """
    shared = sorted(set(images_of(calibration)) & set(images_of(test)))
    if shared:
        raise DataError(
            f"{len(shared)} images are in the calibration split and in the test split, {shared[0]!r} among them: a map must "
            "be fitted on other images than it is applied to"
        )


def images_of(predictions: Sequence[EstimatedPrediction]) -> list[str]:
    """The image of each prediction.

    Raises:
        DataError: an image is unknown.
    """
    for prediction in predictions:
        if prediction.image is None:
            raise DataError(
                f"prediction {prediction.id!r} has no 'image', so answers cannot be split by image: evaluate again"
            )
    return [p.image for p in predictions if p.image is not None]


def _fit(
    method: str, predictions: Sequence[EstimatedPrediction], confidence: Confidences
) -> Callable[[np.ndarray], np.ndarray]:
    rows = [(c, p.correct) for c, p in zip(confidence, predictions, strict=True) if c is not None]
    if not rows:
        raise DataError(f"{method}: no answer of the calibration split has a confidence to fit on")
    stated, correct = (np.array(column) for column in zip(*rows, strict=True))
    return METHODS[method]().fit(stated.astype(np.float64), correct)


def _apply(fit: Callable[[np.ndarray], np.ndarray], confidence: Confidences) -> list[float | None]:
    indices = [i for i, c in enumerate(confidence) if c is not None]
    recalibrated: list[float | None] = [None] * len(confidence)
    if indices:
        values = fit(np.array([confidence[i] for i in indices], dtype=np.float64))
        for i, value in zip(indices, values.tolist(), strict=True):
            recalibrated[i] = value
    return recalibrated
