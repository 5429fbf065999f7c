"""Serves the page to this machine only: Gradio's settings, the loopback address, allowed host names, the upload limit."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_calibration.app.subject import MAX_UPLOAD, KeyObjectFinder
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    from vlm_calibration.app.page import PageHandlers
    from vlm_calibration.inference.asking import CalibratedModel

HOST = "127.0.0.1"


def serve(model: CalibratedModel, finder: KeyObjectFinder | None, report: Path, port: int) -> None:
    """Serve the page on `port` of the loopback interface until interrupted; the others are for `PageHandlers`. DataError if it is in use."""
    # Disable Gradio telemetry; delete temporary files on exit. Gradio reads these settings when it is imported.
    with tempfile.TemporaryDirectory(prefix="vlm-calibration-") as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "HF_HUB_OFFLINE": "1"}
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
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from vlm_calibration.app.page import build_page

    # Browsers load nothing from elsewhere. Gradio's pages use inline scripts and styles.
    sources = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
    policy = f"{sources}; object-src 'none'; frame-ancestors 'self'"

    async def add_policy(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers.setdefault("content-security-policy", policy)
        return response

    # Against DNS rebinding.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)
    # System fonts: others would be downloaded.
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return build_page(handlers), {
        "server_name": HOST,
        "server_port": port,
        "quiet": True,
        **dict.fromkeys(("share", "ssr_mode", "run_history", "enable_monitoring"), False),
        "footer_links": [],
        "max_file_size": MAX_UPLOAD,
        "theme": gr.themes.Base(primary_hue="blue", **fonts),
        "app_kwargs": {"middleware": [hosts, Middleware(BaseHTTPMiddleware, dispatch=add_policy)]},
    }
