"""`vlm-calibration dashboard`: build the W&B workspace and report of a project, or print what they show."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Sequence

from vlm_calibration.reporting.dashboard import PROJECT, build, outline, sections


def dashboard(
    *,
    entity: str | None = None,
    project: str = PROJECT,
    systems: Sequence[str] = ("base", "sft", "dpo"),
    print: bool = False,
) -> None:
    """Build the W&B workspace and report of a project, or print an outline of them.

    Args:
        entity: team or user that owns the project; to build, required
        project: project that runs are logged to
        systems: names of the systems in the evaluation
        print: print the sections, and what each panel shows, and build nothing
    """
    if not entity and not print:
        owner = "the team or user that owns the project"
        raise ArgumentError(None, f"missing: {owner}; give --entity NAME, or --print")
    content = sections(systems)
    if print:
        sys.stdout.write(f"{outline(content)}\n")
        return
    for name, url in build(entity or "", project, content).items():
        sys.stdout.write(f"{name}: {url}\n")
