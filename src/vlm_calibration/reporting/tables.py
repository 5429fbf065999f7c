"""Metrics as text: the one format of each, and tables on the terminal."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_calibration.benchmarks.files import OFFICIAL, blocks_of

Results = Mapping[str, Mapping[str, float]]
"""Name of a system or of a file of answers -> its metrics by flat name."""

COLUMNS = ("accuracy", "ece", "brier", "auroc", "mean_confidence", "overconfidence", "parse_failure_rate")
"""The headline metrics by flat name."""
PRINTED = ("mean_confidence", "accuracy", "ece", "auroc")
"""Those of them that fit on a terminal of 80 columns."""
BROKEN_DOWN = ("accuracy", "ece", "auroc")
SHARES = ("accuracy", "ece", "smooth_ece", "mean_confidence", "overconfidence", "parse_failure_rate")
"""Metrics in percent on the report page."""
OFFICIAL_COLUMNS = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def heading(name: str) -> str:
    """The heading of a metric, as declared with it."""
    from vlm_calibration.metrics.task import ALL_METRICS  # imports torch, which no help page needs

    return ALL_METRICS[name].heading


def shown(name: str, value: float | None, *, percent: bool = False) -> str:
    """A metric as text in its declared format, or those of `SHARES` in percent; a dash where it is undefined."""
    from vlm_calibration.metrics.task import ALL_METRICS

    if value is None or math.isnan(value):
        return "-"
    form = ALL_METRICS[name].format
    return format(value, form.replace(".3f", ".1%") if percent and name in SHARES else form)


def print_results(
    results: Results,
    *,
    by_group: bool = False,
    about: str = "",
    words: str = "",
    files: Mapping[str, Path] | None = None,
    commands: Sequence[str] = (),
) -> None:
    """Print the result of a command: tables of results (`about` which answers), `words` on them, the files that it wrote, and what to try next."""
    console = Console(highlight=False)
    if results:
        first = next(iter(results.values()))
        any_unparsed = any(values["parse_failure_rate"] for values in results.values())
        names = (*PRINTED, "parse_failure_rate") if any_unparsed else PRINTED
        rows = [(system, *(shown(m, values[m]) for m in names)) for system, values in results.items()]
        title = f"All {int(first['n'])} answers{about}"
        console.print(text_table(title, ["system", *map(heading, names)], rows))
        groups = sorted(name.removeprefix("n/") for name in first if name.startswith("n/"))
        for metric in BROKEN_DOWN if by_group and groups else ():
            rows = []
            for group in groups:
                texts = [shown(metric, values[f"{metric}/{group}"]) for values in results.values()]
                rows.append((group, str(int(first[f"n/{group}"])), *texts))
            console.print(text_table(f"{heading(metric)} by group", ["group", "n", *results], rows))
    if words:
        console.print(Text(words))
    for name, path in (files or {}).items():
        # A line that is wrapped is no path any more. A notebook is read on other machines as well, where a link leads nowhere.
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


def official_table(results: Results) -> Table:
    """A table of the scores under a benchmark's own rules, `official/...`: one row for each system and block."""
    rows: list[tuple[str, str, Mapping[str, float]]] = []
    for system, values in results.items():
        official = {name: value for name, value in values.items() if name.startswith(f"{OFFICIAL}/")}
        rows += [(system, block or "all", scores) for block, scores in blocks_of(official).items()]
    columns = [key for key in OFFICIAL_COLUMNS if any(key in scores for _, _, scores in rows)]
    cells = []
    for system, part, scores in rows:
        # POPE's scores are unrounded fractions, AMBER's are percentages with one decimal.
        form = ".4f" if "yes_ratio" in scores else ".1f"
        texts = [format(scores.get(key, math.nan), form).replace("nan", "-") for key in columns]
        cells.append((system, part, *texts))
    table = text_table("Official scores", ["system", "part", *map(heading, columns)], cells)
    table.columns[1].justify = table.caption_justify = "left"
    rules = "Under the benchmark's own rules, without the stated confidence."
    table.caption = f"{rules} -: its script divides by zero."
    return table


def text_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first column is aligned to the left, and all others to the right."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(headings):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table
