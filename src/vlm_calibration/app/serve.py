"""Serves the page to this machine only: Gradio's settings, the loopback address, the upload limit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_calibration.app.subject import MAX_UPLOAD
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    from vlm_calibration.app.page import PageHandlers
    from vlm_calibration.app.subject import KeyObjectFinder
    from vlm_calibration.inference.asking import Asker

HOST = "127.0.0.1"
_TAB_LEAVES_LISTS = """() => document.addEventListener('keydown', (event) => {
  if (event.key !== 'Tab' || !event.target.matches('[role=combobox]')) return;
  event.stopPropagation();
  document.querySelectorAll('[role=listbox]').forEach((list) => { list.tabIndex = -1; });
}, true)"""
"""Tab goes from a dropdown to the next control and closes its list. Gradio would open the list again after the focus has left, and
Chromium would focus a list that scrolls, which disappears and takes the focus with it."""


@contextmanager
def _gradio_environment() -> Iterator[None]:
    """Disable Gradio telemetry; delete temporary files on exit. Gradio reads these settings when it is imported."""
    with tempfile.TemporaryDirectory(prefix="vlm-calibration-") as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "HF_HUB_OFFLINE": "1"}
        yield


def serve(model: Asker, finder: KeyObjectFinder | None, report: Path, port: int) -> None:
    """Serve the page on the loopback interface until interrupted.

    Args:
        model: the model that answers.
        finder: finds key objects in uploaded images; None: visitors paint them.
        report: page of the second tab; it may appear later.
        port: port on 127.0.0.1.

    Raises:
        DataError: the port is in use.
    """
    with _gradio_environment():
        from vlm_calibration.app.page import PageHandlers

        try:
            page, settings = build(PageHandlers(model, finder, report), port)
            print(f"http://{HOST}:{port} (Ctrl+C stops it)", flush=True)
            page.launch(**settings)
        except OSError as error:
            raise DataError(f"--port {port}: {error}") from error


def build(handlers: PageHandlers, port: int) -> tuple[Any, dict[str, Any]]:
    """Build the page, and the arguments of its `launch`."""
    import gradio as gr
    from starlette.middleware import Middleware

    from vlm_calibration.app.page import build_page
    from vlm_calibration.app.upload_limit import Guard

    theme = gr.themes.Base(
        primary_hue="blue",
        # System fonts: others would be downloaded.
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        # White text has a contrast of 3.7 on Gradio's own shade, and of 5.2 on this one.
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )
    settings = {
        "server_name": HOST,
        "server_port": port,
        "share": False,
        "quiet": True,
        "ssr_mode": False,
        "pwa": False,
        "run_history": False,
        "enable_monitoring": False,
        "footer_links": [],
        "max_file_size": MAX_UPLOAD,
        "theme": theme,
        "js": _TAB_LEAVES_LISTS,
        "css": Path(__file__).with_name("page.css").read_text(encoding="utf-8"),
        "app_kwargs": {
            "middleware": [Middleware(Guard, hosts=(HOST, "localhost"), max_body=MAX_UPLOAD + (1 << 20))]
        },
    }
    return build_page(handlers), settings
