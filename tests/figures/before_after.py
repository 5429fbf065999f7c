"""Draw the README's figure: reliability diagrams of the base model and of one adapter, side by side (`make demo-figure`).

Reads the predictions of an evaluation and draws the diagrams of reports and W&B.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from vlm_calibration.estimators.predictions import read_predictions
from vlm_calibration.files import replacing
from vlm_calibration.metrics.figures import reliability_diagram
from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.table import ConfidenceTable

ROOT = Path(__file__).parents[2]
OUT = ROOT / "notebooks/before_after.png"
WIDTH = 1600
"""Pixels: twice the displayed width, for high-resolution screens."""
COLOURS = 64


def read_table(predictions: Path) -> ConfidenceTable:
    """The answers of one system."""
    answers = read_predictions(predictions)
    return ConfidenceTable.from_predictions([a.confidence for a in answers], [a.correct for a in answers])


def title(name: str, table: ConfidenceTable) -> str:
    """The title of a diagram: mean confidence, accuracy and calibration error."""
    confidence, accuracy, error = (
        100 * float(METRICS[metric](table)) for metric in ("mean_confidence", "parsed_accuracy", "ece")
    )
    return (
        f"{name}: says {confidence:.0f}%, is right {accuracy:.0f}% of the time\n"
        f"calibration error (ECE) {error:.1f}%, {table.n:,} answers"
    )


def side_by_side(before: ConfidenceTable, after: ConfidenceTable) -> Figure:
    """Both reliability diagrams in one figure, with text that is readable at half of `WIDTH`."""
    with rc_context({"font.size": 8, "axes.titlesize": 9.5, "axes.labelsize": 8.5, "legend.fontsize": 7.5}):
        figure = Figure(figsize=(8, 4.1), dpi=WIDTH / 8, layout="constrained")
        for ax, table, name in zip(figure.subplots(1, 2), (before, after), ("Before", "After"), strict=True):
            reliability_diagram(table, title=title(name, table), ax=ax)
    return figure


def png(figure: Figure) -> bytes:
    """Encode the figure as a small PNG: few colours, and no text chunks with library versions."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    picture.save(small, format="png", optimize=True)
    return small.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.figures.before_after", description=__doc__)
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs/bench/demo/test-estimated-0", help="folder of an evaluation"
    )
    parser.add_argument("--before", default="base", help="name of the first system")
    parser.add_argument("--after", default="dpo", help="name of the second")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(argv)
    before, after = (
        read_table(given.runs / name / "predictions.jsonl") for name in (given.before, given.after)
    )
    with replacing(given.out) as temporary:
        temporary.write_bytes(png(side_by_side(before, after)))
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
