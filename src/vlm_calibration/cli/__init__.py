"""The one command, `vlm-calibration`: LightningCLI's subcommands, and those that need no trainer of the user's.

Errors that a user can act on end in one line that names the culprit; all others keep their traceback. A command's module
is imported when the command is run, so that one that needs neither Lightning nor a model starts at once.
"""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

from vlm_calibration.arguments import did_you_mean
from vlm_calibration.cli.errors import CommandError, one_line
from vlm_calibration.records import DataError

LIGHTNING = "vlm_calibration.cli.lightning_cli"
TRAINER = f"{LIGHTNING}:lightning_command"
COMMANDS: dict[str, tuple[str, str]] = {
    "fit": (TRAINER, "train: SFT or preference optimisation"),
    "validate": (TRAINER, "answer and score the validation queries"),
    "test": (TRAINER, "evaluate the base model and adapters side by side"),
    "predict": (TRAINER, "run a module's prediction over the data"),
    "levels": (
        "vlm_calibration.cli.configured:levels_command",
        "`levels fit`: measure what anchored levels teach",
    ),
    "score": (
        "vlm_calibration.commands.score:score_command",
        "a file of answers: POPE, AMBER or predictions",
    ),
    "report": (
        "vlm_calibration.commands.report:report_command",
        "a page on whether confidence can be trusted",
    ),
    "app": ("vlm_calibration.commands.app:app_command", "a web page to try the models in, on this machine"),
    "ask": ("vlm_calibration.commands.ask:ask_command", "one question about an image, or many from a file"),
    "export": (
        "vlm_calibration.commands.export:export_command",
        "an adapter with its card, or merged into its base",
    ),
    "dashboard": (
        "vlm_calibration.commands.dashboard:dashboard_command",
        "a workspace and a report in W&B, as code",
    ),
    "data": (
        "vlm_calibration.cli.configured:data_command",
        "`data inspect`: what is in the sources of a configuration",
    ),
    "estimate-memory": (
        "vlm_calibration.cli.configured:estimate_command",
        "the memory that `fit` takes with the same settings [--tokens N]",
    ),
    "completion": (
        "vlm_calibration.cli.completion:completion_command",
        "a script that completes commands and settings in bash or zsh",
    ),
}
"""Name of a command -> the function that runs it, as module:function, and what it does. It is called with the arguments
behind the name; LightningCLI reads the name as well."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    head = "usage: vlm-calibration COMMAND [--config FILE ...] [--KEY VALUE ...]"
    foot = "`vlm-calibration COMMAND --help` lists the settings of a command, `vlm-calibration --version` says which this is."
    return "\n".join([head, "", *lines, "", foot])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for an error in the data, 2 for one in the call, 130 or 143 if stopped."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"vlm-calibration {version('vlm-calibration')}")
        return 0
    if args[0] not in COMMANDS:
        near = did_you_mean(args[0], COMMANDS)
        return _fail(f"unknown command {args[0]!r}{near}: expected one of {', '.join(COMMANDS)}", 2)
    # It says at every start that it found no kernels for 4-bit weights on the CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    target, _ = COMMANDS[args[0]]
    try:
        _function(target)(args if target == TRAINER else args[1:])
    except ArgumentError as error:
        return _fail(one_line(error), 2)
    except DataError as error:
        if os.environ.get("VLM_CALIBRATION_TRACEBACK"):
            raise
        return _fail(one_line(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except CommandError as end:
        return _fail(end.message, end.status)
    return 0


def _function(target: str) -> Callable[[Sequence[str]], Any]:
    module, _, name = target.partition(":")
    function: Callable[[Sequence[str]], Any] = getattr(import_module(module), name)
    return function


def _fail(message: str, status: int) -> int:
    if message:
        print(f"vlm-calibration: error: {message}", file=sys.stderr)
    return status
