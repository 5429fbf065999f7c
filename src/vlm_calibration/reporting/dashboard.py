"""The W&B workspace and report of a project: their sections and panels, ordered by the question that each answers."""

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
"""What curves are drawn over."""
COMPARED = ("accuracy", "ece", "brier", "auroc", "mean_confidence", "overconfidence")
NAME = "Calibration"
RUNS = {"training": ["sft", "dpo"], "evaluation": ["evaluation"]}
"""Which runs answer a section of the report, by the tags that `Artifacts` gives them."""
GRID_COLUMNS, THIRD, HALF = 24, 8, 12
"""Width of a report, and of panels in it."""
Kind = Literal["curve", "bars", "figures", "table"]


@dataclass(frozen=True)
class Panel:
    """One panel.

    Args:
        title: what it shows.
        keys: what was logged: metrics ("curve" over steps, "bars" of the last values), images ("figures"), one "table".
        unit: of the numbers, as the label of their axis.
        range: the least and the highest value that they can have, where a panel should show all of that.
    """

    title: str
    kind: Kind
    keys: tuple[str, ...]
    unit: str | None = None
    range: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Section:
    """A question, what to look for in the panels below it, and which runs answer it."""

    question: str
    note: str
    panels: tuple[Panel, ...]
    runs: Literal["training", "evaluation"] = "training"


def curve(
    title: str, *keys: str, unit: str | None = None, low: float | None = None, high: float | None = None
) -> Panel:
    """Metrics over the steps of training."""
    return Panel(title, "curve", keys, unit, (low, high))


def sections(systems: Sequence[str]) -> list[Section]:
    """All sections, for an evaluation of these systems.

    Raises:
        DataError: a name that no system can have, or none.
    """
    bad = [name for name in systems if not re.fullmatch(r"[\w-]+", name)]
    if bad or not systems:
        raise DataError(
            f"--systems: expected names of letters, digits, '_' and '-', found {bad[0] if bad else 'none'!r}"
        )
    return [_comparison(systems), *_answers(), *_training()]


def _comparison(systems: Sequence[str]) -> Section:
    def of_each(name: str) -> tuple[str, ...]:
        return tuple(f"test/{system}/{name}" for system in systems)

    bars = [Panel(column(name)[0], "bars", of_each(name), range=_range(name)) for name in COMPARED]
    return Section(
        f"Did it pay? {', '.join(systems)} side by side",
        "All systems answer the same images. Training pays if ECE and Brier fall, AUROC does not, and accuracy stays.",
        (
            Panel("Comparison", "table", ("test/comparison",)),
            *bars,
            Panel("Reliability of each system", "figures", of_each("reliability")),
            Panel("Response of each system to noise", "figures", of_each("response_curve")),
            Panel("Risk and coverage of each system", "figures", of_each("risk_coverage")),
            Panel("The same questions, answered by each system", "table", ("test/samples",)),
        ),
        "evaluation",
    )


def _range(metric: str) -> tuple[float | None, float | None]:
    """The range of an axis: metrics that are not signed are shown from 0, so that bars can be compared."""
    return (None, None) if ALL_METRICS[metric].lower < 0 else (0.0, None)


def _answers() -> list[Section]:
    """What validations say about the model's answers and confidence."""
    return [
        Section(
            "Is the stated confidence honest?",
            "Lower is better for calibration errors and scores. Overconfidence is mean confidence minus accuracy: above 0 the "
            "model is too sure, below 0 too modest.",
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
            "Where is it too sure, and where too modest?",
            "Points below the diagonal are too sure, points above it too modest.",
            (
                Panel("Reliability", "figures", ("val/reliability",)),
                Panel("Answers at each stated confidence", "table", ("val/confidence_table",)),
            ),
        ),
        Section(
            "Does confidence fall with the evidence?",
            "The more noise on the key object, the less a model can know: the two curves should fall together.",
            (
                Panel("Response to noise", "figures", ("val/response_curve",)),
                Panel("Accuracy and confidence at each noise step", "table", ("val/response_table",)),
            ),
        ),
        Section(
            "Does it know which of its answers are right?",
            "AUROC is the chance that a right answer states more confidence than a wrong one; 0.5 is guessing.",
            (
                curve("AUROC", "val/auroc", unit="probability"),
                curve("Area under risk and coverage", "val/aurc", unit="error rate in [0, 1]", low=0),
                Panel("Risk and coverage", "figures", ("val/risk_coverage",)),
            ),
        ),
        Section(
            "What does it say?",
            "The same questions at every validation, each with the image as the model saw it.",
            (Panel("Answers", "table", ("val/samples",)),),
        ),
    ]


def _training() -> list[Section]:
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
            "Is the machine used well?",
            "A share of waiting above a few percent asks for more data workers.",
            (
                curve("Samples", "train/samples_per_second", unit="a second", low=0),
                curve("Tokens", "train/tokens_per_second", unit="a second", low=0),
                curve("Waiting for data", "train/data_wait", unit="share of the time", low=0, high=1),
                curve("Most memory held", "memory/peak_gib", unit="GiB", low=0),
                curve("Samples left out", "train/skipped", unit="samples", low=0),
            ),
        ),
    ]


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
        if x + width > GRID_COLUMNS:
            x, y, height = 0, y + height, 0
        placed.append(wandb_panel(panel, wr.Layout(x=x, y=y, w=width, h=tall)))
        x, height = x + width, max(height, tall)
    return placed


def _size(panel: Panel) -> tuple[int, int]:
    if panel.kind in ("curve", "bars"):
        return THIRD, 7
    wide = panel.kind == "table" and panel.keys[0].rsplit("/", 1)[-1] in ("samples", "comparison")
    return (GRID_COLUMNS if wide or len(panel.keys) > 1 else HALF), 11


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
        raise DataError(
            f"W&B does not take the dashboard of {entity}/{project}: {first_line(error)}"
        ) from error
