"""Graded predictions, and reading them from the files that an evaluation writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from vlm_calibration.files import json_lines
from vlm_calibration.perturbation.levels import Perturbation
from vlm_calibration.records import (
    ANSWER_TYPES,
    ORIGINAL,
    VERBALIZED,
    AnswerType,
    DataError,
    Prediction,
    Query,
    RecordError,
)
from vlm_calibration.text.confidence import parse_confidence
from vlm_calibration.text.grading import EXACT, Grade, Grading, grade, parse_answer

PREDICTIONS, CALIBRATION = "predictions.jsonl", "calibration.jsonl"
"""Files of a system's answers to the test set and to the calibration set."""
EXPECTED = "expected"
"""Name of `ExpectedConfidence`."""


def graded_prediction(
    query: Query,
    text: str,
    perturbation: Perturbation | None,
    noise_step: int | None,
    grading: Grading | None = EXACT,
) -> Prediction:
    """Parse and grade a text that answers a query; with None for `grading` it is not correct.

    `perturbation` happened to the image, None if that is not known; `noise_step` is the diffusion step of its noise, None for other kinds.
    """
    kind, question = query.answer_type, query.question
    if grading is None:
        outcome = Grade(parse_answer(text, kind, question), False)
    else:
        outcome = grade(text, query.answer, kind, query.synonyms, grading, question)
    return Prediction(
        id=query.id,
        question=question,
        answer=query.answer,
        text=text,
        predicted=outcome.predicted,
        confidence=parse_confidence(text),
        correct=outcome.correct,
        category=query.category,
        noise_step=noise_step,
        answer_type=kind,
        perturbation=None if perturbation is None else perturbation.kind,
        strength=None if perturbation is None else perturbation.strength,
        image=query.image,
    )


KEYS = tuple(f.name for f in fields(Prediction) if f.name != "estimates")
REQUIRED = tuple(f.name for f in fields(Prediction) if f.default is f.default_factory is MISSING)
TYPES = get_type_hints(Prediction)
SHARE = float | None
CHECKS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("a string", lambda value: isinstance(value, str)),
    str | None: ("a string or null", lambda value: isinstance(value, str | None)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int | None: ("a whole number or null", lambda value: value is None or type(value) is int),
    AnswerType: (f"one of {', '.join(ANSWER_TYPES)}", lambda value: value in ANSWER_TYPES),
    SHARE: (
        "a number in [0, 1] or null",
        lambda value: value is None or (type(value) in (int, float) and 0 <= value <= 1),
    ),
}
"""Type of a field -> what its value must be, and the check. Keys that are no fields are shares."""


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a `predictions.jsonl`.

    DataError if the file cannot be read, holds no prediction, repeats an id, or has a line that is none and not blank.
    """
    predictions: dict[str, Prediction] = {}
    for line in json_lines(path):
        prediction = line.read(prediction_from_dict)
        if prediction.id in predictions:
            raise line.error(f"the id {prediction.id!r} comes twice")
        predictions[prediction.id] = prediction
    if not predictions:
        raise DataError(f"{path}: no prediction in this file")
    return list(predictions.values())


def prediction_from_dict(data: Any) -> Prediction:
    """Convert a decoded JSON object to a prediction; unknown keys are estimators. RecordError if it is none."""
    if not isinstance(data, Mapping):
        raise RecordError("expected an object with the keys of a prediction")
    if missing := [key for key in REQUIRED if key not in data]:
        raise RecordError(f"no key {missing[0]!r}; a prediction has {', '.join(REQUIRED)}")
    probes = data.get("probes", {})
    if not isinstance(probes, Mapping) or (probes and ORIGINAL not in probes):
        raise RecordError(f"'probes' must be an object with the key {ORIGINAL!r}, found {probes!r}")
    plain = {key: value for key, value in data.items() if key != "probes"}
    for key, value in {**plain, **{f"probes.{name}": p for name, p in probes.items()}}.items():
        expected, is_valid = CHECKS.get(TYPES.get(key), CHECKS[SHARE])
        if not is_valid(value):
            raise RecordError(f"'{key}' must be {expected}, found {value!r}")
    own = {key: value for key, value in data.items() if key in KEYS}
    return Prediction(**own, estimates={k: v for k, v in plain.items() if k not in KEYS})


def estimators_of(predictions: Sequence[Prediction]) -> tuple[str, ...]:
    """The estimators that all predictions have, the verbalized confidence first."""
    common = [n for n in predictions[0].estimates if all(n in p.estimates for p in predictions)]
    return (VERBALIZED, *common)


def probes_of(predictions: Sequence[Prediction]) -> tuple[str, ...]:
    """The probes that all predictions have, in the order of the first one."""
    first = [name for name in predictions[0].probes if name != ORIGINAL]
    return tuple(name for name in first if all(name in p.probes for p in predictions))
