"""`vlm-calibration threshold`: the confidence from which on a model may answer, with a guarantee, written beside the adapter."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import OpenUnitInterval

from vlm_calibration.commands.options import check_folder
from vlm_calibration.errors import CommandError
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    from vlm_calibration.estimators.decision import DecisionRule
    from vlm_calibration.metrics.risk_control import Choice, RiskControl, ThresholdScores


def threshold(
    run: str,
    *,
    max_error: OpenUnitInterval = OpenUnitInterval(0.05),
    certainty: OpenUnitInterval = OpenUnitInterval(0.95),
    max_sent_away: OpenUnitInterval | None = None,
    by: Literal["category"] | None = None,
    estimator: str = "verbalized",
    system: str | None = None,
    json: bool = False,
) -> None:
    """Choose the confidence from which on a model may answer, with a guarantee, and write it to the adapter as thresholds.json.

    The adapter's model card then states the guarantee. Exit status 3 and no file if no threshold keeps the limits.

    Args:
        run: folder of an evaluation
        max_error: largest share of wrong answers among the answers given
        certainty: how sure the promise is
        max_sent_away: largest share of the correct answers that are not given; no limit without it
        by: a threshold for each category instead of one for all; the promise holds for all at once
        estimator: estimator of the confidence that is compared, such as expected or likelihood
        system: system of the evaluation (default: the last trained one)
        json: print one JSON object
    """
    check_folder(run)
    # These import torch, which the help does not need.
    from vlm_calibration.estimators.decision import DecisionRule, KnownQuestions, read_rule, write_rule
    from vlm_calibration.estimators.predictions import CALIBRATION, PREDICTIONS
    from vlm_calibration.metrics.risk_control import ASSUMPTIONS, Limits, guarantee
    from vlm_calibration.reporting.card import state_guarantee
    from vlm_calibration.reporting.report.data import ORACLE, check_estimator, read_systems, system_named
    from vlm_calibration.reporting.report.thresholds import choose, grouped, model_of, realised
    from vlm_calibration.settings import file_digest

    limits = Limits(max_error, certainty, max_sent_away)
    if not (systems := [s for s in read_systems([run]) if s.name != ORACLE]):
        raise DataError(f"{run}: holds no answers of a model")
    about = systems[-1] if system is None else system_named(systems, system)
    fields, folder, has_adapter = model_of(about)
    has_split = about.calibration is not None
    answers = about.predictions if about.calibration is None else about.calibration
    path = about.folder / about.name / (CALIBRATION if has_split else PREDICTIONS)
    check_estimator(estimator, answers, path)
    if not (groups := grouped(answers, by)):
        raise DataError(f"{path}: no answer has a category: leave --by out")
    control = choose(groups, estimator, limits)
    rule = DecisionRule(
        **fields,
        estimator=estimator,
        by=by,
        groups={name: _figures(choice) for name, choice in control.choices.items()},
        limits=asdict(limits),
        correction=control.correction,
        guarantee=guarantee(control, "those of the calibration split" if has_split else "the evaluated ones"),
        assumptions=list(ASSUMPTIONS),
        answers={
            "split": path.stem,
            "digest": file_digest(path),
            "n": len(answers),
            "images": len({a.image for a in answers if a.image is not None}) or None,
            "without_group": len(answers) - sum(map(len, groups.values())),
        },
        questions=KnownQuestions.of([answer.question for answer in answers]),
    )
    tested = realised(control, estimator, about.predictions) if has_split else {}
    written = None
    if control.found:
        written = str(write_rule(rule, folder))
        state_guarantee(folder, rule.guarantee)
    if json:
        test = {name: _plain(scores) for name, scores in tested.items()} or None
        row = {"found": control.found, "written": written, **asdict(rule), "test": test}
        print(json_format.dumps(row, indent=2, ensure_ascii=False))
    else:
        _print(path, rule, control, tested)
        if written:
            print(f"wrote {written}")
        elif earlier := read_rule(folder):
            print(f"The thresholds of an earlier run stay in {folder}: {earlier.guarantee}")
        if written and not has_adapter:
            where = "where it lies beside a model's weights"
            print(f"No adapter belongs to this model: the file is read {where}.")
    if not control.found:
        raise CommandError("", 3)


def _figures(choice: Choice) -> dict[str, Any]:
    figures = choice._asdict()
    scores = figures.pop("scores")
    return {"threshold": figures.pop("threshold"), **({} if scores is None else _plain(scores)), **figures}


def _plain(scores: ThresholdScores) -> dict[str, Any]:
    """Values for JSON; an interval as value, low and high, null where undefined."""
    return {
        name: [None if v != v else v for v in value] if isinstance(value, tuple) else value
        for name, value in scores._asdict().items()
    }


def _print(path: Path, rule: DecisionRule, control: RiskControl, tested: dict[str, ThresholdScores]) -> None:
    from rich.console import Console

    from vlm_calibration.metrics.risk_control import percent
    from vlm_calibration.reporting.tables import text_table

    images, split = rule.answers["images"], rule.answers["split"]
    about = f" about {images} images, of which one each counts" if images else ""
    print(f"{path}: {rule.answers['n']} answers{about}; confidence: {rule.estimator}")
    if split == "predictions":
        scored = "the answers that it scores: they cannot check the promise as well. Give data.calibration."
        print(f"The evaluation has no calibration split, so the threshold is chosen on {scored}")
    if left_out := rule.answers["without_group"]:
        print(f"{left_out} answers have no category and are left out.")
    print(rule.guarantee or "No threshold keeps the limits, so nothing is written.")
    cells: list[tuple[str, ...]] = []

    def add(label: str, from_on: str, scores: ThresholdScores) -> None:
        shares = (scores.coverage, scores.error, scores.sent_away_share)
        texts = [f"{v:.1%} [{low:.1%}, {high:.1%}]" if v == v else "-" for v, low, high in shares]
        cells.append((label, from_on, *texts))

    for name, choice in control.choices.items():
        if choice.threshold is None or choice.scores is None:
            print(f"{name or 'Why'}: {choice.reason}.")
        else:
            label = f"{split} (chosen on)" + (f": {name}" if name else "")
            add(label, percent(choice.threshold), choice.scores)
    if not control.found:
        return
    for name, scores in tested.items():
        add("test" if name == "all" else f"test: {name}", "", scores)
    headings = ("answers", "threshold", "answered", "wrong of those", "correct, but sent away")
    Console().print(text_table(f"Intervals at {percent(control.limits.certainty)}", headings, cells))
    print(rule.questions.described())
    if "all" in tested:
        max_error, scores = control.limits.max_error, tested["all"]
        verdict = ": within the promise" if scores.answers else ""
        if scores.error.low > max_error:
            unlike = "these questions are not like those that the threshold was chosen on"
            verdict = f": more than promised, so {unlike}"
        elif scores.error.value > max_error:
            verdict = ": above it, but no more than chance explains"
        given = f"on the test answers {scores.wrong} of {scores.answers} given are wrong"
        print(f"Promised: at most {percent(max_error)} wrong; {given}{verdict}.")
