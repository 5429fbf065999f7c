"""`vlm-calibration app`: serves the page to this machine, and to nobody else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_calibration.app.options import add_model_options, load_model
from vlm_calibration.arguments import Parser, explained_errors, positive
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    from vlm_calibration.app.page import Desk
    from vlm_calibration.app.subject import KeyObjectFinder

HOST = "127.0.0.1"
MAX_UPLOAD = 20 << 20
"""Bytes of a file that may be sent."""
REPORTS = ("runs/demo/report.html", "runs/eval/report.html")


def app_parser() -> Parser:
    """The parser of `app`."""
    parser = Parser(
        "vlm-calibration app",
        description="A page to try out a base model and its calibrated adapter in, on this machine.",
    )
    parser.add_argument("--port", type=positive, default=7860, help="(default: 7860)")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help=f"page of the second tab (default: {' or '.join(REPORTS)})",
    )
    group = parser.add_argument_group("key objects of uploaded images")
    group.add_argument(
        "--detector",
        metavar="MODEL",
        help="e.g. IDEA-Research/grounding-dino-tiny; without one they are painted",
    )
    group.add_argument("--segmenter", metavar="MODEL", help="e.g. facebook/sam2.1-hiera-tiny")
    add_model_options(parser)
    return parser


def app_command(args: Sequence[str]) -> None:
    """Read the arguments behind `app`, and serve until interrupted.

    Raises:
        ArgumentError: they make no sense. DataError: a model that cannot be loaded, a port in use, or no Gradio.
    """
    with explained_errors(parser := app_parser()):
        found = parser.parse_args(args)
    if (found.detector is None) != (found.segmenter is None):
        parser.error("--detector and --segmenter belong together")
    if find_spec("gradio") is None:
        raise DataError("the page needs Gradio: pip install 'vlm-calibration[app]'")
    finder = None if found.detector is None else _finder(found.detector, found.segmenter)
    model = load_model(found)
    if finder is not None:
        finder.load(model.model.device)
    report = found.report or next((Path(r) for r in REPORTS if Path(r).is_file()), Path(REPORTS[0]))
    with _settled():
        from vlm_calibration.app.page import Desk

        _serve(Desk(model, finder, report), found.port)


def _finder(detector: str, segmenter: str) -> KeyObjectFinder:
    """What finds key objects, not loaded yet.

    Raises:
        DataError: the tagger is not installed.
    """
    from vlm_calibration.app.subject import KeyObjectFinder
    from vlm_calibration.regions.detector import ZeroShotDetector
    from vlm_calibration.regions.phrases import RuleDescriber
    from vlm_calibration.regions.segmenter import PromptedSegmenter

    return KeyObjectFinder(RuleDescriber(), ZeroShotDetector(detector), PromptedSegmenter(segmenter))


@contextmanager
def _settled() -> Iterator[None]:
    """Gradio's settings, which it reads when it is imported: nothing is told to anyone, and files go when we go."""
    with tempfile.TemporaryDirectory(prefix="vlm-calibration-") as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "HF_HUB_OFFLINE": "1"}
        yield


def _serve(desk: Desk, port: int) -> None:
    try:
        page, settings = build(desk, port)
        print(f"http://{HOST}:{port} (Ctrl+C ends it)", flush=True)
        page.launch(**settings)
    except OSError as error:
        raise DataError(f"--port {port}: {error}") from error


def build(desk: Desk, port: int) -> tuple[Any, dict[str, Any]]:
    """The page, and how `launch` is to serve it."""
    import gradio as gr
    from starlette.middleware import Middleware

    from vlm_calibration.app.guard import Guard
    from vlm_calibration.app.page import build_page

    theme = gr.themes.Base(
        primary_hue="blue",
        # Those of the machine: others would be fetched from elsewhere.
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
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
        "css": Path(__file__).with_name("page.css").read_text(encoding="utf-8"),
        "app_kwargs": {
            "middleware": [Middleware(Guard, hosts=(HOST, "localhost"), max_body=MAX_UPLOAD + (1 << 20))]
        },
    }
    return build_page(desk), settings
