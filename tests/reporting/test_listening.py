"""What confidences listen to, in a report: the words, and the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from vlm_calibration.commands.report import report
from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.reporting.report.summary import probe_sentences

from .test_report import Page, answers, write

NAMES = ("image", "object", "distractor", "answer")


def probed(listens: bool, n: int = 60) -> list[EstimatedPrediction]:
    """Answers of a model that listens to the image, or of one whose confidence never moves."""
    predictions = []
    for i, p in enumerate(answers(0, n)):
        original = p.confidence
        after: dict[str, float | None] = dict.fromkeys(("original", *NAMES), original)
        if listens and original is not None:
            after["image"] = 0.2
            after["object"] = None if i % 3 == 0 else 0.2
            after["answer"] = round(1 - original, 6)
        predictions.append(replace(p, probes=after))
    return predictions


def effect(probe: str, change: float, fell: float = 0.84, rose: float = 0.1, n: int = 1234) -> dict[str, float]:  # fmt: skip
    return {f"probe_{probe}_{name}": value for name, value in (("change", change), ("fell", fell), ("rose", rose), ("n", n))}  # fmt: skip


def test_the_words() -> None:
    values = {
        **effect("image", -0.31),
        **effect("object", 0.014, rose=0.3),
        **effect("distractor", 0.0, fell=0.0, rose=0.0, n=7),
        **effect("answer", -0.002, fell=0.02),
        "probe_answer_sum": 1.73,
    }
    assert probe_sentences(dict.fromkeys(values, 0.0)) == [], "it applies to no answer"
    assert probe_sentences(values) == [
        "Without the image, its confidence falls by 31 points on average (it falls in 84% of 1,234 answers).",
        "Without the key object, its confidence rises by 1 point on average (it rises in 30% of 1,234 answers).",
        "Without another object, its confidence does not move on average (it falls in 0% of 7 answers).",
        "With the opposite answer, its confidence moves by less than a point on average (it falls in 2% of 1,234 answers). The "
        "confidences in an answer and in its opposite add up to 173% on average; 100% would be consistent.",
    ]


def test_the_page_speaks_of_each_probed_system(tmp_path: Path) -> None:
    evaluation = tmp_path / "eval"
    write(evaluation / "base", probed(listens=False))
    write(evaluation / "tuned", probed(listens=True))
    write(evaluation / "oracle", answers(0))
    report([str(evaluation)], replicates=20, images=False)
    text = Page((evaluation / "report.html").read_text()).text
    # The contents name both headings first.
    section = text[text.rindex("What confidence listens to") : text.rindex("By category")]
    predictions = probed(listens=True)
    changes = [0.2 - p.confidence for p in predictions if p.confidence is not None]
    fell = sum(c < 0 for c in changes) / len(changes)
    assert (
        f"tuned : Without the image, its confidence falls by {-100 * np.mean(changes):.0f} points on average "
        f"(it falls in {100 * fell:.0f}% of 59 answers)." in section
    )
    assert (
        "base : Without the image, its confidence does not move on average (it falls in 0% of 59" in section
    )
    assert "add up to 100% on average" in section
    assert "A good confidence falls a lot without the image" in section
    assert "oracle" not in section
