"""`vlm-calibration runs`: list run directories with stage, state, key figures and how to go on."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from vlm_calibration.reporting.runs import Run, find_runs

LABELS = {
    "n": ("", "{:.0f} answers"),
    "accuracy": ("accuracy ", "{:.3f}"),
    "ece": ("ECE ", "{:.3f}"),
    "brier": ("Brier ", "{:.3f}"),
    "auroc": ("AUROC ", "{:.3f}"),
    "accuracy clean": ("accuracy clean ", "{:.3f}"),
    "accuracy at full strength": ("at full strength ", "{:.3f}"),
    "with regions": ("with regions ", "{:.1%}"),
}
"""Figure -> what stands in front of it, and its format."""
ELLIPSIS = "`...` stands for the settings of your model and data that the run was given: its --config and --data-root."


def runs(folder: Path = Path("runs"), *, json: bool = False) -> None:
    """List the runs in and below a folder: stage, state, model, time, key figures, and the command to go on with.

    Args:
        folder: folder of run directories
        json: print one JSON array

    Raises:
        DataError: there is no such folder.
    """
    found = find_runs(folder)
    if json:
        rows = [{**asdict(run), "folder": str(run.folder), "when": run.when.isoformat()} for run in found]
        print(json_format.dumps(rows, indent=2, ensure_ascii=False))
    elif not found:
        print(f"no run in {folder}")
    else:
        print("\n".join(_lines(found)))


def _lines(found: list[Run]) -> Iterator[str]:
    for run in found:
        state = " ".join(filter(None, [run.state, run.detail and f"({run.detail})"]))
        yield "  ".join(
            filter(None, [f"{run.folder}:", run.stage, state, run.model, f"{run.when:%Y-%m-%d %H:%M}"])
        )
        indent = max((len(system) for system in run.figures), default=0)
        for system, figures in run.figures.items():
            yield (
                "    "
                + f"{system:<{indent}}  ".lstrip()
                + ", ".join(_figure(*item) for item in figures.items())
            )
        if run.command:
            yield f"    next: {run.command}"
    if any(" ... " in f"{run.command} " for run in found):
        yield ELLIPSIS


def _figure(name: str, value: float | None) -> str:
    before, form = LABELS[name]
    return before + ("-" if value is None else form.format(value))
