"""A visit to `vlm-calibration app` in a real browser."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from vlm_calibration import cli
from vlm_calibration.app.page import answer_rows
from vlm_calibration.app.subject import demo_subject
from vlm_calibration.inference.model import BASE, CALIBRATED, DEMO_MODEL, CalibratedModel

from ..command_line import LIMIT, Capture, restore_sigint


@pytest.fixture
def port(adapter_run: Path, tmp_path: Path) -> Iterator[int]:
    """The port of a server of the page, which must end without errors and without files."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = int(taken.getsockname()[1])
    (tmp_path / "temporary").mkdir()
    (tmp_path / "report.html").write_text("<h1>The report of a run</h1>", encoding="utf-8")
    options = ["--port", str(port), "--adapter", str(adapter_run), "--device", "cpu"]
    command = [sys.executable, "-m", "vlm_calibration.cli", "app", *options, "--report", "report.html"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "temporary")}
    place: dict[str, Any] = {"cwd": tmp_path, "env": environment, "preexec_fn": restore_sigint}
    with (tmp_path / "stderr").open("w") as errors:
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, **place)
    try:
        end = time.monotonic() + LIMIT
        while not _answers(port):
            assert server.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < end, "the page does not start"
            time.sleep(0.2)
        yield port
        server.send_signal(signal.SIGINT)
        assert server.wait(LIMIT) == 0
        lines = (tmp_path / "stderr").read_text().splitlines()
        assert [line for line in lines if not line.startswith("loading a model")] == []
        assert [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()] == []
    finally:
        server.kill()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=LIMIT) as reply:
            assert "default-src 'self'" in reply.headers["content-security-policy"]
            return bool(reply.status == 200)
    except OSError:
        return False


def test_a_visit(browser: Browser, port: int, calibrated: CalibratedModel, capsys: Capture) -> None:
    """A scene, a strength, a painted region and the report; nothing comes from elsewhere, and no script complains."""
    page = browser.new_page(viewport={"width": 1280, "height": 1600})
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    hosts: set[str] = set()
    complaints: list[str] = []
    page.on("request", lambda r: hosts.add(r.url.split("/")[2]) if r.url.startswith("http") else None)
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"http://127.0.0.1:{port}")

    def shows(index: int) -> None:
        subject = demo_subject(index)
        base = calibrated.ask(subject.image, subject.question, as_base=True)
        asked = {BASE: base, CALIBRATED: calibrated.ask(subject.image, subject.question)}
        expect(page.get_by_label("Question", exact=True)).to_have_value(subject.question)
        for row in answer_rows(asked):
            shown = page.get_by_role("row").filter(has_text=row[0])
            expect(shown).to_have_text(re.compile(r"\s*".join(map(re.escape, row[:4]))))

    shows(0)
    page.locator("#scenes button").nth(2).click()
    shows(2)
    expect(page.locator("#curve canvas, #curve svg").first).to_be_visible()
    seen = page.locator("#seen img")
    before = seen.get_attribute("src")
    page.locator("#strength input[type=number]").fill("100")
    page.locator("#strength input[type=number]").press("Enter")
    expect(seen).not_to_have_attribute("src", before or "")

    canvas = page.locator("#picture canvas").first.bounding_box()
    assert canvas is not None
    x, y = canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=8)
    page.mouse.up()
    expect(page.locator("#object input")).to_have_value("what I paint")
    before = seen.get_attribute("src")
    page.locator("#ask").click()
    expect(seen).not_to_have_attribute("src", before or "")

    page.get_by_role("tab", name="Report").click()
    frame = page.frame_locator("iframe[title=Report]")
    expect(frame.get_by_role("heading")).to_have_text("The report of a run")
    page.close()
    assert complaints == []
    assert hosts == {f"127.0.0.1:{port}"}

    request = urllib.request.Request(f"http://127.0.0.1:{port}", headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=30)
    assert cli.main(["app", "--port", str(port), "--base", str(DEMO_MODEL), "--device", "cpu"]) == 1
    assert f"vlm-calibration: error: --port {port}: " in capsys.readouterr().err
