"""`vlm-calibration monitor`: compare the confidences of new answers, whose correctness is unknown, with those of an evaluation."""

from __future__ import annotations

import json as json_format
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import OpenUnitInterval

from vlm_calibration.errors import CommandError, did_you_mean
from vlm_calibration.files import json_lines, replacing, write_json
from vlm_calibration.records import DataError, RecordError, category_groups, short_repr

if TYPE_CHECKING:
    from vlm_calibration.reporting.drift import GroupDrift, MonitoredAnswer
    from vlm_calibration.reporting.report.data import System

By = Literal["category", "answer_type"]
FIGURES, FIGURE = "monitor.json", "monitor.png"
DRIFT_STATUS = 3
"""Exit status if the answers have changed."""


def monitor(
    *,
    reference: Path,
    new: Path,
    system: str | None = None,
    estimator: str = "verbalized",
    by: By | None = None,
    certainty: OpenUnitInterval = OpenUnitInterval(0.95),
    out: Path | None = None,
    wandb: str | None = None,
    json: bool = False,
) -> None:
    """Compare the confidences of new answers with those of an evaluation: are they still of the same kind? Exit status 3 if not.

    A guarantee holds for questions like those that it was measured on. The new answers need not be graded. They are tested one after
    another, in the order of their lines, so that the file may grow between runs. It writes monitor.json and monitor.png.

    Args:
        reference: folder of an evaluation, or of one of its systems; its answers to the calibration set are the reference, or those to
            the test set if it has no calibration set
        new: JSON lines with a confidence: predictions.jsonl, or what `ask --questions` writes to --out
        system: system of the evaluation that gave the new answers (needed if there are several)
        estimator: estimator of the confidence, such as expected
        by: also compare each category, or each type of answer, with the reference's; "a/b" counts in a and in b
        certainty: probability that there is no false alarm, however long the stream; shared equally by all comparisons
        out: folder to write to (default: one beside the new answers, named after them)
        wandb: W&B project to log figures, plot and curves to; offline unless logged in
        json: print one JSON object

    Raises:
        ArgumentError: an argument is missing or wrong.
        DataError: a file, a line of it, or the system or estimator cannot be used.
        CommandError: the answers have changed.
    """
    # These import torch, which the help does not need.
    from vlm_calibration.reporting.drift import compare_groups, drift_figure, drift_table

    answers = _reference_answers(reference, system, estimator, by)
    new_answers = _new_answers(new, estimator, by)
    known = {group for answer in answers for group in answer.groups}
    groups_of_new = {group for answer in new_answers for group in answer.groups}
    if by is not None and not known & groups_of_new:
        raise DataError(f"--by {by}: {_listed(groups_of_new)} in {new}, {_listed(known)} in {reference}")
    groups = compare_groups(answers, new_answers, certainty)
    has_drifted = any(group.alarm is not None for group in groups)
    result = {
        "reference": str(reference),
        "new": str(new),
        "estimator": estimator,
        "certainty": float(certainty),
        "drift": has_drifted,
        "without_reference": sorted(groups_of_new - known),
        "overall": groups[0].to_dict(),
        "groups": {group.name: group.to_dict() for group in groups[1:]},
    }
    folder = out or new.with_name(f"{new.stem}-monitor")
    with replacing(folder / FIGURE) as temporary:
        drift_figure(groups).savefig(temporary, format="png")
    write_json(folder / FIGURES, result)
    if wandb is not None:
        _log(wandb, folder, groups, result)
    if json:
        print(json_format.dumps(result))
    else:
        from rich.console import Console

        Console().print(drift_table(groups, certainty))
        if unknown := groups_of_new - known:
            print(f"without reference, counted overall alone: {_listed(unknown)}")
        print(f"wrote {folder / FIGURES} and {FIGURE}")
    if has_drifted:
        raise CommandError("", DRIFT_STATUS)


def _listed(groups: set[str]) -> str:
    return ", ".join(map(repr, sorted(groups))) or "none"


# --- Answers --------------------------------------------------------------------------------------------------------


def _reference_answers(
    folder: Path, system: str | None, estimator: str, by: By | None
) -> list[MonitoredAnswer]:
    """The answers of a system to the calibration set, or without one to the test set."""
    from vlm_calibration.estimators.predictions import estimators_of
    from vlm_calibration.reporting.drift import MonitoredAnswer
    from vlm_calibration.reporting.report.data import read_systems

    chosen = _system(folder, read_systems([str(folder)]), system)
    answers = chosen.calibration if chosen.calibration is not None else chosen.predictions
    if estimator not in (estimators := estimators_of(answers)):
        raise DataError(
            f"--estimator: {folder}: {chosen.name} has no {estimator!r}{did_you_mean(estimator, estimators)}; "
            f"it has {', '.join(estimators)}"
        )
    return [
        MonitoredAnswer(
            _number(answer.confidence_of(estimator)),
            _groups({"category": answer.category, "answer_type": answer.answer_type}, by),
        )
        for answer in answers
    ]


def _system(folder: Path, systems: Sequence[System], name: str | None) -> System:
    names = [system.name for system in systems]
    if name is None and len(systems) > 1:
        raise DataError(f"{folder}: several systems: give --system, one of {', '.join(names)}")
    if name is not None and name not in names:
        raise DataError(
            f"--system: {folder} has no {name!r}{did_you_mean(name, names)}; it has {', '.join(names)}"
        )
    return systems[0 if name is None else names.index(name)]


def _new_answers(path: Path, estimator: str, by: By | None) -> list[MonitoredAnswer]:
    """The answers of a file, in the order of its lines.

    Raises:
        DataError: the file cannot be read, has no answer, or a line lacks the confidence or the group (named).
    """
    key = "confidence" if estimator == "verbalized" else estimator
    answers = [line.read(partial(_new_answer, key=key, by=by)) for line in json_lines(path)]
    if not answers:
        raise DataError(f"{path}: no answer in this file")
    return answers


def _new_answer(data: Any, key: str, by: By | None) -> MonitoredAnswer:
    from vlm_calibration.reporting.drift import MonitoredAnswer

    if not isinstance(data, Mapping):
        raise RecordError(f"expected an object with the key {key!r}, found {short_repr(data)}")
    for needed in filter(None, (key, by)):
        if needed not in data:
            raise RecordError(f"no key {needed!r}; it has {', '.join(map(repr, data))}")
    value = data[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 <= value <= 1):
        raise RecordError(f"{key!r} must be a number in [0, 1], or null, found {short_repr(value)}")
    if by and not (data[by] is None or isinstance(data[by], str)):
        raise RecordError(f"{by!r} must be a string or null, found {short_repr(data[by])}")
    return MonitoredAnswer(_number(value), _groups(data, by))


def _number(confidence: float | None) -> float:
    return math.nan if confidence is None else float(confidence)


def _groups(data: Mapping[str, Any], by: By | None) -> tuple[str, ...]:
    """The parts of an answer's category, or its type."""
    return tuple(group for group in category_groups(data[by]) if "/" not in group) if by else ()


# --- W&B ------------------------------------------------------------------------------------------------------------


def _log(project: str, folder: Path, groups: Sequence[GroupDrift], result: Mapping[str, Any]) -> None:
    """Log the figures as summary, the plot as an image, and the curves of wealth over the number of the answer."""
    from vlm_calibration.callbacks.logger import RunLogger
    from vlm_calibration.reporting.drift import wealth_curves

    logger = RunLogger(save_dir=str(folder), project=project, job_type="monitor")
    for number, wealth in wealth_curves(groups):
        logger.log_metrics({**wealth, "answer": number})
    logger.log_image("monitor", [str(folder / FIGURE)])
    logger.experiment.summary.update(result)
    logger.experiment.finish()
