"""Recalibration against netcal and against arithmetic, and the check that the splits share no image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from netcal.binning import IsotonicRegression
from netcal.scaling import LogisticCalibration, TemperatureScaling

from vlm_calibration.estimators.recalibration import (
    HALF_PERCENT,
    METHODS,
    SMALLEST,
    histogram,
    isotonic,
    logit,
    platt,
    recalibrated,
    temperature,
)
from vlm_calibration.records import VERBALIZED, DataError, Prediction


def answers(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overconfident answers in whole percents."""
    rng = np.random.default_rng(seed)
    truth = rng.beta(2, 1.5, n)
    confidence = np.round(np.clip(truth**0.4 + rng.normal(0, 0.05, n), 0.01, 0.99), 2)
    return confidence, rng.random(n) < truth


def predictions(
    confidence: Sequence[float | None],
    correct: Sequence[bool],
    images: Sequence[str | None],
    prefix: str = "q",
) -> list[Prediction]:
    rows = zip(confidence, correct, images, strict=True)
    return [
        Prediction(
            *(f"{prefix}{i}", "?", "Yes", "", "yes", c, bool(r), None, None, "yes_no"),
            image=image,
            estimates={"other": c},
        )
        for i, (c, r, image) in enumerate(rows)
    ]


def test_isotonic_and_logistic_maps_are_those_of_netcal() -> None:
    confidence, correct = answers(800)
    new = np.round(np.random.default_rng(1).uniform(0.02, 0.98, 300), 2)
    peer: Any = IsotonicRegression()
    peer.fit(confidence, correct.astype(int))
    assert isotonic(confidence, correct)(new) == pytest.approx(peer.transform(new), abs=1e-9)
    for ours, theirs in ((platt, LogisticCalibration), (temperature, TemperatureScaling)):
        peer = theirs(method="mle")
        peer.fit(confidence, correct.astype(int), random_state=0)
        mapped = ours(confidence, correct)(new)
        assert mapped == pytest.approx(peer.transform(new), abs=2e-3), ours
        assert np.abs(mapped - new).mean() > 0.05


def test_logistic_maps_never_reverse_the_order() -> None:
    confidence, correct = answers(400)
    assert temperature(confidence, ~correct)(np.array([0.1, 0.9])).tolist() == [0.5, 0.5]
    mapped = platt(confidence, ~correct)(np.linspace(0, 1, 101))
    assert mapped == pytest.approx(np.full(101, 1 - correct.mean()), abs=1e-5)
    assert (np.diff(mapped) > 0).all()


def test_histogram_bins_have_equally_many_answers_and_give_their_accuracy() -> None:
    confidence = np.repeat(np.arange(20) / 20, 10)
    correct = np.arange(200) % 10 < np.repeat(np.arange(20) // 2, 10)
    mapped = histogram(confidence, correct)(np.arange(20) / 20)
    assert mapped == pytest.approx(np.repeat(np.arange(10) / 10, 2), abs=1e-9)
    assert histogram(confidence, correct)(np.array([0.0, 1.0])) == pytest.approx([0.0, 0.9], abs=1e-9)


@pytest.mark.parametrize("method", METHODS.values())
@pytest.mark.filterwarnings("ignore:.*Bins whose width are too small.*")
@given(
    rows=st.lists(st.tuples(st.integers(0, 100), st.booleans()), min_size=1, max_size=40),
    percents=st.lists(st.integers(0, 100), min_size=1, max_size=10),
)
def test_any_answers_give_probabilities(
    method: Callable[..., Any], rows: list[tuple[int, bool]], percents: list[int]
) -> None:
    confidence, correct = (np.array(c) for c in zip(*rows, strict=True))
    mapped = method(confidence / 100, correct)(np.sort(percents) / 100)
    assert ((mapped >= 0) & (mapped <= 1)).all()
    if method is not histogram:
        assert (np.diff(mapped) >= -1e-12).all()


@pytest.mark.parametrize("epsilon", [HALF_PERCENT, SMALLEST])
def test_logits_are_finite_and_strictly_increasing(epsilon: float) -> None:
    inside = np.array([epsilon, 0.2, 0.5, 1 - epsilon])
    assert logit(inside, epsilon) == pytest.approx(np.log(inside / (1 - inside)))
    end = np.log((1 - epsilon) / epsilon) + 1 / (1 - epsilon)
    assert logit(np.array([0.0, 1.0]), epsilon) == pytest.approx([-end, end]), "on the tangent"
    assert (np.diff(logit(np.linspace(0, 1, 100_001), epsilon)) > 0).all()


# --- Splits -------------------------------------------------------------------------------------------------------


def test_each_answer_type_has_the_map_of_its_own_answers() -> None:
    """Yes/no answers are right as often as they say, short ones half as often; together they would be neither."""
    rng = np.random.default_rng(0)
    confidence = rng.random(8000)
    correct = rng.random(8000) < confidence * np.where(np.arange(8000) % 2, 0.5, 1.0)
    rows = predictions(confidence.tolist(), correct.tolist(), [f"{i // 2}" for i in range(8000)])
    rows[1::2] = [replace(p, answer_type="short") for p in rows[1::2]]
    test, calibration = rows[:4000], rows[4000:]
    for estimator, epsilon in (("other", SMALLEST), (VERBALIZED, HALF_PERCENT)):
        for method in (platt, temperature, histogram, isotonic):
            mapped = np.array(recalibrated(method.__name__, test, estimator, calibration))
            for start in (0, 1):
                own = method(confidence[4000 + start :: 2], correct[4000 + start :: 2], epsilon)
                assert mapped[start::2].tolist() == own(confidence[start:4000:2]).tolist()
    for start, share in ((0, 1.0), (1, 0.5)):
        assert np.abs(mapped[start::2] - share * confidence[start:4000:2]).mean() < 0.05, "isotonic"
    unrated = replace(test[0], estimates={"other": None})
    assert recalibrated("isotonic", [unrated], "other", calibration) == [None]
    unfit = [*calibration[::2], replace(calibration[1], estimates={"other": None})]
    with pytest.raises(DataError, match="isotonic: no short answer"):
        recalibrated("isotonic", test, "other", unfit)


def test_one_outcome_is_not_certain() -> None:
    """The rule of succession, as in stage 2's teacher: after eight right answers the ninth is right at 9/10."""
    for right, share in ((True, 0.9), (False, 0.1)):
        mapped = platt(np.linspace(0.1, 0.9, 8), np.full(8, right))(np.array([0.2, 0.8]))
        assert mapped == pytest.approx([share, share])


@pytest.mark.parametrize(
    ("test", "calibration", "message"),
    [
        (["a", "b", "c"], ["d", "b"], "1 images are in the calibration split and in the test split, 'b'"),
        (["a", None, "c"], ["d"], "prediction 'q1' has no 'image'"),
        (["a", "b"], ["d", None], "prediction 'q1' has no 'image'"),
    ],
)
def test_splits_that_would_leak_are_refused(
    test: list[str | None], calibration: list[str | None], message: str
) -> None:
    def rows(images: list[str | None]) -> list[Prediction]:
        return predictions([0.5] * len(images), [True] * len(images), images)

    with pytest.raises(DataError) as caught:
        recalibrated("platt", rows(test), VERBALIZED, rows(calibration))
    assert message in str(caught.value)
