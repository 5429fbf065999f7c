"""The page for everybody: by keyboard alone, on narrow screens, with readable figures."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import FilePayload, expect

from vlm_calibration.app import view
from vlm_calibration.app.subject import DRAWN, WHOLE, demo_subject
from vlm_calibration.inference.answers import Answer
from vlm_calibration.inference.model import CALIBRATED

from .browser import SCENE, Visit


def _tab_to(visit: Visit, selector: str) -> None:
    """Press Tab until the element that matches has the focus, and check that this is visible."""
    for _ in range(30):
        visit.page.keyboard.press("Tab")
        if visit.page.evaluate("selector => document.activeElement.matches(selector)", selector):
            shown = visit.page.evaluate(
                """() => {
                  const style = getComputedStyle(document.activeElement);
                  return style.outlineStyle !== 'none' || style.boxShadow !== 'none' ||
                    getComputedStyle(document.activeElement.closest('.wrap, label') ?? document.body).boxShadow !== 'none';
                }"""
            )
            assert shown, f"nothing shows that {selector} has the focus"
            return
    raise AssertionError(f"{selector} cannot be reached")


def test_the_keyboard_reaches_everything(visit: Visit) -> None:
    keys = visit.page.keyboard
    # Listen early: Playwright subscribes to file choosers with the first listener, too late for a key press.
    visit.page.on("filechooser", lambda _: None)
    _tab_to(visit, f"#scenes button[data-index='{SCENE}']")
    visit.renewed("curve", lambda: keys.press("Enter"))
    clean = visit.seen()
    _tab_to(visit, "#upload")
    with visit.page.expect_file_chooser():
        keys.press("Enter")
    _tab_to(visit, "#marker canvas")
    for _ in range(4):
        keys.press("ArrowLeft")
    visit.renewed("curve", lambda: keys.press("Space"))
    assert visit.object() == DRAWN
    _tab_to(visit, "#kind input")
    keys.press("ArrowDown")
    visit.renewed("curve", lambda: keys.press("Enter"))
    expect(visit.page.locator("#curve figure[data-kind=blur]")).to_be_visible()
    _tab_to(visit, "#kind input")
    keys.press("ArrowUp")
    visit.renewed("curve", lambda: keys.press("Enter"))
    expect(visit.page.locator("#curve figure[data-kind=noise]")).to_be_visible()
    _tab_to(visit, "#strength input[type=range]")
    keys.press("End")
    visit.answered(100)
    y, x = np.nonzero((visit.seen() != clean).any(axis=2))
    assert (x.mean() / 96, y.mean() / 96) == pytest.approx((0.5 - 0.12, 0.5), abs=0.02)
    keys.press("ArrowLeft")
    visit.answered(95)
    _tab_to(visit, "#object input")
    keys.press("ArrowDown")
    visit.renewed("curve", lambda: keys.press("Enter"))
    assert visit.object() in demo_subject(SCENE).objects or visit.object() == WHOLE
    _tab_to(visit, "#word input")
    keys.press("Tab")
    expect(visit.page.locator("#question textarea")).to_be_focused()
    expect(visit.page.get_by_role("listbox")).to_have_count(0)
    keys.press("Shift+Tab")
    expect(visit.page.locator("#word input")).to_be_focused()
    _tab_to(visit, "#question textarea")
    keys.press("Control+A")
    keys.type("Do you see a house?")
    visit.renewed("curve", lambda: keys.press("Enter"))
    _tab_to(visit, "#ask")
    _tab_to(visit, "#solution button")
    keys.press("Enter")
    expect(visit.page.locator(".solution")).to_be_visible()
    visit.page.get_by_role("tab", name="Ask").focus()
    keys.press("Tab")
    expect(visit.page.get_by_role("tab", name="Report")).to_be_focused()
    keys.press("Enter")
    expect(visit.page.locator("iframe.report")).to_be_visible()


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_screen(visits: Callable[..., Visit], width: int, tmp_path: Path) -> None:
    visit = visits(width=width)
    assert visit.too_wide() == []
    visit.renewed("problem", lambda: visit.send(FilePayload(name="a.png", mimeType="image/png", buffer=b"?")))
    assert visit.too_wide() == []
    long = "Donaudampfschifffahrtsgesellschaft" * 5
    panel = view.answer_panel(CALIBRATED, Answer(long, long, None, 0.3, {1.0: 0.3, 0.0: 0.7}, "open"))
    visit.page.evaluate("html => document.querySelector('#answers .answers').innerHTML += html", panel)
    assert visit.too_wide() == []
    shot = Image.open(io.BytesIO(visit.page.screenshot(full_page=True)))
    assert shot.width == width
    visit.page.get_by_role("tab", name="Report").click()
    expect(visit.page.locator("iframe.report")).to_be_visible()
    assert visit.too_wide() == []


def test_figures_are_readable_on_a_phone(visits: Callable[..., Visit]) -> None:
    """On a phone, where figures are small."""
    visit = visits(width=400)
    sizes = visit.page.locator("#curve svg text, #answers svg text").evaluate_all(
        "texts => texts.map(t => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a)"
    )
    assert min(sizes) >= 10
    edge = visit.page.locator("#answers .said.base").evaluate(
        "panel => getComputedStyle(panel).borderLeftWidth"
    )
    assert re.fullmatch(r"[1-9].*px", edge)
    targets = visit.page.locator("#scenes button").evaluate_all(
        "all => all.map(b => b.getBoundingClientRect().height)"
    )
    assert min(targets) >= 44
