"""`vlm-calibration threshold`: the confidence from which on a model may answer, with a guarantee, written beside the adapter."""

from __future__ import annotations

import json as json_format
from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm_calibration.errors import CommandError

if TYPE_CHECKING:
    from vlm_calibration.estimators.decision import DecisionRule
    from vlm_calibration.metrics.risk_control import RiskControl, ThresholdScores
    from vlm_calibration.reporting.report.thresholds import Evaluated, EvaluatedModel

NOT_FOUND = 3
"""Exit status if no threshold keeps the limits."""


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

    The adapter's model card then states the guarantee.

    Exit status 3 and no file if no threshold keeps the limits.

    Args:
        run: folder of an evaluation
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
    from vlm_calibration.estimators.decision import read_rule, write_rule
    from vlm_calibration.metrics.risk_control import Limits
    from vlm_calibration.reporting.card import state_guarantee
    from vlm_calibration.reporting.report.thresholds import choose, model_of, read_evaluated, realised

    try:
        limits = Limits(max_error, certainty, max_sent_away)
    except ValueError as error:
        raise ArgumentError(None, f"--{str(error).replace('_', '-')}") from error
    evaluated = read_evaluated(Path(run), system, estimator, by)
    model = model_of(evaluated.system)
    control = choose(evaluated.groups, estimator, limits)
    rule = _rule(control, evaluated, model, estimator, by)
    tested = (
        realised(control, estimator, evaluated.system.predictions) if evaluated.split == "calibration" else {}
    )
    written = None
    if control.found:
        written = str(write_rule(rule, model.folder))
        state_guarantee(model.folder, rule.guarantee)
    earlier = None if control.found else read_rule(model.folder)
    if json:
        print(json_format.dumps(_as_json(rule, control, tested, written), indent=2, ensure_ascii=False))
    else:
        _print(rule, control, evaluated, tested, written)
        if earlier is not None:
            print(f"The thresholds of an earlier run stay in {model.folder}: {earlier.guarantee}")
    if not control.found:
        raise CommandError("", NOT_FOUND)


# --- The rule -------------------------------------------------------------------------------------------------------


def _rule(
    control: RiskControl,
    evaluated: Evaluated,
    model: EvaluatedModel,
    estimator: str,
    by: Literal["category"] | None,
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

    images = (
        f" about {rule.answers['images']} images, of which one each counts" if rule.answers["images"] else ""
    )
    print(f"{evaluated.path}: {len(evaluated.answers)} answers{images}; confidence: {rule.estimator}")
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
