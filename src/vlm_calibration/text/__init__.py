"""Prompts, stated confidence and grading of answers, as pure functions of strings."""

from vlm_calibration.text.confidence import parse_confidence, render_answer, render_response, strip_confidence
from vlm_calibration.text.grading import Grade, Grading, grade, parse_answer
from vlm_calibration.text.prompts import ElicitationPrompt

__all__ = [
    "ElicitationPrompt",
    "Grade",
    "Grading",
    "grade",
    "parse_answer",
    "parse_confidence",
    "render_answer",
    "render_response",
    "strip_confidence",
]
