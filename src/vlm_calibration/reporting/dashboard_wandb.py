"""The dashboard in the words of `wandb-workspaces`: a workspace, a report, and how they get to the server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from vlm_calibration.callbacks.login import logged_in
from vlm_calibration.records import DataError
from vlm_calibration.reporting.dashboard import STEP, Panel, Section

NAME = "Calibration"
RUNS = {"training": ["sft", "dpo"], "evaluation": ["evaluation"]}
"""Which runs answer a section of the report, by the tags that `Artifacts` gives them."""
COLUMNS, THIRD, HALF = 24, 8, 12
"""Width of a report, and of panels in it."""


def workspace(entity: str, project: str, sections: Sequence[Section]) -> ws.Workspace:
    """The workspace, a section a question."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            ws.Section(
                name=section.question,
                panels=[wandb_panel(panel) for panel in section.panels],
                is_open=True,
            )
            for section in sections
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP),
    )


def report(entity: str, project: str, sections: Sequence[Section]) -> wr.Report:
    """The report: each question, what to look for, and the panels."""
    blocks: list[Any] = [wr.TableOfContents()]
    for section in sections:
        blocks += [
            wr.H2(section.question),
            wr.P(section.note),
            wr.PanelGrid(
                runsets=[wr.Runset(name=section.runs, filters=[ws.Tags().isin(RUNS[section.runs])])],
                panels=_laid_out(section.panels),
            ),
        ]
    return wr.Report(
        entity=entity,
        project=project,
        title=NAME,
        description="Whether the confidence that the model states can be trusted.",
        blocks=blocks,
        width="fluid",
    )


def wandb_panel(panel: Panel, layout: wr.Layout | None = None) -> Any:
    """The panel as W&B has it."""
    place = {} if layout is None else {"layout": layout}
    if panel.kind == "curve":
        return wr.LinePlot(
            title=panel.title,
            x=STEP,
            y=list(panel.keys),
            range_y=panel.range,
            title_x="Step",
            title_y=panel.unit,
            **place,
        )
    if panel.kind == "bars":
        return wr.BarPlot(
            title=panel.title, metrics=list(panel.keys), orientation="v", range_x=panel.range, **place
        )
    if panel.kind == "figures":
        return wr.MediaBrowser(
            title=panel.title, media_keys=list(panel.keys), num_columns=len(panel.keys), **place
        )
    [key] = panel.keys
    return wr.WeavePanelSummaryTable(table_name=key, **place)


def _laid_out(panels: Sequence[Panel]) -> list[Any]:
    """Panels from left to right and top to bottom; tables and several figures take a whole row."""
    placed, x, y, height = [], 0, 0, 0
    for panel in panels:
        width, tall = _size(panel)
        if x + width > COLUMNS:
            x, y, height = 0, y + height, 0
        placed.append(wandb_panel(panel, wr.Layout(x=x, y=y, w=width, h=tall)))
        x, height = x + width, max(height, tall)
    return placed


def _size(panel: Panel) -> tuple[int, int]:
    if panel.kind in ("curve", "bars"):
        return THIRD, 7
    wide = panel.kind == "table" and panel.keys[0].rsplit("/", 1)[-1] in ("samples", "comparison")
    return (COLUMNS if wide or len(panel.keys) > 1 else HALF), 11


def specification(entity: str, project: str, sections: Sequence[Section]) -> str:
    """What would be sent to the server, as JSON; made without a network."""
    made = {
        "workspace": workspace(entity, project, sections)._to_model(),
        "report": report(entity, project, sections)._to_model(),
    }
    shown = {
        what: json.loads(model.model_dump_json(by_alias=True, exclude_none=True))
        for what, model in made.items()
    }
    return json.dumps(shown, indent=2, ensure_ascii=False)


def build(entity: str, project: str, sections: Sequence[Section]) -> dict[str, str]:
    """Save the report, which makes the project if there is none, and the workspace; the address of each.

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
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"W&B does not take the dashboard of {entity}/{project}: {cause}") from error
