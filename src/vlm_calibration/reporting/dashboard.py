"""`vlm-calibration dashboard`: what a W&B workspace and report of a project show, by the questions that people bring to them.

Here is what is shown, in words of our own; `dashboard_wandb` says it to W&B.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jsonargparse import ArgumentError, ArgumentParser

from vlm_calibration.arguments import explained_errors
from vlm_calibration.callbacks.login import PROJECT
from vlm_calibration.records import DataError
from vlm_calibration.reporting.tables import COLUMNS

STEP = "trainer/global_step"
"""What curves are drawn over."""
SYSTEMS = ("base", "sft", "dpo")
COMPARED = ("accuracy", "ece", "brier", "auroc", "mean_confidence", "overconfidence")
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


def sections(systems: Sequence[str] = SYSTEMS) -> list[Section]:
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

    bars = [Panel(COLUMNS[name][0], "bars", of_each(name), range=_range(name)) for name in COMPARED]
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
    """Overconfidence is signed; all others are shown from 0, so that bars can be compared."""
    return (None, None) if metric == "overconfidence" else (0.0, None)


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


def dashboard_parser() -> ArgumentParser:
    """The parser of `dashboard`."""
    parser = ArgumentParser(prog="vlm-calibration dashboard", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--entity", type=str, help="team or user that has the project (required)")
    parser.add_argument("--project", type=str, default=PROJECT, help="where runs are logged")
    parser.add_argument(
        "--systems",
        nargs="+",
        type=str,
        default=list(SYSTEMS),
        help="names that the evaluation knows its systems by",
    )
    parser.add_argument(
        "--print", action="store_true", help="print the specification as JSON; nothing is built"
    )
    return parser


def dashboard_command(args: Sequence[str]) -> None:
    """`dashboard`: build the workspace and the report of a project, or print what they would be.

    Raises:
        ArgumentError: a setting is missing or unknown.
        DataError: `wandb-workspaces` is not installed, nobody is logged in, or the server refuses.
    """
    with explained_errors(parser := dashboard_parser()):
        settings = parser.parse_args(list(args))
    if not settings.entity:
        raise ArgumentError(None, "give the team or user that has the project: --entity NAME")
    shown = sections(settings.systems)
    try:
        from vlm_calibration.reporting.dashboard_wandb import build, specification
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("wandb_workspaces"):
            raise
        raise DataError(
            "wandb-workspaces is not installed: pip install 'vlm-calibration[dashboard]'"
        ) from error
    if settings.print:
        print(specification(settings.entity, settings.project, shown))
        return
    for what, url in build(settings.entity, settings.project, shown).items():
        print(f"{what}: {url}")
