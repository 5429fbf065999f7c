"""`vlm-calibration calibrate`: run the stages of a calibration, which `make` and the SLURM jobs call."""

import multiprocessing
import os
import shlex
import signal
import sys
from contextlib import suppress
from itertools import takewhile
from typing import Annotated, Any, Literal

from jsonargparse import ArgumentParser, set_parsing_settings

from vlm_calibration.arguments import Command, Forwarded, Lazy, Subcommands, command_parser, description
from vlm_calibration.cli import COMMANDS, PROG, main
from vlm_calibration.commands.settings_check import check_settings
from vlm_calibration.errors import CommandError
from vlm_calibration.presets import presets_by_folder
from vlm_calibration.records import DataError
from vlm_calibration.steps import STAGES, Plan

SETTINGS = Forwarded(
    {
        "--KEY VALUE": "setting of every stage but report, e.g. --trainer.max_steps 100",
        "--STAGE.KEY VALUE": "argument of one stage, e.g. --sft.trainer.max_steps 100 or --report.replicates 200",
    },
    lambda: f"stages: {', '.join(STAGES)}\n{presets_by_folder('sft', 'dpo')}",
    usage="[STAGE ...] [--model NAME] [--KEY VALUE ...]",
)


def calibrate(
    *arguments: Annotated[str, SETTINGS], plan: Plan, config: str | None = None, dry_run: bool = False
) -> None:
    """Run stages of a calibration, one after the other: `calibrate [STAGE ...]`; without any, all that these settings need.

    A stage that has finished with the same settings is not repeated, and one that was interrupted resumes. Without a model and data it
    is the embedded demo.

    Args:
        arguments: names of stages, then settings
        config: configuration of a single stage, instead of the stage's own
        dry_run: print stage, run directory and command of each stage, separated by tabs, and run nothing
    """
    named = [*takewhile(lambda argument: not argument.startswith("--"), arguments)]
    if unknown := [stage for stage in named if stage not in STAGES]:
        expected = f"{', '.join(STAGES)}, in any number, and then settings"
        raise DataError(f"no stage {unknown[0]!r}: expected {expected}")
    stages = [stage for stage in STAGES if stage in (named or plan.stages)]
    if config and len(stages) != 1:
        raise DataError(f"--config is for one stage, not for {', '.join(stages)}")
    further: dict[str, list[str]] = {stage: [] for stage in STAGES}
    receivers: list[str] = []
    # A setting goes to its receivers, and so do the values behind it.
    for argument in arguments[len(named) :]:
        if argument.startswith("--"):
            stage, dot, key = argument[2:].partition(".")
            is_of_stage = bool(dot) and stage in STAGES
            receivers = [stage] if is_of_stage else [stage for stage in STAGES if stage != "report"]
            argument = f"--{key}" if is_of_stage else argument
        for stage in receivers:
            further[stage].append(argument)
    if "report" in stages:
        further["evaluate"].append("--no_table")

    # Check all stages before the first one runs.
    commands = {}
    for number, stage in enumerate(stages):
        commands[stage] = plan.command(stage, *further[stage], config=config, after=stages[:number])
        if stage != "report":
            check_settings(commands[stage])
    for stage, words in commands.items():
        line = shlex.join([PROG, *words])
        if dry_run:
            print(f"{stage}\t{plan.folder(stage)}\t{line}")
            continue
        print("+", line, flush=True)
        # A single stage is this process itself, which a scheduler signals and which starts the other processes of the stage.
        if status := main(words) if len(stages) == 1 else _run_apart(words):
            raise CommandError("", status)


def _run_apart(words: list[str]) -> int:
    """Run a command in a fork of this process, whose imports it need not repeat; return its exit status."""
    import vlm_calibration.commands.lightning_cli  # noqa: F401  (shared by all stages)

    child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main(words)))
    child.start()

    def forward(number: int, frame: object) -> None:
        # A terminal interrupts both processes.
        if number != signal.SIGINT:
            os.kill(int(child.pid or 0), number)

    handlers = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    child.join()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    status = int(child.exitcode or 0)
    return 128 - status if status < 0 else status


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
