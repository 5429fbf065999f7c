"""`vlm-calibration app`: serve the web page on this machine."""

from __future__ import annotations

from argparse import ArgumentError
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from jsonargparse.typing import PositiveInt

from vlm_calibration.commands.options import ModelOptions, load_model
from vlm_calibration.records import DataError


@dataclass(frozen=True)
class FinderOptions:
    """key objects of uploaded images

    Attributes:
        detector: e.g. IDEA-Research/grounding-dino-tiny; without a detector, visitors paint key objects
        segmenter: e.g. facebook/sam2.1-hiera-tiny
    """

    detector: str | None = None
    segmenter: str | None = None


def app(
    *,
    port: PositiveInt = PositiveInt(7860),
    report: Path | None = None,
    model: ModelOptions,
    key_objects: FinderOptions,
) -> None:
    """Serve a page to try out a base model and its calibrated adapter, on this machine, until interrupted.

    Args:
        port: port on 127.0.0.1
        report: page of the second tab (default: runs/demo/report.html or runs/eval/report.html)
    """
    detector, segmenter = key_objects.detector, key_objects.segmenter
    if (detector is None) != (segmenter is None):
        raise ArgumentError(None, "--detector and --segmenter belong together")
    if find_spec("gradio") is None:
        raise DataError("the page needs Gradio: pip install 'vlm-calibration[app]'")
    finder = None
    if detector is not None and segmenter is not None:
        from vlm_calibration.app.subject import KeyObjectFinder
        from vlm_calibration.regions.detector import ZeroShotDetector
        from vlm_calibration.regions.phrases import RuleDescriber
        from vlm_calibration.regions.segmenter import PromptedSegmenter

        finder = KeyObjectFinder(RuleDescriber(), ZeroShotDetector(detector), PromptedSegmenter(segmenter))
    loaded = load_model(model)
    for part in (finder.describer, finder.detector, finder.segmenter) if finder is not None else ():
        part.load(loaded.device)
    from vlm_calibration.app.serve import serve

    reports = (Path("runs/demo/report.html"), Path("runs/eval/report.html"))
    serve(loaded, finder, report or next(filter(Path.is_file, reports), reports[0]), port)
