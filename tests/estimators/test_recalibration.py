"""Recalibration against netcal and against arithmetic; no image is ever on both sides."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from netcal.binning import IsotonicRegression
from netcal.scaling import LogisticCalibration, TemperatureScaling

from vlm_calibration.estimators import recalibration
from vlm_calibration.estimators.predictions import VERBALIZED, EstimatedPrediction
from vlm_calibration.estimators.recalibration import (
    EPSILON,
    METHODS,
    Histogram,
    Isotonic,
    Platt,
    Recalibration,
    Temperature,
    folds,
    logit,
    recalibrated,
)
from vlm_calibration.records import DataError


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
) -> list[EstimatedPrediction]:
    rows = zip(confidence, correct, images, strict=True)
    return [
        EstimatedPrediction(
            f"{prefix}{i}", "?", "Yes", "", "yes", c, bool(r), None, None, "yes_no", image, {"other": c}
        )
        for i, (c, r, image) in enumerate(rows)
    ]


def test_isotonic_and_logistic_maps_are_those_of_netcal() -> None:
    confidence, correct = answers(800)
    new = np.round(np.random.default_rng(1).uniform(0.02, 0.98, 300), 2)
    isotonic = IsotonicRegression()
    isotonic.fit(confidence, correct.astype(int))
    assert Isotonic().fit(confidence, correct)(new) == pytest.approx(isotonic.transform(new), abs=1e-9)
    for ours, theirs in ((Platt, LogisticCalibration), (Temperature, TemperatureScaling)):
        peer = theirs(method="mle")
        peer.fit(confidence, correct.astype(int), random_state=0)
        found = ours().fit(confidence, correct)(new)
        assert found == pytest.approx(peer.transform(new), abs=2e-3), ours.name
        assert np.abs(found - new).mean() > 0.05


def test_logistic_maps_minimise_the_log_loss() -> None:
    confidence, correct = answers(400)
    x = logit(confidence)

    def loss(a: float, b: float) -> float:
        p = 1 / (1 + np.exp(-(a * x + b)))
        return float(-np.log(np.where(correct, p, 1 - p)).mean())

    for method, shifts in ((Platt, (-0.02, 0.0, 0.02)), (Temperature, (0.0,))):
        p = method().fit(confidence, correct)(np.array([0.3, 0.6]))
        z = np.log(p / (1 - p))
        a = float((z[1] - z[0]) / (logit(np.array([0.6])) - logit(np.array([0.3])))[0])
        b = float(z[0] - a * logit(np.array([0.3]))[0])
        assert b == pytest.approx(0, abs=1e-9) if method is Temperature else b != 0
        near = [loss(a + da, b + db) for da in (-0.02, 0.0, 0.02) for db in shifts if da or db]
        assert loss(a, b) < min(near)


def test_a_temperature_is_never_below_zero() -> None:
    confidence, correct = answers(400)
    found = Temperature().fit(confidence, ~correct)(np.array([0.1, 0.9]))
    assert found.tolist() == [0.5, 0.5]


def test_histogram_bins_hold_as_many_answers_and_state_their_accuracy() -> None:
    confidence = np.repeat(np.arange(20) / 20, 10)
    correct = np.arange(200) % 10 < np.repeat(np.arange(20) // 2, 10)
    found = Histogram().fit(confidence, correct)(np.arange(20) / 20)
    assert found == pytest.approx(np.repeat(np.arange(10) / 10, 2), abs=1e-9)
    assert Histogram().fit(confidence, correct)(np.array([0.0, 1.0])) == pytest.approx([0.0, 0.9], abs=1e-9)


@pytest.mark.parametrize("method", METHODS.values())
@pytest.mark.filterwarnings("ignore:.*Bins whose width are too small.*")
@given(
    rows=st.lists(st.tuples(st.integers(0, 100), st.booleans()), min_size=1, max_size=40),
    asked=st.lists(st.integers(0, 100), min_size=1, max_size=10),
)
@settings(max_examples=60)
def test_any_answers_give_probabilities(
    method: type[Recalibration], rows: list[tuple[int, bool]], asked: list[int]
) -> None:
    confidence, correct = (np.array(c) for c in zip(*rows, strict=True))
    found = method().fit(confidence / 100, correct)(np.sort(asked) / 100)
    assert ((found >= 0) & (found <= 1)).all()
    if method in (Isotonic, Temperature):
        assert (np.diff(found) >= -1e-12).all()


def test_logits_are_finite() -> None:
    assert logit(np.array([0.0, 0.5, 1.0])) == pytest.approx(
        [np.log(EPSILON / (1 - EPSILON)), 0.0, np.log((1 - EPSILON) / EPSILON)]
    )


# --- Splits -------------------------------------------------------------------------------------------------------


@given(images=st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda i: len(set(i)) > 1))
@settings(max_examples=100)
def test_no_image_is_fitted_on_and_held_out(images: list[int]) -> None:
    rows = predictions([0.5] * len(images), [True] * len(images), [f"{i}.png" for i in images])
    held: list[int] = []
    for fitted_on, held_out in folds(rows):
        assert fitted_on
        assert not {images[i] for i in fitted_on} & {images[i] for i in held_out}
        assert sorted([*fitted_on, *held_out]) == list(range(len(images)))
        held += held_out
    assert sorted(held) == list(range(len(images)))


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_does_not_depend_on_answers_about_its_image(method: str) -> None:
    """Turning all answers about one image round moves no recalibrated confidence in them."""
    confidence, correct = answers(200)
    images = [f"{i // 4}.png" for i in range(200)]
    before = recalibrated(method, predictions(confidence.tolist(), correct.tolist(), images), VERBALIZED)
    for image in ("0.png", "17.png"):
        own = np.array([i == image for i in images])
        turned = predictions(confidence.tolist(), np.where(own, ~correct, correct).tolist(), images)
        after = recalibrated(method, turned, VERBALIZED)
        assert [a for a, o in zip(after, own, strict=True) if o] == [
            b for b, o in zip(before, own, strict=True) if o
        ]
        assert after != before, "those about other images are fitted on it"


def test_the_order_of_answers_does_not_matter() -> None:
    confidence, correct = answers(120)
    rows = predictions(confidence.tolist(), correct.tolist(), [f"{i // 3}.png" for i in range(120)])
    before = dict(zip((p.id for p in rows), recalibrated("isotonic", rows, VERBALIZED), strict=True))
    random.Random(0).shuffle(rows)
    after = dict(zip((p.id for p in rows), recalibrated("isotonic", rows, VERBALIZED), strict=True))
    assert after == pytest.approx(before, abs=1e-12)


def test_a_calibration_split_is_fitted_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    confidence, correct = answers(300)
    test = predictions([*confidence[:100].tolist(), None], [*correct[:100].tolist(), True], ["t.png"] * 101)
    held = predictions(confidence[100:].tolist(), correct[100:].tolist(), ["c.png"] * 200, "c")
    found = recalibrated("isotonic", test, "other", held)
    expected = Isotonic().fit(confidence[100:], correct[100:])(confidence[:100])
    assert found[:100] == pytest.approx(expected.tolist())
    assert found[100] is None


@pytest.mark.parametrize(
    ("test", "held", "says"),
    [
        (["a", "b", "c"], ["d", "b"], "1 images are in the calibration split and in the test split, 'b'"),
        (["a", None, "c"], ["d"], "prediction 'q1' does not say what its image is"),
        (["a", "b"], ["d", None], "prediction 'q1' does not say what its image is"),
        (["a", "a"], None, "two images at least, found only 'a'"),
        (["a", None], None, "prediction 'q1' does not say"),
    ],
)
def test_splits_that_would_leak_are_refused(
    test: list[str | None], held: list[str | None] | None, says: str
) -> None:
    def rows(images: list[str | None]) -> list[EstimatedPrediction]:
        return predictions([0.5] * len(images), [True] * len(images), images)

    with pytest.raises(DataError) as caught:
        recalibrated("platt", rows(test), VERBALIZED, None if held is None else rows(held))
    assert says in str(caught.value)


def test_nothing_to_fit_on_is_an_error() -> None:
    held = predictions([None, None], [True, False], ["a", "b"])
    with pytest.raises(DataError, match="no answer with a readable confidence"):
        recalibrated("platt", predictions([0.5], [True], ["c"]), VERBALIZED, held)


def test_recalibration_mends_overconfidence_and_not_the_ranking() -> None:
    confidence, correct = answers(2000)
    rows = predictions(confidence.tolist(), correct.tolist(), [f"{i // 2}" for i in range(2000)])
    for method in METHODS:
        found = np.array(recalibrated(method, rows, VERBALIZED))
        assert abs(found.mean() - correct.mean()) < 0.01 < confidence.mean() - correct.mean() or (
            method == "temperature"
        )
        assert ((found - correct) ** 2).mean() < ((confidence - correct) ** 2).mean()
    assert recalibration.FOLDS == 5
