"""What the page says of the demo model's questions: which it knows, which it does not, and their right answers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest
from playwright.sync_api import expect

from vlm_calibration.app import view
from vlm_calibration.app.page import PageHandlers, build_page
from vlm_calibration.app.subject import demo_subject
from vlm_calibration.demo.questions import FORMS, POSITION_FORMS, known_question, right_answer
from vlm_calibration.demo.scenes import CLASSES, CORNERS
from vlm_calibration.estimators.decision import AppliedRule
from vlm_calibration.inference.answers import Answer
from vlm_calibration.inference.model import BASE, CALIBRATED, DEMO_MODEL, CalibratedModel, load_calibrated

from .browser import SCENE, Visit, shown_answers

ZEBRA = "Is there a zebra in the image?"


def _ask(model: CalibratedModel, question: str) -> str:
    subject = demo_subject(SCENE)
    return PageHandlers(model).answer(subject, next(iter(subject.objects)), "", question, "noise", 0)


def test_a_question_is_flagged_for_the_demo_model_alone(tmp_path: Path) -> None:
    own = load_calibrated(str(shutil.copytree(DEMO_MODEL, tmp_path / "own")), device="cpu")
    demo = load_calibrated(str(DEMO_MODEL), device="cpu")
    assert "does not know the word &#x27;zebra&#x27;" in _ask(demo, ZEBRA)
    assert f"said {BASE}" not in _ask(demo, ZEBRA)
    assert f"said {BASE}" in _ask(demo, "is there a dog in the image")
    assert f"said {BASE}" in _ask(own, ZEBRA)
    labels = [
        {block.elem_id for block in build_page(PageHandlers(model)).blocks.values()}
        & {"form", "word", "known"}
        for model in (demo, own)
    ]
    assert labels == [{"form", "word", "known"}, set()]


def test_passing_the_choices_changes_neither_question_nor_key_object() -> None:
    handlers = PageHandlers(load_calibrated(str(DEMO_MODEL), device="cpu"))
    subject = demo_subject(SCENE)
    question = subject.question
    form, word = known_question(question) or ("", "")
    kept = [gr.skip(), gr.skip()]
    assert handlers.compose(subject, question, form, word) == kept
    assert handlers.compose(subject, ZEBRA, None, None) == kept
    other = next(corner for corner in CORNERS if corner in subject.corners.values())
    at = next(name for name, corner in subject.corners.items() if corner == other)
    assert handlers.compose(subject, ZEBRA, POSITION_FORMS[0], other) == [f"What is at the {other}?", at]
    assert handlers.compose(subject, ZEBRA, None, "cat")[0] == "Is there a cat in the image?"


def test_the_solution_names_the_answer_and_the_scene() -> None:
    corners = {"dog": "top left"}
    assert "Do you see a cat? <strong>No.</strong> The scene shows: dog (top left)." in view.solution(
        "Do you see a cat?", corners
    )
    assert "<strong>Nothing is there.</strong>" in view.solution("What is at the top right?", corners)
    assert "<strong>Known for the demo's questions only.</strong>" in view.solution(ZEBRA, corners).replace(
        "&#x27;", "'"
    )


def test_an_unknown_word_is_flagged_instead_of_answered(visit: Visit) -> None:
    visit.ask(ZEBRA)
    flagged = visit.page.locator("#answers").get_by_role("alert")
    expect(flagged).to_contain_text(
        "The demo model does not know the word 'zebra'; it knows the objects dog, cat"
    )
    expect(visit.page.locator("#answers .said")).to_have_count(0)
    expect(visit.page.locator("#curve figure")).to_have_count(0)
    for part in ("form", "word"):
        expect(visit.page.locator(f"#{part} input")).to_have_value("")
        visit.page.locator(f"#{part} input").focus()
        visit.page.keyboard.press("Tab")
    expect(visit.page.locator("#question textarea")).to_be_focused()
    expect(visit.page.locator("#question textarea")).to_have_value(ZEBRA)
    visit.ask("Is there a cat in the image?")
    expect(visit.page.locator("#answers .said")).to_have_count(2)
    expect(visit.page.locator("#form input")).to_have_value("Is there a ... in the image?")
    expect(visit.page.locator("#word input")).to_have_value("cat")


def test_what_the_demo_model_knows_is_listed_and_offered(visit: Visit) -> None:
    visit.page.get_by_role("button", name="What the demo model knows").click()
    listed = visit.page.locator(".known")
    for word in (*CLASSES, *CORNERS):
        expect(listed).to_contain_text(word)
    visit.choose_scene(SCENE)
    corners = demo_subject(SCENE).corners
    visit.page.locator("#form input").click()
    expect(visit.page.get_by_role("option")).to_have_count(len(FORMS))
    visit.renewed("curve", visit.page.get_by_role("option", name="What is at the ...?").click)
    question = visit.page.get_by_label("Question", exact=True)
    expect(question).to_have_value(f"What is at the {CORNERS[0]}?")
    visit.page.locator("#word input").click()
    visit.renewed("curve", visit.page.get_by_role("option", name=CORNERS[3]).click)
    expect(question).to_have_value(f"What is at the {CORNERS[3]}?")
    [expected] = [name for name, corner in corners.items() if corner == CORNERS[3]]
    assert visit.object() == expected, "the key object is what the question is about"
    expect(visit.page.locator("#answers .said.base .answer")).to_have_text(f"{expected}.")


def test_the_right_answer_is_hidden_until_it_is_asked_for(visit: Visit) -> None:
    visit.choose_scene(SCENE)
    solution = visit.page.locator(".solution")
    expect(solution).to_have_count(0)
    button = visit.page.get_by_role("button", name="The right answer")
    button.click()
    subject = demo_subject(SCENE)
    answer = right_answer(subject.question, subject.corners)
    expect(solution).to_contain_text(f"{answer}. The scene shows: ")
    visit.choose_scene(SCENE + 1)
    expect(solution).to_be_hidden()
    visit.ask("Do you see an umbrella?")
    button.click()
    expect(solution).to_contain_text("No. The scene shows: ")
    assert shown_answers(visit)[BASE][0] in ("Yes.", "No.")


@pytest.mark.parametrize(
    ("threshold", "confidence", "decision", "why"),
    [
        (0.925, 0.95, "answer", "stated 95%, at least 92.5%"),
        (0.925, 0.9, "review", "stated 90%, below 92.5%"),
        (0.925, None, "review", "no stated confidence"),
        (None, 1.0, "review", "no threshold keeps the limits"),
    ],
)
def test_an_answer_says_whether_it_may_be_given_and_why(
    threshold: float | None, confidence: float | None, decision: str, why: str
) -> None:
    rule = AppliedRule(threshold, "verbalized", confidence, "", "At most <5%> ...")
    answer = Answer("Yes", "Yes", confidence, None, {}, "yes_no", rule=rule)
    panel = view.answer_panel(CALIBRATED, answer)
    assert (
        f'data-decision="{decision}"><strong>{decision}</strong> ({why})<small>At most &lt;5%&gt; ...'
        in panel
    )
    assert "data-decision" not in view.answer_panel(CALIBRATED, replace(answer, rule=None))
