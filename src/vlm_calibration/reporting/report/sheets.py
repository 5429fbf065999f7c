"""The tables of the page as CSV files beside it: `report.NAME.csv` beside `report.html`, unrounded.

The comparison of all confidences is `report.csv` (`table.as_csv`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vlm_calibration.benchmarks.official import blocks_of
from vlm_calibration.files import remove, write_text
from vlm_calibration.reporting.report.agreement import GROUPED, Group, Match
from vlm_calibration.reporting.report.data import System
from vlm_calibration.reporting.report.listening import ProbeEffect
from vlm_calibration.reporting.report.summary import weakest_group
from vlm_calibration.reporting.report.table import Compared
from vlm_calibration.reporting.report.thresholds import SystemPromises
from vlm_calibration.reporting.tables import OFFICIAL_COLUMNS, official_of

HEADLINE = (
    "n",
    "accuracy",
    "ece",
    "brier",
    "auroc",
    "mean_confidence",
    "overconfidence",
    "parse_failure_rate",
)
"""Metrics in the table of systems."""
MATCH = ("says", "is_right", "is_right_low", "is_right_high", "agrees")
"""Columns of a `Match`; shares in [0, 1]."""

Value = str | float | None


class Sheet(NamedTuple):
    """A table for a CSV file.

    Attributes:
        header: names of the columns.
        rows: a value for each column; None and NaN leave the cell empty.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Value]]


def sheets_of(
    systems: Sequence[System], compared: Compared, promises: Sequence[SystemPromises]
) -> dict[str, Sheet]:
    """The tables of the page other than the comparison: name -> table, which may have no rows."""
    return {
        "systems": _systems(systems, compared.groups),
        "confidence": Sheet(
            ("system", "from_percent", "to_percent", "answers", *MATCH),
            [
                (name, band.low, band.high, band.match.answers, *_match(band.match))
                for name, bands in compared.bands.items()
                for band in bands
            ],
        ),
        "groups": Sheet(
            ("system", "group", "n", *MATCH, *GROUPED),
            [
                (name, group.name, group.n, *_match(group.match), *(group.metrics[m] for m in GROUPED))
                for name, groups in compared.groups.items()
                for group in groups
            ],
        ),
        "thresholds": _thresholds(promises),
        "probes": _probes(compared.probed),
        "official": _official(systems),
    }


def write_sheets(sheets: Mapping[str, Sheet], page: Path) -> list[Path]:
    """Write each table beside the page; without rows an earlier file of its name is removed. Returns the paths.

    Raises:
        DataError: a file cannot be written.
    """
    paths = []
    for name, sheet in sheets.items():
        path = sheet_path(page, name)
        if sheet.rows:
            write_text(path, _as_csv(sheet))
            paths.append(path)
        else:
            remove(path)
    return paths


def sheet_path(page: Path, name: str) -> Path:
    """The file of a table beside the page."""
    return page.with_suffix(f".{name}.csv")


def _systems(systems: Sequence[System], groups: Mapping[str, Sequence[Group]]) -> Sheet:
    facts = list(dict.fromkeys(heading for s in systems for heading in s.origin.facts))
    rows = []
    for s in systems:
        group = weakest_group(groups[s.name])
        worst = (group.name, *_match(group.match)) if group else [None] * (1 + len(MATCH))
        known = [s.origin.facts.get(heading) for heading in facts]
        rows.append((s.name, s.origin.label, *known, *(s.values[name] for name in HEADLINE), *worst))
    worst_heads = ("weakest_group", *(f"weakest_group_{name}" for name in MATCH))
    return Sheet(("system", "label", *(f.replace(" ", "_") for f in facts), *HEADLINE, *worst_heads), rows)


def _match(match: Match) -> Iterator[Value]:
    yield from (value / 100 for value in match[:4])
    yield match.agreement if match.answers else None


def _thresholds(rows: Sequence[SystemPromises]) -> Sheet:
    """A row for the calibration answers of each limit, whether it has a threshold or not, and one for each part of the test answers."""
    shares = [f"{name}{end}" for name in ("coverage", "error") for end in ("", "_low", "_high")]
    header = (
        *("system", "estimator", "max_error", "certainty", "threshold", "answers", "n", "given", "wrong"),
        *shares,
        *("above_limit", "more_answers", "reason"),
    )
    lines: list[Sequence[Value]] = []
    for row in rows:
        for limits, choice, tested in row.promises:
            promise = (row.system, row.estimator, limits.max_error, limits.certainty, choice.threshold)
            if choice.scores is None:
                none = [None] * (2 + len(shares) + 1)
                lines.append((*promise, "calibration", row.n, *none, choice.more_answers, choice.reason))
                continue
            parts = {"calibration": choice.scores, **{f"test: {name}": s for name, s in tested.items()}}
            for part, s in parts.items():
                above = "yes" if s.error.low > limits.max_error else "no"
                lines.append(
                    (*promise, part, s.n, s.answers, s.wrong, *s.coverage, *s.error, above, None, None)
                )
    return Sheet(header, lines)


def _probes(probed: Mapping[str, Mapping[str, ProbeEffect]]) -> Sheet:
    header = (
        *("system", "probe", "n", "change", "change_low", "change_high", "fell", "stayed", "rose"),
        *("sum", "sum_low", "sum_high"),
    )
    rows = [
        (
            system,
            probe,
            e.n,
            *e.change,
            e.fell,
            e.stayed,
            e.rose,
            *(e.sum if e.sum is not None else [None] * 3),
        )
        for system, effects in probed.items()
        for probe, e in effects.items()
    ]
    return Sheet(header, rows)


def _official(systems: Sequence[System]) -> Sheet:
    rows = []
    for system in systems:
        defined = {name: value for name, value in system.metrics.items() if value is not None}
        for block, scores in blocks_of(official_of(defined)).items():
            rows.append((system.name, block or "all", *(scores.get(key) for key in OFFICIAL_COLUMNS)))
    return Sheet(("system", "part", *OFFICIAL_COLUMNS), rows)


def _as_csv(sheet: Sheet) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(sheet.header)
    for row in sheet.rows:
        writer.writerow(["" if value is None or value != value else value for value in row])
    return out.getvalue()
