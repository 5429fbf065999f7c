"""`vlm-calibration threshold`: the confidence from which on a model may answer, with a guarantee, written beside the adapter."""

from __future__ import annotations

import json as json_format
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vlm_calibration.errors import CommandError
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    from vlm_calibration.estimators.decision import DecisionRule
    from vlm_calibration.estimators.predictions import EstimatedPrediction
    from vlm_calibration.metrics.risk_control import RiskControl, ThresholdScores
    from vlm_calibration.reporting.report.data import System

NOT_FOUND = 3
"""Exit status if no threshold keeps the limits."""


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


def threshold(
    run: str,
    *,
    max_error: float = 0.05,
    certainty: float = 0.95,
    max_sent_away: float | None = None,
    by: Literal["category"] | None = None,
    estimator: Literal["verbalized", "expected"] = "verbalized",
    system: str | None = None,
    json: bool = False,
) -> None:
    """Choose the confidence from which on a model may answer, with a guarantee, and write it to the adapter as thresholds.json.

    Exit status 3 and no file if no threshold keeps the limits.

    Args:
        run: folder of an evaluation, or of one system in it
        max_error: largest share of wrong answers among the answers given, in (0, 1)
        certainty: how sure the promise is, in (0, 1)
        max_sent_away: largest share of the correct answers that are not given, in (0, 1); no limit without it
        by: a threshold for each category instead of one for all; the promise holds for all at once
        estimator: estimator of the confidence that is compared
        system: system of the evaluation (default: the last trained one)
        json: print one JSON object

    Raises:
        ArgumentError: a limit is not in (0, 1).
        DataError: there are no answers, they cannot be used, or the adapter is not that of the evaluation.
        CommandError: no threshold keeps the limits.
    """
    # These import torch, which the help does not need.
    from vlm_calibration.estimators.decision import write_rule
    from vlm_calibration.metrics.risk_control import Limits, control_risk, graded_answers

    try:
        limits = Limits(max_error, certainty, max_sent_away)
    except ValueError as error:
        raise ArgumentError(None, f"--{str(error).replace('_', '-')}") from error
    evaluated = read_evaluated(Path(run), system, estimator, by)
    model = _model_of(evaluated.system, estimator, evaluated.answers)
    control = control_risk(
        {
            name: graded_answers([p.confidence_of(estimator) for p in part], [p.correct for p in part])
            for name, part in evaluated.groups.items()
        },
        limits,
    )
    rule = _rule(control, evaluated, model, estimator, by)
    tested = (
        realised(rule, evaluated.system.predictions, certainty) if evaluated.split == "calibration" else {}
    )
    written = str(write_rule(rule, model.folder)) if control.found else None
    if json:
        print(json_format.dumps(_as_json(rule, control, tested, written), indent=2, ensure_ascii=False))
    else:
        _print(rule, control, evaluated, tested, written)
    if not control.found:
        raise CommandError("", NOT_FOUND)


# --- The answers ----------------------------------------------------------------------------------------------------


def read_evaluated(run: Path, name: str | None, estimator: str, by: str | None) -> Evaluated:
    """The answers of one system of an evaluation, in groups.

    Raises:
        DataError: there are none, there is no such system, or they lack the estimator or a category.
    """
    from vlm_calibration.estimators.decision import EVERYTHING
    from vlm_calibration.estimators.predictions import CALIBRATION, PREDICTIONS, estimators_of

    system, folder = _system_of(run, name)
    split: Literal["calibration", "predictions"] = (
        "predictions" if system.calibration is None else "calibration"
    )
    answers = system.predictions if system.calibration is None else system.calibration
    path = folder / (PREDICTIONS if system.calibration is None else CALIBRATION)
    if estimator not in (known := estimators_of(answers)):
        raise DataError(f"{path}: no estimator {estimator!r}; it has {', '.join(known)}")
    groups: dict[str, list[EstimatedPrediction]] = {}
    for answer in answers:
        group = EVERYTHING if by is None else category_of(answer)
        if group is not None:
            groups.setdefault(group, []).append(answer)
    if not groups:
        raise DataError(f"{path}: no answer has a category: leave --by out")
    left_out = len(answers) - sum(map(len, groups.values()))
    return Evaluated(system, path, split, answers, dict(sorted(groups.items())), left_out)


def _system_of(run: Path, name: str | None) -> tuple[System, Path]:
    """A system of an evaluation, and its folder; `run` is the evaluation or that folder."""
    from vlm_calibration.estimators.predictions import PREDICTIONS
    from vlm_calibration.reporting.report.data import CONFIG, ORACLE, read_systems
    from vlm_calibration.reporting.report.summary import subject_of

    if (
        (run / PREDICTIONS).is_file()
        and not (run / CONFIG).is_file()
        and (run.resolve().parent / CONFIG).is_file()
    ):
        if name not in (None, run.resolve().name):
            raise DataError(f"--system: {run} is the folder of {run.resolve().name!r}, not of {name!r}")
        run, name = run.resolve().parent, run.resolve().name
    systems = {s.name: s for s in read_systems([str(run)]) if s.name != ORACLE}
    if name is not None and name not in systems:
        raise DataError(f"--system: no system {name!r} that is a model; there are {', '.join(systems)}")
    if not systems:
        raise DataError(f"{run}: holds no answers of a model")
    system = systems[name] if name is not None else subject_of(list(systems.values()))
    folder = system.folder / system.name
    if not (folder / PREDICTIONS).is_file() or _evaluation(system) is None:
        raise DataError(
            f"{run}: not an evaluation of `vlm-calibration test`, whose configuration names the adapters"
        )
    return system, folder


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


# --- The model ------------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """The model that a rule is for.

    Attributes:
        base: its base model.
        weights: digest of the weights, as `DecisionRule` has it.
        prompt: template of the evaluation's prompt.
        levels: answer type -> confidences that the estimator averages over; empty if it averages none.
        folder: where the rule belongs.
    """

    base: Any
    weights: str
    prompt: str
    levels: Mapping[str, list[float]]
    folder: Path


def _evaluation(system: System) -> Mapping[str, Any] | None:
    """The settings of the evaluation's module; None if the configuration is not that of an evaluation."""
    model = (system.config or {}).get("model") or {}
    is_evaluation = str(model.get("class_path", "")).endswith(".EvaluationModule")
    return (model.get("init_args") or {}) if is_evaluation else None


def _model_of(system: System, estimator: str, answers: Sequence[EstimatedPrediction]) -> Model:
    """The model behind a system, as the evaluation's configuration names it.

    Raises:
        DataError: the adapter is gone or was trained again since.
    """
    from vlm_calibration.models.base import BaseModel, adapter_weights_digest, base_of_adapters, find_adapter
    from vlm_calibration.reporting.report.data import BASE
    from vlm_calibration.text.prompts import ElicitationPrompt

    settings, data = _evaluation(system) or {}, (system.config or {}).get("data") or {}
    adapters = settings.get("adapters") or {}
    if system.name not in (BASE, *adapters):
        raise DataError(f"{system.folder}: its configuration names no adapter {system.name!r}")
    base = BaseModel(**settings["base"]) if settings.get("base") else base_of_adapters(adapters)
    prompt = (data.get("prompt") or {}).get("template") or ElicitationPrompt().template
    levels = _levels(settings, data, answers) if estimator == "expected" else {}
    folder = system.folder / system.name
    if system.name == BASE:
        from vlm_calibration.models.loading import (
            weights_digest,  # imports transformers, which no adapter needs
        )

        return Model(base, weights_digest(base) or "", prompt, levels, folder)
    adapter = find_adapter(adapters[system.name])
    _check_unchanged(system, adapter)
    # A download in the Hub's cache belongs to the cache.
    is_local = Path(adapters[system.name]).exists()
    return Model(base, adapter_weights_digest(adapter), prompt, levels, adapter if is_local else folder)


def _check_unchanged(system: System, adapter: Path) -> None:
    """Refuse an adapter that differs from the one that the evaluation recorded."""
    from vlm_calibration.models.base import adapter_digest, read_object
    from vlm_calibration.reporting.runs import RECORD

    path = system.folder / RECORD
    inputs = read_object(path).get("inputs", {}) if path.is_file() else {}
    recorded = inputs.get(f"model.init_args.adapters.{system.name}")
    if recorded not in (None, adapter_digest(adapter)):
        raise DataError(f"{adapter}: not the adapter that {system.folder} evaluated: evaluate it first")


def _levels(
    settings: Mapping[str, Any], data: Mapping[str, Any], answers: Sequence[EstimatedPrediction]
) -> dict[str, list[float]]:
    """Answer type -> the confidences over which the evaluation took the expected confidence: those of all its estimators."""
    from jsonargparse import ArgumentParser

    from vlm_calibration.data.candidates import stated_levels
    from vlm_calibration.perturbation.levels import ConfidenceLevels

    configured = [
        (data.get("noise") or {}).get("levels")
        or {"class_path": "vlm_calibration.perturbation.levels.LinearLevels"}
    ]
    for entry in settings.get("estimators") or ():
        configured += (entry.get("init_args") or {}).get("levels") or []
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--levels", type=list[ConfidenceLevels])
    levels = parser.instantiate_classes(parser.parse_object({"levels": configured})).levels
    return {kind: list(stated_levels(levels, kind)) for kind in sorted({a.answer_type for a in answers})}


# --- The rule -------------------------------------------------------------------------------------------------------


def _rule(
    control: RiskControl, evaluated: Evaluated, model: Model, estimator: str, by: Literal["category"] | None
) -> DecisionRule:
    from dataclasses import asdict

    from vlm_calibration.estimators.decision import DecisionRule
    from vlm_calibration.metrics.risk_control import ASSUMPTIONS, guarantee
    from vlm_calibration.settings import file_digest

    groups = {
        name: {
            "threshold": choice.threshold,
            **(_scores_as_json(choice.scores) if choice.scores is not None else {}),
            "p_error": choice.p_error,
            "p_sent_away": choice.p_sent_away,
            "reason": choice.reason,
        }
        for name, choice in control.choices.items()
    }
    return DecisionRule(
        base=model.base.name_or_path,
        quantization=model.base.quantization,
        dtype=model.base.dtype,
        weights=model.weights,
        prompt=model.prompt,
        estimator=estimator,
        levels=model.levels,
        by=by,
        groups=groups,
        limits=asdict(control.limits),
        correction=control.correction,
        guarantee=guarantee(control, evaluated.questions),
        assumptions=list(ASSUMPTIONS),
        answers={
            "split": evaluated.split,
            "digest": file_digest(evaluated.path),
            "n": len(evaluated.answers),
            "images": len({a.image for a in evaluated.answers if a.image is not None}) or None,
            "without_group": evaluated.without_group,
        },
    )


def realised(
    rule: DecisionRule, answers: Sequence[EstimatedPrediction], certainty: float
) -> dict[str, ThresholdScores]:
    """What a rule does on the answers to the test set: "all", and each named part if there are several.

    An answer in a category that the rule does not know is not given.
    """
    from vlm_calibration.metrics.risk_control import ThresholdScores

    parts: dict[str, list[EstimatedPrediction]] = {"all": list(answers)}
    if len(names := dict.fromkeys(map(part_of, answers))) > 1:
        parts |= {name or "other": [a for a in answers if part_of(a) == name] for name in names}
    scores = {}
    for name, part in parts.items():
        decided = [(_is_given(rule, a), a.correct) for a in part]
        scores[name] = ThresholdScores.of(
            len(part),
            sum(given for given, _ in decided),
            sum(given and not correct for given, correct in decided),
            sum(correct for _, correct in decided),
            sum(correct and not given for given, correct in decided),
            certainty,
        )
    return scores


def _is_given(rule: DecisionRule, answer: EstimatedPrediction) -> bool:
    applied = rule.applied(answer.confidence_of(rule.estimator), category_of(answer))
    return applied is not None and applied.decision == "answer"


# --- Output ---------------------------------------------------------------------------------------------------------


def _scores_as_json(scores: ThresholdScores) -> dict[str, Any]:
    """Plain values; an interval as value, low and high, null where undefined."""
    return {
        name: [None if v != v else v for v in value] if isinstance(value, tuple) else value
        for name, value in scores._asdict().items()
    }


def _as_json(
    rule: DecisionRule, control: RiskControl, tested: Mapping[str, ThresholdScores], written: str | None
) -> dict[str, Any]:
    from dataclasses import asdict

    test = {name: _scores_as_json(scores) for name, scores in tested.items()}
    return {"found": control.found, "written": written, **asdict(rule), "test": test or None}


def _print(
    rule: DecisionRule,
    control: RiskControl,
    evaluated: Evaluated,
    tested: Mapping[str, ThresholdScores],
    written: str | None,
) -> None:
    from rich.console import Console
    from rich.table import Table

    from vlm_calibration.metrics.risk_control import percent

    images = f" about {rule.answers['images']} images" if rule.answers["images"] else ""
    print(f"{evaluated.path}: {len(evaluated.answers)} answers{images}, confidence: {rule.estimator}")
    if evaluated.split == "predictions":
        print(
            "The evaluation has no calibration split, so the threshold is chosen on the answers that it scores: they cannot check the "
            "promise as well. Give data.calibration."
        )
    if evaluated.without_group:
        print(f"{evaluated.without_group} answers have no category and are left out.")
    print(rule.guarantee or "No threshold keeps the limits, so nothing is written.")
    for name, choice in control.choices.items():
        if choice.reason:
            print(f"{name or 'Why'}: {choice.reason}.")
    if not control.found:
        return
    table = Table(
        title=f"Intervals at {percent(control.limits.certainty)}", title_justify="left", title_style="bold"
    )
    for heading in ("answers", "threshold", "answered", "wrong of those", "correct, but sent away"):
        table.add_column(heading, justify="left" if heading == "answers" else "right")
    for name, choice in control.choices.items():
        if choice.scores is not None and choice.threshold is not None:
            label = f"{evaluated.split} (chosen on)" + (f": {name}" if name else "")
            table.add_row(label, percent(choice.threshold), *_cells(choice.scores))
    for name, scores in tested.items():
        table.add_row("test" if name == "all" else f"test: {name}", "", *_cells(scores))
    Console().print(table)
    if "all" in tested:
        print(_kept(tested["all"], control))
    print(f"wrote {written}")
    if evaluated.system.name == "base":
        print(
            "No adapter belongs to the base model: the file is read where it lies beside the model's weights."
        )


def _cells(scores: ThresholdScores) -> list[str]:
    return [
        f"{value:.1%} [{low:.1%}, {high:.1%}]" if value == value else "-"
        for value, low, high in (scores.coverage, scores.error, scores.sent_away_share)
    ]


def _kept(scores: ThresholdScores, control: RiskControl) -> str:
    """Whether the test answers agree with the promise, in a sentence."""
    from vlm_calibration.metrics.risk_control import percent

    limit, error = control.limits.max_error, scores.error
    promise = f"Promised: at most {percent(limit)} wrong; on the test answers {scores.wrong} of {scores.answers} given are wrong"
    if scores.answers == 0:
        return f"{promise}."
    if error.low > limit:
        return f"{promise}: more than promised, so these questions are not like those that the threshold was chosen on."
    return f"{promise}: {'within the promise' if error.value <= limit else 'above it, but no more than chance explains'}."
