"""The W&B workspace and report of a project; each of their sections answers a question."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from vlm_calibration.files import first_line
from vlm_calibration.metrics.summary import ALL_METRICS
from vlm_calibration.records import DataError
from vlm_calibration.reporting.tables import column
from vlm_calibration.reporting.wandb_login import logged_in

STEP = "trainer/global_step"
"""The x axis of curves."""
COMPARED = ("accuracy", "ece", "brier", "auroc", "mean_confidence", "overconfidence")
NAME = "Calibration"
RUNS = {"training": ["sft", "dpo"], "evaluation": ["evaluation"]}
"""Runs of a section of the report -> the tags that `Artifacts` gives these runs."""
GRID_COLUMNS, THIRD, HALF = 24, 8, 12
"""Width of a report and of its panels."""
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
    keys: tuple[str, ...]
    unit: str | None = None
    range: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Section:
    """A section of the workspace and the report.

    Attributes:
        question: heading.
        note: what to look for in the panels.
        panels: the panels.
        runs: which runs the report shows in it.
    """

    question: str
    note: str
    panels: tuple[Panel, ...]
    runs: Literal["training", "evaluation"] = "training"


def curve(
    title: str, *keys: str, unit: str | None = None, low: float | None = None, high: float | None = None
) -> Panel:
    """A panel of metrics over the steps of training."""
    return Panel(title, "curve", keys, unit, (low, high))


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
    return [_comparison_section(systems), *_validation_sections(), *_training_sections()]


def _comparison_section(systems: Sequence[str]) -> Section:
    def keys(name: str) -> tuple[str, ...]:
        return tuple(f"test/{system}/{name}" for system in systems)

    bars = [Panel(column(name)[0], "bars", keys(name), range=_range(name)) for name in COMPARED]
    return Section(
        f"Did training help? {', '.join(systems)} side by side",
        "All systems answer the same questions. Training helped if ECE and Brier fall while AUROC and accuracy do not.",
        (
            Panel("Comparison", "table", ("test/comparison",)),
            *bars,
            Panel("Reliability of each system", "figures", keys("reliability")),
            Panel("Response of each system to perturbation", "figures", keys("response_curve")),
            Panel("Risk and coverage of each system", "figures", keys("risk_coverage")),
            Panel("The same questions, answered by each system", "table", ("test/samples",)),
        ),
        "evaluation",
    )


def _range(metric: str) -> tuple[float | None, float | None]:
    """The range of an axis: metrics that are not signed are shown from 0, so that bars can be compared."""
    return (None, None) if ALL_METRICS[metric].lower < 0 else (0.0, None)


def _validation_sections() -> list[Section]:
    """Sections on the answers and confidences in validation."""
    return [
        Section(
            "Is the stated confidence honest?",
            "Lower is better for calibration errors and scores. Overconfidence is mean confidence minus accuracy: above 0 the "
            "model is overconfident, below 0 underconfident.",
            (
                curve("Calibration error", "val/ece", "val/smooth_ece", unit="error in [0, 1]", low=0),
                curve("Brier score", "val/brier", unit="squared error in [0, 1]", low=0),
                curve("Overconfidence", "val/overconfidence", unit="confidence - accuracy"),
                curve(
                    "Mean confidence and accuracy",
                    "val/mean_confidence",
                    "val/accuracy",
                    unit="share",
                    low=0,
                    high=1,
                ),
                curve(
                    "Answers without a readable confidence",
                    "val/parse_failure_rate",
                    unit="share",
                    low=0,
                    high=1,
                ),
            ),
        ),
        Section(
            "Where is the model overconfident, and where underconfident?",
            "Points below the diagonal are overconfident, points above it underconfident.",
            (
                Panel("Reliability", "figures", ("val/reliability",)),
                Panel("Answers at each stated confidence", "table", ("val/confidence_table",)),
            ),
        ),
        Section(
            "Does confidence fall with the evidence?",
            "A stronger perturbation of the key object leaves less evidence: the two curves of each kind should fall together.",
            (
                Panel("Response to perturbation", "figures", ("val/response_curve",)),
                Panel("Accuracy and confidence by kind and strength", "table", ("val/response_table",)),
            ),
        ),
        Section(
            "Does confidence separate correct answers from wrong ones?",
            "AUROC is the probability that a correct answer states more confidence than a wrong one; 0.5 is chance.",
            (
                curve("AUROC", "val/auroc", unit="probability"),
                curve("Area under risk and coverage", "val/aurc", unit="error rate in [0, 1]", low=0),
                Panel("Risk and coverage", "figures", ("val/risk_coverage",)),
            ),
        ),
        Section(
            "How does the model answer?",
            "The same questions at every validation, each with the image as the model saw it.",
            (Panel("Answers", "table", ("val/samples",)),),
        ),
    ]


def _training_sections() -> list[Section]:
    return [
        Section(
            "Is training sound?",
            "Rewards are those of preference optimisation. A margin that grows while the answer's log-likelihood collapses "
            "is not progress.",
            (
                curve("Loss", "train/loss", unit="nats"),
                curve("Loss of a token", "train/nll_confidence", "train/nll_answer", unit="nats", low=0),
                curve("Reward margin", "train/reward_margin", "val/reward_margin", unit="nats"),
                curve(
                    "Reward accuracy",
                    "train/reward_accuracy",
                    "val/reward_accuracy",
                    unit="share",
                    low=0,
                    high=1,
                ),
                curve(
                    "Log-likelihoods",
                    *("train/logp_chosen", "train/logp_rejected", "train/logp_answer"),
                    unit="nats",
                ),
                curve("Distance from the reference", "val/kl", unit="KL divergence, nats", low=0),
                curve("Learning rate", "train/learning_rate", low=0),
                curve("Norm of the gradients, before clipping", "train/grad_norm", low=0),
            ),
        ),
        Section(
            "Is the hardware used well?",
            "If waiting takes more than a few percent of the time, use more data workers.",
            (
                curve("Samples", "train/samples_per_second", unit="a second", low=0),
                curve("Tokens", "train/tokens_per_second", unit="a second", low=0),
                curve("Waiting for data", "train/data_wait", unit="share of the time", low=0, high=1),
                curve("Peak memory", "memory/peak_gib", unit="GiB", low=0),
                curve("Samples left out", "train/skipped", "train/cut_off", unit="samples", low=0),
            ),
        ),
    ]


def workspace(entity: str, project: str, sections: Sequence[Section]) -> ws.Workspace:
    """Build the workspace."""
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
    """Build the report: heading, note and panels of each section."""
    blocks: list[Any] = [wr.TableOfContents()]
    for section in sections:
        blocks += [
            wr.H2(section.question),
            wr.P(section.note),
            wr.PanelGrid(
                runsets=[wr.Runset(name=section.runs, filters=[ws.Tags().isin(RUNS[section.runs])])],
                panels=_arrange(section.panels),
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
    """Convert a panel to W&B's class."""
    position = {} if layout is None else {"layout": layout}
    if panel.kind == "curve":
        return wr.LinePlot(
            title=panel.title,
            x=STEP,
            y=list(panel.keys),
            range_y=panel.range,
            title_x="Step",
            title_y=panel.unit,
            **position,
        )
    if panel.kind == "bars":
        return wr.BarPlot(
            title=panel.title, metrics=list(panel.keys), orientation="v", range_x=panel.range, **position
        )
    if panel.kind == "figures":
        return wr.MediaBrowser(
            title=panel.title, media_keys=list(panel.keys), num_columns=len(panel.keys), **position
        )
    [key] = panel.keys
    return wr.WeavePanelSummaryTable(table_name=key, **position)


def _arrange(panels: Sequence[Panel]) -> list[Any]:
    """Arrange panels from left to right and top to bottom; wide tables and several figures take a whole row."""
    arranged, x, y, row_height = [], 0, 0, 0
    for panel in panels:
        width, height = _size(panel)
        if x + width > GRID_COLUMNS:
            x, y, row_height = 0, y + row_height, 0
        arranged.append(wandb_panel(panel, wr.Layout(x=x, y=y, w=width, h=height)))
        x, row_height = x + width, max(row_height, height)
    return arranged


def _size(panel: Panel) -> tuple[int, int]:
    if panel.kind in ("curve", "bars"):
        return THIRD, 7
    wide = panel.kind == "table" and panel.keys[0].rsplit("/", 1)[-1] in ("samples", "comparison")
    return (GRID_COLUMNS if wide or len(panel.keys) > 1 else HALF), 11


def outline(sections: Sequence[Section]) -> str:
    """The sections as text: the runs of each, its note, and the kind, the logged keys and the unit of each panel."""
    lines = []
    for section in sections:
        lines += [f"{section.question} ({section.runs} runs)", f"  {section.note}"]
        for panel in section.panels:
            unit = f" ({panel.unit})" if panel.unit else ""
            lines.append(f"  - {panel.title}: {panel.kind} of {', '.join(panel.keys)}{unit}")
        lines.append("")
    return "\n".join(lines[:-1])


def specification(entity: str, project: str, sections: Sequence[Section]) -> str:
    """The workspace and report as JSON, as they would be sent to the server; needs no network."""
    models = {
        "workspace": workspace(entity, project, sections)._to_model(),
        "report": report(entity, project, sections)._to_model(),
    }
    content = {
        name: json.loads(model.model_dump_json(by_alias=True, exclude_none=True))
        for name, model in models.items()
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


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
