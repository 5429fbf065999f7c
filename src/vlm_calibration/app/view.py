"""Answers as HTML and SVG: bars, distributions and the response curve.

Pure functions of answers. All text of models and visitors is escaped here, and only here. Colours are those of
`metrics.figures`; marks that differ in colour also differ in shape or line style.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

from vlm_calibration.demo.questions import FORMS, known_question, right_answer, shown_form
from vlm_calibration.demo.scenes import CLASSES, CORNERS
from vlm_calibration.estimators.predictions import VERBALIZED
from vlm_calibration.inference.answers import Answer
from vlm_calibration.inference.asking import BASE, CALIBRATED, ENDPOINT
from vlm_calibration.metrics.figures import BLUE, ORANGE
from vlm_calibration.metrics.risk_control import percent

TITLES = {BASE: "Base model", CALIBRATED: "Calibrated model", ENDPOINT: "Served model"}
COLOURS = {BASE: ORANGE, CALIBRATED: BLUE, ENDPOINT: BLUE}
PREVIEW_SIDE = 768
"""Pixels of the longer side of pictures for the browser."""


def kind_in_words(kind: str, *, capital: bool = False) -> str:
    """A kind of perturbation as the page names it.

    >>> kind_in_words("motion_blur"), kind_in_words("motion_blur", capital=True), kind_in_words("jpeg")
    ('motion blur', 'Motion blur', 'JPEG')
    """
    words = "JPEG" if kind == "jpeg" else kind.replace("_", " ")
    return words[:1].upper() + words[1:] if capital else words


def notice(text: str, kind: str = "hint") -> str:
    """A message to the visitor; `kind` is "hint" or "problem", which screen readers announce."""
    role = ' role="alert"' if kind == "problem" else ""
    return f'<p class="notice {escape(kind)}"{role}>{escape(text)}</p>'


def sentence(text: str) -> str:
    """A message as a sentence of the page: with a capital and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")


def known_to_demo() -> str:
    """What the demo model was trained on, as a list."""
    rows = {
        "Objects": ", ".join(CLASSES),
        "Positions": ", ".join(CORNERS),
        "Questions": " ".join(map(shown_form, FORMS)),
    }
    items = "".join(f"<dt>{name}</dt><dd>{escape(words)}</dd>" for name, words in rows.items())
    return (
        f'<dl class="known">{items}</dl><p>It was trained on drawn scenes: photographs are foreign to it.</p>'
    )


def solution(question: str, corners: Mapping[str, str]) -> str:
    """The right answer to a question about a scene of the demo, and what the scene shows.

    Args:
        question: the question.
        corners: name -> corner of each object of the scene.
    """
    answer = right_answer(question, corners)
    if answer is None:
        answer = "Nothing is there" if known_question(question) else "Known for the demo's questions only"
    shown = ", ".join(f"{name} ({corner})" for name, corner in corners.items())
    return f'<p class="solution">{escape(question)} <strong>{escape(answer)}.</strong> The scene shows: {escape(shown)}.</p>'


def data_url(image: np.ndarray, side: int = PREVIEW_SIDE) -> str:
    """Encode an image, uint8 [H, W, 3], as a data URL, shrunk to a longer side of at most `side` pixels."""
    thumbnail = Image.fromarray(image)
    thumbnail.thumbnail((side, side))
    file = io.BytesIO()
    thumbnail.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def picture(image: np.ndarray, caption: str) -> str:
    """An image, uint8 [H, W, 3], with a caption; small images are scaled without smoothing."""
    small = " small" if max(image.shape[:2]) < 256 else ""
    return (
        f'<figure class="seen"><img class="seen{small}" alt="" src="{data_url(image)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def answer_panel(system: str, answer: Answer) -> str:
    """One system's answer: text, what its thresholds decide, stated and expected confidence as bars, and the distribution."""
    return (
        f'<section class="said {escape(system)}" style="--own: {COLOURS[system]}">'
        f"<h2>{TITLES[system]}</h2>"
        f'<p class="answer">{escape(answer.answer) or "<i>no answer</i>"}</p>'
        f"{_decision(answer)}{_bar('stated', answer.confidence)}{_bar('expected', answer.expected)}"
        f"{_distribution(answer)}</section>"
    )


def _decision(answer: Answer) -> str:
    """Whether the answer may be given or goes to a person, and the guarantee behind it; empty without thresholds."""
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
    return (
        f'<p class="decision" data-decision="{answer.decision}"><strong>{answer.decision}</strong> ({escape(why)})'
        f"<small>{escape(answer.rule.guarantee)}</small></p>"
    )


def _bar(name: str, value: float | None) -> str:
    shown = "none" if value is None else f"{value:.0%}"
    width = 0 if value is None else 100 * value
    return (
        f'<div class="row" role="img" aria-label="{name} confidence: {shown}"><span class="name">{name}</span>'
        f'<span class="track"><span class="fill" style="width: {width:.1f}%"></span></span>'
        f'<span class="value" data-bar="{name}">{shown}</span></div>'
    )


def _distribution(answer: Answer) -> str:
    """The probability of each statement as bars over 0% to 100%."""
    if not answer.distribution:
        return ""
    highest = max(answer.distribution.values())
    bars = "".join(
        f'<rect x="{14 + 212 * level - 1.5:.2f}" y="{52 - 48 * p / highest:.2f}" width="3" height="{48 * p / highest:.2f}"/>'
        for level, p in answer.distribution.items()
        if p / highest > 0.005
    )
    likeliest = sorted(answer.distribution.items(), key=lambda item: -item[1])[:3]
    in_words = ", ".join(f"{level:.0%} with probability {p:.2f}" for level, p in likeliest)
    ticks = "".join(f'<text x="{14 + 2.12 * t}" y="66">{t}%</text>' for t in (0, 25, 50, 75, 100))
    return (
        f'<svg class="distribution" viewBox="0 0 240 70" role="img" aria-label="{escape(f"What might be stated: {in_words}")}">'
        f'<line x1="8" y1="52.5" x2="232" y2="52.5"/>{bars}{ticks}</svg>'
        '<p class="caption">probability of each statement</p>'
    )


# --- The response curve ---------------------------------------------------------------------------------------------

_LEFT, _TOP, _WIDTH, _HEIGHT = 44, 12, 420, 190


def response_curve(
    curves: Mapping[str, Sequence[Answer]], strengths: Sequence[float], kind: str, now: float
) -> str:
    """Confidence against the strength of a perturbation of the key object: stated as points, expected as a line.

    Args:
        curves: system -> its answers, one for each strength.
        strengths: in [0, 1], ascending from 0.
        kind: of the perturbation.
        now: the strength to mark.
    """
    ticks = "".join(_tick(t / 100) for t in (0, 25, 50, 75, 100))
    at = f' data-kind="{escape(kind)}" data-strength="{100 * now:.0f}"'
    lines = "".join(_curve(system, answers, strengths) for system, answers in curves.items())
    legend = "".join(
        f'<li class="{escape(system)}"><svg viewBox="0 0 34 14" width="34" height="14" style="--own: {COLOURS[system]}">'
        f'<line class="line" x1="1" y1="7" x2="33" y2="7"/>{_point(system, 17, 7, False)}</svg> {TITLES[system]}</li>'
        for system in curves
    )
    return (
        f'<figure class="curve"{at}><svg viewBox="0 0 480 250" role="img" aria-label="{escape(_in_words(curves, kind))}">'
        f'{ticks}{_vertical(now, "now")}{lines}<text class="axis" x="{_LEFT + _WIDTH / 2}" y="246">'
        f"strength of {escape(kind_in_words(kind))} on the key object</text></svg>"
        f"<ul>{legend}<li>Points: stated confidence, hollow where the answer has changed. Lines: expected confidence.</li>"
        "</ul></figure>"
    )


def _x(strength: float) -> float:
    return _LEFT + _WIDTH * strength


def _y(confidence: float) -> float:
    return _TOP + _HEIGHT * (1 - confidence)


def _tick(share: float) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" y1="{_y(share):.1f}" x2="{_LEFT + _WIDTH}" y2="{_y(share):.1f}"/>'
        f'<text class="y" x="{_LEFT - 6}" y="{_y(share) + 4:.1f}">{share:.0%}</text>'
        f'<text class="x" x="{_x(share):.1f}" y="{_TOP + _HEIGHT + 24}">{share:.0%}</text>'
    )


def _vertical(strength: float, name: str) -> str:
    x = f"{_x(strength):.1f}"
    return f'<line class="{name}" x1="{x}" y1="{_TOP}" x2="{x}" y2="{_TOP + _HEIGHT}"/>'


def _curve(system: str, answers: Sequence[Answer], strengths: Sequence[float]) -> str:
    path = " ".join(
        f"{_x(s):.1f},{_y(a.expected):.1f}"
        for s, a in zip(strengths, answers, strict=True)
        if a.expected is not None
    )
    points = "".join(
        _point(system, _x(s), _y(a.confidence), a.answer != answers[0].answer)
        for s, a in zip(strengths, answers, strict=True)
        if a.confidence is not None
    )
    return f'<g class="{escape(system)}" style="--own: {COLOURS[system]}"><polyline class="line" points="{path}"/>{points}</g>'


def _point(system: str, x: float, y: float, hollow: bool) -> str:
    kind = "point hollow" if hollow else "point"
    if system == BASE:
        return f'<rect class="{kind}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'


def _in_words(curves: Mapping[str, Sequence[Answer]], kind: str) -> str:
    def at(answer: Answer) -> str:
        return "nothing" if answer.confidence is None else f"{answer.confidence:.0%}"

    return f"Confidence against the strength of {kind_in_words(kind)}. " + " ".join(
        f"{TITLES[system]}: states {at(answers[0])} for the untouched image and {at(answers[-1])} at full strength."
        for system, answers in curves.items()
    )
