"""`vlm-calibration app` in a real browser: what a visitor does, sees and is kept from.

An adapter is trained for this as a user would, a little and on two levels of noise alone: 100% sure of what it sees, 0% of
noise. All is asked of one server; at its end it must have nothing to complain of, nor may any visit.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, FilePayload, expect, sync_playwright

from vlm_calibration import cli
from vlm_calibration.app import view
from vlm_calibration.app.subject import DRAWN, MAX_PIXELS, MAX_UPLOAD, WHOLE, demo_subject
from vlm_calibration.commands.report import report
from vlm_calibration.inference.answers import Answer
from vlm_calibration.inference.model import BASE, CALIBRATED, DEMO_MODEL, CalibratedModel, load_calibrated

from ..command_line import Server
from .browser import CHROMIUM, FLAGS, App, Visit, is_error, missing

HTML = '<img src=x onerror="window.ran = 1"><script>window.ran = 1</script><b>bold</b>'
SCENE = 2
"""The scene that most tests begin with, in which a question is about the cow."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if why := missing():
        # Whoever is root can install it.
        (pytest.fail if os.geteuid() == 0 else pytest.skip)(f"THE WEB PAGE IS NOT TESTED: {why}")
    with sync_playwright() as playwright:
        # Its profile is a new folder, which goes with it.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="module")
def trained_run(root: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    settings = {
        "trainer.max_steps": 50,
        "trainer.default_root_dir": str(folder),
        "trainer.logger": False,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": False,
        "trainer.callbacks": [{"class_path": "vlm_calibration.callbacks.adapter.AdapterWriter"}],
        "model.init_args.base.name_or_path": str(DEMO_MODEL),
        "model.init_args.optimizer.lr": 3e-3,
        "model.init_args.answer_weight": "constant",
        "model.init_args.confidence_weight": 3,
        "data.workers": 0,
        "data.noise.absent": "skip",
        "data.noise.wrong_answer_rate": 0,
        "data.noise.levels": {
            "class_path": "vlm_calibration.perturbation.levels.LinearLevels",
            "init_args": {"n_levels": 2},
        },
        "data.noise.level_weights": [1, 1],
    }
    given = [word for name, value in settings.items() for word in (f"--{name}", json.dumps(value).strip('"'))]
    ended = server.wait(server.start(["fit", "--config", str(root / "configs/sft.yaml"), *given], root))
    assert ended.status == 0, ended.err
    return folder


@pytest.fixture(scope="module")
def model(trained_run: Path) -> CalibratedModel:
    """What the page asks, to be asked without it."""
    return load_calibrated(adapter=trained_run, device="cpu")


@pytest.fixture(scope="module")
def report_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    for name, confidence in (("base", 1.0), ("sft", 0.6)):
        rows = [
            {
                "id": f"{i}",
                "question": f"Is there a cow in picture {i}?",
                "answer": "Yes" if i % 5 < 3 else "No",
                "text": f"Yes. Confidence: {confidence:.0%}",
                "predicted": "yes",
                "confidence": confidence,
                "correct": i % 5 < 3,
                "category": None,
                "noise_step": None,
                "answer_type": "yes_no",
            }
            for i in range(40)
        ]
        (folder / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / "predictions.jsonl").write_text(lines)
    report([str(folder)], images=False, replicates=10)
    return folder / "report.html"


@pytest.fixture(scope="module")
def app(
    browser: Browser, trained_run: Path, report_page: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[App]:
    arguments = ("--adapter", str(trained_run), "--report", str(report_page), "--device", "cpu")
    started = App(tmp_path_factory.mktemp("app"), arguments)
    try:
        started.wait()
        yield started
        status = started.interrupt()
        assert (status, started.errors.read_text()) == (0, ""), "it ends in good order"
        assert started.files() == [], "what was sent to it goes with it"
    finally:
        started.process.kill()


@pytest.fixture
def visits(browser: Browser, app: App) -> Iterator[Callable[..., Visit]]:
    """Begins visits, each in a profile of its own; none may have errors, or send anything to anybody else."""
    begun: list[Visit] = []

    def visit(**size: int) -> Visit:
        begun.append(Visit(browser, app.address, **size))
        return begun[-1]

    yield visit
    for one in begun:
        one.close()
    assert [one.complaints for one in begun] == [[]] * len(begun)
    assert {host for one in begun for host in one.hosts} == {app.address}


@pytest.fixture
def visit(visits: Callable[..., Visit]) -> Visit:
    return visits()


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """An image that is not of the demo: a red disc on a slope of greys, wider than high."""
    y, x = np.mgrid[:180, :300]
    pixels = np.repeat((x * 255 // 300)[..., None], 3, axis=2).astype(np.uint8)
    pixels[(y - 90) ** 2 + (x - 220) ** 2 < 40**2] = (220, 30, 30)
    path = tmp_path / "photograph.png"
    Image.fromarray(pixels).save(path)
    return path


def _shown(answer: Answer) -> tuple[str, str, str]:
    stated, expected = ("none" if c is None else f"{c:.0%}" for c in (answer.confidence, answer.expected))
    return answer.answer, stated, expected


def _said(visit: Visit) -> dict[str, tuple[str, str, str]]:
    return {system: visit.said(system) for system in (BASE, CALIBRATED)}


def _asked(model: CalibratedModel, image: Any, question: str) -> dict[str, tuple[str, str, str]]:
    """What should be said, by the same model without a page."""
    return {
        BASE: _shown(model.ask(image, question, as_base=True)),
        CALIBRATED: _shown(model.ask(image, question)),
    }


def _percent(shown: str) -> int:
    return int(shown.removesuffix("%"))


# --- Asking ---------------------------------------------------------------------------------------------------------


def test_a_scene_of_the_demo_is_answered(visit: Visit, model: CalibratedModel) -> None:
    first = _said(visit)
    assert first == _asked(model, demo_subject(0).image, demo_subject(0).question)
    visit.choose_scene(SCENE)
    subject = demo_subject(SCENE)
    assert visit.page.get_by_label("Question").input_value() == subject.question
    assert visit.object() == "cow"
    assert visit.objects() == [*subject.objects, DRAWN, WHOLE]
    assert _said(visit) == _asked(model, subject.image, subject.question)
    np.testing.assert_array_equal(visit.seen(), subject.image)
    visit.ask("Is there a guitar in the image?")
    assert _said(visit) == _asked(model, subject.image, "Is there a guitar in the image?")


def test_a_question_names_the_key_object(visit: Visit) -> None:
    assert visit.object() == "horse"
    visit.page.get_by_label("Question").press_sequentially(" Or a pig?")
    assert visit.object() == "horse", "the first one that it names"
    visit.page.get_by_label("Question").fill("Can you see pigs?")
    expect(visit.page.locator("#object input")).to_have_value("pig")


def test_an_image_of_ones_own(visit: Visit, model: CalibratedModel, app: App, photograph: Path) -> None:
    visit.set_noise(50)
    visit.renewed("curve", lambda: visit.send(photograph))
    assert visit.page.locator("#noise input[type=number]").input_value() == "0"
    assert visit.objects() == [DRAWN, WHOLE], "nothing is known of its objects"
    question = visit.page.get_by_label("Question")
    question.fill("Is there a ball in the picture?")
    question.press("Enter")
    wanted = _asked(model, photograph, "Is there a ball in the picture?")
    # What was asked before, about the image alone and while the slider moved, is answered first.
    visit.until(lambda: _said(visit) == wanted, lambda: f"{_said(visit)}, not {wanted}")
    clean = visit.seen()
    assert clean.shape == (96, 96, 3), "as the model takes it"
    assert clean[48, 70, 0] > clean[48, 70, 1] + 100, "the disc"
    visit.set_noise(100)
    assert (visit.seen() != clean).any(axis=2).mean() > 0.99, "the whole image is noise"
    assert not [path for path in app.files() if path.suffix == ".png"], "it is not kept on the disk"


def test_another_image_comes_while_answers_are_on_their_way(visit: Visit, photograph: Path) -> None:
    visit.set_noise(50, wait=False)
    visit.send(photograph)
    expect(visit.page.locator("#object input")).to_have_value(WHOLE)
    visit.answered(0)
    expect(visit.page.get_by_text("Error", exact=True)).to_have_count(0)


def test_noise_on_the_key_object(visit: Visit) -> None:
    visit.choose_scene(SCENE)
    mask = demo_subject(SCENE).objects["cow"]
    clean, before, bars = visit.seen(), _said(visit), visit.bars(CALIBRATED)
    assert before[CALIBRATED][1] == "100%"
    assert bars == pytest.approx([1, _percent(before[CALIBRATED][2]) / 100], abs=0.02)
    marked = visit.page.locator("#curve line.now")
    left = float(marked.get_attribute("x1") or "")

    visit.set_noise(100)
    changed = (visit.seen() != clean).any(axis=2)
    assert not changed[~mask].any(), "noise beside the key object"
    assert changed[mask].mean() > 0.98
    expect(visit.page.locator("#seen figcaption")).to_have_text("What the models see: 100% noise on cow")
    after, bars = _said(visit), visit.bars(CALIBRATED)
    assert after[CALIBRATED][1] == "0%", "it says that it cannot know"
    assert _percent(after[CALIBRATED][2]) < 60
    assert bars == pytest.approx([0, _percent(after[CALIBRATED][2]) / 100], abs=0.02)
    assert after[BASE][1] == before[BASE][1], "the base model is as sure as ever"
    expect(marked).not_to_have_attribute("x1", f"{left:.1f}")
    assert float(marked.get_attribute("x1") or "") == left + 420

    visit.set_noise(0)
    np.testing.assert_array_equal(visit.seen(), clean)
    assert _said(visit) == before


def test_another_key_object_gets_the_noise(visit: Visit) -> None:
    visit.choose_scene(SCENE)
    clean = visit.seen()
    visit.page.locator("#object input").click()
    visit.renewed("curve", visit.page.get_by_role("option", name="dog").click)
    visit.set_noise(100)
    changed = (visit.seen() != clean).any(axis=2)
    assert changed[demo_subject(SCENE).objects["dog"]].mean() > 0.98
    assert not changed[~demo_subject(SCENE).objects["dog"]].any()


def test_painting_marks_the_key_object(visit: Visit) -> None:
    visit.choose_scene(SCENE)
    clean = visit.seen()
    visit.renewed("curve", lambda: visit.paint((0.2, 0.8), (0.4, 0.8)))
    assert visit.object() == DRAWN
    visit.set_noise(100)
    changed = (visit.seen() != clean).any(axis=2)
    y, x = np.nonzero(changed)
    # The brush is 14% of the picture wide, with round ends.
    wanted = [0.2 - 0.07, 0.4 + 0.07, 0.8 - 0.07, 0.8 + 0.07]
    found = np.array([x.min(), x.max() + 1, y.min(), y.max() + 1]) / 96
    assert found == pytest.approx(wanted, abs=0.02)
    assert changed.mean() == pytest.approx(0.2 * 0.14 + np.pi * 0.07**2, rel=0.1)

    visit.renewed("curve", visit.page.get_by_role("button", name="Clear paint").click)
    for part in ("seen", "curve"):
        expect(visit.page.locator(f"#{part} .notice")).to_have_text(
            "Paint over the key object to put noise on it."
        )
    visit.renewed("curve", lambda: visit.paint((0.7, 0.3), (0.7, 0.31)))
    assert (visit.seen() != clean).any(axis=2)[29, 67]


def test_the_response_curve(visit: Visit, model: CalibratedModel) -> None:
    visit.choose_scene(SCENE)
    curve = visit.page.locator("#curve figure")
    words = curve.locator("> svg").get_attribute("aria-label") or ""
    assert "Calibrated model: states 100% without noise and 0% where nothing is left." in words
    subject = demo_subject(SCENE)
    for system in (BASE, CALIBRATED):
        drawn = curve.locator(f"> svg g.{system}")
        line = [p.split(",") for p in (drawn.locator("polyline").get_attribute("points") or "").split()]
        assert [float(x) for x, _ in line] == pytest.approx([44 + 42 * level for level in range(11)])
        samples = [
            model.sample(subject.image, subject.question, mask=subject.objects["cow"], step=step)
            for step in (0, 500, 1000)
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


def test_the_report(visit: Visit) -> None:
    visit.page.get_by_role("tab", name="Report").click()
    frame = visit.page.frame_locator("iframe.report")
    expect(frame.locator("h1").first).to_be_visible()
    assert "sft" in frame.locator("body").inner_text()
    [inner] = [f for f in visit.page.frames if f is not visit.page.main_frame]
    assert inner.evaluate("1 + 1") == 2, "its own scripts run"
    assert is_error(lambda: inner.evaluate("() => parent.document.title")), "but reach nothing of the page"
    visit.page.get_by_role("tab", name="Ask").click()
    expect(visit.page.locator("#curve figure")).to_be_visible()


# --- What is refused ------------------------------------------------------------------------------------------------


def _bomb() -> bytes:
    """A PNG of a few bytes that claims to have 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


def _png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (_bomb, "the image: a decompression bomb by its size, more than the"),
        (partial(_png, 8000, MAX_PIXELS // 8000 + 1), "the image: 8000 x 6251 pixels, more than the"),
        (lambda: b"Not a picture, whatever its name says.", "the image: not an image in a format"),
        (lambda: _png(300, 300)[:90], "the image: damaged or truncated"),
    ],
    ids=["bomb", "too many pixels", "text", "torn"],
)
def test_what_is_no_image_is_refused(visit: Visit, app: App, content: Callable[[], bytes], says: str) -> None:
    before, seen = _said(visit), visit.seen()
    visit.renewed(
        "problem", lambda: visit.send(FilePayload(name="a.png", mimeType="image/png", buffer=content()))
    )
    alert = visit.page.get_by_role("alert").filter(has_text=says)
    expect(alert).to_be_visible()
    assert str(app.folder) not in alert.inner_text()
    assert _said(visit) == before
    np.testing.assert_array_equal(visit.seen(), seen)
    visit.choose_scene(SCENE)
    expect(visit.page.locator("#problem")).to_be_hidden()


def test_what_is_too_large_is_refused(visit: Visit, app: App, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(_png(10, 10) + b"\0" * (MAX_UPLOAD + 1000))
    visit.renewed("problem", lambda: visit.send(path))
    expect(visit.page.get_by_role("alert")).to_have_text("the image: a file of more than 20 MB; shrink it")
    assert not [file for file in app.files() if file.stat().st_size > MAX_UPLOAD // 2]
    visit.choose_scene(SCENE)
    expect(visit.page.locator("#problem")).to_be_hidden()


def test_nothing_that_is_written_is_run(visit: Visit) -> None:
    visit.ask(f"Is there a {HTML} in the image?")
    assert visit.page.get_by_label("Question").input_value() == f"Is there a {HTML} in the image?"
    # What a model says, as the page shows it.
    written = Answer(HTML, HTML, None, None, {}, "open")
    panel = view.answer_panel(BASE, written) + view.notice(HTML)
    visit.page.evaluate("html => document.querySelector('#answers').innerHTML = html", panel)
    assert visit.page.locator("#answers .answer").inner_text() == HTML
    assert visit.page.locator("#answers .notice").inner_text() == HTML
    assert visit.page.locator("#answers").locator("script, b, img").count() == 0
    assert visit.page.evaluate("window.ran") is None


def test_visits_share_nothing(visits: Callable[..., Visit], photograph: Path) -> None:
    one, other = visits(), visits()
    default = other.seen()
    one.renewed("curve", lambda: one.send(photograph))
    one.ask("Is there a secret?")
    own = one.seen()
    other.set_noise(100)
    assert other.page.get_by_label("Question").input_value() == demo_subject(0).question
    mask = demo_subject(0).objects["horse"]
    np.testing.assert_array_equal(other.seen()[~mask], default[~mask])
    other.choose_scene(SCENE)
    one.ask("Is there another secret?")
    np.testing.assert_array_equal(one.seen(), own)
    third = visits()
    np.testing.assert_array_equal(third.seen(), default)
    assert "secret" not in third.page.content()


def test_the_page_stays_on_this_machine(visit: Visit, app: App) -> None:
    blocked = visit.page.evaluate(
        """async url => {
          const told = new Promise(done => document.addEventListener('securitypolicyviolation', e => done(e.blockedURI)));
          fetch(url).catch(() => null);
          return await told;
        }""",
        "http://192.0.2.1/",
    )
    assert blocked.startswith("http://192.0.2.1")
    assert visit.complaints
    assert all("Content Security Policy" in complaint for complaint in visit.complaints)
    visit.complaints.clear()

    request = urllib.request.Request(app.address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="421"):
        urllib.request.urlopen(request, timeout=30)


def test_a_port_that_is_taken_is_named(app: App, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["app", "--port", str(app.port), "--base", str(DEMO_MODEL), "--device", "cpu"]) == 1
    assert f"vlm-calibration: error: --port {app.port}: " in capsys.readouterr().err


# --- Everybody's page -----------------------------------------------------------------------------------------------


def _tab_to(visit: Visit, selector: str) -> None:
    """Go on by the Tab key to what matches this, and see that it shows."""
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


def test_all_is_done_with_the_keyboard(visit: Visit) -> None:
    keys = visit.page.keyboard
    # Playwright asks the browser to tell it of file choosers when it is first listened for, too late for a key's speed.
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
    _tab_to(visit, "#noise input[type=range]")
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
    _tab_to(visit, "#question textarea")
    keys.press("Control+A")
    keys.type("Is there a house?")
    visit.renewed("curve", lambda: keys.press("Enter"))
    _tab_to(visit, "#ask")
    visit.page.get_by_role("tab", name="Ask").focus()
    keys.press("Tab")
    expect(visit.page.get_by_role("tab", name="Report")).to_be_focused()
    keys.press("Enter")
    expect(visit.page.locator("iframe.report")).to_be_visible()


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out(visits: Callable[..., Visit], width: int, tmp_path: Path) -> None:
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


def test_what_is_shown_can_be_read(visits: Callable[..., Visit]) -> None:
    """Also on a telephone, whose figures are small."""
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
