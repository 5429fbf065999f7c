"""What confidences listen to, in a report: the numbers against a loop, the words, and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_calibration.commands.report import report
from vlm_calibration.estimators.predictions import EstimatedPrediction, probes_of
from vlm_calibration.files import write_rows
from vlm_calibration.metrics.bootstrap import Interval
from vlm_calibration.reporting.report.bootstrap import ImageBootstrap
from vlm_calibration.reporting.report.listening import (
    ProbeEffect,
    probe_effects,
    probe_sentences,
)

from .test_report import Page, answers

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


def effect(change: float, fell: float = 0.84, rose: float = 0.1, n: int = 1234, both: float | None = None) -> ProbeEffect:  # fmt: skip
    interval = Interval(change, change - 0.02, change + 0.02)
    total = None if both is None else Interval(both, both - 0.05, both + 0.05)
    return ProbeEffect(interval, fell, 1 - fell - rose, rose, n, total)


def test_effects_are_the_means_over_the_answers_with_intervals_of_drawn_images() -> None:
    predictions = probed(listens=True)
    bootstrap = ImageBootstrap(predictions, 200, seed=1)
    effects = probe_effects(predictions, bootstrap)
    assert tuple(effects) == probes_of(predictions) == NAMES

    def change(p: EstimatedPrediction, name: str) -> float | None:
        before, after = p.probes["original"], p.probes[name]
        return None if before is None or after is None else after - before

    images = sorted({p.image or "" for p in predictions})
    draws = np.random.default_rng(1).multinomial(len(images), [1 / len(images)] * len(images), 200)
    for name, found in effects.items():
        changes = [c for p in predictions if (c := change(p, name)) is not None]
        assert found.n == len(changes)
        assert found.change.value == pytest.approx(np.mean(changes))
        assert (found.fell, found.rose) == pytest.approx(
            (np.mean(np.array(changes) < 0), np.mean(np.array(changes) > 0))
        )
        assert found.fell + found.stayed + found.rose == pytest.approx(1)
        drawn = [
            np.mean([
                c for image, times in zip(images, draw, strict=True) for _ in range(times)
                for p in predictions if p.image == image and (c := change(p, name)) is not None
            ])
            for draw in draws
        ]  # fmt: skip
        low, high = np.quantile(drawn, [0.025, 0.975])
        assert found.change.low == pytest.approx(low, abs=0.02)
        assert found.change.high == pytest.approx(high, abs=0.02)
        assert found.change.low <= found.change.value <= found.change.high
    assert effects["answer"].sum is not None
    assert effects["answer"].sum.value == pytest.approx(1)
    assert effects["image"].sum is None
    assert effects["object"].n < effects["image"].n == 59, "one of 60 answers states no confidence"


def test_the_words() -> None:
    effects = {
        "image": effect(-0.31),
        "object": effect(0.014, rose=0.3),
        "distractor": effect(0.0, fell=0.0, rose=0.0, n=7),
        "answer": effect(-0.002, fell=0.02, both=1.73),
    }
    assert probe_sentences(effects) == [
        "Without the image, its confidence falls by 31 points on average (it falls in 84% of 1,234 answers).",
        "Without the key object, its confidence rises by 1 point on average (it rises in 30% of 1,234 answers).",
        "Without another object, its confidence does not move on average (it falls in 0% of 7 answers).",
        "With the opposite answer, its confidence moves by less than a point on average (it falls in 2% of 1,234 answers). The "
        "confidences in an answer and in its opposite add up to 173% on average; 100% would be consistent.",
    ]


def test_of_a_probe_that_applies_to_no_answer_nothing_is_said() -> None:
    missing = Interval(*[float("nan")] * 3)
    nothing = ProbeEffect(missing, *[float("nan")] * 3, 0, missing)
    assert probe_sentences({"answer": nothing}) == []
    predictions = [replace(p, probes={"original": 0.5, "object": None}) for p in answers(0, 6)]
    effects = probe_effects(predictions, ImageBootstrap(predictions, 5))
    assert effects["object"].n == 0


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    for name, rows in (
        ("base", probed(listens=False)),
        ("tuned", probed(listens=True)),
        ("oracle", answers(0)),
    ):
        folder = tmp_path / "eval" / name
        folder.mkdir(parents=True)
        write_rows(folder / "predictions.jsonl", [p.to_dict() for p in rows], lines=True)
    return tmp_path / "eval"


def test_the_page_speaks_of_each_probed_system(evaluation: Path) -> None:
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


def test_without_probes_there_is_no_section(evaluation: Path) -> None:
    for name in ("base", "tuned"):
        path = evaluation / name / "predictions.jsonl"
        rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
        write_rows(path, [{k: v for k, v in row.items() if k != "probes"} for row in rows], lines=True)
    report([str(evaluation)], replicates=5, images=False)
    assert "What confidence listens to" not in (evaluation / "report.html").read_text()
