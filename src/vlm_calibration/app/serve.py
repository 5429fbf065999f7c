"""Serves the page to this machine only: Gradio's settings, the loopback address, allowed host names, the upload limit."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_calibration.app.subject import MAX_UPLOAD
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    from vlm_calibration.app.page import PageHandlers
    from vlm_calibration.app.subject import KeyObjectFinder
    from vlm_calibration.inference.asking import Asker

HOST = "127.0.0.1"
POLICY = (
    b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; frame-ancestors 'self'"
)
"""Browsers load nothing from elsewhere. Gradio's pages use inline scripts and styles."""


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
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from vlm_calibration.app.page import build_page

    settings = {
        "server_name": HOST,
        "server_port": port,
        "share": False,
        "quiet": True,
        "ssr_mode": False,
        "run_history": False,
        "enable_monitoring": False,
        "footer_links": [],
        "max_file_size": MAX_UPLOAD,
        # System fonts: others would be downloaded.
        "theme": gr.themes.Base(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="blue"
        ),
        "app_kwargs": {
            "middleware": [
                # Against DNS rebinding.
                Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False),
                Middleware(SecurityPolicy),
            ]
        },
    }
    return build_page(handlers), settings


class SecurityPolicy:
    """ASGI middleware that adds `POLICY` to responses without a policy of their own."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", []))
                if b"content-security-policy" not in {name.lower() for name, _ in headers}:
                    headers.append((b"content-security-policy", POLICY))
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_policy)
