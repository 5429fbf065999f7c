"""What the page refuses: files that are no images or too large, scripts in texts, data of other visits, other hosts."""

from __future__ import annotations

import io
import struct
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import FilePayload, expect

from vlm_calibration import cli
from vlm_calibration.app import view
from vlm_calibration.app.subject import MAX_PIXELS, MAX_UPLOAD, demo_subject
from vlm_calibration.inference.answers import Answer
from vlm_calibration.inference.model import BASE, DEMO_MODEL

from .browser import SCENE, App, Visit, names_of, shown_answers

HTML = '<img src=x onerror="window.ran = 1"><script>window.ran = 1</script><b>bold</b>'


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
def test_files_that_are_no_images_are_refused(
    visit: Visit, app: App, content: Callable[[], bytes], says: str
) -> None:
    before, seen = shown_answers(visit), visit.seen()
    visit.renewed(
        "problem", lambda: visit.send(FilePayload(name="a.png", mimeType="image/png", buffer=content()))
    )
    alert = visit.page.get_by_role("alert").filter(has_text=says)
    expect(alert).to_be_visible()
    assert str(app.folder) not in alert.inner_text()
    assert shown_answers(visit) == before
    np.testing.assert_array_equal(visit.seen(), seen)
    visit.choose_scene(SCENE)
    expect(visit.page.locator("#problem")).to_be_hidden()


def test_files_that_are_too_large_are_refused(visit: Visit, app: App, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(_png(10, 10) + b"\0" * (MAX_UPLOAD + 1000))
    visit.renewed("problem", lambda: visit.send(path))
    expect(visit.page.get_by_role("alert")).to_have_text("the image: a file of more than 20 MB; shrink it")
    assert not [file for file in app.files() if file.stat().st_size > MAX_UPLOAD // 2]
    visit.choose_scene(SCENE)
    expect(visit.page.locator("#problem")).to_be_hidden()


def test_texts_are_not_run_as_scripts(visit: Visit) -> None:
    visit.ask(f"Is there a {HTML} in the image?")
    assert visit.page.get_by_label("Question", exact=True).input_value() == f"Is there a {HTML} in the image?"
    # The text of a model, as the page shows it.
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
    other.set_strength(100)
    assert other.page.get_by_label("Question", exact=True).input_value() == demo_subject(0).question
    mask = demo_subject(0).objects[names_of(0)[0]]
    np.testing.assert_array_equal(other.seen()[~mask], default[~mask])
    other.choose_scene(SCENE)
    one.ask("Is there a guitar in the image?")
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
