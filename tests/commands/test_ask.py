"""`vlm-calibration ask` one question, many questions with restarts, and mistakes in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_calibration.commands.ask import _as_text
from vlm_calibration.demo.questions import unknown_part
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.decision import AppliedRule, KnownQuestions
from vlm_calibration.inference.asking import Answer
from vlm_calibration.inference.model import DEMO_MODEL, CalibratedModel

from ..command_line import Ended, read_lines
from ..decision_rules import write_decision_rule

SOURCE = DemoSource("test", scenes=4)
Call = Callable[..., Ended]
Options = tuple[str, ...]
Decides = Callable[..., Options]


@pytest.fixture
def call(call: Call) -> Call:
    """The command in this process, in `tmp_path`."""
    return partial(call, "ask")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Twelve questions about four scenes."""
    lines = []
    for query in SOURCE.queries():
        Image.fromarray(SOURCE.load(query).image).save(tmp_path / f"{query.image}.png")
        lines.append({"id": query.id, "image": f"{query.image}.png", "question": query.question})
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def asked(questions: Path) -> Options:
    """Image and question of the first of them."""
    row = read_lines(questions)[0]
    return row["image"], row["question"]


@pytest.fixture
def call_one(call: Call, asked: Options) -> Call:
    return partial(call, *asked)


@pytest.fixture
def call_many(call: Call, questions: Path) -> Call:
    return partial(call, "--questions", str(questions), "--out", "answers.jsonl")


@pytest.fixture
def adapter(adapter_run: Path) -> Options:
    return ("--adapter", str(adapter_run), "--device", "cpu", "--max-new-tokens", "16")


def test_one_question(call: Call, asked: Options, adapter: Options, calibrated: CalibratedModel) -> None:
    ended = call(*asked, *adapter)
    expected = calibrated.ask(*asked)
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0] == expected.answer
    assert lines[1].split() == ["stated", "confidence", f"{expected.confidence:.0%}"]
    assert lines[2].split() == ["expected", "confidence", f"{expected.expected:.0%}"]
    call = partial(call, *asked, *adapter, "--json")
    answered = json.loads(call().out)
    assert answered.pop("model").endswith(")")
    assert answered == {"image": asked[0], "question": asked[1], **expected.to_dict()}
    answered = json.loads(call("--answer-type", "open").out)
    assert (answered["answer_type"], answered["decision"]) == ("open", None)


def test_what_the_demo_model_does_not_know_is_a_warning(call: Call, questions: Path, tmp_path: Path) -> None:
    """The same weights in a folder of the user are not the demo's model."""
    known = read_lines(questions)[0]
    zebra = {**known, "id": "z", "question": "Is there a zebra?"}
    questions.write_text("".join(json.dumps(row) + "\n" for row in (known, zebra)))
    own = shutil.copytree(DEMO_MODEL, tmp_path / "own")
    for model, warnings in ((DEMO_MODEL, [None, unknown_part("Is there a zebra?")]), (own, [None, None])):
        base = ("--base", str(model), "--device", "cpu")
        ended = call(known["image"], zebra["question"], *base)
        assert ended.err == (f"warning: {warnings[1]}\n" if warnings[1] else "")
        ended = call("--questions", str(questions), "--out", f"{model.name}.jsonl", *base)
        assert (f"warning: {questions}:2: {warnings[1]}" in ended.err) == (model == DEMO_MODEL)
        assert [row["warning"] for row in read_lines(tmp_path / f"{model.name}.jsonl")] == warnings


def test_an_answer_as_text() -> None:
    rule = AppliedRule(0.9, "verbalized", None, "", "At most 5% ...")
    answer = Answer("\x1b[2JYes", "\x1b[2JYes", None, 0.7, {0.9: 0.5, 0.5: 0.46, 0.1: 0.04}, "yes_no", rule)
    assert _as_text(answer).splitlines() == [
        "\N{REPLACEMENT CHARACTER}[2JYes",
        "  stated confidence     none",
        "  expected confidence    70%",
        "  might have stated    90% (p = 0.50), 50% (p = 0.46)",
        "  decision             review (no stated confidence)",
    ]


@pytest.fixture
def decides(adapter: Options, tmp_path: Path) -> Decides:
    """Options of the adapter with a decision rule beside it."""

    def options(threshold: float | None = 0.5, **changed: Any) -> Options:
        folder = tmp_path / "decides"
        shutil.copytree(Path(adapter[1]) / "adapter", folder, dirs_exist_ok=True)
        write_decision_rule(folder, threshold, **changed)
        return ("--adapter", str(folder), *adapter[2:])

    return options


def test_an_answer_below_the_threshold_is_not_printed(call_one: Call, decides: Decides) -> None:
    call = partial(call_one, *decides(None))
    ended = call("--abstain")
    assert (ended.status, ended.out, ended.err) == (4, "review\n", "")
    ended = call("--abstain", "--json")
    assert (ended.status, json.loads(ended.out)["decision"]) == (4, "review")
    assert "decision             review" in call().out, "not asked to abstain"
    for estimator, name in (("verbalized", "stated"), ("expected", "expected"), ("likelihood", "likelihood")):
        ended = call_one(*decides(0.0, estimator=estimator), "--abstain")
        assert ended.status == 0
        assert re.search(rf"decision             answer \({name} .*%, at least 0%\)", ended.out)


def test_a_question_unlike_those_of_the_calibration_set_goes_to_a_person(
    call: Call, asked: Options, decides: Decides
) -> None:
    for known, decision in ((asked[1], "answer"), ("What is this?", "review")):
        options = decides(0.0, questions=KnownQuestions.of([known] * 20))
        answer = json.loads(call(*asked, *options, "--abstain", "--json").out)
        assert (answer["decision"], answer["unfamiliar"] is None) == (decision, decision == "answer")
    # The demo's model does not know zebras.
    assert call(asked[0], "Is there a zebra in the image?", *decides(0.0), "--abstain").status == 4


def test_thresholds_by_category_need_one(call_one: Call, decides: Decides) -> None:
    groups = {"colour": {"threshold": 0.0}, "size": {"threshold": None}}
    call = partial(call_one, *decides(by="category", groups=groups))
    assert call("--category", "colour", "--abstain").status == 0
    assert call("--category", "size", "--abstain").status == 4
    assert json.loads(call("--json").out)["decision"] is None
    for category in ((), ("--category", "shape")):
        assert "'colour', 'size'" in call(*category, "--abstain").error()


def test_abstaining_without_thresholds_names_the_command(
    call_one: Call, call_many: Call, adapter: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_calibration.inference.model.load_base", lambda *_: pytest.fail("loaded"))
    for call in (call_one, call_many):
        assert "`vlm-calibration threshold RUN`" in call(*adapter, "--abstain").error()


def test_thresholds_of_another_model_are_refused(call_one: Call, decides: Decides) -> None:
    changes: Any = {"other weights": {"weights": "0"}, "another prompt": {"prompt": "{question}?"}}
    for says, changed in changes.items():
        error = call_one(*decides(**changed)).error()
        assert f"decides/thresholds.json: its thresholds were chosen with {says}" in error


def test_without_a_model_the_demo_s_is_asked(call_one: Call, adapter_run: Path, tmp_path: Path) -> None:
    assert "asking the demo's model alone" in call_one("--max-new-tokens", "16").err
    (tmp_path / "runs").mkdir()
    for run in ("runs/sft", "runs/dpo"):
        (tmp_path / run).symlink_to(adapter_run)
        ended = call_one("--json", "--max-new-tokens", "16")
        assert f"asking the demo's model and the adapter in {run}\n" in ended.err
        assert f"with {run}/adapter (" in json.loads(ended.out)["model"]


def test_a_run_that_was_cut_off_resumes_where_it_was(
    call: Call,
    questions: Path,
    decides: Decides,
    calibrated: CalibratedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = partial(call, "--questions", str(questions), "--batch-size", "5", *decides(0.97), "--abstain")
    assert call("--out", "a/whole.jsonl").status == 0
    whole, given = questions.parent / "a/whole.jsonl", read_lines(questions)
    expected = calibrated.ask_many((questions.parent / q["image"], q["question"]) for q in given)
    for row, question, answer in zip(read_lines(whole), given, expected, strict=True):
        assert {key: row[key] for key in question} == question
        assert (row["text"], row["confidence"]) == (answer.text, answer.confidence)
        assert row["expected"] == pytest.approx(answer.expected, abs=2e-4)
    below = [row["confidence"] is None or row["confidence"] < 0.97 for row in read_lines(whole)]
    assert [row["decision"] for row in read_lines(whole)] == ["review" if b else "answer" for b in below]
    out = questions.parent / "cut.jsonl"
    out.write_text("".join(whole.read_text().splitlines(keepends=True)[:5]) + '{"id": "torn')
    asked: list[str] = []
    answers = CalibratedModel.answers

    def noted(self: CalibratedModel, samples: Any, systems: Any) -> Any:
        asked.extend(sample.query.question for sample in samples)
        return answers(self, samples, systems)

    monkeypatch.setattr(CalibratedModel, "answers", noted)
    ended = call("--out", "cut.jsonl")
    assert ended.out == (
        f"7 of 12 questions answered, 5 answered before, {sum(below)} for review: cut.jsonl\n"
    )
    assert asked == [q["question"] for q in given[5:]]
    assert [r["text"] for r in read_lines(out)] == [r["text"] for r in read_lines(whole)]
    counts = {"questions": 12, "answered_now": 0, "answered_before": 12, "skipped": 0}
    ended = call("--out", "cut.jsonl", "--json")
    assert json.loads(ended.out) == {**counts, "review": sum(below), "out": "cut.jsonl"}


def test_answers_under_other_settings_are_not_mixed(
    call_many: Call, questions: Path, adapter: Options, decides: Decides
) -> None:
    assert call_many(*adapter).status == 0
    before = (questions.parent / "answers.jsonl").read_bytes()
    error = call_many("--base", str(DEMO_MODEL)).error()
    assert error.startswith("answers.jsonl:1: written with model = '")
    assert call_many(*decides()).error().startswith("answers.jsonl:1: written with ")
    first, *rest = questions.read_text().splitlines()
    questions.write_text("\n".join([json.dumps({**json.loads(first), "question": "A cow?"}), *rest]))
    error = call_many(*adapter).error()
    assert f"{questions}:1: answers.jsonl holds an answer to another question" in error
    assert (questions.parent / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize("line", ['{"id": "a"}', '{"id": [], "image": "", "question": ""}'])
def test_a_line_that_is_no_answer_is_named_and_the_file_stays(
    call_many: Call, tmp_path: Path, line: str
) -> None:
    path, settings = tmp_path / "answers.jsonl", {"model": str(DEMO_MODEL), "rule": None}
    rows = [{"id": "b", "image": "", "question": ""}, json.loads(line)]
    before = "".join(json.dumps({**row, **settings}) + "\n" for row in rows) + "not finished"
    path.write_text(before)
    error = call_many("--base", str(DEMO_MODEL)).error()
    assert error.startswith("answers.jsonl:2: damaged: not an answer that `ask` wrote: choose another --out")
    assert path.read_text() == before


def test_bad_images_stop_the_run_or_are_counted(call_many: Call, questions: Path, adapter: Options) -> None:
    first, second, *_ = questions.read_text().splitlines()
    images = ("nowhere.png", "../x.png", "torn.png")
    bad = [json.dumps({"image": image, "question": "A dog?"}) for image in images]
    (questions.parent / "torn.png").write_bytes((questions.parent / "test-000000.png").read_bytes()[:500])
    questions.write_text("\n".join([first, *bad, second]) + "\n")
    call = partial(call_many, *adapter, "--batch-size", "1")
    assert f"{questions}:2: no such image: " in call().error()
    assert len(read_lines(questions.parent / "answers.jsonl")) == 1, "what was answered stays"
    ended = call("--on-bad-image", "skip")
    assert ended.out == "1 of 5 questions answered, 1 answered before, 3 left out: answers.jsonl\n"
    for reason in (":2: no such image", ":3: the image path '../x.png' leaves", "torn.png: damaged"):
        assert reason in ended.err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object with 'image' and 'question'"),
        ('{"image": "a.png"}', "'question' is missing"),
        ('{"image": "a.png", "question": "?", "answer_type": "x"}', "'answer_type' must be one of"),
        ('{"image": "a.png", "question": "?", "id": "1"}', "the id '1' comes twice"),
    ],
)
def test_bad_lines_are_named_before_a_model_is_loaded(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, says: str
) -> None:
    monkeypatch.setattr("vlm_calibration.commands.ask.load_model", lambda *_: pytest.fail("loaded"))
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "question": "A dog?"}\n' + line)
    ended = call("--questions", "q.jsonl", "--out", "a.jsonl")
    assert ended.error().startswith(f"q.jsonl:2: {says}")
    assert not (tmp_path / "a.jsonl").exists()
