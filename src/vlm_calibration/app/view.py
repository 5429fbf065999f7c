"""Answers as what the page's components show: rows of a table, points of plots, texts.

Texts are Markdown, in which those of models and visitors are escaped here; tables show theirs as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from vlm_calibration.demo.questions import FORMS, known_question, right_answer, shown_form
from vlm_calibration.demo.scenes import CLASSES, CORNERS
from vlm_calibration.estimators.predictions import VERBALIZED
from vlm_calibration.inference.answers import Answer
from vlm_calibration.inference.asking import BASE, CALIBRATED, ENDPOINT
from vlm_calibration.metrics.risk_control import percent

TITLES = {BASE: "Base model", CALIBRATED: "Calibrated model", ENDPOINT: "Served model"}
COLUMNS = ("model", "answer", "stated", "expected", "decision")
"""Columns of the table of answers. Stated: the confidence in the answer; expected: the mean of all that might have been stated."""
MEASURES = ("stated", "expected")


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


def known_to_demo() -> str:
    """What the demo model was trained on."""
    return (
        f"- Objects: {', '.join(CLASSES)}\n- Positions: {', '.join(CORNERS)}\n- Questions: {' '.join(map(shown_form, FORMS))}\n\n"
        "It was trained on drawn scenes: photographs are foreign to it."
    )


def solution(question: str, corners: Mapping[str, str]) -> str:
    """The right answer to a question about a scene of the demo, and what the scene shows.

    Args:
        question: the question.
        corners: name -> corner of each object of the scene.
    """
    if not corners:
        return "Known for the demo's scenes only."
    answer = right_answer(question, corners)
    if answer is None:
        answer = "Nothing is there" if known_question(question) else "Known for the demo's questions only"
    return f"**{answer}.** The scene shows: {', '.join(f'{name} ({corner})' for name, corner in corners.items())}."


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


def statement_points(answers: Mapping[str, Answer]) -> Iterator[dict[str, Any]]:
    """The probability of each confidence (in percent) that a system might have stated."""
    for system, answer in answers.items():
        for level, probability in answer.distribution.items():
            yield {"confidence": 100 * level, "probability": probability, "model": TITLES[system]}


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
            for measure, value in zip(MEASURES, (answer.confidence, answer.expected), strict=True):
                if value is not None:
                    line = f"{TITLES[system]}, {measure}"
                    yield {"strength": 100 * strength, "confidence": 100 * value, "line": line}
