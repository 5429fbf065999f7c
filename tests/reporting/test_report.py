"""The report: its table against naive resampling and plain metrics, its parsed page, and its errors."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from vlm_calibration.commands.report import report
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.predictions import graded_prediction
from vlm_calibration.estimators.recalibration import METHODS, logit
from vlm_calibration.estimators.teacher import taught_confidences
from vlm_calibration.files import write_rows
from vlm_calibration.metrics.bootstrap import percentile_interval
from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.table import ConfidenceTable
from vlm_calibration.records import DataError, Prediction
from vlm_calibration.reporting.card import Card, save_card
from vlm_calibration.reporting.report import page
from vlm_calibration.reporting.report.data import System, read_calibration, read_systems
from vlm_calibration.reporting.report.page import examples_of, perturbation_of, thumbnail
from vlm_calibration.reporting.report.summary import (
    Verdict,
    checked,
    in_numbers,
    verdict_of,
    verdict_sentence,
    weakest_group,
)
from vlm_calibration.reporting.report.table import (
    ImageBootstrap,
    agreement,
    bands_of,
    compare,
    groups_of,
    match_of,
    p_value,
)
from vlm_calibration.reporting.runs import RunRecord

EVIL = "<script>alert(1)</script>\"'<img src=http://evil.example/x onerror=alert(2)>"


def answers(seed: int, n: int = 60, honest: bool = True) -> list[Prediction]:
    """Answers to three questions an image, of a model that is honest or always 95% confident."""
    rng = np.random.default_rng(seed)
    predictions = []
    for i in range(n):
        level = float(rng.choice([0.2, 0.5, 0.8, 1.0]))
        right = bool(rng.random() < level)
        confidence = level if honest else 0.95
        said = "Yes" if right else "No"
        text, stated = f"{said}. Confidence: {100 * confidence:.0f}%", None if i == 7 else confidence
        noise: tuple[Any, ...] = (("noise", 500), ("motion_blur", None))[i % 4 // 2] if i % 2 else ("", 0)
        category = "noised/dog" if i % 2 else "clean/dog"
        predictions.append(
            Prediction(
                f"q{i}", f"Is there a dog, {i}?", "Yes", text, said.lower(), stated, right, category, noise[1], "yes_no",
                perturbation=noise[0], strength=0.5 if i % 2 else 0.0, image=f"{i // 3}.png",
                estimates={"likelihood": round(float(rng.random()), 6)},
            )
        )  # fmt: skip
    return predictions


def held_out(seed: int, honest: bool = True) -> list[Prediction]:
    """Answers to a calibration set: about other images than `answers`, and not noised."""
    given = answers(seed, honest=honest)
    return [replace(p, id=f"h{p.id}", image=f"h{p.image}", category="clean/dog") for p in given]


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """The folder of an evaluation of a base model and an adapter, with a calibration set."""
    folder = tmp_path / "eval"
    settings = {"adapters": {"tuned": "runs/tuned/adapter"}}
    for name, honest in (("tuned", True), ("base", False)):
        write(folder / name, answers(0, honest=honest))
        write(folder / name, held_out(5, honest), "calibration")
        (folder / name / "metrics.json").write_text(json.dumps({"forward_passes@likelihood": 1.0}))
    configure(folder, {"class_path": "EvaluationModule", "init_args": settings})
    return folder


def write(folder: Path, predictions: Sequence[Prediction], split: str = "predictions") -> None:
    write_rows(folder / f"{split}.jsonl", [p.to_dict() for p in predictions], lines=True)


def configure(folder: Path, model: dict[str, Any], **sections: Any) -> None:
    # The order of the kinds of perturbation decides which one is drawn.
    text = yaml.safe_dump({"model": model, **sections}, sort_keys=False)
    (folder / "config.yaml").write_text(text)


class Page(HTMLParser):
    """The tags of a page, its text, and the addresses that it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.policy = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        # A link loads nothing.
        names = {"href": "link"} if tag == "a" else {}
        self.attributes += [(names.get(name, name), value or "") for name, value in attrs]
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""

    def values(self, *names: str) -> list[str]:
        """The values of all attributes with these names; addresses of links are `link`."""
        return [value for name, value in self.attributes if name in names]

    @property
    def loads(self) -> list[str]:
        return self.values("src", "href", "data", "srcset")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def system(name: str, predictions: list[Prediction], calibration: list[Prediction] | None = None) -> System:
    return System(name, predictions, {}, Path("eval"), {}, calibration)


# --- The table ----------------------------------------------------------------------------------------------------


def test_every_system_estimator_and_recalibration_has_a_row_with_the_metrics_of_its_confidences() -> None:
    systems = [
        system("base", answers(0, honest=False), held_out(5, honest=False)),
        system("tuned", answers(0), held_out(5)),
    ]
    frame, notes = compare(systems, replicates=20)
    rows = frame[frame.kind == "all"]
    assert list(zip(rows.system, rows.estimator, rows.recalibration, strict=True)) == [
        (s, e, m) for s in ("base", "tuned") for e in ("verbalized", "likelihood") for m in ("raw", *METHODS)
    ]
    assert notes == []
    for row, estimator in ((rows.iloc[0], "verbalized"), (rows.iloc[15], "likelihood")):
        predictions = next(s for s in systems if s.name == row.system).predictions
        correct = [p.correct for p in predictions]
        table = ConfidenceTable.from_predictions(
            [p.confidence_of(estimator) for p in predictions], correct, grid_steps=None
        )
        for name in ("ece", "brier", "auroc", "aurc"):
            assert row[name] == pytest.approx(float(METRICS[name](table)), abs=1e-9), name
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"], name
        assert row.accuracy == pytest.approx(np.mean(correct))
    assert rows.iloc[0].filter(regex="_p$").isna().all(), "the row that all others are compared with"


def test_distances_are_differences_of_two_rows_on_the_same_draws() -> None:
    """The teacher's row is that of scikit-learn's logistic regression, fitted on the calibration answers."""

    def rated(predictions: list[Prediction]) -> list[Prediction]:
        given = ({**p.estimates, "expected": 0.9 * (p.confidence or 0.5)} for p in predictions)
        return [replace(p, estimates=estimates) for p, estimates in zip(predictions, given, strict=True)]

    systems = [
        system(name, rated(answers(0, honest=honest)), rated(held_out(5, honest)))
        for name, honest in (("base", False), ("tuned", True))
    ]
    frame, _ = compare(systems, replicates=50)
    distances = frame[frame.kind == "distance"].set_index(["system", "group"])
    assert list(distances.index) == [
        ("base", "base, expected"), ("base", "base, teacher"), ("base", "base, likelihood, platt"),
        ("tuned", "tuned, expected"), ("tuned", "tuned, teacher"), ("tuned", "base, likelihood, platt"),
    ]  # fmt: skip
    rows = frame[frame.kind == "all"].set_index(["system", "estimator", "recalibration"])
    others = {"tuned, teacher": ("tuned", "teacher", "raw")}
    others |= {"base, likelihood, platt": ("base", "likelihood", "platt")}
    for group, other in others.items():
        distance = distances.loc["tuned", group]
        for name in ("brier", "auroc"):
            expected = rows.loc["tuned", "verbalized", "raw"][name] - rows.loc[other][name]
            assert distance[name] == pytest.approx(expected)
            assert distance[f"{name}_low"] < expected < distance[f"{name}_high"]

    def log_odds(predictions: Sequence[Prediction]) -> np.ndarray:
        return logit(np.array([[p.estimates["likelihood"], p.estimates["expected"]] for p in predictions]))

    predictions, calibration = systems[1].predictions, systems[1].calibration or ()
    teacher = LogisticRegression(max_iter=1000).fit(log_odds(calibration), [p.correct for p in calibration])
    accuracy = teacher.predict_proba(log_odds(predictions))[:, 1]
    brier = brier_score_loss([p.correct for p in predictions], accuracy)
    assert rows.loc["tuned", "teacher", "raw"].brier == pytest.approx(brier, abs=1e-6)
    others_type = replace(predictions[0], answer_type="short")
    unrated, rated_one = replace(predictions[1], estimates={}), predictions[2]
    taught = taught_confidences([others_type, unrated, rated_one], calibration)
    assert taught == [None, None, pytest.approx(accuracy[2])]
    for nothing in ((predictions, ()), ([others_type, unrated], calibration)):
        assert taught_confidences(*nothing) == []


def test_intervals_and_p_values_are_those_of_whole_images_drawn_one_by_one() -> None:
    base, tuned = answers(0, honest=False), answers(0)
    replicates, seed = 300, 3
    first, second = (ImageBootstrap(p, replicates, seed) for p in (tuned, base))
    measured = [b.measure([p.confidence for p in ps]) for b, ps in ((first, tuned), (second, base))]

    images = sorted({p.image for p in base})
    weights = np.random.default_rng(seed).multinomial(
        len(images), [1 / len(images)] * len(images), replicates
    )
    drawn: dict[str, list[list[float]]] = {name: [[], []] for name in ("accuracy", "brier")}
    for draw in weights:
        for side, predictions in enumerate((tuned, base)):
            chosen = [
                p for image, times in zip(images, draw, strict=True) for p in predictions if p.image == image
                for _ in range(times)
            ]  # fmt: skip
            drawn["accuracy"][side].append(float(np.mean([p.correct for p in chosen])))
            read = [(p.confidence, p.correct) for p in chosen if p.confidence is not None]
            drawn["brier"][side].append(float(np.mean([(c - r) ** 2 for c, r in read])))
    for name, (ours, theirs) in drawn.items():
        assert measured[0].drawn[name].numpy() == pytest.approx(np.array(ours), abs=1e-12)
        value = measured[0].intervals[name].value
        rarer = min(len({p.image for p in tuned if p.correct == kind}) for kind in (True, False))
        expected = percentile_interval(value, torch.tensor(ours, dtype=torch.float64), rarer)
        assert measured[0].intervals[name] == pytest.approx(expected, abs=1e-9)
        difference = np.array(ours) - np.array(theirs)
        observed = value - measured[1].intervals[name].value
        extreme = (np.abs(difference - observed) >= abs(observed) - 1e-12).sum()
        assert p_value(*measured, name) == pytest.approx((1 + extreme) / (1 + replicates))
    assert p_value(*measured, "brier") < 0.05 < p_value(*measured, "accuracy")


def stated(
    ece: tuple[float, float] = (0.01, 0.04),
    ranking: tuple[float, float] = (0.75, 0.85),
    unparsed: float = 0.0,
) -> pd.Series:
    """The part of a row that the verdict depends on: lower and upper ends of intervals."""
    row = {"n": 1000, "parse_failure_rate": unparsed}
    for name, (low, high) in (("ece", ece), ("auroc", ranking)):
        row |= {name: (low + high) / 2, f"{name}_low": low, f"{name}_high": high}
    return pd.Series(row, dtype=object)


Match = tuple[float, float, int]


def match(low: float, high: float, answers: int = 1000) -> Match:
    """An interval, in percent, of how often answers are right that say 80%, and their number."""
    return low / 100, high / 100, answers


def parts(bands: dict[str, Match], groups: dict[str, Match]) -> pd.DataFrame:
    """Rows of bands and groups that say 80%."""
    rows = []
    for kind, matches in (("group", groups), ("band", bands)):
        for name, (low, high, n) in matches.items():
            row = {"kind": kind, "group": name, "parsed": n, "says": 0.8, "is_right": (low + high) / 2}
            row |= {"is_right_low": low, "is_right_high": high, "agrees": agreement(0.8, low, high)}
            rows.append(row)
    columns = ("kind", "group", "parsed", "says", "is_right", "is_right_low", "is_right_high", "agrees")
    return pd.DataFrame(rows, columns=columns)


GOOD, OPEN, OFF = match(78, 82), match(73, 77), match(63, 67)
"""Accuracy at a stated confidence of 80%, about 5 points away, and farther away."""


@pytest.mark.parametrize(
    ("low", "high", "agrees"),
    [
        *((75, 85, "yes"), (78, 79, "yes"), (74.9, 85, "unclear"), (60, 90, "unclear")),
        *((85.1, 90, "no"), (60, 74.9, "no")),
    ],
)
def test_the_whole_interval_agrees_or_differs_or_it_is_unclear(low: float, high: float, agrees: str) -> None:
    assert agreement(0.8, low / 100, high / 100) == agrees


@pytest.mark.parametrize(
    ("part", "is_checked"),
    [(match(78, 82), True), (match(72.1, 77), True), (match(72, 78), False), (match(50, 70), True), (match(78, 82, 99), False)],
)  # fmt: skip
def test_what_is_too_wide_or_too_small_to_tell_is_not_checked(part: Match, is_checked: bool) -> None:
    assert list(checked(parts({}, {"a": part})).group) == ["a"] * is_checked


def test_intervals_of_groups_are_over_images() -> None:
    """Ten answers about an image that are all right or all wrong say as much as one, and no fewer than 30 are certain."""
    plain = replace(answers(0, n=1)[0], confidence=0.5)
    rows = [replace(plain, id=f"q{i}", image=f"{i // 10}", correct=i // 10 % 2 == 0) for i in range(1000)]

    def whole(predictions: list[Prediction]) -> dict[str, Any]:
        return match_of(system("a", predictions), ImageBootstrap(predictions), [True] * len(predictions))

    widths = []
    for predictions in (rows, [replace(row, image=row.id) for row in rows]):
        found = whole(predictions)
        assert (found["says"], found["is_right"], found["parsed"]) == (0.5, 0.5, 1000)
        widths.append(found["is_right_high"] - found["is_right_low"])
    assert widths[0] / widths[1] == pytest.approx(10**0.5, rel=0.1)
    certain = whole([replace(row, correct=True) for row in rows[:30]])
    assert (certain["is_right"], certain["is_right_high"]) == (1, 1)
    assert certain["is_right_low"] < 0.9


@pytest.mark.parametrize(
    ("row", "bands", "groups", "verdict"),
    [
        (stated((0.0, 0.05), (0.70, 0.80)), {"80–89%": GOOD}, {"clean": GOOD}, "yes"),
        (stated(ranking=(math.nan, math.nan)), {"80–89%": GOOD}, {}, "yes"),
        (stated(), {"80–89%": GOOD}, {"clean": GOOD, "foreign": OFF}, "partly"),
        (stated(), {"80–89%": GOOD, "20–39%": OFF}, {"clean": GOOD}, "partly"),
        (stated(), {"80–89%": OPEN, "20–39%": OFF}, {}, "partly"),
        (stated((0.051, 0.15)), {"80–89%": GOOD}, {}, "partly"),
        (stated(ranking=(0.55, 0.69)), {"80–89%": GOOD}, {}, "partly"),
        (stated((0.101, 0.2)), {"80–89%": GOOD}, {}, "no"),
        (stated(ranking=(0.5, 0.59)), {"80–89%": GOOD}, {}, "no"),
        (stated(), {"80–89%": OFF}, {"clean": GOOD}, "no"),
        (stated((0.2, 0.3)), {}, {}, "no"),
        (stated((math.nan, math.nan), (math.nan, math.nan), unparsed=1.0), {}, {}, "no"),
        (stated(), {}, {"clean": GOOD}, "unknown"),
        (stated(), {"80–89%": OPEN}, {"clean": GOOD}, "unknown"),
        (stated(), {"80–89%": GOOD}, {"clean": OPEN}, "unknown"),
        (stated((0.03, 0.06)), {"80–89%": GOOD}, {}, "unknown"),
        (stated(ranking=(0.69, 0.8)), {"80–89%": GOOD}, {}, "unknown"),
    ],
)
def test_verdict(row: Any, bands: dict[str, Match], groups: dict[str, Match], verdict: Verdict) -> None:
    checks = parts(bands, groups)
    assert verdict_of(row, checks) == verdict
    sentence = verdict_sentence(verdict, row, checks)
    start = {"yes": "Yes:", "partly": "Partly:", "no": "No:", "unknown": "It cannot be told"}
    assert sentence.startswith(start[verdict])
    assert sentence.count(". ") == 0, "one sentence"
    for part in checks.itertuples():
        if part.agrees == "no":
            assert f"{part.group} (says 80%, is right 65%)" in sentence
        elif part.agrees == {"unknown": "unclear", "yes": "none"}.get(verdict, "yes"):
            assert part.group in sentence


def test_the_verdict_names_a_group_that_an_average_hides() -> None:
    """Two groups that err by 15 points in opposite directions are right on average."""
    rows = []
    for i in range(800):
        group, says = ("up", "down")[i % 2], (0.25, 0.75)[i // 2 % 2]
        right = (i // 4 % 20) < 20 * (says + (0.15 if group == "up" else -0.15))
        about = {"id": f"q{i}", "image": f"{i}", "category": group}
        rows.append(replace(answers(0, n=1)[0], **about, confidence=says, correct=right))
    frame, _ = compare([system("tuned", rows)], replicates=100)
    row, checks = frame.iloc[0], checked(frame[frame.kind != "all"])
    assert row.ece < 0.01
    assert verdict_of(row, checks) == "partly"
    sentence = verdict_sentence("partly", row, checks)
    assert "where it says 60–79% or 20–39%" in sentence
    assert "not on down (says 50%, is right 35%) and up (says 50%, is right 65%)" in sentence


def test_small_groups_decide_nothing_and_answer_types_are_groups() -> None:
    rows = [
        replace(answers(0, n=1)[0], id=f"q{i}", category="small" if i < 99 else "large", confidence=0.5,
                correct=i % 2 == 0, answer_type="short" if i < 120 else "yes_no")
        for i in range(300)
    ]  # fmt: skip
    groups = pd.DataFrame(groups_of(system("tuned", rows), ImageBootstrap(rows, 20)))
    assert dict(zip(groups.group, groups.n, strict=True)) == {
        "yes-or-no answers": 180, "short answers": 120, "large": 201, "small": 99,
    }  # fmt: skip
    assert set(groups.agrees) == {"unclear"}
    assert len(checked(groups)) == 0


def test_bands_hold_every_answer_that_states_a_confidence_once() -> None:
    rows = [(0.0, True), (0.2, False), (0.29, True), (0.8, True), (0.9, False), (1.0, True), (1.0, True)]
    predictions = [
        Prediction(str(i), "?", "Yes", "", "yes", c, r, None, None, "yes_no")
        for i, (c, r) in enumerate([*rows, (None, True)])
    ]
    bands = bands_of(system("a", predictions), ImageBootstrap(predictions, 5))
    assert [(b["group"], b["n"], round(b["says"], 6), round(b["is_right"], 5)) for b in bands] == [
        ("90–100%", 3, 0.966667, 0.66667),
        ("80–89%", 1, 0.8, 1.0),
        ("20–39%", 2, 0.245, 0.5),
        ("0–19%", 1, 0.0, 1.0),
    ]


def test_figures_hold_the_confidences_of_the_table_and_the_response_of_perturbed_splits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Any] = []
    curves: list[Any] = []
    monkeypatch.setattr(page, "reliability_diagram", lambda table, ax: drawn.append(table))
    monkeypatch.setattr(page, "response_curve", lambda tables, figure: curves.append(tables))
    rows = [replace(p, category="clean") if p.strength == 0 else p for p in answers(0)]
    rows += [replace(p, id=f"n{p.id}", category="noised") for p in rows[:8:2]]
    # A level oracle's confidences are not whole percents.
    rows = [replace(p, confidence=(p.confidence or 0.5) * 0.991) for p in rows]
    oracle = system("oracle", rows)
    page.figures_of([oracle, system("base", [p for p in rows if p.category == "clean"])])
    assert float(METRICS["ece"](drawn[0])) == compare([oracle], replicates=20)[0].iloc[0].ece
    [tables] = curves
    counts = {("", 0.0): 4, ("motion_blur", 0.5): 15, ("noise", 0.5): 15}
    assert {key: table.n for key, table in tables.items()} == counts


# --- The files ----------------------------------------------------------------------------------------------------


def test_page_and_table_of_an_evaluation(evaluation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report([str(evaluation)], replicates=50, images=False)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.strip() == "All 60 answers"
    words = " ".join(lines)
    assert re.search(
        r"tuned: its largest error is on “.+”: it says \d+% and is right \d+% of the time \(\d+", words
    )
    at = lines.index(f"report: {evaluation}/report.html")
    assert lines[at + 1] == "what to try next:"
    for line, command in zip(lines[at + 2 :], ("app", "ask", "export"), strict=True):
        assert re.match(rf"  \S*(vlm-calibration|make) {command} .*runs/tuned", line), line
    page = Page((evaluation / "report.html").read_text())
    predictions = answers(0)
    most = [p for p in predictions if p.confidence is not None and p.confidence >= 0.9]
    right = 100 * sum(p.correct for p in most) / len(most)
    assert f"When it says 90–100%, on average 100%, it is right {right:.0f}% of the time." in page.text
    assert "“base” says 95% on average" in page.text
    assert " 1 of the answers state none that could be parsed." in page.text
    assert f"Versions of the run in {evaluation}: not recorded." in page.text
    assert "What confidence listens to" not in page.text, "nothing was probed"
    for heading in (
        "Side by side", "Reliability", "Response to lost evidence", "By category", "Most confident wrong answers",
    ):  # fmt: skip
        assert heading in page.text, heading
    assert all(load.startswith("data:image/") for load in page.loads if load), page.loads
    assert page.tags.count("img") == 2 * 2, "two figures for each of two systems"
    assert "script" not in page.tags
    *anchors, beside = page.values("link")
    assert [link.removeprefix("#") for link in anchors] == page.values("id")
    assert {"#confidence", "#systems", "#groups", "#made"} <= set(anchors)
    assert unquote(beside) == "report.csv"
    assert {p.name for p in evaluation.glob("report*")} == {"report.html", "report.csv"}

    rows = list(csv.DictReader((evaluation / "report.csv").open()))
    assert [r["system"] for r in rows if r["kind"] == "all"] == ["base"] * 10 + ["tuned"] * 10
    assert rows[5]["forward_passes"] == "1.0"
    clean = [p for p in predictions if (p.category or "").startswith("clean/") and p.confidence is not None]
    [row] = [r for r in rows if (r["system"], r["group"]) == ("tuned", "clean")]
    assert float(row["says"]) == pytest.approx(np.mean([p.confidence for p in clean]))
    assert float(row["is_right"]) == pytest.approx(np.mean([p.correct for p in clean]))
    of_base = [(r["kind"], r["group"]) for r in rows if r["system"] == "base"]
    assert of_base[-2:] == [("band", "90–100%"), ("distance", "base, likelihood, platt")]


def test_the_page_says_what_a_system_is_where_it_is_weakest_and_what_ran_it(evaluation: Path) -> None:
    adapter = evaluation.parent / "runs/tuned/adapter"
    adapter.mkdir(parents=True)
    save_card(adapter, Card("my/base", training={"stage": "a stage", "steps": "77", "adapter": "LoRA, r=3"}))
    levels = {"class_path": "vlm_calibration.perturbation.levels.AnchoredLevels"}
    noise = {"levels": levels, "kinds": {"noise": 2, "motion_blur": 1, "jpeg": 0}}
    model = {"class_path": "a.SFTModule", "init_args": {"optimizer": {"name": "adamw", "lr": 0.5}}}
    configure(adapter.parent, model, data={"noise": noise})
    configure(evaluation, {"init_args": {"adapters": {"tuned": str(adapter)}}})
    (evaluation / "base").rename(evaluation / "oracle")
    versions = {"Python": "3.99.1", "torch": "0.0.7"}
    RunRecord("test", "EvaluationModule", True, versions=versions).write(evaluation)
    report([str(evaluation)], replicates=5, images=False)
    page = Page((evaluation / "report.html").read_text()).text
    for fact in (
        "base model my/base", f"adapter {adapter}", "stage a stage", "steps 77", "adapter settings LoRA, r=3",
        "optimizer adamw, learning rate 0.5", "SFT, anchored levels, noise + motion blur",
        f"Versions of the run in {evaluation}: Python 3.99.1, torch 0.0.7.",
    ):  # fmt: skip
        assert fact in page
    shown, oracle = read_systems([str(evaluation)])
    assert "Can its confidence be trusted? tuned" in page, "not the oracle"
    assert "kind and strength" in oracle.label
    weakest = weakest_group(compare([shown], 5)[0], "tuned")
    assert f"{weakest.group}: {in_numbers(weakest)} of the time" in page
    assert torch.__version__ not in page


def test_texts_of_models_and_data_neither_run_nor_load(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    evil = [
        Prediction(
            f"q{i}{EVIL}", EVIL, EVIL, EVIL, EVIL, i / 40, i % 3 == 0, EVIL.replace("/", "|"), 0, "open", image=f"{i}{EVIL}"
        )
        for i in range(40)
    ]  # fmt: skip
    write(folder, evil)
    configure(folder, {"init_args": {"note": EVIL}})
    report([str(folder)], replicates=5)
    page = Page((folder / "report.html").read_text())
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not [load for load in page.loads if "evil" in load or load.startswith(("http", "//"))]
    assert "default-src 'none'" in page.policy
    assert "script-src" not in page.policy
    assert "alert(1)" in page.text, "it is shown as text"


def test_images_come_back_with_their_perturbation(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration of the run gives the images as the model saw them."""
    monkeypatch.chdir(root)
    model, kinds = "src/vlm_calibration/demo/model", dict.fromkeys(("noise", "blur", "occlusion"), 1.0)
    clean, perturbed = EvalSplit(DemoSource("test", 4)), EvalSplit(DemoSource("test", 4), "drawn")
    data = PerturbedQueryDataModule(
        model, test={"clean": clean, "perturbed": perturbed}, noise=NoisePolicy(kinds=kinds)
    )
    data.setup("test")
    dataset = data.sets["test"]
    samples = {s.query.id: s for s in (dataset[0, i] for i in range(len(dataset.queries)))}
    rows = []
    for i, s in enumerate(samples.values()):
        text = f"{('Yes', 'No')[i % 2]}. Confidence: {90 if s.perturbation.strength else 60}%"
        rows.append(graded_prediction(s.query, text, s.perturbation, s.noise_step))
    write(tmp_path / "base", rows)
    settings = {"split": "test", "scenes": 4}
    source = {"class_path": "vlm_calibration.demo.source.DemoSource", "init_args": settings}
    test = {"clean": {"source": source}, "perturbed": {"source": source, "noise": "drawn"}}
    base = {"init_args": {"base": {"name_or_path": model}}}
    configure(tmp_path, base, data={"test": test, "noise": {"kinds": kinds}})
    report([str(tmp_path)], replicates=5)
    html = (tmp_path / "report.html").read_text()
    shown = [e for examples in examples_of(*read_systems([str(tmp_path)])).values() for e in examples]
    assert any(e.strength for e in shown)
    assert perturbation_of(replace(shown[0], strength=None)) == ""
    for example in shown:
        sample = samples[example.id]
        assert perturbation_of(example) == str(sample.perturbation)
        assert perturbation_of(example) in html
        assert thumbnail(sample.image) in html, example.id
    assert html.count('alt="the image of the question') == len(shown)


def test_systems_of_an_earlier_evaluation_are_not_read(evaluation: Path) -> None:
    """The configuration names the systems; what else lies in the folder answered other questions."""
    write(evaluation / "zzz", answers(0, n=30))
    assert [s.name for s in read_systems([str(evaluation)])] == ["base", "tuned"]
    (evaluation / "config.yaml").unlink()
    with pytest.raises(DataError, match="'base'.*'zzz'"):
        read_systems([str(evaluation)])


# --- Errors -------------------------------------------------------------------------------------------------------


def test_mistakes_are_named(evaluation: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    write(tmp_path / "fewer", answers(0, n=57))
    other = [replace(p, question="Is there a cat?") if p.id == "q3" else p for p in answers(0)]
    write(tmp_path / "other", other)
    for settings, says in (
        ({"runs": [str(empty)]}, "no predictions.jsonl"),
        ({"runs": [str(evaluation), str(tmp_path / "fewer")]}, "'base'.*'fewer'.* 'q57', 'q58', 'q59':"),
        ({"runs": [str(tmp_path / "other"), str(evaluation)]}, "'other'.*'base'.* 'q3':"),
        ({"runs": [str(evaluation)], "system": "nobody"}, "there are base, tuned"),
        ({"runs": [str(evaluation)], "calibration": str(evaluation)}, "image"),
    ):
        with pytest.raises(DataError, match=says):
            report(**settings)  # type: ignore[arg-type]


# --- Recalibration ------------------------------------------------------------------------------------------------


def test_recalibration_may_be_fitted_on_another_evaluation(evaluation: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "held"
    for name in ("base", "tuned"):
        write(calibration / name, [replace(p, correct=True) for p in held_out(6)])
    frame, _ = compare(read_calibration(str(calibration), read_systems([str(evaluation)])), replicates=5)
    isotonic = frame[(frame.recalibration == "isotonic") & (frame.estimator == "verbalized")]
    assert list(isotonic.mean_confidence) == [1.0, 1.0], "all held-out answers are right"


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        (None, "there are no answers to a calibration set"),
        ({"estimates": {}}, "likelihood is not recalibrated: the calibration set"),
        ({"confidence": None}, "verbalized is not recalibrated: no yes_no answer of the calibration set"),
    ],
)
def test_a_missing_recalibration_is_noted(calibration: dict[str, Any] | None, says: str) -> None:
    held = None if calibration is None else [replace(p, **calibration) for p in held_out(5)]
    frame, notes = compare([system("tuned", answers(0), held)], replicates=5)
    recalibrated = set(frame[frame.recalibration != "raw"].estimator)
    assert len([note for note in notes if says in note]) == 2 - len(recalibrated)
    assert {note.split()[1] for note in notes} == {"verbalized", "likelihood"} - recalibrated


def test_names_that_occur_twice_get_their_folder(evaluation: Path, tmp_path: Path) -> None:
    write(tmp_path / "other/tuned", answers(2))
    systems = read_systems([str(evaluation), str(tmp_path / "other")])
    assert [s.name for s in systems] == ["base", f"{evaluation}/tuned", f"{tmp_path / 'other'}/tuned"]


def test_a_report_that_fails_leaves_the_page_as_it_was(
    evaluation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise DataError("no page")

    (evaluation / "report.html").write_text("before")
    monkeypatch.setattr("vlm_calibration.reporting.report.page.render_page", fail)
    with pytest.raises(DataError, match="no page"):
        report([str(evaluation)], replicates=5)
    assert {p.name: p.read_text() for p in evaluation.glob("report*")} == {"report.html": "before"}
