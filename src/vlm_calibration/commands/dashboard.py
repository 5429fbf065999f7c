"""`vlm-calibration dashboard`: build the W&B workspace and report of a project, or print their specification."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentError, ArgumentParser

from vlm_calibration.arguments import explained_errors
from vlm_calibration.records import DataError
from vlm_calibration.reporting.wandb_login import PROJECT

SYSTEMS = ("base", "sft", "dpo")


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
    try:
        from vlm_calibration.reporting.dashboard import build, sections, specification
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("wandb_workspaces"):
            raise
        raise DataError(
            "wandb-workspaces is not installed: pip install 'vlm-calibration[dashboard]'"
        ) from error
    shown = sections(settings.systems)
    if settings.print:
        print(specification(settings.entity, settings.project, shown))
        return
    for what, url in build(settings.entity, settings.project, shown).items():
        print(f"{what}: {url}")
