"""Metrics as tables on the terminal."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_calibration.benchmarks.official import OFFICIAL, blocks_of

Results = Mapping[str, Mapping[str, float]]
"""Name of a system or of a file of answers -> its metrics by flat name."""

COLUMNS = ("accuracy", "ece", "brier", "auroc", "mean_confidence", "overconfidence", "parse_failure_rate")
"""The headline metrics by flat name."""
PRINTED = ("mean_confidence", "accuracy", "ece", "auroc")
"""Those of them that fit beside each other on a terminal of 80 columns."""
BROKEN_DOWN = ("accuracy", "ece", "auroc")


def column(name: str) -> tuple[str, str]:
    """Heading and number format of a metric, as declared with it."""
    from vlm_calibration.metrics.summary import ALL_METRICS  # imports torch, which no help page needs

    return ALL_METRICS[name].heading, ALL_METRICS[name].format


def overall_table(results: Results) -> Table:
    """A table of the `PRINTED` metrics over all answers, one row a system; with unparsed answers if there are any."""
    any_unparsed = any(values["parse_failure_rate"] for values in results.values())
    names = (*PRINTED, "parse_failure_rate") if any_unparsed else PRINTED
    n = int(next(iter(results.values()))["n"])
    table = Table(title=f"All {n} answers", title_justify="left", title_style="bold")
    table.add_column("system")
    for name in names:
        table.add_column(column(name)[0], justify="right")
    for system, values in results.items():
        table.add_row(system, *(_cell(values[name], column(name)[1]) for name in names))
    return table


def group_table(results: Results, metric: str, groups: Sequence[str]) -> Table:
    """A table of one metric: one row a group of answers, one column a system."""
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


def groups_of(results: Results, max_parts: int = 2) -> list[str]:
    """The groups of answers in the results with at most `max_parts` parts in their names, coarse groups first."""
    names = [k.split("/", 1)[1] for k in next(iter(results.values())) if k.startswith("n/")]
    return sorted((n for n in names if n.count("/") < max_parts), key=lambda n: (n.count("/"), n))


def print_results(
    results: Results,
    *,
    by_group: bool = False,
    words: str = "",
    files: Mapping[str, Path] = MappingProxyType({}),
    commands: Sequence[str] = (),
) -> None:
    """Print the result of a command, which ends its output.

    Args:
        results: of the systems; empty prints no table.
        by_group: print tables of the main metrics by group of answers as well.
        words: a sentence on the results.
        files: what was written -> its path, which a terminal links to.
        commands: what to try next; each begins with `vlm-calibration`.
    """
    console = Console(highlight=False)
    if results:
        console.print(overall_table(results))
        groups = groups_of(results) if by_group else []
        for metric in BROKEN_DOWN if groups else ():
            console.print(group_table(results, metric, groups))
    if words:
        console.print(Text(words))
    for name, path in files.items():
        # A line that is wrapped is no path any more.
        # A notebook is read on other machines as well, where the link leads nowhere.
        link = Text(str(path), "" if console.is_jupyter else f"link {path.resolve().as_uri()}")
        console.print(Text.assemble(f"{name}: ", link), soft_wrap=True)
    if commands:
        console.print("what to try next:")
    for command in commands:
        console.print(Text(f"  {_as_typed(command)}"), soft_wrap=True)


def _as_typed(command: str) -> str:
    """The command with the path of its program, if the shell does not find it by its name."""
    name, _, arguments = command.partition(" ")
    beside = Path(sys.executable).with_name(name)
    if shutil.which(name) or not beside.exists():
        return command
    path = beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside
    return f"{path} {arguments}"


def _cell(value: float, form: str) -> str:
    return "-" if value != value else format(value, form)


OFFICIAL_COLUMNS = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def official_table(results: Results) -> Table:
    """A table of the scores under a benchmark's own rules, `official/...`: one row for each system and block."""
    blocks = {system: blocks_of(official_of(values)) for system, values in results.items()}
    keys = {key for by_block in blocks.values() for scores in by_block.values() for key in scores}
    columns = [key for key in OFFICIAL_COLUMNS if key in keys]
    table = Table(
        title="Official scores",
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption="Under the benchmark's own rules, without the stated confidence. -: its script divides by zero.",
    )
    table.add_column("system")
    table.add_column("part")
    for key in columns:
        table.add_column(column(key)[0], justify="right")
    for system, by_block in blocks.items():
        for block, scores in by_block.items():
            # POPE's scores are unrounded fractions, AMBER's are percentages with one decimal.
            form = ".4f" if "yes_ratio" in scores else ".1f"
            table.add_row(
                system, block or "all", *(_cell(scores.get(key, math.nan), form) for key in columns)
            )
    return table


def official_of(values: Mapping[str, float]) -> dict[str, float]:
    """The official scores among the metrics."""
    return {name: value for name, value in values.items() if name.startswith(f"{OFFICIAL}/")}
