"""`vlm-calibration report`: write the report page of evaluations and runs from their prediction files."""

from __future__ import annotations

from pathlib import Path

from jsonargparse.typing import PositiveInt

from vlm_calibration.commands.options import check_folder
from vlm_calibration.files import write_text
from vlm_calibration.reporting.runs import PAGE


def report(
    runs: list[str],
    *,
    out: Path | None = None,
    system: str | None = None,
    calibration: Path | None = None,
    images: bool = True,
    replicates: PositiveInt = PositiveInt(1000),
    seed: int = 0,
) -> None:
    """Write a page on whether the confidence of evaluated models can be trusted, with its numbers beside it.

    `report.csv` beside `report.html` holds every confidence of every system, raw and recalibrated, with intervals, and the stated one
    for each group and range of confidence.

    What it prints is the result in brief: a table, the weakest group, the page and what to try next.

    Args:
        runs: folders of evaluations or runs, with predictions.jsonl in them or in their subfolders; all systems are compared
            with the first one, the base model of an evaluation
        out: path of the page (default: report.html in the first folder)
        system: the system that the summary and the examples describe (default: the last trained one)
        calibration: an evaluation of the same systems on other images, to choose thresholds and fit recalibration on (default: the answers to the
            calibration set of the evaluation itself, data.calibration; without either, there are neither)
        images: show images, loaded from the data that the run's configuration names
        replicates: number of bootstrap draws
        seed: seed of the draws
    """
    for folder in [*runs, *([str(calibration)] if calibration else [])]:
        check_folder(folder)
    # These import torch and matplotlib, which the help does not need.
    from vlm_calibration.reporting.report.data import read_calibration, read_systems, system_named
    from vlm_calibration.reporting.report.page import render_page
    from vlm_calibration.reporting.report.summary import largest_error, subject_of
    from vlm_calibration.reporting.report.table import compare, stated_rows
    from vlm_calibration.reporting.runs import commands_with
    from vlm_calibration.reporting.tables import print_results

    systems = read_systems(runs)
    about = subject_of(systems) if system is None else system_named(systems, system)
    if calibration is not None:
        systems = read_calibration(str(calibration), systems)
        about = system_named(systems, about.name)
    frame, notes = compare(systems, replicates, seed)
    page = out if out is not None else Path(runs[0]) / PAGE
    table = page.with_suffix(".csv")
    html = render_page(systems, frame, notes, about, table, images=images, replicates=replicates, seed=seed)
    write_text(page, html)
    write_text(table, frame.to_csv(index=False, lineterminator="\n"))
    worst = largest_error(frame, about.name)
    words = f"{about.name}: its {worst}" if worst else ""
    results = stated_rows(frame).set_index("system").to_dict("index")
    print_results(results, words=words, files={"report": page}, commands=commands_with(about.adapter))
