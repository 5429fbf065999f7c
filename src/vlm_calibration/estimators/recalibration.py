"""Recalibration after the fact, the baseline that training a model to be honest must beat.

A map from confidence to accuracy is fitted on the answers of a calibration set and applied to those of a test set. No image
is in both, since answers about one image are right or wrong together. One map is applied to all answers: confidences that
several maps gave, each fitted on other folds of the test set, would not be ranked by the model alone. The maps are those of
scikit-learn. They are monotone but for histogram binning, so they fix calibration, not ranking: AUROC and AURC need a better
model.
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
"""How near to 0 and 1 the logit gives way to its tangent: half a percent, since stated confidences are whole ones."""
LEAST_SLOPE = 1e-6
"""Of a logistic map: with it, confidences keep their order, and differ by a hundred-thousandth."""
UNREGULARISED = 1e6
"""Inverse strength of the penalty on logistic weights: none to speak of, and yet finite where answers can be separated."""


class Recalibration(ABC):
    """A map from confidence to accuracy.

    Attributes:
        name: as in tables.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.map = self._map()

    @abstractmethod
    def _map(self) -> object:
        """What scikit-learn fits, on float64 [N, 1]."""

    def fit(self, confidence: np.ndarray, correct: np.ndarray) -> Recalibration:
        """Fit on float64 [N] in [0, 1] and bool [N], N at least 1; returns itself."""
        self.map.fit(confidence[:, None], correct.astype(np.float64))  # type: ignore[attr-defined]
        return self

    def __call__(self, confidence: np.ndarray) -> np.ndarray:
        """The recalibrated confidences, float64 [N] in [0, 1]."""
        found = self.map.predict(confidence[:, None])  # type: ignore[attr-defined]
        return np.clip(found, 0.0, 1.0)  # a least-squares fit may leave it by a rounding error


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
        if self.constant is not None:  # without wrong answers, or right ones, there is no more to learn
            return np.full(len(confidence), self.constant)
        return self.map.predict_proba(confidence[:, None])[:, 1]  # type: ignore[attr-defined]


class Platt(_Logistic):
    """Platt scaling (1999), of the logit of the confidence: sigmoid(a logit(c) + b), a > 0.

    It is strictly increasing, so it leaves AUROC as it is. Where answers that state more are right less often, a is
    `LEAST_SLOPE`: all are mapped to about their accuracy.
    """

    name = "platt"
    intercept = True

    def fit(self, confidence: np.ndarray, correct: np.ndarray) -> Recalibration:
        super().fit(confidence, correct)
        if self.constant is None and (logistic := self.map[-1]).coef_[0, 0] < LEAST_SLOPE:  # type: ignore[index]
            logistic.coef_ = np.array([[LEAST_SLOPE]])
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
            logistic.coef_ = np.maximum(
                logistic.coef_, 0.0
            )  # no temperature is below 0; the best one is infinite
        return self


class Isotonic(Recalibration):
    """Isotonic regression (Zadrozny & Elkan, 2002): the best monotone map, a line between its knots."""

    name = "isotonic"

    def _map(self) -> object:
        return IsotonicRegression(y_min=0.0, y_max=1.0, increasing=True, out_of_bounds="clip")


class Histogram(Recalibration):
    """Histogram binning (Zadrozny & Elkan, 2001): the accuracy of each of ten bins of as many answers.

    Bins are fewer where answers state fewer confidences.
    """

    name = "histogram"
    bins = 10

    def _map(self) -> object:
        # Least squares over indicators of the bins is the mean of each.
        return make_pipeline(
            KBinsDiscretizer(self.bins, encode="onehot-dense", strategy="quantile", subsample=None),
            LinearRegression(),
        )

    def fit(self, confidence: np.ndarray, correct: np.ndarray) -> Recalibration:
        if len(np.unique(confidence)) == 1:  # which has no quantiles
            self.map = LinearRegression()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Bins whose width are too small")  # as it is said above
            return super().fit(confidence, correct)


METHODS: dict[str, type[Recalibration]] = {m.name: m for m in (Platt, Temperature, Isotonic, Histogram)}

Confidences = Sequence[float | None]


def logit(confidence: np.ndarray) -> np.ndarray:
    """log(c / (1 - c)), and within `EPSILON` of 0 or 1 its tangent: finite, and strictly increasing all the way."""
    inside = np.clip(confidence, EPSILON, 1 - EPSILON)
    return np.log(inside) - np.log1p(-inside) + (confidence - inside) / (inside * (1 - inside))


def recalibrated(
    method: str,
    predictions: Sequence[EstimatedPrediction],
    estimator: str,
    calibration: Sequence[EstimatedPrediction],
) -> list[float | None]:
    """What a confidence becomes by a map fitted on answers about other images.

    Args:
        method: one of `METHODS`.
        predictions: answers to recalibrate. estimator: which of their confidences.
        calibration: answers to fit on.

    Returns:
        For each prediction its recalibrated confidence, None where it has none.

    Raises:
        DataError: an image is on both sides or not known, or there is nothing to fit on.
    """
    check_apart(calibration, predictions)
    fit = _fitted(method, calibration, [p.confidence_of(estimator) for p in calibration])
    return _applied(fit, [p.confidence_of(estimator) for p in predictions])


def check_apart(calibration: Sequence[EstimatedPrediction], test: Sequence[EstimatedPrediction]) -> None:
    """Refuse a calibration split that shares an image with the answers to be recalibrated.

    Raises:
        DataError: it does, or an image is not known.
    """
    both = sorted(set(images_of(calibration)) & set(images_of(test)))
    if both:
        raise DataError(
            f"{len(both)} images are in the calibration split and in the test split, {both[0]!r} among them: "
            "what is fitted on an image says nothing about it"
        )


def images_of(predictions: Sequence[EstimatedPrediction]) -> list[str]:
    """The image of each.

    Raises:
        DataError: one is not known.
    """
    for prediction in predictions:
        if prediction.image is None:
            raise DataError(
                f"prediction {prediction.id!r} does not say what its image is, so answers cannot be split by image: "
                "evaluate again"
            )
    return [p.image for p in predictions if p.image is not None]


def _fitted(
    method: str, predictions: Sequence[EstimatedPrediction], confidence: Confidences
) -> Callable[[np.ndarray], np.ndarray]:
    rows = [(c, p.correct) for c, p in zip(confidence, predictions, strict=True) if c is not None]
    if not rows:
        raise DataError(f"{method}: there is no answer with a readable confidence to fit on")
    said, correct = (np.array(column) for column in zip(*rows, strict=True))
    return METHODS[method]().fit(said.astype(np.float64), correct)


def _applied(fit: Callable[[np.ndarray], np.ndarray], confidence: Confidences) -> list[float | None]:
    read = [i for i, c in enumerate(confidence) if c is not None]
    found: list[float | None] = [None] * len(confidence)
    if read:
        values = fit(np.array([confidence[i] for i in read], dtype=np.float64))
        for i, value in zip(read, values.tolist(), strict=True):
            found[i] = value
    return found
