"""Recalibration after the fact, the baseline that training a model to be honest must beat.

A map from confidence to accuracy is fitted on some answers and applied to others: to those of a calibration split, or, where
there is none, to each fold of the answers the map of the other folds. No image is on both sides, since answers about one
image are right or wrong together. The maps are those of scikit-learn. They are monotone but for histogram binning, so they
mend how sure a model is and not of what: only a better ranking, AUROC and AURC, needs a better model.
"""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, KBinsDiscretizer

from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.records import DataError

FOLDS = 5
EPSILON = 0.005
"""What a logit keeps away from 0 and 1: half a percent, since stated confidences are whole ones."""
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
    """Platt scaling (1999), of the logit of the confidence: sigmoid(a logit(c) + b)."""

    name = "platt"
    intercept = True


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
    """log(c / (1 - c)), as if no confidence were within `EPSILON` of 0 or 1."""
    inside = np.clip(confidence, EPSILON, 1 - EPSILON)
    return np.log(inside) - np.log1p(-inside)


def recalibrated(
    method: str,
    predictions: Sequence[EstimatedPrediction],
    estimator: str,
    calibration: Sequence[EstimatedPrediction] | None = None,
) -> list[float | None]:
    """What a confidence becomes by a map fitted on answers about other images.

    Args:
        method: one of `METHODS`.
        predictions: answers to recalibrate. estimator: which of their confidences.
        calibration: answers to fit on; None: the answers themselves, in `FOLDS` folds.

    Returns:
        For each prediction its recalibrated confidence, None where it has none.

    Raises:
        DataError: an image is on both sides or not known, there is only one image, or nothing to fit on.
    """
    confidence = [p.confidence_of(estimator) for p in predictions]
    if calibration is not None:
        check_apart(calibration, predictions)
        said = [p.confidence_of(estimator) for p in calibration]
        return _applied(_fitted(method, calibration, said), confidence)
    found: list[float | None] = [None] * len(predictions)
    for fitted_on, held_out in folds(predictions):
        part = [predictions[i] for i in fitted_on]
        fit = _fitted(method, part, [confidence[i] for i in fitted_on])
        for i, value in zip(held_out, _applied(fit, [confidence[i] for i in held_out]), strict=True):
            found[i] = value
    return found


def folds(predictions: Sequence[EstimatedPrediction]) -> list[tuple[list[int], list[int]]]:
    """Indices to fit on and indices held out, of each of `FOLDS` folds (fewer if there are fewer images).

    No image is in both, and each answer is held out once. Which images share a fold does not depend on the order of answers.

    Raises:
        DataError: the image of an answer is not known, or there is only one.
    """
    images = images_of(predictions)
    if len(set(images)) < 2:
        raise DataError(f"recalibration needs answers about two images at least, found only {images[0]!r}")
    # GroupKFold takes groups in the order of their names, which may be that of their difficulty.
    names = [hashlib.blake2b(image.encode(), digest_size=16).hexdigest() for image in images]
    split = GroupKFold(min(FOLDS, len(set(names)))).split(names, groups=names)
    return [(fitted_on.tolist(), held_out.tolist()) for fitted_on, held_out in split]


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
