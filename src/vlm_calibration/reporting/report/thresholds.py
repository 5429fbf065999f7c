"""What to send to a person: thresholds that are chosen on the calibration answers, and what they do on each part of the test answers.

Of several answers about one image one counts, since they are not independent: whether one is wrong says something about the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vlm_calibration.estimators.decision import EVERYTHING, By, may_answer
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.predictions import estimators_of
from vlm_calibration.metrics.risk_control import (
    Choice,
    Limits,
    RiskControl,
    ThresholdScores,
    control_risk,
    graded_answers,
    percent,
)
from vlm_calibration.models.base import (
    BaseModel,
    adapter_digest,
    adapter_weights_digest,
    base_of_adapters,
    find_adapter,
)
from vlm_calibration.records import VERBALIZED, DataError, Prediction
from vlm_calibration.reporting.report.data import BASE, Answers, System
from vlm_calibration.reporting.report.summary import listed
from vlm_calibration.reporting.runs import read_record, systems_of
from vlm_calibration.settings import digest
from vlm_calibration.text.confidence import ElicitationPrompt

A = TypeVar("A")
MAX_ERRORS, CERTAINTY = (0.01, 0.02, 0.05, 0.10), 0.95
"""The limits of the error in the report, and the certainty of each."""
ALL = "all"  # the name of all test answers beside their parts


class Promise(NamedTuple):
    """One limit of the error, its threshold on the calibration answers, and what that does on `ALL` and each part of the test answers."""

    limits: Limits
    choice: Choice
    tested: Mapping[str, ThresholdScores]

    @property
    def broken(self) -> list[str]:
        """The parts where the interval of the error lies above the limit."""
        return [name for name, s in self.tested.items() if s.error.low > self.limits.max_error]


def part_of(answer: Prediction) -> str | None:
    """The named split that an answer belongs to, which an evaluation puts in front of id and category; None if it has no name."""
    first = (answer.category or "").split("/", 1)[0]
    return first if first and answer.id.startswith(f"{first}:") else None


def category_of(answer: Prediction) -> str | None:
    """The category of the question itself, without the name of its split; None if it has none."""
    return (answer.category or "").removeprefix(part_of(answer) or "").removeprefix("/") or None


def parts_of(answers: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """The named splits of the answers; of one split its main categories; empty if there is one of these too."""
    for name_of in (part_of, lambda answer: (category_of(answer) or "").split("/")[0] or None):
        parts: dict[str, list[Prediction]] = {}
        for answer in answers:
            parts.setdefault(name_of(answer) or "other", []).append(answer)
        if len(parts) > 1:
            return parts
    return {}


def grouped(answers: Sequence[Prediction], by: By | None) -> dict[str, list[Prediction]]:
    """The answers in the groups that get a threshold each, by name; answers without a category are left out if it goes by that."""
    if by is None:
        return {EVERYTHING: list(answers)}
    groups: dict[str, list[Prediction]] = {}
    for answer in answers:
        if (group := category_of(answer)) is not None:
            groups.setdefault(group, []).append(answer)
    return dict(sorted(groups.items()))


def one_an_image(answers: Sequence[A]) -> list[A]:
    """One of the answers about each image, the one whose id has the smallest digest; all answers that name no image."""
    chosen: dict[str | int, tuple[str, A]] = {}
    for place, answer in enumerate(answers):
        about: Any = answer  # with the attributes `id` and `image`, str and str or None
        drawn = (digest([about.id]), answer)
        image = place if about.image is None else about.image
        chosen[image] = min(drawn, chosen.get(image, drawn), key=lambda candidate: candidate[0])
    return [answer for _, answer in chosen.values()]


def choose(groups: Mapping[str, Answers], estimator: str, limits: Limits) -> RiskControl:
    """Choose a threshold for each group of answers (`grouped`)."""
    graded = {}
    for name, answers in groups.items():
        counted = one_an_image(answers)
        confidences = [answer.confidence_of(estimator) for answer in counted]
        graded[name] = graded_answers(confidences, [answer.correct for answer in counted])
    return control_risk(graded, limits)


def realised(control: RiskControl, estimator: str, answers: Answers) -> dict[str, ThresholdScores]:
    """What thresholds do on the answers to the test set: `ALL`, each part if there are several, and each group that has a threshold.

    An answer in a category without a threshold is not given.
    """
    is_one = EVERYTHING in control.choices
    parts = {ALL: answers, **parts_of(answers), **({} if is_one else grouped(answers, "category"))}
    thresholds = {group: choice.threshold for group, choice in control.choices.items()}
    scores = {}
    for name, part in parts.items():
        counted = one_an_image(part)
        given = []
        for answer in counted:
            group = EVERYTHING if is_one else category_of(answer) or ""
            given.append(may_answer(answer.confidence_of(estimator), thresholds.get(group)))
        correct = np.array([answer.correct for answer in counted])
        scores[name] = ThresholdScores.of(np.array(given), correct, control.limits.certainty)
    return scores


def promises_of(systems: Sequence[System]) -> dict[tuple[str, str], list[Promise]]:
    """(System that answered a calibration set, estimator) -> a promise for each of `MAX_ERRORS`, each by itself.

    The estimator is the stated confidence, and for the base model the likelihood of its answers too.
    """
    promises: dict[tuple[str, str], list[Promise]] = {}
    for system in systems:
        if system.calibration is None:
            continue
        known = {*estimators_of(system.predictions)} & {*estimators_of(system.calibration)}
        is_base = system.name.removeprefix(f"{system.folder}/") == BASE
        has_likelihood = is_base and AnswerLikelihood.name in known
        for estimator in (VERBALIZED, AnswerLikelihood.name) if has_likelihood else (VERBALIZED,):
            for max_error in MAX_ERRORS:
                limits = Limits(max_error, CERTAINTY)
                control = choose({EVERYTHING: system.calibration}, estimator, limits)
                tested = realised(control, estimator, system.predictions) if control.found else {}
                promise = Promise(limits, control.choices[EVERYTHING], tested)
                promises.setdefault((system.name, estimator), []).append(promise)
    return promises


def broken_sentence(promises: Sequence[Promise]) -> str:
    """Where the test answers contradict the promises of a system."""
    if not (kept := [promise for promise in promises if promise.choice.threshold is not None]):
        return "No limit has a threshold, so there is nothing to check."
    by_parts: dict[tuple[str, ...], list[str]] = {}
    for promise in kept:
        if broken := promise.broken:
            parts = [f"“{name}”" for name in broken if name != ALL] or ["the test answers as a whole"]
            by_parts.setdefault(tuple(parts), []).append(percent(promise.limits.max_error))
    if not by_parts:
        return "On no part does the interval of the error lie above the limit."
    places = [f"{listed(parts)} (limit {listed(limits)})" for parts, limits in by_parts.items()]
    return f"The guarantee does not hold on {'; on '.join(places)}: the whole interval of the error lies above the limit."


def model_of(system: System) -> tuple[dict[str, Any], Path, bool]:
    """The fields of a `DecisionRule` on the model of a system, the folder for the rule, and whether it is an adapter's.

    DataError if the configuration of the evaluation does not name the model, or its adapter is gone or was trained again since.
    """
    config = system.config
    if system.name not in systems_of(config):
        evaluation = "an evaluation of `vlm-calibration test`"
        raise DataError(f"{system.folder}: not {evaluation} whose configuration names {system.name!r}")
    settings = config["model"].get("init_args") or {}
    adapters, endpoints = (settings.get(kind) or {} for kind in ("adapters", "endpoints"))
    template = ((config.get("data") or {}).get("prompt") or {}).get("template")
    folder, has_adapter = system.folder / system.name, system.name in adapters
    if system.name in endpoints:
        # Nobody knows the weights behind an address.
        base, weights = BaseModel(endpoints[system.name]["model"]), ""
    else:
        base = BaseModel(**settings["base"]) if settings.get("base") else base_of_adapters(adapters)
        if has_adapter:
            adapter, record = find_adapter(adapters[system.name]), read_record(system.folder)
            recorded = record.inputs.get(f"model.init_args.adapters.{system.name}") if record else None
            if recorded not in (None, adapter_digest(adapter)):
                evaluated = f"the adapter that {system.folder} evaluated"
                raise DataError(f"{adapter}: not {evaluated}: evaluate it first")
            weights = adapter_weights_digest(adapter)
            # A download in the Hub's cache belongs to the cache.
            folder = adapter if Path(adapters[system.name]).exists() else folder
        else:
            # It imports transformers, which no adapter needs.
            from vlm_calibration.models.loading import weights_digest

            weights = weights_digest(base) or ""
    fields = {"base": base.name_or_path, "quantization": base.quantization, "dtype": base.dtype}
    prompt = template or ElicitationPrompt().template
    return {**fields, "weights": weights, "prompt": prompt}, folder, has_adapter
