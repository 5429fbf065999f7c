"""`vlm-calibration app` in a real browser: scenes, uploads, key objects, noise, the response curve and the report."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect

from vlm_calibration.app.subject import DRAWN, WHOLE, demo_subject
from vlm_calibration.inference.answers import Answer
from vlm_calibration.inference.model import BASE, CALIBRATED, CalibratedModel
from vlm_calibration.perturbation import KIND_NAMES, Perturbation

from .browser import SCENE, App, Visit, is_error, names_of, shown_answers

KEY, OTHER, *_ = names_of(SCENE)
"""The object that the question of the scene names, and another one."""


def _shown(answer: Answer) -> tuple[str, str, str]:
    stated, expected = ("none" if c is None else f"{c:.0%}" for c in (answer.confidence, answer.expected))
    return answer.answer, stated, expected


def _asked(model: CalibratedModel, image: Any, question: str) -> dict[str, tuple[str, str, str]]:
    """The answers that the page should show, from the same model without a page."""
    return {
        BASE: _shown(model.ask(image, question, as_base=True)),
        CALIBRATED: _shown(model.ask(image, question)),
    }


def _percent(shown: str) -> int:
    return int(shown.removesuffix("%"))


def test_a_scene_of_the_demo_is_answered(visit: Visit, model: CalibratedModel) -> None:
    first = shown_answers(visit)
    assert first == _asked(model, demo_subject(0).image, demo_subject(0).question)
    visit.choose_scene(SCENE)
    subject = demo_subject(SCENE)
    assert visit.page.get_by_label("Question", exact=True).input_value() == subject.question
    assert visit.object() == KEY
    assert visit.objects() == [*subject.objects, DRAWN, WHOLE]
    assert shown_answers(visit) == _asked(model, subject.image, subject.question)
    np.testing.assert_array_equal(visit.seen(), subject.image)
    visit.ask("Is there a guitar in the image?")
    assert shown_answers(visit) == _asked(model, subject.image, "Is there a guitar in the image?")


def test_a_question_names_the_key_object(visit: Visit) -> None:
    named, other, *_ = names_of(0)
    assert visit.object() == named
    visit.page.get_by_label("Question", exact=True).press_sequentially(f" Or a {other}?")
    first = next(name for name in demo_subject(0).objects if name in (named, other))
    expect(visit.page.locator("#object input")).to_have_value(first)
    visit.page.get_by_label("Question", exact=True).fill(f"Can you see {other}s?")
    expect(visit.page.locator("#object input")).to_have_value(other)


def test_an_image_of_ones_own(visit: Visit, model: CalibratedModel, app: App, photograph: Path) -> None:
    visit.set_strength(50)
    visit.renewed("curve", lambda: visit.send(photograph))
    assert visit.page.locator("#strength input[type=number]").input_value() == "0"
    assert visit.objects() == [DRAWN, WHOLE], "nothing is known of its objects"
    question = visit.page.get_by_label("Question", exact=True)
    question.fill("Is there a ball in the image?")
    question.press("Enter")
    expected = _asked(model, photograph, "Is there a ball in the image?")
    # What was asked before, about the image alone and while the slider moved, is answered first.
    visit.until(lambda: shown_answers(visit) == expected, lambda: f"{shown_answers(visit)}, not {expected}")
    clean = visit.seen()
    assert clean.shape == (96, 96, 3), "as the model takes it"
    assert clean[48, 70, 0] > clean[48, 70, 1] + 100, "the disc"
    visit.set_strength(100)
    assert (visit.seen() != clean).any(axis=2).mean() > 0.99, "the whole image is noise"
    assert not [path for path in app.files() if path.suffix == ".png"], "it is not kept on the disk"


def test_another_image_comes_while_answers_are_on_their_way(visit: Visit, photograph: Path) -> None:
    visit.set_strength(50, wait=False)
    visit.send(photograph)
    expect(visit.page.locator("#object input")).to_have_value(WHOLE)
    visit.answered(0)
    expect(visit.page.get_by_text("Error", exact=True)).to_have_count(0)


@pytest.mark.slow
def test_noise_on_the_key_object(visit: Visit) -> None:
    visit.choose_scene(SCENE)
    mask = demo_subject(SCENE).objects[KEY]
    clean, before, bars = visit.seen(), shown_answers(visit), visit.bars(CALIBRATED)
    assert before[CALIBRATED][1] == "100%"
    assert bars == pytest.approx([1, _percent(before[CALIBRATED][2]) / 100], abs=0.02)
    marked = visit.page.locator("#curve line.now")
    left = float(marked.get_attribute("x1") or "")

    visit.set_strength(100)
    changed = (visit.seen() != clean).any(axis=2)
    assert not changed[~mask].any(), "noise beside the key object"
    assert changed[mask].mean() > 0.98
    expect(visit.page.locator("#seen figcaption")).to_have_text(f"What the models see: 100% noise on {KEY}")
    after, bars = shown_answers(visit), visit.bars(CALIBRATED)
    assert after[CALIBRATED][1] == "0%", "it says that it cannot know"
    assert _percent(after[CALIBRATED][2]) < 60
    assert bars == pytest.approx([0, _percent(after[CALIBRATED][2]) / 100], abs=0.02)
    assert after[BASE][1] == before[BASE][1], "the base model is as sure as ever"
    expect(marked).not_to_have_attribute("x1", f"{left:.1f}")
    assert float(marked.get_attribute("x1") or "") == left + 420

    visit.set_strength(0)
    np.testing.assert_array_equal(visit.seen(), clean)
    assert shown_answers(visit) == before


def test_every_kind_of_perturbation(visit: Visit, model: CalibratedModel) -> None:
    visit.choose_scene(SCENE)
    visit.page.locator("#kind input").click()
    offered = [
        re.sub(r"^✓\s*", "", name).strip() for name in visit.page.get_by_role("option").all_inner_texts()
    ]
    assert [name.lower().replace(" ", "_") for name in offered] == list(KIND_NAMES)
    visit.page.keyboard.press("Escape")
    subject, clean = demo_subject(SCENE), visit.seen()
    mask = subject.objects[KEY]
    visit.set_strength(60)
    seen = [visit.seen()]
    for name, kind in (("Occlusion", "occlusion"), ("Motion blur", "motion_blur")):
        visit.choose_kind(name)
        visit.page.locator(f"#answers .answers[data-kind={kind}][data-strength='60']").wait_for()
        words = f"What the models see: 60% {name.lower()} on {KEY}"
        expect(visit.page.locator("#seen figcaption")).to_have_text(words)
        seen.append(visit.seen())
        assert not (seen[-1] != clean).any(axis=2)[~mask].any()
        assert not np.array_equal(seen[-1], seen[-2])
        curve = visit.page.locator(f"#curve figure[data-kind={kind}][data-strength='60'] > svg")
        expect(curve).to_contain_text(f"strength of {name.lower()} on the key object")
    visit.page.locator("#kind input").click()
    visit.page.get_by_role("option", name="Fade", exact=True).click()
    visit.set_strength(80)
    visit.page.locator("#curve figure[data-kind=fade][data-strength='80']").wait_for()
    expect(visit.page.locator("#seen figcaption")).to_have_text(f"What the models see: 80% fade on {KEY}")
    visit.set_strength(60)
    visit.choose_kind("Motion blur")
    assert (seen[1] != clean).any(axis=2).sum() == pytest.approx(0.6 * mask.sum(), rel=0.05)
    sample = model.sample(
        subject.image, subject.question, mask=mask, perturbation=Perturbation("motion_blur", 0.6)
    )
    np.testing.assert_array_equal(seen[-1], model.seen(sample))
    expected = {s: _shown(a) for s, [a] in model.answers([sample], [BASE, CALIBRATED]).items()}
    assert shown_answers(visit) == expected


def test_another_key_object_is_perturbed(visit: Visit) -> None:
    visit.choose_scene(SCENE)
    clean = visit.seen()
    visit.page.locator("#object input").click()
    visit.renewed("curve", visit.page.get_by_role("option", name=OTHER).click)
    visit.set_strength(100)
    changed = (visit.seen() != clean).any(axis=2)
    assert changed[demo_subject(SCENE).objects[OTHER]].mean() > 0.98
    assert not changed[~demo_subject(SCENE).objects[OTHER]].any()


def test_painting_marks_the_key_object(visit: Visit) -> None:
    visit.choose_scene(SCENE)
    clean = visit.seen()
    visit.renewed("curve", lambda: visit.paint((0.2, 0.8), (0.4, 0.8)))
    assert visit.object() == DRAWN
    visit.set_strength(100)
    changed = (visit.seen() != clean).any(axis=2)
    y, x = np.nonzero(changed)
    # The brush is 14% of the picture wide, with round ends.
    expected = [0.2 - 0.07, 0.4 + 0.07, 0.8 - 0.07, 0.8 + 0.07]
    painted = np.array([x.min(), x.max() + 1, y.min(), y.max() + 1]) / 96
    assert painted == pytest.approx(expected, abs=0.02)
    assert changed.mean() == pytest.approx(0.2 * 0.14 + np.pi * 0.07**2, rel=0.1)

    visit.renewed("curve", visit.page.get_by_role("button", name="Clear paint").click)
    for part in ("seen", "curve"):
        expect(visit.page.locator(f"#{part} .notice")).to_have_text(
            "Paint over the key object to perturb it."
        )
    visit.renewed("curve", lambda: visit.paint((0.7, 0.3), (0.7, 0.31)))
    assert (visit.seen() != clean).any(axis=2)[29, 67]


def test_the_response_curve(visit: Visit, model: CalibratedModel) -> None:
    visit.choose_scene(SCENE)
    curve = visit.page.locator("#curve figure")
    words = curve.locator("> svg").get_attribute("aria-label") or ""
    assert "Calibrated model: states 100% for the untouched image and 0% at full strength." in words
    subject = demo_subject(SCENE)
    for system in (BASE, CALIBRATED):
        drawn = curve.locator(f"> svg g.{system}")
        line = [p.split(",") for p in (drawn.locator("polyline").get_attribute("points") or "").split()]
        assert [float(x) for x, _ in line] == pytest.approx([44 + 42 * level for level in range(11)])
        samples = [
            model.sample(
                subject.image,
                subject.question,
                mask=subject.objects[KEY],
                perturbation=Perturbation("noise", strength),
            )
            for strength in (0, 0.5, 1)
        ]
        expected = [answer.expected for answer in model.answers(samples, [system])[system]]
        assert [float(line[i][1]) for i in (0, 5, 10)] == pytest.approx(
            [202 - 190 * (e or 0) for e in expected], abs=1
        )
        assert drawn.locator(".point").count() == 11
    box = curve.locator("> svg").bounding_box()
    assert box is not None
    assert box["width"] > 400
    assert box["height"] > 200


def test_the_report(visits: Callable[..., Visit]) -> None:
    visit = visits(width=1920)
    visit.page.get_by_role("tab", name="Report").click()
    frame = visit.page.frame_locator("iframe.report")
    expect(frame.locator("h1").first).to_be_visible()
    box = visit.page.locator("iframe.report").bounding_box()
    assert box is not None
    assert box["width"] > 0.95 * 1920
    assert "sft" in frame.locator("body").inner_text()
    [inner] = [f for f in visit.page.frames if f is not visit.page.main_frame]
    assert inner.evaluate("1 + 1") == 2, "its own scripts run"
    assert is_error(lambda: inner.evaluate("() => parent.document.title")), "but reach nothing of the page"
    frame.locator("nav a[href$='#made']").click()
    expect(frame.locator("#made")).to_be_in_viewport()
    assert frame.locator("h1").count() == 1, "a link of the contents stays in the report"
    visit.page.get_by_role("tab", name="Ask").click()
    expect(visit.page.locator("#curve figure")).to_be_visible()
