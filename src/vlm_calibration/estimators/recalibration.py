"""Post-hoc recalibration, the baseline that training for calibration must beat.

Maps from confidence to accuracy are fitted on the answers of a calibration set and applied to those of a test set, which shares no
image with it, since the correctness of answers about one image is correlated. Each answer type has its own map: the likelihood of yes
against no and that of a text's tokens are not comparable. All but histogram binning are monotone: they fix calibration, not ranking.

A method takes confidences, float64 [N] in [0, 1], their correctness, bool [N], N at least 1, and the `epsilon` of `logit`. It returns the
fitted map, from confidences to recalibrated ones, float64 [M] in [0, 1].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import KBinsDiscretizer

from vlm_calibration.records import VERBALIZED, DataError, Prediction

HALF_PERCENT, SMALLEST = 0.005, 1e-6
"""`epsilon` of `logit`: half of the step between stated percentages, and that for all other confidences."""
MIN_SLOPE = 1e-6
"""Slope of a Platt map, at least: confidences keep their order."""
UNREGULARISED = 1e6
"""Inverse strength of the penalty on logistic weights: negligible, but keeps them finite for separable answers."""
BINS = 10
Map = Callable[[np.ndarray], np.ndarray]


def platt(confidence: np.ndarray, correct: np.ndarray, epsilon: float = SMALLEST) -> Map:
    """Platt scaling (1999), of the logit of the confidence: sigmoid(a logit(c) + b), a > 0, so AUROC does not change.

    If accuracy falls with confidence, a is `MIN_SLOPE`, and all confidences map to about the overall accuracy.
    """
    return _logistic(confidence, correct, epsilon, intercept=True)


def temperature(confidence: np.ndarray, correct: np.ndarray, epsilon: float = SMALLEST) -> Map:
    """Temperature scaling (Guo et al., arXiv 1706.04599): sigmoid(logit(c) / T)."""
    return _logistic(confidence, correct, epsilon, intercept=False)


def _logistic(confidence: np.ndarray, correct: np.ndarray, epsilon: float, intercept: bool) -> Map:
    if correct.all() or not correct.any():
        # One outcome has no finite logistic fit: the rule of succession.
        constant = (correct.sum() + 1) / (len(correct) + 2)
        return lambda c: np.full(len(c), constant)
    logistic = LogisticRegression(C=UNREGULARISED, fit_intercept=intercept, max_iter=1000)
    logistic.fit(logit(confidence, epsilon)[:, None], correct.astype(np.float64))
    if not intercept:
        # If accuracy falls with confidence, the best temperature is infinite.
        logistic.coef_ = np.maximum(logistic.coef_, 0.0)
    elif logistic.coef_[0, 0] < MIN_SLOPE:
        logistic.coef_ = np.array([[MIN_SLOPE]])
        logistic.intercept_ = logit(np.array([correct.mean()]))
    return lambda c: logistic.predict_proba(logit(c, epsilon)[:, None])[:, 1]


def isotonic(confidence: np.ndarray, correct: np.ndarray, epsilon: float = SMALLEST) -> Map:
    """Isotonic regression (Zadrozny & Elkan, 2002): the best monotone map, linear between its knots."""
    regression = IsotonicRegression(y_min=0.0, y_max=1.0, increasing=True, out_of_bounds="clip")
    regression.fit(confidence[:, None], correct.astype(np.float64))
    return lambda c: np.clip(regression.predict(c[:, None]), 0.0, 1.0)


def histogram(confidence: np.ndarray, correct: np.ndarray, epsilon: float = SMALLEST) -> Map:
    """Histogram binning (Zadrozny & Elkan, 2001): the accuracy of each of at most ten bins with equally many answers."""
    regression = LinearRegression()
    if len(np.unique(confidence)) > 1:  # a single one has no quantiles
        # Least squares on bin indicators gives the mean of each bin.
        bins = KBinsDiscretizer(BINS, encode="onehot-dense", strategy="quantile", subsample=None)
        regression = make_pipeline(bins, regression)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Bins whose width are too small")  # fewer bins are expected
        regression.fit(confidence[:, None], correct.astype(np.float64))
    # Rounding can move a least-squares fit outside.
    return lambda c: np.clip(regression.predict(c[:, None]), 0.0, 1.0)


METHODS = {"platt": platt, "temperature": temperature, "isotonic": isotonic, "histogram": histogram}


def logit(confidence: np.ndarray, epsilon: float = SMALLEST) -> np.ndarray:
    """log(c / (1 - c)), and its tangent within `epsilon` of 0 or 1: finite and strictly increasing everywhere."""
    inside = np.clip(confidence, epsilon, 1 - epsilon)
    return np.log(inside) - np.log1p(-inside) + (confidence - inside) / (inside * (1 - inside))


def recalibrated(
    method: str,
    predictions: Sequence[Prediction],
    estimator: str,
    calibration: Sequence[Prediction],
) -> list[float | None]:
    """For each prediction the confidence of an estimator, recalibrated by one of `METHODS`; None without a confidence.

    DataError if an image is in both sets or unknown, or no calibration answer of a type has a confidence.
    """
    for p in (*calibration, *predictions):
        if p.image is None:
            reason = "has no 'image', so answers cannot be split by image: evaluate again"
            raise DataError(f"prediction {p.id!r} {reason}")
    if shared := sorted({str(p.image) for p in calibration} & {str(p.image) for p in predictions}):
        raise DataError(
            f"{len(shared)} images are in the calibration split and in the test split, {shared[0]!r} among them: a map must "
            "be fitted on other images than it is applied to"
        )
    if missing := unrated_types(predictions, estimator, calibration):
        answers = f"no {missing[0]} answer of the calibration split"
        raise DataError(f"{method}: {answers} has a confidence to fit on")
    epsilon = HALF_PERCENT if estimator == VERBALIZED else SMALLEST
    values: list[float | None] = [None] * len(predictions)
    for kind, rows in _rated(predictions, estimator).items():
        fitted_on = [calibration[row] for row in _rated(calibration, estimator)[kind]]
        confidence = np.array([p.confidence_of(estimator) for p in fitted_on], dtype=np.float64)
        fitted = METHODS[method](confidence, np.array([p.correct for p in fitted_on]), epsilon)
        own = np.array([predictions[row].confidence_of(estimator) for row in rows], dtype=np.float64)
        for row, value in zip(rows, fitted(own).tolist(), strict=True):
            values[row] = value
    return values


def unrated_types(
    predictions: Sequence[Prediction], estimator: str, calibration: Sequence[Prediction]
) -> list[str]:
    """The types of answers that an estimator rates, but not in the calibration set."""
    return sorted(_rated(predictions, estimator).keys() - _rated(calibration, estimator).keys())


def _rated(predictions: Sequence[Prediction], estimator: str) -> dict[str, list[int]]:
    """Answer type -> rows of the answers that have a confidence."""
    rows: dict[str, list[int]] = {}
    for row, prediction in enumerate(predictions):
        if prediction.confidence_of(estimator) is not None:
            rows.setdefault(prediction.answer_type, []).append(row)
    return rows
