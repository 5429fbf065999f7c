"""The README's figure, drawn from small prediction files."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_calibration.files import write_rows
from vlm_calibration.records import Prediction

from .before_after import OUT, ROOT, WIDTH, main, read_table, side_by_side

SYSTEMS = {"base": [(0.95, 30, 40)], "dpo": [(0.5, 20, 40), (0.9, 108, 120)]}
"""Of each system: a stated confidence, and how many answers with it are right, of how many."""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """An evaluation with the answers of `SYSTEMS`."""
    for name, levels in SYSTEMS.items():
        rows = [
            Prediction(
                f"{level}-{i}", "A dog?", "Yes", "", "yes", level, i < right, None, 0, "yes_no"
            ).to_dict()
            for level, right, n in levels
            for i in range(n)
        ]
        write_rows(tmp_path / "eval" / name / "predictions.jsonl", rows, lines=True)
    return tmp_path / "eval"


def _points(ax: Any) -> list[tuple[float, float]]:
    """What the diagram's line goes through."""
    [line] = [line for line in ax.lines if line.get_label() == "Answers, by bin"]
    return [(round(float(x), 6), round(float(y), 6)) for x, y in line.get_xydata()]


def test_both_diagrams_show_their_system_and_no_text_leaves_the_picture_or_overlaps(runs: Path) -> None:
    figure = side_by_side(*(read_table(runs / name / "predictions.jsonl") for name in SYSTEMS))
    left, right = figure.axes
    assert _points(left) == [(95, 75)]
    assert _points(right) == [(50, 50), (90, 90)]
    said = "Before: says 95%, is right 75% of the time\ncalibration error (ECE) 20.0%, 40 answers"
    assert left.get_title() == said
    said = "After: says 80%, is right 80% of the time\ncalibration error (ECE) 0.0%, 160 answers"
    assert right.get_title() == said
    figure.canvas.draw()
    titles = [ax.title.get_window_extent() for ax in figure.axes]
    for box in titles:
        assert 0 <= box.x0 < box.x1 <= WIDTH
        assert 0 <= box.y0 < box.y1 <= figure.bbox.height
    assert titles[0].x1 < titles[1].x0
    for ax in figure.axes:
        ticks = [label.get_window_extent() for label in ax.get_xticklabels()]
        assert all(a.x1 < b.x0 for a, b in pairwise(ticks))


@pytest.mark.slow
def test_the_file_is_small_and_the_same_each_time(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "picture.png"
    call = ["--runs", str(runs), "--out", str(out)]
    main(call)
    first = out.read_bytes()
    assert len(first) < 100_000
    picture = Image.open(io.BytesIO(first))
    assert picture.width == 2 * 800, "twice what a page shows"
    # Dark text and blue dots are still there with so few colours.
    colours = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0).tolist()
    assert [0, 0, 0] in colours
    assert [0, 114, 178] in colours
    main(call)
    assert out.read_bytes() == first


def test_the_readme_shows_the_picture_and_says_how_to_draw_it(root: Path) -> None:
    assert root == ROOT
    readme = (root / "README.md").read_text(encoding="utf-8")
    [(text, path)] = re.findall(r"^!\[(.+)\]\((\S+)\)$", readme, re.MULTILINE)
    assert root / path == OUT
    assert len(text) > 40, "it says what is to be seen for those who cannot see it"
    assert "`make demo-figure`" in readme
