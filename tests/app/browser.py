"""The page in a real browser: the command in a process of its own, and a headless Chromium that records requests and errors."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, FilePayload, Page, Request, expect
from playwright.sync_api import Error as BrowserError

from vlm_calibration.app.subject import demo_subject, named_in
from vlm_calibration.inference.model import BASE, CALIBRATED

from ..command_line import LIMIT, restore_sigint

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
expect.set_options(timeout=1000 * LIMIT)


def missing() -> str | None:
    """Why no browser can be started here, None if one can."""
    return None if Path(CHROMIUM).is_file() else f"{CHROMIUM} not found; tests/app/setup installs it"


class App:
    """`vlm-calibration app` on a free port, in a folder of its own, which also holds its temporary files."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self.folder = folder
        (folder / "temporary").mkdir()
        self.port = _free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.errors = folder / "stderr"
        command = [sys.executable, "-m", "vlm_calibration.cli", "app", "--port", str(self.port), *arguments]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "temporary")},
                stdout=subprocess.DEVNULL,
                stderr=errors,
                preexec_fn=restore_sigint,
            )

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.address, timeout=LIMIT) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def wait(self) -> None:
        end = time.monotonic() + LIMIT
        while not self.answers():
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < end, "the page does not start"
            time.sleep(0.2)

    def files(self) -> list[Path]:
        """Its temporary files."""
        return [path for path in (self.folder / "temporary").rglob("*") if path.is_file()]

    def interrupt(self) -> int:
        """Stop it as Ctrl+C does; returns the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(LIMIT)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Visit:
    """A visit to the page, in a new browser context.

    Attributes:
        page: Playwright's page.
        hosts: hosts that the page sent requests to.
        complaints: errors of its scripts and in its console.
    """

    def __init__(self, browser: Browser, address: str, width: int = 1280, height: int = 900) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height})
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(1000 * LIMIT)
        self.hosts: set[str] = set()
        self.complaints: list[str] = []
        self.page.on("request", self._requested)
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(address)
        # The curve appears last.
        self.page.locator("#curve figure").wait_for()

    def _requested(self, request: Request) -> None:
        if not request.url.startswith(("data:", "blob:", "about:")):
            self.hosts.add("/".join(request.url.split("/")[:3]))

    def _said(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def close(self) -> None:
        self.context.close()

    # Actions.

    def renewed(self, part: str, action: Callable[[], Any]) -> None:
        """Do something, and wait until a part of the page has been redrawn."""
        self.page.evaluate(
            "part => document.querySelectorAll(`#${part} .prose > *`).forEach(e => e.dataset.old = '')", part
        )
        action()
        self.page.locator(f"#{part} .prose > :not([data-old])").first.wait_for()

    def choose_scene(self, index: int) -> None:
        self.renewed("curve", self.page.locator("#scenes button").nth(index).click)

    def send(self, *file: str | Path | FilePayload) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.page.locator("#upload").click()
        chooser.value.set_files(*file)

    def ask(self, question: str) -> None:
        self.page.locator("#question textarea").fill(question)
        self.renewed("curve", self.page.locator("#ask").click)

    def choose_kind(self, name: str) -> None:
        """Choose a kind of perturbation by the name that is shown."""
        self.page.locator("#kind input").click()
        self.renewed("curve", self.page.get_by_role("option", name=name, exact=True).click)

    def set_strength(self, percent: int, wait: bool = True) -> None:
        """Drag the slider with the mouse; with `wait`, until the models have answered."""
        slider = self.page.locator("#strength input[type=range]")
        slider.scroll_into_view_if_needed()
        box = slider.bounding_box()
        assert box is not None
        at = self.page.evaluate("() => Number(document.querySelector('#strength input[type=range]').value)")
        # The knob's middle stays half its width away from either end.
        spots = [box["x"] + 8 + (box["width"] - 16) * share / 100 for share in (at, percent)]
        y = box["y"] + box["height"] / 2
        self.page.mouse.move(spots[0], y)
        self.page.mouse.down()
        self.page.mouse.move(spots[1], y, steps=3)
        self.page.mouse.up()
        expect(self.page.locator("#strength input[type=number]")).to_have_value(str(percent))
        if wait:
            self.answered(percent)

    def answered(self, strength: int) -> None:
        """Wait until picture, answers and the mark on the curve show this strength, in percent."""
        caption = f"{strength}% " if strength else "the image untouched"
        expect(self.page.locator("#seen figcaption")).to_contain_text(f": {caption}")
        self.page.locator(f"#answers .answers[data-strength='{strength}']").wait_for()
        self.page.locator(f"#curve .curve[data-strength='{strength}']").wait_for()

    def paint(self, *spots: tuple[float, float]) -> None:
        """Draw a line through points, in shares of the picture's width and height."""
        canvas = self.page.locator("#marker canvas")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        assert box is not None
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in spots]
        self.page.mouse.move(*points[0])
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*point, steps=4)
        self.page.mouse.up()

    def until(self, condition: Callable[[], bool], message: Callable[[], str]) -> None:
        """Wait until a condition is true; fail with a message if it never is."""
        end = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < end, message()
            self.page.wait_for_timeout(100)

    # Observations.

    def seen(self) -> np.ndarray:
        """The image as the models see it, uint8 [H, W, 3]."""
        source = self.page.locator("#seen img").get_attribute("src")
        assert source is not None
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB"))

    def object(self) -> str:
        return self.page.locator("#object input").input_value()

    def objects(self) -> list[str]:
        """The options for the key object."""
        self.page.locator("#object input").click()
        offered = self.page.get_by_role("option").all_inner_texts()
        self.page.keyboard.press("Escape")
        return [re.sub(r"^✓\s*", "", name).strip() for name in offered]

    def said(self, system: str) -> tuple[str, str, str]:
        """A system's answer, and its stated and its expected confidence, as shown."""
        panel = self.page.locator(f"#answers .said.{system}")
        values = [panel.locator(f"[data-bar={bar}]").inner_text() for bar in ("stated", "expected")]
        return panel.locator(".answer").inner_text(), values[0], values[1]

    def bars(self, system: str) -> list[float]:
        """Widths of a system's two bars as shares of their tracks."""
        widths = """bars => bars.map(bar => bar.firstChild.getBoundingClientRect().width / bar.getBoundingClientRect().width)"""
        shares: list[float] = self.page.locator(f"#answers .said.{system} .track").evaluate_all(widths)
        return shares

    def too_wide(self) -> list[str]:
        """Elements of the page that are wider than its window."""
        return list(
            self.page.evaluate(
                """() => {
                  const width = document.documentElement.clientWidth;
                  const out = [...document.body.querySelectorAll('*')].filter(e => {
                    const box = e.getBoundingClientRect();
                    return e.checkVisibility() && box.width > 1 && (box.right > width + 1 || box.left < -1);
                  }).map(e => `${e.tagName} ${e.className.baseVal ?? e.className} in #${e.closest('[id]')?.id}`);
                  return document.documentElement.scrollWidth > width ? ['the page itself', ...out] : out;
                }"""
            )
        )


def is_error(call: Callable[[], Any]) -> bool:
    """Whether a call raises an error of the browser."""
    try:
        call()
    except BrowserError:
        return True
    return False


SCENE = 2
"""The scene of most tests."""


def names_of(scene: int) -> list[str]:
    """The objects of a scene of the demo, first the one that its question names."""
    subject = demo_subject(scene)
    asked = named_in(subject.question, list(subject.objects))
    assert asked is not None
    return [asked, *(name for name in subject.objects if name != asked)]


def shown_answers(visit: Visit) -> dict[str, tuple[str, str, str]]:
    """Answer, stated and expected confidence of each system, as the page shows them."""
    return {system: visit.said(system) for system in (BASE, CALIBRATED)}
