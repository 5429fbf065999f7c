"""Answers as what the page's components show: rows of a table, points of plots, texts.

Texts are Markdown, in which those of models and visitors are escaped here; tables show theirs as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from vlm_calibration.estimators.predictions import VERBALIZED
from vlm_calibration.inference.answers import Answer
from vlm_calibration.inference.asking import BASE, CALIBRATED, ENDPOINT
from vlm_calibration.metrics.risk_control import percent

TITLES = {BASE: "Base model", CALIBRATED: "Calibrated model", ENDPOINT: "Served model"}
COLUMNS = ("model", "answer", "stated", "expected", "decision")
"""Columns of the table of answers. Stated: the confidence in the answer; expected: the mean of all that might have been stated."""


def kind_in_words(kind: str) -> str:
    """A kind of perturbation as the page names it.

    >>> kind_in_words("motion_blur"), kind_in_words("jpeg")
    ('Motion blur', 'JPEG')
    """
    return "JPEG" if kind == "jpeg" else kind.replace("_", " ").capitalize()


def plain(text: str) -> str:
    """A text as a sentence in Markdown that shows it as it is: with a capital, a full stop, and special characters escaped."""
    text = text[:1].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", escape(text, quote=False))


def answer_rows(answers: Mapping[str, Answer]) -> list[list[str]]:
    """System -> its answer, as rows of the table `COLUMNS`."""
    return [
        [TITLES[system], answer.answer, _shown(answer.confidence), _shown(answer.expected), _decision(answer)]
        for system, answer in answers.items()
    ]


def _shown(confidence: float | None) -> str:
    return "none" if confidence is None else f"{confidence:.0%}"


def _decision(answer: Answer) -> str:
    """Whether the answer may be given or goes to a person, and why; empty without thresholds."""
    if answer.rule is None:
        return ""
    name = "stated" if answer.rule.estimator == VERBALIZED else answer.rule.estimator
    if answer.rule.confidence is None:
        why = f"no {name} confidence"
    elif answer.rule.threshold is None:
        why = "no threshold keeps the limits"
    else:
        relation = "at least" if answer.decision == "answer" else "below"
        why = f"{name} {percent(answer.rule.confidence)}, {relation} {percent(answer.rule.threshold)}"
    return f"{answer.decision}: {why}"


def curve_points(
    curves: Mapping[str, Sequence[Answer]], strengths: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Stated and expected confidence against the strength of a perturbation, all in percent, without those that are not known.

    Args:
        curves: system -> its answers, one for each strength.
        strengths: in [0, 1].
    """
    for system, answers in curves.items():
        for strength, answer in zip(strengths, answers, strict=True):
            for measure, value in (("stated", answer.confidence), ("expected", answer.expected)):
                if value is not None:
                    line = f"{TITLES[system]}, {measure}"
                    yield {"strength": 100 * strength, "confidence": 100 * value, "line": line}
