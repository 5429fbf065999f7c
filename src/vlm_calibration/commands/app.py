"""`vlm-calibration app`: serve the web page on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_calibration.arguments import Parser, explained_errors, positive
from vlm_calibration.commands.options import add_model_options, load_model
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    from vlm_calibration.app.subject import KeyObjectFinder

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
    from vlm_calibration.app.serve import serve

    finder = None if found.detector is None else _finder(found.detector, found.segmenter)
    model = load_model(found)
    if finder is not None:
        finder.load(model.model.device)
    report = found.report or next((Path(r) for r in REPORTS if Path(r).is_file()), Path(REPORTS[0]))
    serve(model, finder, report, found.port)


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
