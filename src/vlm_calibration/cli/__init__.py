"""The one command, `vlm-calibration`: the table of its subcommands, and `main`, which runs one of them.

Errors that a user can act on end in one line that names the culprit; all others keep their traceback. The module of a command
is imported when the command runs, so that a command that needs neither Lightning nor a model starts at once.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

from vlm_calibration.arguments import overview, run_command
from vlm_calibration.errors import CommandError, did_you_mean, one_line
from vlm_calibration.quiet import quiet_libraries
from vlm_calibration.records import DataError

PROG = "vlm-calibration"
COMMANDS: dict[str, tuple[str, str]] = {
    "fit": ("commands.trainer:fit", "train: SFT or preference optimisation"),
    "validate": ("commands.trainer:validate", "answer and score the validation queries"),
    "test": ("commands.trainer:test", "evaluate the base model and adapters side by side"),
    "predict": ("commands.trainer:predict", "find the regions of key objects"),
    "levels": ("commands.trainer:LEVELS", "`levels fit`: measure the level table of anchored levels"),
    "calibrate": (
        "cli.calibrate:calibrate",
        "all stages, or some, of a calibration: regions, levels, sft, dpo, evaluate, report",
    ),
    "score": ("commands.score:SUBCOMMANDS", "a file of answers: POPE, AMBER or predictions"),
    "runs": ("commands.runs:runs", "the runs in a folder: stage, state, key figures, how to go on"),
    "report": ("commands.report:report", "a page on whether confidence can be trusted"),
    "threshold": ("commands.threshold:threshold", "the confidence from which on to answer, with a guarantee"),
    "monitor": (
        "commands.monitor:monitor",
        "are the confidences of new, ungraded answers still those of an evaluation?",
    ),
    "app": ("commands.app:app", "a web page to try the models in, on this machine"),
    "ask": ("commands.ask:ask", "one question about an image, or many from a file"),
    "export": ("commands.export:export", "an adapter with its card, or merged into its base"),
    "dashboard": ("commands.dashboard:dashboard", "a workspace and a report in W&B, as code"),
    "data": (
        "commands.data:SUBCOMMANDS",
        "`data inspect`: what sources hold and share; `convert`: published formats; `split`: one file into four; `fetch`: POPE and AMBER",
    ),
    "config": (
        "commands.config:SUBCOMMANDS",
        "`config list|show|copy`: the presets that --config takes by name",
    ),
    "estimate-memory": (
        "commands.estimate_memory:estimate",
        "GPU memory that stages take, by arithmetic and measured",
    ),
    "completion": (
        "cli.completion:completion",
        "a script that completes commands and settings in bash or zsh",
    ),
}
"""Name of a command -> its `arguments.Command` as module:name, and its description."""
FOOT = f"`{PROG} COMMAND --help` lists the settings of a command, `{PROG} --version` prints the version."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 1 for an error in the data, 2 for an error in the call, 3 if `threshold` finds none or `monitor` finds
            drift, 4 if `ask --abstain` does not answer, 130 or 143 if the run was stopped, 141 if nobody reads its output any more.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        rows = {name: text for name, (_, text) in COMMANDS.items()}
        print(overview(f"{PROG} COMMAND [--config FILE ...] [--KEY VALUE ...]", FOOT, rows))
        return 0 if args else 2
    name, *rest = args
    if name == "--version":
        print(f"{PROG} {version(PROG)}")
        return 0
    if name not in COMMANDS:
        suggestion = did_you_mean(name, COMMANDS)
        return _fail(f"unknown command {name!r}{suggestion}: expected one of {', '.join(COMMANDS)}", 2)
    quiet_libraries()
    # Threads that wait for each other sleep: spinning ones starve data workers and whatever else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        run_command(f"{PROG} {name}", load(COMMANDS[name][0]), rest)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output, such as `head`, has ended. Python writes the rest at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
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


def load(target: str) -> Any:
    """Import what a target of `COMMANDS` names."""
    module, _, name = target.partition(":")
    return getattr(import_module(f"vlm_calibration.{module}"), name)


def _fail(message: str, status: int) -> int:
    if message:
        print(f"{PROG}: error: {message}", file=sys.stderr)
    return status
