"""`vlm-calibration completion`: a script for bash or zsh that completes commands, settings and file names.

It is not in `commands` because it reads the table of all commands.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from vlm_calibration.arguments import command_parser
from vlm_calibration.cli import COMMANDS, PROG, load


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Print a script that completes commands, settings and file names.

    For bash save it as ~/.local/share/bash-completion/completions/vlm-calibration, for zsh as _vlm-calibration in a folder of
    $fpath.

    Args:
        shell: shell of the script
    """
    import shtab

    print(shtab.complete(all_commands(), shell))


def all_commands() -> argparse.ArgumentParser:
    """Build one parser with all commands and their settings, for completion only."""
    from vlm_calibration.commands.all_settings import STAGES, stage_parsers, trainer_parsers

    parser = argparse.ArgumentParser(PROG)
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    of_trainer = trainer_parsers()
    for name, (target, text) in COMMANDS.items():
        sources = [command_parser(f"{PROG} {name}", load(target))]
        if name in STAGES:
            sources += [of_trainer[name], *stage_parsers(name)]
        command = commands.add_parser(name, help=text, add_help=False)
        for source in sources:
            _copy(source._actions, command)
    return parser


def _copy(actions: Iterable[argparse.Action], parser: argparse.ArgumentParser) -> None:
    """Add the names and choices of actions to another parser."""
    import shtab

    for action in actions:
        if isinstance(action, argparse._SubParsersAction):
            commands = parser.add_subparsers()
            for name, source in action.choices.items():
                # shtab hides a command without a help text.
                command = commands.add_parser(name, help=_first_sentence(source.description), add_help=False)
                _copy(source._actions, command)
            continue
        names = [name for name in action.option_strings if name not in parser._option_string_actions]
        if (action.option_strings and not names) or action.help == argparse.SUPPRESS:
            continue
        hint = getattr(action, "_typehint", None)
        choices = get_args(hint) if get_origin(hint) is Literal else action.choices
        is_flag = bool(names) and action.nargs == 0
        settings: dict[str, Any] = {"action": "store_true"} if is_flag else {"choices": choices}
        if not names and action.nargs is not None:
            settings["nargs"] = action.nargs
        added = parser.add_argument(*(names or [action.dest]), help=_first_sentence(action.help), **settings)
        if not is_flag and choices is None:
            added.complete = shtab.FILE  # type: ignore[attr-defined]


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").split()).split(". ")[0].replace("%%", "%").replace("%", "%%")
