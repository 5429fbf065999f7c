"""`vlm-calibration report`: one self-contained page on whether a stated confidence can be trusted, from prediction files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from vlm_calibration.arguments import explained_errors
from vlm_calibration.files import write_text
from vlm_calibration.records import DataError

PAGE = "report.html"


def report(
    runs: list[str],
    calibration: str | None = None,
    out: str | None = None,
    subject: str | None = None,
    images: bool = True,
    replicates: int = 1000,
    seed: int = 0,
) -> None:
    """Write a report on runs and evaluations, and its table as CSV, Markdown, LaTeX and JSON beside it.

    Args:
        runs: folders of evaluations or runs, with predictions.jsonl in them or in folders of theirs. The first system, the
            base model of an evaluation, is what others are compared with.
        calibration: an evaluation of the same systems on other images, whose answers recalibration is fitted on; by default
            those to the calibration set of the evaluation itself (data.calibration). Where there is neither, nothing is
            recalibrated.
        out: where to write the page; report.html in the first folder by default.
        subject: the system that the summary and the examples are about; by default the last one that was trained.
        images: show images, loaded from the data that the run's configuration names.
        replicates: draws of the bootstrap. seed: of the draws.

    Raises:
        DataError: there are no predictions, a file cannot be used, the calibration set shares an image with the answers, or
            there is no such system.
    """
    # These import torch and matplotlib, which the help need not wait for.
    from vlm_calibration.reporting.report_data import read_calibration, read_systems
    from vlm_calibration.reporting.report_page import render_page
    from vlm_calibration.reporting.report_table import Comparison, compare, write_tables

    if replicates < 1:
        raise DataError(f"--replicates must be at least 1, found {replicates}")
    systems = read_systems(runs)
    if subject is not None and subject not in [s.name for s in systems]:
        raise DataError(f"--subject: no system {subject!r}; there are {', '.join(s.name for s in systems)}")
    if calibration is not None:
        systems = read_calibration(calibration, systems)
    comparison = Comparison(replicates, seed)
    compared = compare(systems, comparison)
    page = Path(out) if out is not None else Path(runs[0]) / PAGE
    html = render_page(systems, compared, comparison, subject, images)
    write_text(page, html)
    tables = write_tables(compared.rows, page)
    print(f"wrote {page}, and its table as {', '.join(path.name for path in tables)}")


def report_parser() -> ArgumentParser:
    """The parser of `report`."""
    parser = ArgumentParser(prog="vlm-calibration report", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="folders of evaluations or runs")
    parser.add_function_arguments(report, skip={"runs"})
    return parser


def report_command(args: Sequence[str]) -> None:
    """`report`: the settings of `report`.

    Raises:
        ArgumentError: a setting is unknown or has a wrong value, or no folder is given.
    """
    with explained_errors(parser := report_parser()):
        settings = parser.parse_args(args)
    report(**settings.as_dict())
