"""What to send to a person: thresholds that are chosen on the calibration answers, and what they do on each part of the test answers.

Of several answers about one image one counts, since they are not independent: whether one is wrong says something about the others. The
report and `vlm-calibration threshold` both compute with these functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

from vlm_calibration.estimators.decision import EVERYTHING, By, may_answer
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.predictions import VERBALIZED, EstimatedPrediction, estimators_of
from vlm_calibration.metrics.risk_control import (
    Choice,
    GradedAnswers,
    Limits,
    RiskControl,
    ThresholdScores,
    control_risk,
    graded_answers,
    percent,
)
from vlm_calibration.reporting.report.data import BASE, System
from vlm_calibration.settings import digest

MAX_ERRORS = (0.01, 0.02, 0.05, 0.10)
"""The limits of the error in the tables of the report."""
CERTAINTY = 0.95
ALL = "all"
"""The name of all test answers beside their parts."""


class Promise(NamedTuple):
    """One limit of the error, and what its threshold does.

    Attributes:
        limits: what is promised.
        choice: the threshold on the calibration answers, or why there is none.
        tested: `ALL` and each part of the test answers -> what the threshold does there; empty without a threshold.
    """

    limits: Limits
    choice: Choice
    tested: Mapping[str, ThresholdScores]

    @property
    def broken(self) -> dict[str, ThresholdScores]:
        """The parts where the interval of the error lies above the limit."""
        return {name: s for name, s in self.tested.items() if s.error.low > self.limits.max_error}


class SystemPromises(NamedTuple):
    """What one confidence of a system promises.

    Attributes:
        system: name of the system.
        estimator: estimator of the confidence.
        n: number of calibration answers that count.
        promises: one for each of `MAX_ERRORS`, each by itself.
    """

    system: str
    estimator: str
    n: int
    promises: Sequence[Promise]

    @property
    def name(self) -> str:
        """The system, with the estimator if it is not the stated confidence."""
        return self.system if self.estimator == VERBALIZED else f"{self.system}, {self.estimator}"


# --- Parts of the answers -------------------------------------------------------------------------------------------


def part_of(answer: EstimatedPrediction) -> str | None:
    """The named split that an answer belongs to, which an evaluation puts in front of id and category; None if it has no name."""
    first = (answer.category or "").split("/", 1)[0]
    return first if first and answer.id.startswith(f"{first}:") else None


def category_of(answer: EstimatedPrediction) -> str | None:
    """The category of the question itself, without the name of its split; None if it has none."""
    part = part_of(answer)
    category = (
        answer.category if part is None else (answer.category or "").removeprefix(part).removeprefix("/")
    )
    return category or None


def parts_of(answers: Sequence[EstimatedPrediction]) -> dict[str, list[EstimatedPrediction]]:
    """The named splits of the answers; of one split its main categories; empty if there is one of these too."""
    for name_of in (part_of, lambda answer: (category_of(answer) or "").split("/")[0] or None):
        parts: dict[str, list[EstimatedPrediction]] = {}
        for answer in answers:
            parts.setdefault(name_of(answer) or "other", []).append(answer)
        if len(parts) > 1:
            return parts
    return {}


def grouped(answers: Sequence[EstimatedPrediction], by: By | None) -> dict[str, list[EstimatedPrediction]]:
    """The answers in the groups that get a threshold each, by name; answers without a category are left out if it goes by that."""
    groups: dict[str, list[EstimatedPrediction]] = {}
    for answer in answers:
        group = EVERYTHING if by is None else category_of(answer)
        if group is not None:
            groups.setdefault(group, []).append(answer)
    return dict(sorted(groups.items()))


# --- Choosing and testing -------------------------------------------------------------------------------------------


class AboutImage(Protocol):
    """An answer that may name its image."""

    @property
    def id(self) -> str: ...

    @property
    def image(self) -> str | None: ...


A = TypeVar("A", bound=AboutImage)


def one_an_image(answers: Sequence[A]) -> list[A]:
    """One of the answers about each image, the one whose id has the smallest digest; all answers that name no image."""
    chosen: dict[str | int, tuple[str, A]] = {}
    for place, answer in enumerate(answers):
        image = place if answer.image is None else answer.image
        drawn = (digest([answer.id]), answer)
        chosen[image] = min(drawn, chosen.get(image, drawn), key=lambda candidate: candidate[0])
    return [answer for _, answer in chosen.values()]


def graded(answers: Sequence[EstimatedPrediction], estimator: str) -> GradedAnswers:
    """The counts of `one_an_image` by the confidence of an estimator."""
    answers = one_an_image(answers)
    return graded_answers([a.confidence_of(estimator) for a in answers], [a.correct for a in answers])


def choose(
    groups: Mapping[str, Sequence[EstimatedPrediction]], estimator: str, limits: Limits
) -> RiskControl:
    """Choose a threshold for each group of answers (`grouped`)."""
    return control_risk({name: graded(answers, estimator) for name, answers in groups.items()}, limits)


def realised(
    control: RiskControl, estimator: str, answers: Sequence[EstimatedPrediction]
) -> dict[str, ThresholdScores]:
    """What thresholds do on the answers to the test set: `ALL`, each part if there are several, and each group that has a threshold.

    An answer in a category without a threshold is not given.
    """
    of_groups = {} if EVERYTHING in control.choices else grouped(answers, "category")
    scores = {}
    for name, part in {ALL: answers, **parts_of(answers), **of_groups}.items():
        counted = one_an_image(part)
        given = [answer.correct for answer in counted if _is_given(control, estimator, answer)]
        correct = sum(answer.correct for answer in counted)
        wrong = given.count(False)
        scores[name] = ThresholdScores.of(
            len(counted), len(given), wrong, correct, correct - given.count(True), control.limits.certainty
        )
    return scores


def _is_given(control: RiskControl, estimator: str, answer: EstimatedPrediction) -> bool:
    group = EVERYTHING if EVERYTHING in control.choices else category_of(answer)
    choice = control.choices.get(group or "")
    return choice is not None and may_answer(answer.confidence_of(estimator), choice.threshold)


def promises_of(systems: Sequence[System]) -> list[SystemPromises]:
    """The stated confidence of each system that answered a calibration set, and the base model's likelihood of its answers."""
    rows = []
    for system in systems:
        if system.calibration is None:
            continue
        estimators = [VERBALIZED]
        is_base = system.name.removeprefix(f"{system.folder}/") == BASE
        known = {*system.estimators} & {*estimators_of(system.calibration)}
        if is_base and AnswerLikelihood.name in known:
            estimators.append(AnswerLikelihood.name)
        rows += [_promises(system, estimator, system.calibration) for estimator in estimators]
    return rows


def _promises(system: System, estimator: str, calibration: Sequence[EstimatedPrediction]) -> SystemPromises:
    promises = []
    for max_error in MAX_ERRORS:
        control = choose(grouped(calibration, None), estimator, Limits(max_error, CERTAINTY))
        tested = realised(control, estimator, system.predictions) if control.found else {}
        promises.append(Promise(control.limits, control.choices[EVERYTHING], tested))
    return SystemPromises(system.name, estimator, len(one_an_image(calibration)), promises)


# --- In words -------------------------------------------------------------------------------------------------------


class ThresholdCell(NamedTuple):
    """A cell of the report's tables of thresholds.

    Attributes:
        value: coverage or error as text, or why there is none.
        notes: lines below it: the interval, and the threshold or the number of answers.
        is_broken: whether the interval of the error lies above the limit.
    """

    value: str
    notes: Sequence[str] = ()
    is_broken: bool = False


def coverage_cell(promise: Promise) -> ThresholdCell:
    """The share of the calibration answers that are given."""
    choice = promise.choice
    if choice.scores is None or choice.threshold is None:
        return ThresholdCell("no threshold gives this")
    _, low, high = choice.scores.coverage
    return ThresholdCell(
        f"{choice.scores.coverage.value:.1%}",
        [f"{100 * low:.1f}–{high:.1%}", f"from {percent(choice.threshold)} on"],
    )


def error_cell(promise: Promise, part: str) -> ThresholdCell:
    """The share of wrong answers among those given on a part of the test."""
    if part not in promise.tested:
        return ThresholdCell("–")
    scores = promise.tested[part]
    given = f"{scores.answers:,} of {scores.n:,} given"
    if not scores.answers:
        return ThresholdCell("–", [given])
    interval = f"{100 * scores.error.low:.1f}–{scores.error.high:.1%}"
    return ThresholdCell(f"{scores.error.value:.1%}", [interval, given], part in promise.broken)


def broken_sentence(row: SystemPromises) -> str:
    """Where the test answers contradict the promises of a system."""
    kept = [promise for promise in row.promises if promise.choice.threshold is not None]
    if not kept:
        return "No limit has a threshold, so there is nothing to check."
    by_parts: dict[tuple[str, ...], list[str]] = {}
    for promise in kept:
        if names := tuple(name for name in promise.broken if name != ALL) or tuple(promise.broken):
            by_parts.setdefault(names, []).append(percent(promise.limits.max_error))
    if not by_parts:
        return "On no part does the interval of the error lie above the limit."
    places = [
        f"{_listed([_part_in_words(name) for name in names])} (limit {_listed(limits)})"
        for names, limits in by_parts.items()
    ]
    return f"The guarantee does not hold on {'; on '.join(places)}: the whole interval of the error lies above the limit."


def _part_in_words(part: str) -> str:
    return "the test answers as a whole" if part == ALL else f"“{part}”"


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def uncalibrated_sentence(systems: Sequence[System]) -> str:
    """Which systems have no thresholds for lack of calibration answers, and what to do; empty if none."""
    names = [system.name for system in systems if system.calibration is None]
    if not names:
        return ""
    one = len(names) == 1
    if len(names) < len(systems):
        who = f"{_listed(names)} {'has' if one else 'have'}"
    else:
        who = "The system has" if one else "The systems have"
    return (
        f"{who} no answers to a calibration set, and a threshold that is chosen on the answers it is tested on proves nothing: evaluate "
        "with data.calibration, or name such an evaluation with --calibration."
    )
