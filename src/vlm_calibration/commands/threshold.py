"""`vlm-calibration threshold`: the confidence from which on a model may answer, with a guarantee, written beside the adapter."""

from __future__ import annotations

import json as json_format
from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm_calibration.errors import CommandError

if TYPE_CHECKING:
    from vlm_calibration.estimators.decision import DecisionRule
    from vlm_calibration.metrics.risk_control import RiskControl, ThresholdScores
    from vlm_calibration.reporting.report.thresholds import Evaluated

NOT_FOUND = 3
"""Exit status if no threshold keeps the limits."""


def threshold(
    run: str,
    *,
    max_error: float = 0.05,
    certainty: float = 0.95,
    max_sent_away: float | None = None,
    by: Literal["category"] | None = None,
    estimator: str = "verbalized",
    system: str | None = None,
    json: bool = False,
) -> None:
    """Choose the confidence from which on a model may answer, with a guarantee, and write it to the adapter as thresholds.json.

    The adapter's model card then states the guarantee. Exit status 3 and no file if no threshold keeps the limits.

    Args:
        run: folder of an evaluation
        max_error: largest share of wrong answers among the answers given, in (0, 1)
        certainty: how sure the promise is, in (0, 1)
        max_sent_away: largest share of the correct answers that are not given, in (0, 1); no limit without it
        by: a threshold for each category instead of one for all; the promise holds for all at once
        estimator: estimator of the confidence that is compared, such as expected or likelihood
        system: system of the evaluation (default: the last trained one)
        json: print one JSON object

    Raises:
        ArgumentError: a limit is not in (0, 1).
        DataError: there are no answers, they cannot be used, or the adapter is not that of the evaluation.
        CommandError: no threshold keeps the limits.
    """
    # These import torch, which the help does not need.
    from vlm_calibration.estimators.decision import DecisionRule, read_rule, write_rule
    from vlm_calibration.metrics.risk_control import ASSUMPTIONS, Limits, guarantee
    from vlm_calibration.reporting.card import state_guarantee
    from vlm_calibration.reporting.report.thresholds import choose, model_of, read_evaluated, realised
    from vlm_calibration.settings import file_digest
    from vlm_calibration.text.known_questions import KnownQuestions

    try:
        limits = Limits(max_error, certainty, max_sent_away)
    except ValueError as error:
        raise ArgumentError(None, f"--{str(error).replace('_', '-')}") from error
    evaluated = read_evaluated(Path(run), system, estimator, by)
    model = model_of(evaluated.system)
    control = choose(evaluated.groups, estimator, limits)
    rule = DecisionRule(
        base=model.base.name_or_path,
        quantization=model.base.quantization,
        dtype=model.base.dtype,
        weights=model.weights,
        prompt=model.prompt,
        estimator=estimator,
        by=by,
        groups={
            name: {
                "threshold": choice.threshold,
                **(_plain(choice.scores) if choice.scores is not None else {}),
                "p_error": choice.p_error,
                "p_sent_away": choice.p_sent_away,
                "reason": choice.reason,
            }
            for name, choice in control.choices.items()
        },
        limits=asdict(limits),
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
        questions=KnownQuestions.of([answer.question for answer in evaluated.answers]),
    )
    tested = (
        realised(control, estimator, evaluated.system.predictions) if evaluated.split == "calibration" else {}
    )
    written = str(write_rule(rule, model.folder)) if control.found else None
    if control.found:
        state_guarantee(model.folder, rule.guarantee)
    if json:
        test = {name: _plain(scores) for name, scores in tested.items()} or None
        row = {"found": control.found, "written": written, **asdict(rule), "test": test}
        print(json_format.dumps(row, indent=2, ensure_ascii=False))
    else:
        _print(rule, control, evaluated, tested)
        if control.found:
            print(f"wrote {written}")
        elif earlier := read_rule(model.folder):
            print(f"The thresholds of an earlier run stay in {model.folder}: {earlier.guarantee}")
        if control.found and not model.has_adapter:
            print(
                "No adapter belongs to this model: the file is read where it lies beside a model's weights."
            )
    if not control.found:
        raise CommandError("", NOT_FOUND)


def _plain(scores: ThresholdScores) -> dict[str, Any]:
    """Values for JSON; an interval as value, low and high, null where undefined."""
    return {
        name: [None if v != v else v for v in value] if isinstance(value, tuple) else value
        for name, value in scores._asdict().items()
    }


def _print(
    rule: DecisionRule, control: RiskControl, evaluated: Evaluated, tested: Mapping[str, ThresholdScores]
) -> None:
    from rich.console import Console
    from rich.table import Table

    from vlm_calibration.metrics.risk_control import percent

    images = rule.answers["images"]
    about = f" about {images} images, of which one each counts" if images else ""
    print(f"{evaluated.path}: {len(evaluated.answers)} answers{about}; confidence: {rule.estimator}")
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
    rows: list[tuple[str, str, ThresholdScores]] = []
    for name, choice in control.choices.items():
        if choice.scores is not None and choice.threshold is not None:
            label = f"{evaluated.split} (chosen on)" + (f": {name}" if name else "")
            rows.append((label, percent(choice.threshold), choice.scores))
    rows += [("test" if name == "all" else f"test: {name}", "", scores) for name, scores in tested.items()]
    for label, from_on, scores in rows:
        shares = (scores.coverage, scores.error, scores.sent_away_share)
        cells = [f"{v:.1%} [{low:.1%}, {high:.1%}]" if v == v else "-" for v, low, high in shares]
        table.add_row(label, from_on, *cells)
    Console().print(table)
    print(rule.questions.described())
    if "all" in tested:
        max_error, scores = control.limits.max_error, tested["all"]
        given = f"on the test answers {scores.wrong} of {scores.answers} given are wrong"
        verdict = ""
        if scores.error.low > max_error:
            verdict = (
                ": more than promised, so these questions are not like those that the threshold was chosen on"
            )
        elif scores.error.value > max_error:
            verdict = ": above it, but no more than chance explains"
        elif scores.answers:
            verdict = ": within the promise"
        print(f"Promised: at most {percent(max_error)} wrong; {given}{verdict}.")
