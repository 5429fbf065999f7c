"""`vlm-calibration monitor`: compare the confidences of new answers, whose correctness is unknown, with those of an evaluation."""

from __future__ import annotations

import json as json_format
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jsonargparse.typing import OpenUnitInterval

from vlm_calibration.errors import CommandError, did_you_mean
from vlm_calibration.files import json_lines
from vlm_calibration.records import DataError, RecordError, category_groups, short_repr

By = Literal["category", "answer_type"]
DRIFT_STATUS = 3
"""Exit status if the answers have changed."""


class MonitoredAnswer(NamedTuple):
    """An answer without its correctness.

    Attributes:
        id: decides which of several answers about an image counts.
        image: None if the file names none; each such answer counts.
        confidence: in [0, 1], NaN if unparsed.
        groups: the groups that it counts in, beside all answers.
    """

    id: str
    image: str | None
    confidence: float
    groups: tuple[str, ...]


def monitor(
    *,
    reference: Path,
    new: Path,
    system: str | None = None,
    estimator: str = "verbalized",
    by: By | None = None,
    certainty: OpenUnitInterval = OpenUnitInterval(0.95),
    json: bool = False,
) -> None:
    """Compare the confidences of new answers with those of an evaluation: are they still of the same kind? Exit status 3 if not.

    A guarantee holds for questions like those that it was measured on. The new answers need not be graded, and their order does not
    matter. Of several answers about one image one counts.

    Args:
        reference: folder of an evaluation, or of one of its systems; its answers to the calibration set are the reference, or those to
            the test set if it has no calibration set
        new: JSON lines with a confidence: predictions.jsonl, or what `ask --questions` writes to --out
        system: system of the evaluation that gave the new answers (needed if there are several)
        estimator: estimator of the confidence, such as expected
        by: also compare each category, or each type of answer, with the reference's; "a/b" counts in a and in b
        certainty: probability that one call gives no false alarm; shared equally by all comparisons
        json: print one JSON object

    Raises:
        ArgumentError: an argument is missing or wrong.
        DataError: a file, a line of it, or the system or estimator cannot be used.
        CommandError: the answers have changed.
    """
    answers = _reference_answers(reference, system, estimator, by)
    key = "confidence" if estimator == "verbalized" else estimator
    new_answers = [line.read(partial(_new_answer, key=key, by=by)) for line in json_lines(new)]
    if not new_answers:
        raise DataError(f"{new}: no answer in this file")
    known, groups_of_new = ({g for answer in some for g in answer.groups} for some in (answers, new_answers))
    if by is not None and not known & groups_of_new:
        raise DataError(f"--by {by}: {_listed(groups_of_new)} in {new}, {_listed(known)} in {reference}")
    # A false alarm anywhere is at most as probable as the sum of the errors.
    error = (1 - certainty) / (1 + len(known))
    overall = _compare(answers, new_answers, error)
    groups = {}
    for group in sorted(known):
        old, asked = ([a for a in some if group in a.groups] for some in (answers, new_answers))
        groups[group] = _compare(old, asked, error)
    has_drifted = any(figures["drift"] for figures in (overall, *groups.values()))
    result = {
        "reference": str(reference),
        "new": str(new),
        "estimator": estimator,
        "certainty": float(certainty),
        "drift": has_drifted,
        "without_reference": sorted(groups_of_new - known),
        "overall": overall,
        "groups": groups,
    }
    if json:
        print(json_format.dumps(result))
    else:
        print("\n".join(_line(*item) for item in {"overall": overall, **groups}.items()))
        print(
            f"Without drift an alarm has a probability of at most {1 - certainty:.3g}: p of at most {error:.2g}."
        )
        if unknown := groups_of_new - known:
            print(f"without reference, counted overall alone: {_listed(unknown)}")
    if has_drifted:
        raise CommandError("", DRIFT_STATUS)


def _listed(groups: set[str]) -> str:
    return ", ".join(map(repr, sorted(groups))) or "none"


def _compare(
    reference: Sequence[MonitoredAnswer], new: Sequence[MonitoredAnswer], error: float
) -> dict[str, Any]:
    """The figures of some answers; one of those about each image counts."""
    import numpy as np

    from vlm_calibration.metrics.drift import drift_test
    from vlm_calibration.reporting.report.thresholds import one_an_image

    # Sorted, so that not even the last digit of a mean depends on the order of the lines.
    before, after = (np.sort([a.confidence for a in one_an_image(answers)]) for answers in (reference, new))
    # Twice as many as make a p-value of this error possible.
    test = drift_test(before, after, permutations=max(999, math.ceil(2 / error))) if new else None
    figures: dict[str, Any] = {}
    for name, values in (("reference", before), ("new", after)):
        parsed = values[~np.isnan(values)]
        figures |= {
            f"{name}_n": len(values),
            f"{name}_mean_confidence": float(parsed.mean()) if len(parsed) else None,
            f"{name}_unparsed": len(values) - len(parsed),
        }
    return {
        **figures,
        "difference": None if test is None else test.difference,
        "p_value": None if test is None else test.p_value,
        "drift": test is not None and test.p_value <= error,
    }


def _line(name: str, figures: Mapping[str, Any]) -> str:
    """The figures of a group for the terminal."""
    counts = [
        f"{answers} {figures[f'{answers}_n']:,}" + ("" if mean is None else f" (mean {mean:.1%})")
        for answers in ("reference", "new")
        for mean in [figures[f"{answers}_mean_confidence"]]
    ]
    if figures["p_value"] is None:
        return f"{name}: {', '.join(counts)}"
    verdict = "drift" if figures["drift"] else "no drift"
    return f"{name}: {', '.join(counts)}, difference {figures['difference']:.1%}, p = {figures['p_value']:.2g}: {verdict}"


# --- Answers --------------------------------------------------------------------------------------------------------


def _reference_answers(
    folder: Path, system: str | None, estimator: str, by: By | None
) -> list[MonitoredAnswer]:
    """The answers of a system to the calibration set, or without one to the test set."""
    # These import torch, which the help does not need.
    from vlm_calibration.estimators.predictions import estimators_of
    from vlm_calibration.reporting.report.data import read_systems

    systems = {found.name: found for found in read_systems([str(folder)])}
    if system is None and len(systems) > 1:
        raise DataError(f"{folder}: several systems: give --system, one of {', '.join(systems)}")
    if system is not None and system not in systems:
        raise DataError(
            f"--system: {folder} has no {system!r}{did_you_mean(system, list(systems))}; it has {', '.join(systems)}"
        )
    chosen = systems[system or next(iter(systems))]
    answers = chosen.calibration if chosen.calibration is not None else chosen.predictions
    if estimator not in (estimators := estimators_of(answers)):
        raise DataError(
            f"--estimator: {folder}: {chosen.name} has no {estimator!r}{did_you_mean(estimator, estimators)}; "
            f"it has {', '.join(estimators)}"
        )
    return [
        MonitoredAnswer(
            answer.id,
            answer.image,
            _float(answer.confidence_of(estimator)),
            _groups(answer.category if by == "category" else answer.answer_type) if by else (),
        )
        for answer in answers
    ]


def _groups(category: str | None) -> tuple[str, ...]:
    return tuple(group for group in category_groups(category) if "/" not in group)


def _float(confidence: float | None) -> float:
    return math.nan if confidence is None else float(confidence)


def _new_answer(data: Any, key: str, by: By | None) -> MonitoredAnswer:
    """Check and convert a line of new answers; RecordError if it lacks the confidence or the group."""
    if not isinstance(data, Mapping):
        raise RecordError(f"expected an object with the key {key!r}, found {short_repr(data)}")
    for needed in filter(None, (key, by)):
        if needed not in data:
            raise RecordError(f"no key {needed!r}; it has {', '.join(map(repr, data))}")
    value = data[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 <= value <= 1):
        raise RecordError(f"{key!r} must be a number in [0, 1], or null, found {short_repr(value)}")
    for name in filter(None, ("image", by)):
        if not (data.get(name) is None or isinstance(data[name], str)):
            raise RecordError(f"{name!r} must be a string or null, found {short_repr(data[name])}")
    identifier = str(data.get("id", json_format.dumps(data, sort_keys=True)))
    return MonitoredAnswer(identifier, data.get("image"), _float(value), _groups(data[by]) if by else ())
