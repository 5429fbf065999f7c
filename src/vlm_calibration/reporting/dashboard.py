"""The W&B workspace and report of a project, from the sections in `dashboard.yaml`; each of them answers a question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
import yaml

from vlm_calibration.files import first_line
from vlm_calibration.records import DataError
from vlm_calibration.reporting.wandb_login import logged_in

STEP = "trainer/global_step"
"""The x axis of curves."""
NAME = "Calibration"
RUNS = {"training": ["sft", "dpo"], "evaluation": ["evaluation"]}
"""Runs of a section of the report -> the tags that `Artifacts` gives these runs."""
GRID_COLUMNS = 24
"""Width of a report."""
Kind = Literal["curve", "bars", "figures", "table"]


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: heading.
        kind: "curve" over steps, "bars" of the last values, "figures", or a "table".
        keys: logged metrics, images or one table.
        unit: label of the value axis.
        range: limits of the value axis, None for automatic ones.
    """

    title: str
    kind: Kind
    keys: list[str]
    unit: str | None
    range: tuple[float | None, float | None]


@dataclass(frozen=True)
class Section:
    """A section of the workspace and the report.

    Attributes:
        question: heading.
        note: what to look for in the panels.
        runs: which runs the report shows in it, a key of `RUNS`.
        panels: the panels.
    """

    question: str
    note: str
    runs: str
    panels: list[Panel]


def sections(systems: Sequence[str]) -> list[Section]:
    """All sections for an evaluation of some systems.

    Raises:
        DataError: no system, or an invalid name.
    """
    invalid = [name for name in systems if not re.fullmatch(r"[\w-]+", name)]
    if invalid or not systems:
        raise DataError(
            f"--systems: expected names of letters, digits, '_' and '-', found {invalid[0] if invalid else 'none'!r}"
        )
    content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return [
        Section(s["question"], s["note"], s["runs"], [_read_panel(panel, systems) for panel in s["panels"]])
        for s in content
    ]


def _read_panel(panel: dict[str, Any], systems: Sequence[str]) -> Panel:
    [kind] = [kind for kind in get_args(Kind) if kind in panel]
    keys = [
        key.replace("*", system) for key in panel[kind] for system in (systems if "*" in key else systems[:1])
    ]
    low, high = panel.get("range", (None, None))
    return Panel(panel["title"], kind, keys, panel.get("unit"), (low, high))


def outline(sections: Sequence[Section]) -> str:
    """The sections as text: the runs of each, its note, and the kind, the logged keys and the unit of each panel."""
    lines = []
    for section in sections:
        lines += ["", f"{section.question} ({section.runs} runs)", f"  {section.note}"]
        for panel in section.panels:
            unit = f" ({panel.unit})" if panel.unit else ""
            lines.append(f"  - {panel.title}: {panel.kind} of {', '.join(panel.keys)}{unit}")
    return "\n".join(lines[1:])


def build(entity: str, project: str, sections: Sequence[Section]) -> dict[str, str]:
    """Save the report, which creates the project if necessary, and the workspace; returns the URL of each.

    Raises:
        DataError: nobody is logged in, or the server refuses or cannot be reached.
    """
    if not logged_in():
        raise DataError("nobody is logged in to W&B: run `wandb login`, or print the dashboard with --print")
    try:
        return {
            "report": report(entity, project, sections).save().url,
            "workspace": workspace(entity, project, sections).save().url,
        }
    except (wandb.errors.Error, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"W&B does not take the dashboard of {entity}/{project}: {first_line(error)}"
        ) from error


def workspace(entity: str, project: str, sections: Sequence[Section]) -> ws.Workspace:
    """Build the workspace."""
    rooms = [
        ws.Section(name=s.question, panels=[_wandb_panel(panel) for panel in s.panels], is_open=True)
        for s in sections
    ]
    settings = ws.WorkspaceSettings(x_axis=STEP)
    return ws.Workspace(entity=entity, project=project, name=NAME, sections=rooms, settings=settings)


def report(entity: str, project: str, sections: Sequence[Section]) -> wr.Report:
    """Build the report: heading, note and panels of each section."""
    blocks: list[Any] = [wr.TableOfContents()]
    for section in sections:
        runs = wr.Runset(name=section.runs, filters=[ws.Tags().isin(RUNS[section.runs])])
        grid = wr.PanelGrid(runsets=[runs], panels=_arrange(section.panels))
        blocks += [wr.H2(section.question), wr.P(section.note), grid]
    return wr.Report(
        entity=entity,
        project=project,
        title=NAME,
        description="Whether the confidence that the model states can be trusted.",
        blocks=blocks,
        width="fluid",
    )


def _arrange(panels: Sequence[Panel]) -> list[Any]:
    """Arrange panels from left to right and top to bottom; wide tables and several figures take a whole row."""
    arranged, x, y, row_height = [], 0, 0, 0
    for panel in panels:
        is_wide = len(panel.keys) > 1 or panel.keys[0].endswith(("/samples", "/comparison"))
        width, height = (8, 7) if panel.kind in ("curve", "bars") else (24 if is_wide else 12, 11)
        if x + width > GRID_COLUMNS:
            x, y, row_height = 0, y + row_height, 0
        arranged.append(_wandb_panel(panel, layout=wr.Layout(x=x, y=y, w=width, h=height)))
        x, row_height = x + width, max(row_height, height)
    return arranged


def _wandb_panel(panel: Panel, **place: Any) -> Any:
    """Convert a panel to W&B's class; `place` is its layout in a report."""
    title, keys = panel.title, panel.keys
    if panel.kind == "curve":
        axes = {"x": STEP, "title_x": "Step", "title_y": panel.unit, "range_y": panel.range}
        return wr.LinePlot(title=title, y=keys, **axes, **place)
    if panel.kind == "bars":
        return wr.BarPlot(title=title, metrics=keys, orientation="v", range_x=panel.range, **place)
    if panel.kind == "figures":
        return wr.MediaBrowser(title=title, media_keys=keys, num_columns=len(keys), **place)
    return wr.WeavePanelSummaryTable(table_name=keys[0], **place)
