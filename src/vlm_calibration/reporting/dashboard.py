"""The W&B workspace and report of a project, from the sections in `dashboard.yaml`; W&B is imported when something is built."""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

from vlm_calibration.files import first_line
from vlm_calibration.records import DataError

PROJECT = "vlm-calibration"  # default project that runs are logged to
STEP = "trainer/global_step"  # the x axis of curves
NAME = "Calibration"
RUNS = {"training": ["sft", "dpo"], "evaluation": ["evaluation"]}
"""Runs of a section of the report -> the tags that `Artifacts` gives these runs."""
Section = dict[str, Any]


def logged_in() -> bool:
    """Whether there are credentials for W&B, in the environment or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        login = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return False
    return login is not None and bool(login[2])


def sections(systems: Sequence[str]) -> list[Section]:
    """All sections for an evaluation of some systems; DataError without a system, or for an invalid name."""
    if (invalid := [name for name in systems if not re.fullmatch(r"[\w-]+", name)]) or not systems:
        found = invalid[0] if invalid else "none"
        raise DataError(f"--systems: expected names of letters, digits, '_' and '-', found {found!r}")
    content: list[Section] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    for panel in (panel for section in content for panel in section["panels"]):
        keys = (key.replace("*", name) for key in panel["keys"] for name in systems)
        panel["keys"] = list(dict.fromkeys(keys))
    return content


def outline(sections: Sequence[Section]) -> str:
    """The sections and their panels as text."""
    lines = []
    for section in sections:
        lines += ["", f"{section['question']} ({section['runs']} runs)", f"  {section['note']}"]
        for panel in section["panels"]:
            unit = f" ({panel['unit']})" if "unit" in panel else ""
            lines.append(f"  - {panel['title']}: {panel['kind']} of {', '.join(panel['keys'])}{unit}")
    return "\n".join(lines[1:])


def build(entity: str, project: str, sections: Sequence[Section]) -> dict[str, str]:
    """Save the report, which creates the project if necessary, and the workspace; returns the URL of each, or raises a DataError."""
    import wandb

    if find_spec("wandb_workspaces") is None:
        raise DataError("wandb-workspaces is not installed: pip install 'vlm-calibration[dashboard]'")
    if not logged_in():
        raise DataError("nobody is logged in to W&B: run `wandb login`, or print the dashboard with --print")
    views = {"report": report, "workspace": workspace}
    try:
        return {name: view(entity, project, sections).save().url for name, view in views.items()}
    except (wandb.errors.Error, ValueError, TypeError, KeyError) as error:
        what = f"the dashboard of {entity}/{project}"
        raise DataError(f"W&B does not take {what}: {first_line(error)}") from error


def workspace(entity: str, project: str, sections: Sequence[Section]) -> Any:
    """Build the workspace, a `wandb_workspaces.workspaces.Workspace`."""
    import wandb_workspaces.workspaces as ws

    panels = ((s["question"], list(map(_wandb_panel, s["panels"]))) for s in sections)
    made = [ws.Section(name=question, panels=of_it, is_open=True) for question, of_it in panels]
    settings = ws.WorkspaceSettings(x_axis=STEP)
    return ws.Workspace(entity=entity, project=project, name=NAME, sections=made, settings=settings)


def report(entity: str, project: str, sections: Sequence[Section]) -> Any:
    """Build the report, a `wandb_workspaces.reports.v2.Report`: heading, note and panels of each section."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    blocks: list[Any] = [wr.TableOfContents()]
    for section in sections:
        runs = wr.Runset(name=section["runs"], filters=[ws.Tags().isin(RUNS[section["runs"]])])
        panels = []
        for panel in section["panels"]:
            is_wide = len(panel["keys"]) > 1 or panel["keys"][0].endswith(("/samples", "/comparison"))
            width, height = (8, 7) if panel["kind"] in ("curve", "bars") else (24 if is_wide else 12, 11)
            # W&B moves panels that overlap to the right, or down.
            panels.append(_wandb_panel(panel, layout=wr.Layout(w=width, h=height)))
        grid = wr.PanelGrid(runsets=[runs], panels=panels)
        blocks += [wr.H2(section["question"]), wr.P(section["note"]), grid]
    texts = {"title": NAME, "description": "Whether the confidence that the model states can be trusted."}
    return wr.Report(entity=entity, project=project, blocks=blocks, width="fluid", **texts)


def _wandb_panel(panel: dict[str, Any], **place: Any) -> Any:
    """Convert a panel to W&B's class; `place` is its layout in a report."""
    import wandb_workspaces.reports.v2 as wr

    title, keys, limits = panel["title"], panel["keys"], tuple(panel.get("range", (None, None)))
    if panel["kind"] == "curve":
        axes = {"x": STEP, "title_x": "Step", "title_y": panel.get("unit"), "range_y": limits}
        return wr.LinePlot(title=title, y=keys, **axes, **place)
    if panel["kind"] == "bars":
        return wr.BarPlot(title=title, metrics=keys, orientation="v", range_x=limits, **place)
    if panel["kind"] == "figures":
        return wr.MediaBrowser(title=title, media_keys=keys, num_columns=len(keys), **place)
    return wr.WeavePanelSummaryTable(table_name=keys[0], **place)
