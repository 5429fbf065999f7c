"""`vlm-calibration completion`: a script with which bash or zsh complete commands, settings and file names."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

from vlm_calibration.arguments import Parser, explained_errors
from vlm_calibration.cli import COMMANDS, TRAINER

STAGES = (
    "vlm_calibration.stages.sft:SFTModule",
    "vlm_calibration.stages.dpo:DPOModule",
    "vlm_calibration.stages.evaluation:EvaluationModule",
    "vlm_calibration.stages.level_fit:LevelFitModule",
    "vlm_calibration.stages.regions:RegionExtractor",
)


def completion_parser() -> Parser:
    """The parser of `completion`."""
    parser = Parser(
        "vlm-calibration completion",
        description="Print a script that completes commands, settings and file names. For bash put it into "
        "~/.local/share/bash-completion/completions/vlm-calibration, for zsh into a file _vlm-calibration in a folder of "
        "$fpath.",
    )
    parser.add_argument("shell", choices=["bash", "zsh"])
    return parser


def completion_command(args: Sequence[str]) -> None:
    """`completion bash` and `completion zsh`.

    Raises:
        ArgumentError: another shell.
    """
    with explained_errors(parser := completion_parser()):
        found = parser.parse_args(args)
    import shtab

    print(shtab.complete(all_commands(), found.shell))


def all_commands() -> argparse.ArgumentParser:
    """One parser with all commands and their settings; it parses nothing."""
    parser = argparse.ArgumentParser("vlm-calibration")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    trainer = _trainer_parsers()
    for name, (target, text) in COMMANDS.items():
        module = import_module(target.partition(":")[0])
        own = trainer[name] if target == TRAINER else getattr(module, f"{name}_parser")()
        made = commands.add_parser(name, help=text, add_help=False)
        _copy(own._actions, made)
        if target == TRAINER:
            _add_stages(made)
    return parser


def _trainer_parsers() -> Mapping[str, argparse.ArgumentParser]:
    """LightningCLI's parser of each of its subcommands."""
    from vlm_calibration.cli.lightning_cli import CalibrationCLI

    class BuiltError(Exception):
        pass

    class Building(CalibrationCLI):
        def parse_arguments(self, *_: Any) -> None:
            raise BuiltError(self._subcommand_parsers)

    try:
        Building()
    except BuiltError as built:
        parsers: Mapping[str, argparse.ArgumentParser] = built.args[0]
    return parsers


def _add_stages(parser: argparse.ArgumentParser) -> None:
    """Add the settings of all modules that a configuration may choose."""
    from jsonargparse import ArgumentParser

    for stage in STAGES:
        module, _, name = stage.partition(":")
        own = ArgumentParser(exit_on_error=False)
        own.add_class_arguments(getattr(import_module(module), name), "model.init_args")
        _copy(own._actions, parser)


def _copy(actions: Iterable[argparse.Action], parser: argparse.ArgumentParser) -> None:
    """Add what can be typed of these actions, without what they do."""
    import shtab

    for action in actions:
        if isinstance(action, argparse._SubParsersAction):
            commands = parser.add_subparsers()
            for name, own in action.choices.items():
                # shtab takes a command without a help for a hidden one.
                _copy(
                    own._actions, commands.add_parser(name, help=_one_line(own.description), add_help=False)
                )
            continue
        names = [name for name in action.option_strings if name not in parser._option_string_actions]
        if not names and action.option_strings:
            continue
        flag = bool(names) and action.nargs == 0
        settings: dict[str, Any] = {"action": "store_true"} if flag else {"choices": action.choices}
        if not names and action.nargs is not None:
            settings["nargs"] = action.nargs
        made = parser.add_argument(*(names or [action.dest]), help=_one_line(action.help), **settings)
        if not flag and action.choices is None:
            made.complete = shtab.FILE  # type: ignore[attr-defined]


def _one_line(text: str | None) -> str:
    return (
        ""
        if text in (None, argparse.SUPPRESS)
        else " ".join(str(text).split()).split(". ")[0].replace("%", "%%")
    )
