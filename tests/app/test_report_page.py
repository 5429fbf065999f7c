"""The report page in a real browser: on a phone, in the dark, enlarged, by keyboard and printed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import yaml
from playwright.sync_api import Browser, Page

from vlm_calibration.commands.report import report
from vlm_calibration.files import write_rows
from vlm_calibration.records import Prediction

A4 = {"width": 700, "height": 1000}
"""The print area of a sheet in CSS pixels."""
CONTRAST = """
    selectors => {
      const light = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const opaque = e => { const c = getComputedStyle(e).backgroundColor;
        return c === 'rgba(0, 0, 0, 0)' ? opaque(e.parentElement) : c; };
      return selectors.map(s => document.querySelector(s)).map(e => {
        const [a, b] = [light(getComputedStyle(e).color), light(opaque(e))].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05); });
    }"""


def _answers(prefix: str, seed: int) -> list[dict[str, Any]]:
    """Answers in twelve groups with long names, with a confidence of ten levels and one of an estimator."""
    rng = np.random.default_rng(seed)
    shifts, kinds = ("untouched", "perturbed", "unfamiliar"), ("existence", "attribute", "relation")
    question = "Is there a dog behind the Donaudampfschifffahrtsgesellschaftskapitän?"
    answers = []
    for i in range(300):
        confidence, correct = int(rng.integers(1, 11)) / 10, bool(rng.random() < 0.6)
        said = ("Yes", "Yes. Confidence: 80%", "yes", confidence, correct)
        facts = (f"{prefix}{i}", question, *said, f"{shifts[i % 3]}/{kinds[i // 3 % 3]}", None, "yes_no")
        estimates = {"self_consistency": float(rng.random())}
        answers.append(Prediction(*facts, image=f"{prefix}{i // 2}.png", estimates=estimates))
    return [answer.to_dict() for answer in answers]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report about four systems, with recalibration."""
    folder = tmp_path_factory.mktemp("reported")
    for seed, name in enumerate(("base", "sft", "preference_optimised", "oracle")):
        (folder / name).mkdir()
        write_rows(folder / name / "predictions.jsonl", _answers("q", seed), lines=True)
        write_rows(folder / name / "calibration.jsonl", _answers("c", seed + 9), lines=True)
    adapters = {"sft": "runs/sft", "preference_optimised": "runs/dpo"}
    settings = {"model": {"init_args": {"base": {"name_or_path": "my/base"}, "adapters": adapters}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    report([str(folder)], images=False, replicates=10)
    return (folder / "report.html").as_uri()


@pytest.fixture
def page(browser: Browser, written: str) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(written)
    yield page
    context.close()


@pytest.mark.parametrize(("width", "height", "screens"), [(400, 800, 12), (640, 450, 32), (1280, 900, 20)])
def test_nothing_is_wider_than_the_screen(page: Page, width: int, height: int, screens: int) -> None:
    """On a phone, at 200% zoom and on a desktop; wide tables scroll in their boxes, which are no higher than the screen."""
    page.set_viewport_size({"width": width, "height": height})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.scrollHeight") < screens * height
    boxes = page.locator(".scroll")
    assert boxes.count() == page.locator("table").count()
    for box in boxes.evaluate_all(
        "boxes => boxes.map(b => b.getBoundingClientRect()).map(b => [b.right, b.height])"
    ):
        assert box[0] <= width
        assert box[1] < height
    column = page.locator("#groups ~ .scroll td:first-child").first.bounding_box()
    assert column is not None
    assert 60 < column["width"] < max(0.4 * width, 300), (
        "names of groups are neither broken into letters nor cover the table"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    names = [".verdict", ".soft", "nav a", "td .interval", "thead th", ".differs", ".agrees", ".item dt"]
    # Whether a range agrees is drawn by chance here.
    names = [name for name in (*names, "summary") if page.locator(name).count()]
    assert len(names) >= 7
    for name, contrast in zip(names, page.evaluate(CONTRAST, names), strict=True):
        assert contrast >= 4.5, name
    is_dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert is_dark == (scheme == "dark")


def test_sections_are_reached_by_keyboard(page: Page) -> None:
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#systems"
    page.keyboard.press("Enter")
    page.wait_for_function("Math.abs(document.getElementById('systems').getBoundingClientRect().top) < 2")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "The systems"


def test_printing_opens_folded_parts_and_cuts_no_table(page: Page) -> None:
    folded = page.locator("details table, details pre")
    assert folded.count() >= 4
    heights = "parts => parts.map(p => p.checkVisibility({contentVisibilityAuto: true}) ? p.offsetHeight : 0)"
    assert max(folded.evaluate_all(heights)) == 0
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size(A4)
    assert min(folded.evaluate_all(heights)) > 0
    tables = page.locator("table").evaluate_all("tables => tables.map(t => t.getBoundingClientRect().right)")
    assert max(tables) <= A4["width"]
    clipped = page.locator(".scroll").evaluate_all(
        "boxes => boxes.filter(b => b.scrollHeight > b.clientHeight + 1).length"
    )
    assert clipped == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
