"""`vlm-calibration runs`: list run directories with what their records say, key figures, and how to resume."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path

from vlm_calibration.reporting.runs import find_runs

LABELS = {"accuracy": "accuracy", "ece": "ECE", "brier": "Brier", "auroc": "AUROC"}


def runs(folder: Path = Path("runs"), *, json: bool = False) -> None:
    """List the runs in and below a folder: stage, state, model, time, key figures, and the command that resumes an interrupted one.

    Args:
        folder: folder of run directories
        json: print one JSON array
    """
    found = find_runs(folder)
    if json:
        rows = [{**asdict(run), "folder": str(run.folder), "when": run.when.isoformat()} for run in found]
        print(json_format.dumps(rows, indent=2, ensure_ascii=False))
        return
    if not found:
        print(f"no run in {folder}")
    for run in found:
        state = f"{run.state} ({run.detail})" if run.detail else run.state
        parts = (f"{run.folder}:", run.stage, state, run.model, f"{run.when:%Y-%m-%d %H:%M}")
        print("  ".join(filter(None, parts)))
        for system, figures in run.figures.items():
            values = {name: float("nan") if value is None else value for name, value in figures.items()}
            texts = [f"{values['n']:.0f} answers"] if "n" in values else []
            texts += [f"{label} {values[name]:.3f}" for name, label in LABELS.items() if name in values]
            print("    " + f"{system}  ".lstrip() + ", ".join(texts))
        if run.command:
            print(f"    next: {run.command}")
