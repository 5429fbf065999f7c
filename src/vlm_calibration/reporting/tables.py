"""Scores as tables on the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from vlm_calibration.benchmarks.official import OFFICIAL, blocks_of

Results = Mapping[str, Mapping[str, float]]
"""Row -> metrics by flat name: of a system, or of a file of answers."""

COLUMNS = ("accuracy", "ece", "brier", "auroc", "mean_confidence", "overconfidence", "parse_failure_rate")
"""The headline metrics by flat name."""
BROKEN_DOWN = ("accuracy", "ece", "auroc")


def column(name: str) -> tuple[str, str]:
    """Heading and number format of a metric, as declared with it."""
    from vlm_calibration.metrics.summary import ALL_METRICS  # imports torch, which no help page needs

    return ALL_METRICS[name].heading, ALL_METRICS[name].format


def overall_table(results: Results) -> Table:
    """One row a system, over all its answers."""
    n = int(next(iter(results.values()))["n"])
    table = Table(title=f"All {n} answers", title_justify="left", title_style="bold")
    table.add_column("system")
    for name in COLUMNS:
        table.add_column(column(name)[0], justify="right")
    for system, values in results.items():
        table.add_row(system, *(_cell(values[name], column(name)[1]) for name in COLUMNS))
    return table


def group_table(results: Results, metric: str, groups: Sequence[str]) -> Table:
    """One metric: a row a group of answers, a column a system."""
    heading, form = column(metric)
    table = Table(title=f"{heading} by group", title_justify="left", title_style="bold")
    table.add_column("group")
    table.add_column("n", justify="right")
    for system in results:
        table.add_column(system, justify="right")
    first = next(iter(results.values()))
    for group in groups:
        cells = [_cell(values[f"{metric}/{group}"], form) for values in results.values()]
        table.add_row(group, str(int(first[f"n/{group}"])), *cells)
    return table


def groups_of(results: Results, most_parts: int = 2) -> list[str]:
    """The groups that results are broken down by, those of at most this many parts, coarse ones first."""
    names = [k.split("/", 1)[1] for k in next(iter(results.values())) if k.startswith("n/")]
    return sorted((n for n in names if n.count("/") < most_parts), key=lambda n: (n.count("/"), n))


def print_results(results: Results, console: Console | None = None) -> None:
    console = console or Console()
    console.print(overall_table(results))
    groups = groups_of(results)
    for metric in BROKEN_DOWN if groups else ():
        console.print(group_table(results, metric, groups))


def _cell(value: float, form: str) -> str:
    return "-" if value != value else format(value, form)


OFFICIAL_COLUMNS = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def official_table(results: Results) -> Table:
    """Scores under the benchmarks' own rules: a row for each system and part or block, `official/...` of the results."""
    blocks = {system: blocks_of(official_of(values)) for system, values in results.items()}
    columns = [
        key for key in OFFICIAL_COLUMNS if any(key in b for of in blocks.values() for b in of.values())
    ]
    table = Table(
        title="Official scores",
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption="By the benchmark's own rules, without the stated confidence. -: its script divides by zero.",
    )
    table.add_column("system")
    table.add_column("part")
    for key in columns:
        table.add_column(column(key)[0], justify="right")
    for system, of in blocks.items():
        for block, scores in of.items():
            # POPE's are fractions that are not rounded, AMBER's percent with one decimal.
            form = ".4f" if "yes_ratio" in scores else ".1f"
            table.add_row(
                system, block or "all", *(_cell(scores.get(key, math.nan), form) for key in columns)
            )
    return table


def official_of(values: Mapping[str, float]) -> dict[str, float]:
    """The official scores among the metrics."""
    return {name: value for name, value in values.items() if name.startswith(f"{OFFICIAL}/")}
