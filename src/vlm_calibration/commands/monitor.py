"""`vlm-calibration monitor`: compare the confidences of new answers, whose correctness is unknown, with those of an evaluation."""

from __future__ import annotations

import json as json_format
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jsonargparse.typing import OpenUnitInterval

from vlm_calibration.commands.options import check_folder
from vlm_calibration.errors import CommandError
from vlm_calibration.files import json_lines
from vlm_calibration.records import DataError, RecordError, category_groups, short_repr

By = Literal["category", "answer_type"]


class MonitoredAnswer(NamedTuple):
    """An answer without its correctness, with the groups that it counts in; none without `--by`."""

    id: str
    image: str | None
    confidence: float | None
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

    A guarantee holds for questions like those that it was measured on. The new answers need not be graded. Of several answers about one
    image one counts.

    Args:
        reference: folder of an evaluation, or of one of its systems; its answers to the calibration set are the reference, or those to
            the test set if it has no calibration set
        new: JSON lines with a confidence: predictions.jsonl, or what `ask --questions` writes to --out
        system: system of the evaluation that gave the new answers (needed if there are several)
        estimator: estimator of the confidence, such as expected
        by: also compare each category, or each type of answer, with the reference's; "a/b" counts in a and in b
        certainty: probability that one call gives no false alarm; shared equally by all comparisons
        json: print one JSON object
    """
    check_folder(reference)
    # These import torch, which the help does not need.
    from vlm_calibration.reporting.report.data import check_estimator, read_systems, system_named

    systems = read_systems([str(reference)])
    if system is None and len(systems) > 1:
        names = ", ".join(s.name for s in systems)
        raise DataError(f"{reference}: several systems: give --system, one of {names}")
    chosen = systems[0] if system is None else system_named(systems, system)
    known_answers = chosen.predictions if chosen.calibration is None else chosen.calibration
    check_estimator(estimator, known_answers, reference)
    answers = [
        MonitoredAnswer(a.id, a.image, a.confidence_of(estimator), category_groups(by and getattr(a, by)))
        for a in known_answers
    ]
    key = "confidence" if estimator == "verbalized" else estimator
    new_answers = [line.read(partial(_new_answer, key=key, by=by)) for line in json_lines(new)]
    if not new_answers:
        raise DataError(f"{new}: no answer in this file")
    known, groups_of_new = ({g for answer in some for g in answer.groups} for some in (answers, new_answers))
    if by is not None and not known & groups_of_new:
        raise DataError(f"--by {by}: {_listed(groups_of_new)} in {new}, {_listed(known)} in {reference}")
    # A false alarm anywhere is at most as probable as the sum of the errors.
    error = (1 - certainty) / (1 + len(known))
    compared = {"overall": _compare(answers, new_answers, error)}
    for group in sorted(known):
        old, asked = ([a for a in some if group in a.groups] for some in (answers, new_answers))
        compared[group] = _compare(old, asked, error)
    has_drifted = any(figures["drift"] for figures in compared.values())
    without_reference = groups_of_new - known
    if json:
        result: dict[str, Any] = {"reference": str(reference), "new": str(new), "estimator": estimator}
        result |= {"certainty": float(certainty), "drift": has_drifted}
        result |= {"without_reference": sorted(without_reference), "overall": compared.pop("overall")}
        print(json_format.dumps({**result, "groups": compared}))
    else:
        print("\n".join(_line(*item) for item in compared.items()))
        probability = f"{1 - certainty:.3g}: p of at most {error:.2g}"
        print(f"Without drift an alarm has a probability of at most {probability}.")
        if without_reference:
            print(f"without reference, counted overall alone: {_listed(without_reference)}")
    if has_drifted:
        raise CommandError("", 3)


def _listed(groups: set[str]) -> str:
    return ", ".join(map(repr, sorted(groups))) or "none"


def _compare(old: Sequence[MonitoredAnswer], new: Sequence[MonitoredAnswer], error: float) -> dict[str, Any]:
    """The figures of some answers; one of those about each image counts."""
    import numpy as np

    from vlm_calibration.metrics.drift import drift_test
    from vlm_calibration.reporting.report.thresholds import one_an_image

    # Sorted, so that not even the last digit of a mean depends on the order of the lines.
    chosen = ([a.confidence for a in one_an_image(answers)] for answers in (old, new))
    before, after = (np.sort(np.array(confidences, float)) for confidences in chosen)  # None becomes NaN
    figures: dict[str, Any] = {}
    for name, values in (("reference", before), ("new", after)):
        parsed = values[~np.isnan(values)]
        mean = float(parsed.mean()) if len(parsed) else None
        figures |= {f"{name}_n": len(values), f"{name}_mean_confidence": mean}
        figures[f"{name}_unparsed"] = len(values) - len(parsed)
    if not new:
        return {**figures, "difference": None, "p_value": None, "drift": False}
    # Twice as many as make a p-value of this error possible.
    test = drift_test(before, after, permutations=max(999, math.ceil(2 / error)))
    return {**figures, **test._asdict(), "drift": test.p_value <= error}


def _line(name: str, figures: Mapping[str, Any]) -> str:
    """The figures of a group for the terminal."""
    parts = []
    for answers in ("reference", "new"):
        mean = figures[f"{answers}_mean_confidence"]
        shown = "" if mean is None else f" (mean {mean:.1%})"
        parts.append(f"{answers} {figures[f'{answers}_n']:,}{shown}")
    if figures["p_value"] is not None:
        verdict = "drift" if figures["drift"] else "no drift"
        parts += [f"difference {figures['difference']:.1%}", f"p = {figures['p_value']:.2g}: {verdict}"]
    return f"{name}: {', '.join(parts)}"


def _new_answer(data: Any, key: str, by: By | None) -> MonitoredAnswer:
    """Convert a line of new answers; RecordError if it lacks the confidence or the group."""
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
        if not isinstance(data.get(name), str | None):
            raise RecordError(f"{name!r} must be a string or null, found {short_repr(data[name])}")
    identifier = str(data.get("id", json_format.dumps(data, sort_keys=True)))
    return MonitoredAnswer(identifier, data.get("image"), value, category_groups(by and data[by]))
