"""The report's sections on thresholds (what they give, where the promise breaks, what is missing), and on what confidences listen to."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from vlm_calibration.commands.report import report
from vlm_calibration.estimators.decision import write_rule
from vlm_calibration.metrics.risk_control import percent
from vlm_calibration.records import Prediction
from vlm_calibration.reporting.report.data import System, read_systems
from vlm_calibration.reporting.report.summary import probe_sentences
from vlm_calibration.reporting.report.thresholds import (
    ALL,
    MAX_ERRORS,
    broken_sentence,
    parts_of,
    promises_of,
)
from vlm_calibration.settings import file_digest

from ..decision_rules import write_decision_rule
from .test_report import Page, configure, write
from .test_report import answers as three_an_image


def answers(
    part: str, sure: int, wrong: int, unsure: int = 0, likelihood: float | None = None
) -> list[Prediction]:
    """`sure` answers at 90%, of which `wrong` are wrong, and `unsure` ones at 40%, of which half are wrong."""
    rows = [(0.9, i >= wrong) for i in range(sure)] + [(0.4, i % 2 == 0) for i in range(unsure)]
    return [
        Prediction(
            f"{part}:{i}", "A dog?", "Yes", "", None, confidence, correct, f"{part}/dog", None, "yes_no",
            image=f"{part}{i}", estimates={} if likelihood is None else {"likelihood": likelihood},
        )
        for i, (confidence, correct) in enumerate(rows)
    ]  # fmt: skip


def system(name: str, likelihood: float | None = None, calibrated: bool = True) -> System:
    test = [*answers("easy", 200, 2, 20, likelihood), *answers("hard", 100, 30, 0, likelihood)]
    calibration = answers("held", 300, 4, 100, likelihood) if calibrated else None
    return System(name, test, {}, Path("eval"), {}, calibration)


def test_each_limit_has_a_threshold_and_the_parts_where_it_breaks_are_named() -> None:
    [row] = promises_of([system("tuned")]).values()
    assert [promise.limits.max_error for promise in row] == list(MAX_ERRORS)
    one, two, five, ten = row
    assert (one.choice.threshold, two.choice.threshold, five.choice.threshold) == (None, None, 0.9)
    assert one.tested == {}
    assert ten.choice.threshold == 0.9
    assert {name: (s.n, s.answers, s.wrong) for name, s in ten.tested.items()} == {
        ALL: (320, 300, 32),
        "easy": (220, 200, 2),
        "hard": (100, 100, 30),
    }
    exact = binomtest(30, 100).proportion_ci(0.95, method="exact")
    assert tuple(ten.tested["hard"].error) == pytest.approx((0.3, exact.low, exact.high))
    assert list(ten.broken) == ["hard"]
    assert broken_sentence(row) == (
        "The guarantee does not hold on “hard” (limit 5% and 10%): the whole interval of the error lies above the limit."
    )
    for predictions, says in (
        (answers("easy", 200, 2), "On no part"),
        (answers("hard", 200, 60), "on the test answers as a whole (limit 5% and 10%)"),
    ):
        [row] = promises_of([replace(system("tuned"), predictions=predictions)]).values()
        assert says in broken_sentence(row)


def test_the_likelihood_of_the_base_model_is_compared_and_no_other() -> None:
    rows = promises_of([system("base", 0.5), system("tuned", 0.5), system("bare", calibrated=False)])
    assert list(rows) == [("base", "verbalized"), ("base", "likelihood"), ("tuned", "verbalized")]
    assert rows["base", "verbalized"][-1].choice.threshold == 0.9
    assert rows["base", "likelihood"][-1].choice.threshold is None, "all answers are equally likely"


def test_parts_are_splits_or_else_categories() -> None:
    easy, hard = answers("easy", 2, 0), answers("hard", 3, 0)
    assert {name: len(part) for name, part in parts_of([*easy, *hard]).items()} == {"easy": 2, "hard": 3}
    assert parts_of(easy) == {}
    categories = [replace(a, category=("easy/dog/red", "easy/cat", "easy")[i]) for i, a in enumerate(hard)]
    unnamed = [replace(a, id=str(i)) for i, a in enumerate(categories)]
    named = [replace(a, id=f"easy:{i}") for i, a in enumerate(categories)]
    assert list(parts_of(named)) == ["dog", "cat", "other"]
    assert parts_of(unnamed) == {}


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    folder = tmp_path / "eval"
    for name in ("base", "tuned"):
        about = system(name, 0.5)
        write(folder / name, about.predictions)
        write(folder / name, about.calibration or (), "calibration")
    return folder


def _section(folder: Path) -> str:
    """The text of the page's section."""
    report([str(folder)], replicates=5, images=False)
    html = (folder / "report.html").read_text()
    section = html[html.index('id="thresholds"') : html.index('id="reliability"')]
    return " ".join(re.sub(r"<[^>]*>", " ", section).split())


def test_the_page(evaluation: Path) -> None:
    text = _section(evaluation)
    assert '<a href="#thresholds">What to send to a person</a>' in (evaluation / "report.html").read_text()
    for words in (
        "What to send to a person", "at most 1% wrong", "at most 10% wrong", "base, likelihood",
        "75.0% 70.5–79.2% from 90% on", "The guarantee does not hold on “hard” (limit 5% and 10%)",
        "at most 10% wrong base no threshold gives this no threshold gives this 75.0%",
        "Chosen on 400 answers (400 held), none of them easy or hard; of several",
        "easy – – 1.0% 0.1–3.6% 200 of 220 given", "30.0% ▲ 21.2–40.0% 100 of 100 given",
    ):  # fmt: skip
        assert words in text, words
    for name in ("base", "tuned"):
        (evaluation / name / "calibration.jsonl").unlink()
    text = _section(evaluation)
    assert "No answers to a calibration set: base, tuned." in text, "without calibration answers"
    assert "--calibration" in text
    assert "at most" not in text


def test_the_card_of_a_system_states_the_guarantee_of_its_own_weights(evaluation: Path) -> None:
    adapter = evaluation.parent / "tuned/adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    (adapter / "adapter_model.safetensors").write_text("weights")
    configure(evaluation, {"init_args": {"adapters": {"tuned": str(adapter)}}})
    guarantee = f"At most {percent(0.05)} of tuned."
    rule = write_decision_rule(adapter, 0.9, base="owner/base", guarantee=guarantee)
    answered = {"split": "calibration", "digest": file_digest(evaluation / "base/calibration.jsonl")}
    write_rule(replace(rule, guarantee="At most 2% of base.", answers=answered), evaluation / "base")

    def stated() -> list[str | None]:
        return [system.facts.get("guarantee") for system in read_systems([str(evaluation)])]

    assert stated() == ["At most 2% of base.", "At most 5% of tuned."]
    (adapter / "adapter_model.safetensors").write_text("trained again")
    assert stated() == ["At most 2% of base.", None]
    write(evaluation / "base", answers("held", 10, 1, likelihood=0.5), "calibration")
    assert stated() == [None, None]


# --- what confidence listens to


NAMES = ("image", "object", "distractor", "answer")


def probed(listens: bool, n: int = 60) -> list[Prediction]:
    """Answers of a model that listens to the image, or of one whose confidence never moves."""
    predictions = []
    for i, p in enumerate(three_an_image(0, n)):
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


def test_the_words_of_probes() -> None:
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
        "With the likeliest other answer, its confidence moves by less than a point on average (it falls in 2% of 1,234 answers). "
        "The confidences in both add up to 173% on average; more than 100% is inconsistent.",
    ]


def test_the_page_speaks_of_each_probed_system(tmp_path: Path) -> None:
    evaluation = tmp_path / "eval"
    write(evaluation / "base", probed(listens=False))
    write(evaluation / "tuned", probed(listens=True))
    write(evaluation / "oracle", three_an_image(0))
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
