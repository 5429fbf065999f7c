"""What to send to a person: thresholds that are chosen on the calibration answers, and what they do on each part of the test answers.

Of several answers about one image one counts, since they are not independent: whether one is wrong says something about the others. The
report and `vlm-calibration threshold` both compute with these functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeVar

from vlm_calibration.estimators.decision import EVERYTHING, By, may_answer
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.predictions import (
    CALIBRATION,
    PREDICTIONS,
    VERBALIZED,
    EstimatedPrediction,
    estimators_of,
)
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
from vlm_calibration.models.base import (
    BaseModel,
    adapter_digest,
    adapter_weights_digest,
    base_of_adapters,
    find_adapter,
    read_object,
)
from vlm_calibration.records import DataError
from vlm_calibration.reporting.report.data import BASE, ORACLE, System, read_systems
from vlm_calibration.reporting.report.summary import listed, subject_of
from vlm_calibration.reporting.report.table import confidence_name
from vlm_calibration.reporting.runs import RECORD, systems_of
from vlm_calibration.settings import digest
from vlm_calibration.text.prompts import ElicitationPrompt

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
    def broken(self) -> list[str]:
        """The parts where the interval of the error lies above the limit."""
        return [name for name, s in self.tested.items() if s.error.low > self.limits.max_error]


class SystemPromises(NamedTuple):
    """What one confidence of a system promises.

    Attributes:
        system: name of the system.
        name: the same with the estimator, if that is not the stated confidence.
        promises: one for each of `MAX_ERRORS`, each by itself.
    """

    system: str
    name: str
    promises: Sequence[Promise]


# --- Parts of the answers -------------------------------------------------------------------------------------------


def part_of(answer: EstimatedPrediction) -> str | None:
    """The named split that an answer belongs to, which an evaluation puts in front of id and category; None if it has no name."""
    first = (answer.category or "").split("/", 1)[0]
    return first if first and answer.id.startswith(f"{first}:") else None


def category_of(answer: EstimatedPrediction) -> str | None:
    """The category of the question itself, without the name of its split; None if it has none."""
    category = (answer.category or "").removeprefix(part_of(answer) or "").removeprefix("/")
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
    is_one = EVERYTHING in control.choices
    scores = {}
    for name, part in {
        ALL: answers,
        **parts_of(answers),
        **({} if is_one else grouped(answers, "category")),
    }.items():
        counted = one_an_image(part)
        given = []
        for answer in counted:
            choice = control.choices.get(EVERYTHING if is_one else category_of(answer) or "")
            if choice is not None and may_answer(answer.confidence_of(estimator), choice.threshold):
                given.append(answer.correct)
        correct = sum(answer.correct for answer in counted)
        scores[name] = ThresholdScores.of(
            n=len(counted),
            answers=len(given),
            wrong=given.count(False),
            correct=correct,
            sent_away=correct - given.count(True),
            certainty=control.limits.certainty,
        )
    return scores


def promises_of(systems: Sequence[System]) -> list[SystemPromises]:
    """The stated confidence of each system that answered a calibration set, and the base model's likelihood of its answers."""
    rows = []
    for system in systems:
        if system.calibration is None:
            continue
        known = {*estimators_of(system.predictions)} & {*estimators_of(system.calibration)}
        is_base = system.name.removeprefix(f"{system.folder}/") == BASE
        has_likelihood = is_base and AnswerLikelihood.name in known
        for estimator in (VERBALIZED, AnswerLikelihood.name) if has_likelihood else (VERBALIZED,):
            promises = []
            for max_error in MAX_ERRORS:
                limits = Limits(max_error, CERTAINTY)
                control = choose({EVERYTHING: system.calibration}, estimator, limits)
                tested = realised(control, estimator, system.predictions) if control.found else {}
                promises.append(Promise(limits, control.choices[EVERYTHING], tested))
            rows.append(SystemPromises(system.name, confidence_name(system.name, estimator), promises))
    return rows


# --- In words -------------------------------------------------------------------------------------------------------


def broken_sentence(row: SystemPromises) -> str:
    """Where the test answers contradict the promises of a system."""
    kept = [promise for promise in row.promises if promise.choice.threshold is not None]
    if not kept:
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


def uncalibrated_sentence(systems: Sequence[System]) -> str:
    """Which systems have no thresholds for lack of calibration answers, and what to do; empty if none."""
    names = [system.name for system in systems if system.calibration is None]
    if not names:
        return ""
    one = len(names) == 1
    who = "The system" if one else "The systems"
    if len(names) < len(systems):
        who = listed(names)
    return (
        f"{who} {'has' if one else 'have'} no answers to a calibration set, and a threshold that is chosen on the answers it is tested on "
        "proves nothing: evaluate with data.calibration, or name such an evaluation with --calibration."
    )


# --- The system that `vlm-calibration threshold` chooses a rule for -------------------------------------------------


class Evaluated(NamedTuple):
    """The answers that a threshold is chosen on.

    Attributes:
        system: the model that answered.
        path: file of the answers.
        split: "calibration", or "predictions" without a calibration split.
        answers: the answers.
        groups: group -> its answers.
        without_group: how many answers have no group and are left out.
    """

    system: System
    path: Path
    split: Literal["calibration", "predictions"]
    answers: Sequence[EstimatedPrediction]
    groups: Mapping[str, list[EstimatedPrediction]]
    without_group: int

    @property
    def questions(self) -> str:
        """Which questions the answers are to, as `guarantee` names them."""
        return "those of the calibration split" if self.split == "calibration" else "the evaluated ones"


class EvaluatedModel(NamedTuple):
    """The model that a rule is for.

    Attributes:
        base: its base model.
        weights: digest of the weights, as `DecisionRule` has it.
        prompt: template of the evaluation's prompt.
        folder: where the rule belongs.
        has_adapter: whether that is an adapter's folder.
    """

    base: BaseModel
    weights: str
    prompt: str
    folder: Path
    has_adapter: bool


def read_evaluated(run: Path, name: str | None, estimator: str, by: By | None) -> Evaluated:
    """The answers of one system of an evaluation, in groups.

    Raises:
        DataError: there are none, there is no such system, or they lack the estimator or a category.
    """
    systems = {s.name: s for s in read_systems([str(run)]) if s.name != ORACLE}
    if not systems:
        raise DataError(f"{run}: holds no answers of a model")
    if name is not None and name not in systems:
        raise DataError(f"--system: no system {name!r} that is a model; there are {', '.join(systems)}")
    system = subject_of(list(systems.values()), name)
    if system.name not in systems_of(system.config or {}):
        raise DataError(
            f"{run}: not an evaluation of `vlm-calibration test`, whose configuration names the adapters"
        )
    split: Literal["calibration", "predictions"] = "calibration"
    answers, path = system.calibration, system.folder / system.name / CALIBRATION
    if answers is None:
        split, answers, path = "predictions", system.predictions, path.with_name(PREDICTIONS)
    if estimator not in (known := estimators_of(answers)):
        raise DataError(f"{path}: no estimator {estimator!r}; it has {', '.join(known)}")
    groups = grouped(answers, by)
    if not groups:
        raise DataError(f"{path}: no answer has a category: leave --by out")
    left_out = len(answers) - sum(map(len, groups.values()))
    return Evaluated(system, path, split, answers, groups, left_out)


def model_of(system: System) -> EvaluatedModel:
    """The model behind a system, as the evaluation's configuration names it.

    Raises:
        DataError: the adapter is gone or was trained again since.
    """
    config = system.config or {}
    settings = config["model"].get("init_args") or {}
    adapters, endpoints = (settings.get(kind) or {} for kind in ("adapters", "endpoints"))
    if system.name not in (BASE, *adapters, *endpoints):
        raise DataError(f"{system.folder}: its configuration names no adapter {system.name!r}")
    template = ((config.get("data") or {}).get("prompt") or {}).get("template")
    prompt, folder = template or ElicitationPrompt().template, system.folder / system.name
    if system.name in endpoints:
        # Nobody knows the weights behind an address.
        return EvaluatedModel(BaseModel(endpoints[system.name]["model"]), "", prompt, folder, False)
    base = BaseModel(**settings["base"]) if settings.get("base") else base_of_adapters(adapters)
    if system.name == BASE:
        # It imports transformers, which no adapter needs.
        from vlm_calibration.models.loading import weights_digest

        return EvaluatedModel(base, weights_digest(base) or "", prompt, folder, False)
    adapter, record = find_adapter(adapters[system.name]), system.folder / RECORD
    inputs = read_object(record).get("inputs", {}) if record.is_file() else {}
    recorded = inputs.get(f"model.init_args.adapters.{system.name}")
    if recorded not in (None, adapter_digest(adapter)):
        raise DataError(f"{adapter}: not the adapter that {system.folder} evaluated: evaluate it first")
    # A download in the Hub's cache belongs to the cache.
    is_local = Path(adapters[system.name]).exists()
    folder = adapter if is_local else folder
    return EvaluatedModel(base, adapter_weights_digest(adapter), prompt, folder, True)
