"""A headless Chromium, and photographs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser with a new profile. While it is open, no other test may start an event loop.

    Without Chromium the tests fail for root, who can install it, and are skipped for others.
    """
    if not Path(CHROMIUM).is_file():
        why = f"THE WEB PAGE IS NOT TESTED: {CHROMIUM} not found; tests/app/setup installs it"
        (pytest.fail if os.geteuid() == 0 else pytest.skip)(why)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()
