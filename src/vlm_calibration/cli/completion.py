"""`vlm-calibration completion`: a script for bash or zsh that completes commands and settings."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal

from jsonargparse import ArgumentParser, set_parsing_settings

from vlm_calibration.arguments import Command, Lazy, Subcommands, command_parser, description
from vlm_calibration.cli import COMMANDS, PROG


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Print a script that completes commands and settings.

    For bash save it as ~/.local/share/bash-completion/completions/vlm-calibration, for zsh as _vlm-calibration in a folder of
    $fpath.

    Args:
        shell: shell of the script
    """
    from vlm_calibration.commands.lightning_cli import CalibrationCLI

    class AllCommands(CalibrationCLI):
        """LightningCLI's subcommands and the others in one parser, which prints its completion and exits."""

        def parse_arguments(self, parser: Any, args: Any) -> None:
            for name, command in COMMANDS.commands.items():
                if name not in self._subcommand_parsers:
                    _add_command(parser._subcommands_action, name, command)
            parser.parse_args(["--print_completion", f"shtab-{shell}"])

    set_parsing_settings(add_print_completion_argument=True)
    with suppress(SystemExit):
        AllCommands()


def _add_command(group: Any, name: str, command: Command) -> None:
    """Add a command, and then its subcommands, to a group of them."""
    text = description(command).split(". ")[0]
    command = command.load() if isinstance(command, Lazy) else command
    if not isinstance(command, Subcommands):
        group.add_subcommand(name, command_parser(f"{PROG} {name}", command), help=text)
        return
    # jsonargparse wants a parser to be added before its own subcommands are.
    parser = ArgumentParser(exit_on_error=False)
    group.add_subcommand(name, parser, help=text)
    inner = parser.add_subcommands()
    for subcommand, function in command.commands.items():
        _add_command(inner, subcommand, function)
